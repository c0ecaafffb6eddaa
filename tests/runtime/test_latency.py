"""Timing with a fake clock that only the candidates advance, so that no test depends on this machine's speed."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from itertools import chain, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from edgewright.runtime.errors import ParityError
from edgewright.runtime.latency import (
    WARMUP_MAX_RUNS,
    WARMUP_WINDOW,
    Latency,
    interleaved_samples,
    measure_interleaved,
    median_interval,
    paired_ratio,
    warm_up,
)

MILLISECOND = 1_000_000


class FakeClock:
    """A fake of `time.perf_counter_ns` that stands still until a run of `takes` moves it; notes who ran."""

    def __init__(self) -> None:
        self.now = 123
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now

    def takes(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """A candidate that takes these times one after the other, then always the last."""
        times: Iterator[float] = chain(milliseconds, repeat(milliseconds[-1]))

        def run() -> None:
            self.log.append(name)
            self.now += round(next(times) * MILLISECOND)

        return run


# --- Latency -----------------------------------------------------------------------------------------------------


def test_latency_of_known_samples() -> None:
    found = Latency.of(np.arange(1.0, 102.0), batch=1, threads=2)
    assert (found.batch, found.threads, found.runs) == (1, 2, 101)
    assert (found.p50, found.p90, found.p99) == (51, 91, 100)
    assert found.cv == pytest.approx(np.std(np.arange(1, 102), ddof=1) / 51)


def test_latency_of_one_sample() -> None:
    assert Latency.of([3.0], batch=8, threads=1) == Latency(8, 1, 1, 3.0, 3.0, 3.0, 0.0, (3.0, 3.0), (3.0,) * 21)


@pytest.mark.parametrize("samples", [[], [[1.0, 2.0]], 1.0])
def test_latency_refuses(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="expected \\[runs\\]"):
        Latency.of(samples, batch=1, threads=1)


def test_latency_json_round_trip() -> None:
    found = Latency.of([1.5, 2.5, 9.0], batch=1, threads=2)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(content) >= {"batch", "threads", "runs", "p50", "p90", "p99"}
    assert Latency.from_json(content) == found
    assert Latency.from_json({**content, "added_later": 1}) == found


# --- warm-up -----------------------------------------------------------------------------------------------------


def test_warm_up_of_a_steady_candidate_takes_two_windows() -> None:
    clock = FakeClock()
    assert warm_up(clock.takes("a", 10), budget_seconds=60, clock=clock) == 2 * WARMUP_WINDOW


def test_warm_up_waits_until_the_time_is_stable() -> None:
    clock = FakeClock()
    falling = [100 * 0.9**step for step in range(20)]  # 41 % less from window to window
    count = warm_up(clock.takes("a", *falling), budget_seconds=60, clock=clock)
    assert 20 < count <= 20 + 2 * WARMUP_WINDOW


def test_warm_up_ignores_an_outlier() -> None:
    clock = FakeClock()
    times = [10.0] * 8 + [500.0] + [10.0]
    assert warm_up(clock.takes("a", *times), budget_seconds=60, clock=clock) == 2 * WARMUP_WINDOW


def test_warm_up_gives_up_on_a_candidate_that_never_settles() -> None:
    clock = FakeClock()
    restless = [1.1**step for step in range(WARMUP_MAX_RUNS + 1)]
    assert warm_up(clock.takes("a", *restless), budget_seconds=1e6, clock=clock) == WARMUP_MAX_RUNS


def test_warm_up_of_a_slow_candidate_stops_with_the_budget_but_runs_once() -> None:
    clock = FakeClock()
    assert warm_up(clock.takes("a", 5_000), budget_seconds=12, clock=clock) == 3
    assert warm_up(clock.takes("a", 5_000), budget_seconds=0, clock=clock) == 1


# --- interleaving ------------------------------------------------------------------------------------------------


def rounds_of(clock: FakeClock, candidates: int, rounds: int, runs: int) -> list[tuple[str, ...]]:
    """The order of the turns in each round; a turn has `runs`, all of one candidate."""
    log = clock.log[-candidates * rounds * runs :]
    turns = [log[start : start + runs] for start in range(0, len(log), runs)]
    assert all(len(set(turn)) == 1 for turn in turns)
    return [tuple(turn[0] for turn in turns[start : start + candidates]) for start in range(0, len(turns), candidates)]


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_every_round_has_a_turn_of_each_in_an_order_that_changes(names: str) -> None:
    clock, rounds = FakeClock(), 4 * len(names)
    runs = {name: clock.takes(name, 1) for name in names}
    interleaved_samples(runs, budget_seconds=0, min_runs=rounds, max_runs=rounds, clock=clock)
    found = rounds_of(clock, len(names), rounds, runs=3)
    assert all(sorted(order) == sorted(names) for order in found)
    for place in range(len(names)):
        at_place = [order[place] for order in found]
        assert {at_place.count(name) for name in names} == {rounds // len(names)}
    follows = [(order[i], order[i + 1]) for order in found for i in range(len(names) - 1)]
    assert all(follows.count((b, a)) == follows.count((a, b)) for a, b in follows)


def test_samples_are_each_candidates_own_times_in_milliseconds() -> None:
    clock = FakeClock()
    runs = {"a": clock.takes("a", 2), "b": clock.takes("b", 7)}
    found = interleaved_samples(runs, budget_seconds=0, min_runs=9, max_runs=9, clock=clock)
    assert found["a"].tolist() == [2.0] * 9
    assert found["b"].tolist() == [7.0] * 9


@pytest.mark.parametrize("milliseconds", [0.1, 2.9, 3.0, 500.0])
def test_only_the_last_run_of_a_turn_counts(milliseconds: float) -> None:
    """The first runs behind another engine are slower; a fake that takes ten times as long there."""
    clock, last = FakeClock(), [""]

    def candidate(name: str) -> Callable[[], None]:
        cold, warm = clock.takes(name, 10 * milliseconds), clock.takes(name, milliseconds)

        def run() -> None:
            (warm if last[0] == name else cold)()
            last[0] = name

        return run

    found = interleaved_samples(
        {name: candidate(name) for name in "ab"}, budget_seconds=0, min_runs=6, max_runs=6, clock=clock
    )
    assert found["a"].tolist() == found["b"].tolist() == pytest.approx([milliseconds] * 6)


@pytest.mark.parametrize(("milliseconds", "runs"), [(0.1, 3), (1.4, 3), (2.9, 3), (3.0, 2), (500.0, 2)])
def test_a_slow_candidate_runs_once_before_it_is_timed(milliseconds: float, runs: int) -> None:
    clock = FakeClock()
    interleaved_samples(
        {name: clock.takes(name, milliseconds) for name in "ab"}, budget_seconds=0, min_runs=6, max_runs=6, clock=clock
    )
    rounds_of(clock, 2, 6, runs)
    assert len(clock.log) == 2 * (1 + 6 * runs)


def test_a_candidate_alone_only_runs_to_be_timed() -> None:
    clock = FakeClock()
    interleaved_samples({"a": clock.takes("a", 1)}, budget_seconds=0, min_runs=5, max_runs=5, clock=clock)
    assert len(clock.log) == 1 + 5


def test_warm_up_is_not_among_the_samples() -> None:
    clock = FakeClock()
    runs = {"a": clock.takes("a", 900, *([3.0] * 100))}
    found = interleaved_samples(runs, budget_seconds=5, min_runs=5, max_runs=5, clock=clock)
    assert found["a"].max() == 3.0


def test_slow_candidates_share_the_time_to_warm_up() -> None:
    clock = FakeClock()
    runs = {"a": clock.takes("a", 1_000), "b": clock.takes("b", 1_000)}
    interleaved_samples(runs, budget_seconds=8, min_runs=1, max_runs=1, clock=clock)
    assert clock.log[:-4] == ["a", "a", "b", "b"]  # half of 8 s for both together


@pytest.mark.parametrize(
    ("budget_seconds", "expected"),
    [(0.0, 4), (0.5, 25), (100.0, 80)],  # the least, what fits in (20 ms a round), the most
)
def test_rounds_are_limited_by_time_and_number(budget_seconds: float, expected: int) -> None:
    clock = FakeClock()
    runs = {"a": clock.takes("a", 4), "b": clock.takes("b", 6)}
    found = measure_interleaved(
        runs, batch=1, threads=2, budget_seconds=budget_seconds, min_runs=4, max_runs=80, clock=clock
    )
    assert {latency.runs for latency in found.values()} == {expected}
    assert found["a"] == Latency(1, 2, expected, 4.0, 4.0, 4.0, 0.0, (4.0, 4.0), (4.0,) * 21)


def test_a_slow_spell_hits_all_candidates_alike() -> None:
    """The machine slows down threefold on the way: the medians say nothing, the ratio stays what it is."""
    clock = FakeClock()

    def drifting(base: float) -> Callable[[], None]:
        def run() -> None:
            clock.now += round(base * MILLISECOND * (1 if clock.now < 2e9 else 3))

        return run

    runs = {"fast": drifting(10), "slow": drifting(12)}
    samples = interleaved_samples(runs, budget_seconds=8, min_runs=10, max_runs=1_000, clock=clock)
    assert np.ptp(samples["fast"]) == pytest.approx(20)
    ratio = paired_ratio(samples["slow"], samples["fast"])
    assert ratio.median == pytest.approx(1.2)
    assert (ratio.low, ratio.high) == pytest.approx((1.2, 1.2))


def test_garbage_is_not_collected_during_the_rounds_but_is_afterwards() -> None:
    clock, states = FakeClock(), []
    run = clock.takes("a", 1)

    def watched() -> None:
        states.append(gc.isenabled())
        run()

    assert gc.isenabled()
    interleaved_samples({"a": watched}, budget_seconds=0, min_runs=3, max_runs=3, clock=clock)
    assert states[-3:] == [False] * 3
    assert gc.isenabled()


def test_garbage_collection_returns_after_an_error_and_stays_off_where_it_was_off() -> None:
    clock = FakeClock()
    calls = iter(range(100))

    def failing() -> None:
        clock.now += MILLISECOND
        if next(calls) == 3:  # the first is the warm-up
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        interleaved_samples({"a": failing}, budget_seconds=0, min_runs=9, max_runs=9, clock=clock)
    assert gc.isenabled()
    gc.disable()
    try:
        interleaved_samples({"a": clock.takes("a", 1)}, budget_seconds=0, min_runs=1, max_runs=1, clock=clock)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("names", "budget_seconds", "min_runs", "max_runs"),
    [("", 1, 1, 1), ("a", 1, 0, 5), ("a", 1, 6, 5), ("a", -1, 1, 5), ("a", float("nan"), 1, 5)],
)
def test_measuring_refuses(names: str, budget_seconds: float, min_runs: int, max_runs: int) -> None:
    runs = {name: FakeClock().takes(name, 1) for name in names}
    with pytest.raises(ValueError, match="expected one or more of each"):
        interleaved_samples(runs, budget_seconds=budget_seconds, min_runs=min_runs, max_runs=max_runs)


def test_the_real_clock_measures_something() -> None:
    found = measure_interleaved(
        {"a": lambda: sum(range(1_000))}, batch=1, threads=1, budget_seconds=0, min_runs=3, max_runs=3
    )
    assert found["a"].runs == 3
    assert found["a"].p50 > 0


# --- ratios ------------------------------------------------------------------------------------------------------


def test_ratio_of_known_pairs() -> None:
    b = np.array([1.0, 2, 4, 8, 1, 2, 4, 8, 1])
    found = paired_ratio(b * np.arange(1.0, 10.0), b)
    assert found.median == 5
    assert (found.low, found.high) == (2, 8)  # the table of the sign test: n = 9, second from either end
    assert found.confidence == pytest.approx(1 - 2 * 10 / 2**9)
    assert found.rounds == 9


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(6, 3_000))
def test_interval_takes_the_narrowest_ranks_that_cover(n: int) -> None:
    found = paired_ratio(np.arange(1.0, n + 1), np.ones(n))
    rank = round(found.low)
    assert found.high == n + 1 - rank
    assert found.confidence >= 0.95 - 1e-12
    assert found.confidence == pytest.approx(1 - binomtest(rank - 1, n).pvalue, abs=1e-9)
    assert binomtest(rank, n).pvalue > 0.05  # one rank further in would cover less than 95 %


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_rounds_give_the_range_with_the_confidence_it_has(n: int) -> None:
    found = paired_ratio(np.arange(1.0, n + 1), np.ones(n))
    assert (found.low, found.high) == (1, n)
    assert found.confidence == pytest.approx(1 - 2 * 0.5**n)


def test_interval_covers_the_median_of_a_skewed_distribution() -> None:
    random = np.random.default_rng(0)
    repeats, rounds, inside = 1_000, 30, 0
    for _ in range(repeats):
        found = paired_ratio(np.exp(random.normal(size=rounds) ** 3), np.ones(rounds))  # median 1, heavy tails
        inside += found.low <= 1 <= found.high
    assert inside / repeats >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / repeats)


def test_ratio_mirrors_when_the_two_are_exchanged() -> None:
    random = np.random.default_rng(1)
    a, b = random.lognormal(size=(2, 51))
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert (back.low, back.median, back.high) == pytest.approx((1 / there.high, 1 / there.median, 1 / there.low))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones(3), np.ones(4), "are not pairs"),
        (np.ones(0), np.ones(0), "are not pairs"),
        (np.ones((2, 2)), np.ones((2, 2)), "are not pairs"),
        (np.ones(2), np.array([1.0, 0.0]), "0, negative or not finite"),
        (np.array([-1.0, 1.0]), np.ones(2), "0, negative or not finite"),
        (np.array([np.nan, 1.0]), np.ones(2), "0, negative or not finite"),
    ],
)
def test_ratio_refuses(a: NDArray[np.float64], b: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        paired_ratio(a, b)


@pytest.mark.parametrize("alpha", [0.05, 0.025, 0.01])
@pytest.mark.parametrize("n", [1, 5, 6, 7, 20, 400])
def test_interval_of_a_median_has_the_narrowest_ranks_that_hold_it(n: int, alpha: float) -> None:
    """Ranks by scipy's binomial distribution: P(median outside) = 2 P(fewer than r of n are below it)."""
    fitting = [r for r in range(1, n // 2 + 1) if 2 * binom.cdf(r - 1, n, 0.5) <= alpha]
    rank = max(fitting, default=1)
    low, high, confidence = median_interval(np.random.default_rng(3).permutation(n) + 1.0, alpha=alpha)
    assert (low, high) == (rank, n + 1 - rank)
    assert confidence == pytest.approx(max(0.0, 1 - 2 * binom.cdf(rank - 1, n, 0.5)))
    assert (confidence >= 1 - alpha) == bool(fitting)


def test_no_samples_have_no_median() -> None:
    with pytest.raises(ParityError, match="have no median"):
        median_interval([])
