"""Histograms of activations, and the range that a quantizer should cover: pure functions on numpy arrays.

A histogram's bins are `[k·w, (k+1)·w)` with `w` a power of two, anchored at 0. When a larger value arrives, `w` doubles
and pairs of bins merge exactly. What comes out depends on the values alone, not on their order or the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.errors import CalibrationError

__all__ = [
    "AUTO",
    "METHODS",
    "Histogram",
    "Range",
    "Transfer",
    "best_range",
    "entropy_range",
    "minmax_range",
    "mse_range",
    "percentile_range",
    "silu",
    "symmetric",
    "symmetric_mse_range",
]

HALF_BINS = 4096
SMALLEST_EXPONENT = -126 - 12  # bins of the smallest normal float32: below, values count as 0
UINT8_LEVELS = 256
DEFAULT_PERCENTILE = 99.99
AUTO = "auto"
"""Each tensor by the method that errs least there: see `best_range`."""
SHARES = np.concatenate([np.linspace(1.0, 0.5, 26), np.linspace(0.48, 0.02, 24)])
"""Of the largest magnitude: where the search for the least error looks for the end of a range."""


@dataclass(frozen=True)
class Range:
    """The interval that the integers cover, in the unit of the activation; values beyond it saturate.

    * method: what chose it, one of `METHODS`, "" if nobody said; two intervals are equal if their ends are
    """

    low: float
    high: float
    method: str = field(default="", compare=False)

    def with_zero(self) -> Range:
        """Widened to hold 0, which must be exact: padding and ReLU produce it."""
        return replace(self, low=min(self.low, 0.0), high=max(self.high, 0.0))


@dataclass
class Histogram:
    """What was seen of one activation tensor. Mutable while it is collected.

    * minimum, maximum: of all values
    * exponent: bins are 2**exponent wide
    * counts: int64 `[2 · HALF_BINS]`, of the sampled values; bin i holds `[(i − HALF_BINS)·w, (i + 1 − HALF_BINS)·w)`
    """

    minimum: float
    maximum: float
    exponent: int
    counts: NDArray[np.int64]

    @classmethod
    def empty(cls) -> Histogram:
        """Nothing seen yet."""
        return cls(math.inf, -math.inf, SMALLEST_EXPONENT, np.zeros(2 * HALF_BINS, np.int64))

    def add(self, samples: NDArray[np.float32], minimum: float, maximum: float) -> None:
        """Counts `samples` (any shape); `minimum` and `maximum` bound all values that they were drawn from.

        Raises `CalibrationError` if any of these is not finite.
        """
        if not (math.isfinite(minimum) and math.isfinite(maximum) and np.isfinite(samples).all()):
            raise CalibrationError("holds NaN or infinite values")
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        self._widen(max(abs(minimum), abs(maximum)))
        # in float64 the product is exact; in float32 it would over- or underflow for tensors of tiny or mixed values
        bins = np.floor(np.multiply(samples.reshape(-1), 2.0**-self.exponent, dtype=np.float64)).astype(np.int32)
        self.counts += np.bincount(bins + HALF_BINS, minlength=2 * HALF_BINS)

    def _widen(self, magnitude: float) -> None:
        # frexp: magnitude < 2**e, so that HALF_BINS bins of 2**(e − 12) hold it strictly
        self._coarsen(math.frexp(magnitude)[1] - (HALF_BINS.bit_length() - 1) if magnitude else SMALLEST_EXPONENT)

    def _coarsen(self, exponent: int) -> None:
        """Bins at least 2**exponent wide."""
        for _ in range(min(exponent - self.exponent, 2 * HALF_BINS.bit_length())):
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros_like(self.counts)
            self.counts[HALF_BINS // 2 : HALF_BINS // 2 + HALF_BINS] = pairs
        self.exponent = max(self.exponent, exponent)

    def merged(self, other: Histogram) -> Histogram:
        """That of what both have seen together."""
        both = Histogram(self.minimum, self.maximum, self.exponent, self.counts.copy())
        finer = Histogram(other.minimum, other.maximum, other.exponent, other.counts)
        both._coarsen(other.exponent)
        finer._coarsen(both.exponent)
        both.minimum, both.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        both.counts += finer.counts
        return both

    def occupied(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres and counts of the bins that hold anything, float64 `[K]` each; values near 0 are taken as 0."""
        index = np.flatnonzero(self.counts)
        centres = (index - HALF_BINS + 0.5) * 2.0**self.exponent
        centres[index == HALF_BINS] = 0.0  # mostly the exact zeros that ReLU makes
        return np.clip(centres, self.minimum, self.maximum), self.counts[index].astype(np.float64)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`; empty bins at both ends are left out."""
        index = np.flatnonzero(self.counts)
        first, last = (int(index[0]), int(index[-1])) if len(index) else (HALF_BINS, HALF_BINS - 1)
        return {
            "min": self.minimum,
            "max": self.maximum,
            "exponent": self.exponent,
            "first_bin": first - HALF_BINS,
            "counts": self.counts[first : last + 1].tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Histogram:
        """The inverse of `to_json`."""
        counts = np.zeros(2 * HALF_BINS, np.int64)
        first = content["first_bin"] + HALF_BINS
        counts[first : first + len(content["counts"])] = content["counts"]
        return cls(float(content["min"]), float(content["max"]), int(content["exponent"]), counts)


RangeMethod = Callable[[Histogram], Range]
Transfer = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""What a network does to an activation next, elementwise on `[K]`, if it does nothing else with it."""


def minmax_range(histogram: Histogram) -> Range:
    """Everything that was seen."""
    return Range(histogram.minimum, histogram.maximum)


def percentile_range(histogram: Histogram, percentile: float = DEFAULT_PERCENTILE) -> Range:
    """The narrowest bins that leave out at most (100 − percentile) / 2 % of the values at either end."""
    outside = (100.0 - percentile) / 200.0 * histogram.counts.sum()
    below = np.cumsum(histogram.counts)
    low = int(np.searchsorted(below, outside, side="right"))
    above = np.cumsum(histogram.counts[::-1])
    high = 2 * HALF_BINS - int(np.searchsorted(above, outside, side="right"))
    width = 2.0**histogram.exponent
    return Range(max((low - HALF_BINS) * width, histogram.minimum), min((high - HALF_BINS) * width, histogram.maximum))


def mse_range(histogram: Histogram, transfer: Transfer | None = None) -> Range:
    """The range with the least mean squared quantization error, U8 asymmetric, clipping and rounding together.

    Either end is moved inwards in turn over a grid (as in Banner et al. 2019, but measured instead of modelled).
    With `transfer` the error is measured behind it: what SiLU flattens needs no levels. On EfficientNet-B0 that is
    worth 7 dB of logit SQNR.
    """
    values, counts = histogram.occupied()
    best = minmax_range(histogram).with_zero()

    def error(interval: Range) -> float:
        return squared_error(values, counts, interval, transfer)

    for _ in range(2):
        best = min(
            (best, *(Range(best.low, float(share) * max(histogram.maximum, 0.0)) for share in SHARES)), key=error
        )
        best = min(
            (best, *(Range(float(share) * min(histogram.minimum, 0.0), best.high) for share in SHARES)), key=error
        )
    return best


def symmetric(interval: Range) -> Range:
    """The smallest range around 0 that holds `interval` and has the levels of S8: −128 … 127 steps.

    Of such a range that is the range itself. On it U8 with zero-point 128 and S8 with zero-point 0 are the same values,
    so that what measures errors in the one measures them in the other.
    """
    step = max(-interval.low / 128, interval.high / 127)
    return replace(interval, low=-128 * step, high=127 * step)


def symmetric_mse_range(histogram: Histogram) -> Range:
    """The symmetric range with the least mean squared quantization error, S8, clipping and rounding together."""
    values, counts = histogram.occupied()
    whole = minmax_range(histogram)
    magnitude = max(abs(whole.low), abs(whole.high))
    candidates = (symmetric(Range(0.0, float(share) * magnitude)) for share in SHARES)
    return min(candidates, key=lambda interval: squared_error(values, counts, interval))


def squared_error(
    values: NDArray[np.float64], counts: NDArray[np.float64], interval: Range, transfer: Transfer | None = None
) -> float:
    """Sum of squared differences when `values` `[K]`, each `counts` `[K]` times, go through U8 over `interval`.

    With `transfer`, of the differences between transfer(quantized) and transfer(values).
    """
    scale = (interval.high - interval.low) / (UINT8_LEVELS - 1)
    if scale == 0.0:
        quantized = np.zeros_like(values)
    else:
        zero_point = round(-interval.low / scale)
        levels = np.clip(np.rint(values / scale) + zero_point, 0, UINT8_LEVELS - 1)
        quantized = (levels - zero_point) * scale
    if transfer is not None:
        values, quantized = transfer(values), transfer(quantized)
    return float(counts @ (quantized - values) ** 2)


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """SiLU, x · sigmoid(x) (Elfwing et al. 2018), elementwise; the exponential is kept from overflowing."""
    return x / (1.0 + np.exp(np.minimum(-x, 700.0)))


def entropy_range(histogram: Histogram) -> Range:
    """The threshold whose quantized histogram keeps most information: least Kullback-Leibler divergence.

    Szymon Migacz, "8-bit Inference with TensorRT" (GTC 2017), on magnitudes; a signed tensor is cut at ±threshold,
    with half of the levels on either side.
    """
    magnitudes = histogram.counts[HALF_BINS:] + histogram.counts[:HALF_BINS][::-1]
    magnitudes[0] = magnitudes[1]  # ReLU's exact zeros cost nothing at any threshold and would drown the rest
    signed = histogram.minimum < 0.0
    levels = UINT8_LEVELS // 2 if signed else UINT8_LEVELS
    used = int(np.flatnonzero(magnitudes)[-1]) + 1 if magnitudes.any() else 0
    if used <= levels:
        return minmax_range(histogram)
    candidates = np.unique(np.linspace(levels, used, 128).astype(int))
    divergences = [_divergence(magnitudes[:used], int(bins), levels) for bins in candidates]
    threshold = float(candidates[int(np.argmin(divergences))]) * 2.0**histogram.exponent
    return Range(max(-threshold, histogram.minimum), min(threshold, histogram.maximum))


def _divergence(magnitudes: NDArray[np.int64], bins: int, levels: int) -> float:
    """KL(P‖Q): P is the first `bins` counts with the outliers added to the last; Q is P's inside in `levels` steps."""
    inside = magnitudes[:bins].astype(np.float64)
    reference = inside.copy()
    reference[-1] += magnitudes[bins:].sum()
    edges = (np.arange(levels) * bins) // levels
    sums = np.add.reduceat(inside, edges)
    filled = np.add.reduceat((inside > 0).astype(np.float64), edges)
    average = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
    spread = np.repeat(average, np.diff(np.append(edges, bins))) * (inside > 0)
    mask = (reference > 0) & (spread > 0)
    lost = reference[(reference > 0) & (spread == 0)].sum()  # P where Q has nothing: an infinite price, made large
    p, q = reference[mask] / reference.sum(), spread[mask] / spread.sum()
    return float((p * np.log(p / q)).sum() + lost / reference.sum() * math.log(1 / np.finfo(np.float64).eps))


METHODS: dict[str, RangeMethod] = {
    "minmax": minmax_range,
    "percentile": percentile_range,
    **{f"percentile-{share}": partial(percentile_range, percentile=share) for share in (99.9, 99.999, 99.9999)},
    "entropy": entropy_range,
    "mse": mse_range,
}
"""By the names that a person writes; "percentile" alone is that of `DEFAULT_PERCENTILE`."""


def best_range(histogram: Histogram, transfer: Transfer | None = None, *, signed: bool = False) -> Range:
    """Of the ranges that all `METHODS` give, the one with the least mean squared error behind `transfer`.

    Of equal ones the first in the order of `METHODS`. `signed` ranges are symmetric, for S8 with zero-point 0.
    """
    values, counts = histogram.occupied()

    def candidate(name: str, method: RangeMethod) -> Range:
        if signed:
            return replace(
                symmetric_mse_range(histogram) if name == "mse" else symmetric(method(histogram)), method=name
            )
        chosen = mse_range(histogram, transfer) if name == "mse" else method(histogram)
        return replace(chosen.with_zero(), method=name)

    candidates = [candidate(name, method) for name, method in METHODS.items()]
    return min(candidates, key=lambda interval: squared_error(values, counts, interval, transfer))
