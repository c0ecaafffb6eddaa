"""Channels that say nothing: over all calibration images they have one value throughout.

Behind a ReLU a channel that is always 0 is called dead. Such channels do no harm to the quantization, but they cost
time, and many of them say that the images are not those that the network was trained on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ChannelExtremes"]

ROUNDING = 4 * float(np.finfo(np.float32).eps)
"""Share of its magnitude by which a constant varies over a map: convolutions sum in another order at the borders."""


class ChannelExtremes:
    """The least and the largest value of each channel, axis 1 of a tensor; mutable while they are collected."""

    def __init__(self) -> None:
        self._minima: NDArray[np.float32] | None = None
        self._maxima: NDArray[np.float32] | None = None

    def add(self, minima: NDArray[np.float32], maxima: NDArray[np.float32]) -> None:
        """Those of a batch, `[N, C]` each."""
        low, high = minima.min(axis=0), maxima.max(axis=0)
        self._minima = low if self._minima is None else np.minimum(self._minima, low)
        self._maxima = high if self._maxima is None else np.maximum(self._maxima, high)

    def constant(self) -> dict[int, float]:
        """The channels whose values are all the same but for rounding, and that value."""
        if self._minima is None or self._maxima is None:
            return {}
        low, high = self._minima.astype(np.float64), self._maxima.astype(np.float64)
        still = high - low <= ROUNDING * np.maximum(np.abs(low), np.abs(high))
        return {int(channel): float(high[channel]) + 0.0 for channel in np.flatnonzero(still)}
