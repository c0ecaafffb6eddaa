"""Which calibration images choose, and which check what the others chose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["held_back"]

HELD_BACK = 4
"""Every fourth: docs/contract.md has a quarter of the calibration images check each choice."""


def held_back(count: int) -> NDArray[np.bool_]:
    """Of `count` images in their order those that check, `[count]`; of fewer than four there are none."""
    positions: NDArray[np.bool_] = np.arange(count) % HELD_BACK == HELD_BACK - 1
    return positions
