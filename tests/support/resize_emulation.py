"""What resize.cu computes, in numpy: the tables as matrices of whole numbers, one pass after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.resampling import COUNT, FIRST, PRECISION_BITS, WEIGHTS, resampling

HALF = 1 << (PRECISION_BITS - 1)


def emulated(preprocess: Preprocess, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`preprocess.pixels` of an image `[H, W, C]`."""
    height, width, _ = pixels.shape
    how = resampling(preprocess, width, height)
    columns, rows = matrix(how.columns, width), matrix(how.rows, height)
    passes = [("ow,hwc->hoc", columns), ("oh,hwc->owc", rows)]
    values = pixels.astype(np.int64)
    for subscripts, weights in reversed(passes) if how.rows_first else passes:
        values = np.clip((HALF + np.einsum(subscripts, weights, values)) >> PRECISION_BITS, 0, 255)
    return values.astype(np.uint8)


def matrix(table: NDArray[np.int32], sources: int) -> NDArray[np.int64]:
    """The weight of each source pixel in each output, `[outputs, sources]`."""
    dense = np.zeros((table.shape[1], sources), np.int64)
    for row, column in zip(dense, table.T, strict=True):
        first, count = column[FIRST], column[COUNT]
        row[first : first + count] = column[WEIGHTS : WEIGHTS + count]
    return dense
