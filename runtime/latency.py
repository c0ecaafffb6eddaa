"""How long a run takes, measured so that a comparison holds on a machine that is not quiet.

The candidates take turns, so that a slow second of the machine hits all of them, and only the last run of a turn
counts: the first finds the processor's caches full of what another engine left there, which is never so on a device
with one engine. The order changes from round to round. Compare two candidates by the ratios within the rounds
(`paired_ratio`), not by two medians.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ParityError
from .intervals import binomial_half_cdf

__all__ = [
    "Latency",
    "PairedRatio",
    "interleaved_samples",
    "measure_interleaved",
    "median_interval",
    "paired_ratio",
    "warm_up",
]

K = TypeVar("K", bound=Hashable)
Clock = Callable[[], int]
"""Nanoseconds from any origin, never backwards."""

NANOSECONDS = 1e9
WARMUP_WINDOW = 5  # runs per median: one outlier does not move it
WARMUP_TOLERANCE = 0.05  # stable: the median of a window is within 5 % of the window before it
WARMUP_MAX_RUNS = 50
WARMUP_SHARE = 0.5  # of the budget, all candidates together: slow ones must leave time to measure
REFILL_RUNS, REFILL_MS = 2, 3.0
"""A turn's untimed runs: as many, or fewer if they have taken that long. EfficientNet-B0 at 64×64 in INT8 takes 1.47 ms
behind another engine, 1.45 after one such run and 1.32 after two; in a loop of its own 1.3."""

QUANTILES = tuple(range(0, 101, 5))  # per cent


@dataclass(frozen=True)
class Latency:
    """Distribution of the time of one run.

    * batch: images per run; threads: of the backend; runs: how many were timed
    * p50, p90, p99: quantiles in milliseconds, linear between order statistics (numpy's default)
    * cv: coefficient of variation, standard deviation / mean; above 0.025 the machine was not quiet
    * p50_ci95: interval of the median from order statistics, in milliseconds; empty where it was not kept
    * quantiles: in milliseconds, from the fastest run to the slowest in steps of 5 %; empty where they were not kept
    """

    batch: int
    threads: int
    runs: int
    p50: float
    p90: float
    p99: float
    cv: float
    p50_ci95: tuple[float, ...] = ()
    quantiles: tuple[float, ...] = ()

    @classmethod
    def of(cls, milliseconds: ArrayLike, *, batch: int, threads: int) -> Latency:
        """Summary of timed runs, `[runs]` in milliseconds. Raises `ValueError` if there are none."""
        samples = np.asarray(milliseconds, np.float64)
        if samples.ndim != 1 or samples.size == 0:
            raise ValueError(f"samples of shape {list(samples.shape)} have no quantiles, expected [runs], one or more")
        p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)))
        mean = float(samples.mean())
        cv = float(samples.std(ddof=1)) / mean if samples.size > 1 and mean > 0 else 0.0
        quantiles = tuple(float(value) for value in np.percentile(samples, QUANTILES))
        return cls(batch, threads, samples.size, p50, p90, p99, cv, median_interval(samples)[:2], quantiles)

    def to_json(self) -> dict[str, Any]:
        """The contract's "latency_ms" and more, plain values, for `from_json`."""
        return asdict(self) | {"p50_ci95": list(self.p50_ci95), "quantiles": list(self.quantiles)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Latency:
        """The inverse of `to_json`; fields that a later version added are ignored, the last two may be missing."""
        values: dict[str, Any] = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        for name in ("p50_ci95", "quantiles"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


@dataclass(frozen=True)
class PairedRatio:
    """Median over the rounds of time a / time b, and an interval of it from order statistics.

    * median: above 1 if a is slower
    * low, high: contain the true median with probability `confidence`, whatever the distribution, if rounds are
      independent of each other
    * confidence: at least 0.95 from six rounds on; with fewer the interval is the whole range, and less is said
    """

    median: float
    low: float
    high: float
    confidence: float
    rounds: int


def measure_interleaved(
    runs: Mapping[K, Callable[[], object]],
    *,
    batch: int,
    threads: int,
    budget_seconds: float,
    min_runs: int,
    max_runs: int,
    clock: Clock = time.perf_counter_ns,
) -> dict[K, Latency]:
    """Latency of each candidate from `interleaved_samples`; `batch` and `threads` are only noted in the result."""
    samples = interleaved_samples(
        runs, budget_seconds=budget_seconds, min_runs=min_runs, max_runs=max_runs, clock=clock
    )
    return {key: Latency.of(times, batch=batch, threads=threads) for key, times in samples.items()}


def interleaved_samples(
    runs: Mapping[K, Callable[[], object]],
    *,
    budget_seconds: float,
    min_runs: int,
    max_runs: int,
    clock: Clock = time.perf_counter_ns,
) -> dict[K, NDArray[np.float64]]:
    """Milliseconds of each candidate, float64 `[rounds]`; element i of all was timed in round i, for `paired_ratio`.

    Each candidate is warmed up, then rounds follow until `budget_seconds` have passed in them (warm-up, at most half as
    long again, apart), but `min_runs` rounds at least and `max_runs` at most. In a round each candidate runs up to
    three times, of which the last is timed; once, if there is no other. Garbage is not collected meanwhile.
    Raises `ValueError` if there are no candidates or the limits contradict; what a candidate raises passes through.
    """
    if not runs or not 1 <= min_runs <= max_runs or not 0 <= budget_seconds < math.inf:
        raise ValueError(
            f"{len(runs)} candidates, {min_runs} to {max_runs} runs in {budget_seconds} s, "
            "expected one or more of each, min_runs ≤ max_runs and a finite time"
        )
    for run in runs.values():
        warm_up(run, budget_seconds=budget_seconds * WARMUP_SHARE / len(runs), clock=clock)
    times: dict[K, list[int]] = {key: [] for key in runs}
    with _garbage_kept():
        start = clock()
        for index in range(max_runs):
            if index >= min_runs and clock() - start >= budget_seconds * NANOSECONDS:
                break
            for key in _order(tuple(runs), index):
                if len(runs) > 1:
                    _refill_caches(runs[key], clock)
                times[key].append(_timed(runs[key], clock))
    return {key: np.asarray(nanoseconds, np.float64) / 1e6 for key, nanoseconds in times.items()}


def warm_up(run: Callable[[], object], *, budget_seconds: float, clock: Clock = time.perf_counter_ns) -> int:
    """Runs until the time is stable: the median of five runs is within 5 % of that of the five before.

    Gives up after 50 runs or when `budget_seconds` have passed. Returns the number of runs, one at least.
    """
    times: list[int] = []
    start = clock()
    while len(times) < WARMUP_MAX_RUNS:
        times.append(_timed(run, clock))
        if _is_stable(times) or clock() - start >= budget_seconds * NANOSECONDS:
            break
    return len(times)


def paired_ratio(samples_a: ArrayLike, samples_b: ArrayLike) -> PairedRatio:
    """Median of the ratios a / b of two candidates' times in the same rounds, both `[rounds]` in the same unit.

    The interval is `median_interval` of the ratios.
    Raises `ParityError` if the two have not the same number of rounds, or a time is not above 0.
    """
    a, b = np.asarray(samples_a, np.float64), np.asarray(samples_b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ParityError(
            f"times of shape {list(a.shape)} and {list(b.shape)} are not pairs", "take both from one interleaved run"
        )
    if not ((a > 0) & (b > 0) & np.isfinite(a) & np.isfinite(b)).all():
        raise ParityError("a time is 0, negative or not finite", "time more work per run")
    ratios = a / b
    low, high, confidence = median_interval(ratios)
    return PairedRatio(float(np.median(ratios)), low, high, confidence, int(ratios.size))


def median_interval(samples: ArrayLike, *, alpha: float = 0.05) -> tuple[float, float, float]:
    """Two-sided interval of the median of `samples`, `[n]`, and its confidence, at least 1 − alpha if n suffices.

    That of the sign test (Conover 1999, Practical Nonparametric Statistics, 3.2): from the r-th smallest to the r-th
    largest sample, r the largest with 2 · P(binomial(n, ½) < r) ≤ alpha; the whole range where there is none.
    Raises `ParityError` if there are no samples.
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    if ordered.ndim != 1 or ordered.size == 0:
        raise ParityError(f"samples of shape {list(ordered.shape)} have no median", "give [n], one or more")
    rank = _interval_rank(ordered.size, alpha)
    confidence = max(0.0, 1 - 2 * binomial_half_cdf(rank - 1, ordered.size))
    return float(ordered[rank - 1]), float(ordered[-rank]), confidence


def _interval_rank(n: int, alpha: float) -> int:
    """Largest r with 2 · P(binomial(n, ½) < r) ≤ alpha; 1, the whole range, where there is none."""
    low, high = 1, n // 2 + 1  # at `high` the tail is ½ or more
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if 2 * binomial_half_cdf(middle - 1, n) <= alpha else (low, middle)
    return low


def _order(keys: Sequence[K], index: int) -> Sequence[K]:
    """Order of round `index`: rotates by one each round, and runs backwards in every second full turn.

    Over two turns each candidate stands at each place equally often, and follows whom it also precedes.
    """
    turn, shift = divmod(index, len(keys))
    rotated = (*keys[shift:], *keys[:shift])
    return rotated if turn % 2 == 0 else rotated[::-1]


def _refill_caches(run: Callable[[], object], clock: Clock) -> None:
    start = clock()
    for _ in range(REFILL_RUNS):
        run()
        if clock() - start >= REFILL_MS * NANOSECONDS / 1e3:
            break


def _timed(run: Callable[[], object], clock: Clock) -> int:
    start = clock()
    run()
    return clock() - start


def _is_stable(times: Sequence[int]) -> bool:
    if len(times) < 2 * WARMUP_WINDOW:
        return False
    now = median(times[-WARMUP_WINDOW:])
    before = median(times[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
    return abs(now - before) <= WARMUP_TOLERANCE * before


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """A collection in the middle of a run would be timed as if it were the engine's."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
