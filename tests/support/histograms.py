"""Histograms of given values, and what numpy makes of the same bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgewright.calibration.ranges import HALF_BINS, Histogram

__all__ = [
    "FLOAT32",
    "SMALLEST",
    "Array",
    "add",
    "edges",
    "expected_counts",
    "finite",
    "nested",
    "of",
    "same",
    "seeded",
]

Array = NDArray[Any]

FLOAT32 = np.finfo(np.float32)
SMALLEST = float(FLOAT32.smallest_subnormal)


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([2026, seed])


def add(histogram: Histogram, values: Any) -> Histogram:
    array = np.asarray(values, np.float32)
    histogram.add(array, float(array.min()), float(array.max()))
    return histogram


def of(*batches: Any) -> Histogram:
    histogram = Histogram.empty()
    for batch in batches:
        add(histogram, batch)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    numbers = [(h.minimum, h.maximum, h.exponent) for h in (one, other)]
    return numbers[0] == numbers[1] and np.array_equal(one.counts, other.counts)


def edges(histogram: Histogram) -> Array:
    """The bin edges in float64, `[2 · HALF_BINS + 1]`, all exact."""
    return np.ldexp(np.arange(-HALF_BINS, HALF_BINS + 1, dtype=np.float64), histogram.exponent)


def expected_counts(values: Any, histogram: Histogram) -> Array:
    """numpy's histogram on the final bins; its last bin is closed, but no value lies on that edge."""
    return np.histogram(np.asarray(values, np.float32).astype(np.float64), edges(histogram))[0]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
nested = st.lists(st.lists(finite, min_size=1, max_size=6), min_size=1, max_size=5)
