"""Pillow's resize as tables of whole numbers: for each output column or row, which source pixels weigh how much.

Pillow resizes 8-bit images in fixed point: weights with 22 bits behind the point, one pass over the columns and one
over the rows, each rounded and clipped to 8 bits (`src/libImaging/Resample.c`). Nearest is an algorithm of its own
(`ImagingScaleAffine` in `src/libImaging/Geometry.c`), a pass that changes nothing is left out, a crop keeps a part, and
padding is black. As tables they are all the same: a nearest or unchanged pixel is one source pixel of weight one, which
comes through the rounding unchanged, and a padded one has no source pixel, and is 0.

The weights are those of Pillow's C code, in float64 and in its order, wherever the compiler does not contract a product
and a sum into one operation: on x86-64. On ARM it may, and a weight can then differ in its last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL
from numpy.typing import NDArray

from .preprocess import Preprocess, crop_start, resized_size

__all__ = ["COUNT", "FIRST", "PRECISION_BITS", "WEIGHTS", "Axis", "Resampling", "resampling"]

Filter = Callable[[NDArray[np.float64]], NDArray[np.float64]]

PRECISION_BITS = 32 - 8 - 2  # of Resample.c: two bits for weights below 0 and sums above 255
ONE = 1 << PRECISION_BITS
FIRST, COUNT, WEIGHTS = 0, 1, 2  # rows of a table; resize.cu reads the same
SIZES_KEPT = 64  # a camera has one
TALL = 100  # by how much an image is higher than wide in Pillow's pull request 9524


@dataclass(frozen=True)
class Axis:
    """What happens along one side of an image, in pixels: resized from `source` to `resized`, of which `crop` remain.

    A `crop` above `resized` pads.
    """

    source: int
    resized: int
    crop: int


@dataclass(frozen=True)
class Resampling:
    """How the network's pixels come from those of an image of one size.

    * columns, rows: int32 `[2 + taps, outputs]`, not to be changed: of each output the first source pixel, how many
      source pixels there are, and their weights, times 2 to the power of 22; 0 behind the last
    * rows_first: which of the two passes comes first, and is rounded to 8 bits before the other
    """

    columns: NDArray[np.int32]
    rows: NDArray[np.int32]
    rows_first: bool


@functools.lru_cache(maxsize=SIZES_KEPT)
def resampling(preprocess: Preprocess, width: int, height: int) -> Resampling:
    """What `preprocess.pixels` does to an image of that size. Raises `DataError` if it would not fit into memory."""
    resized_width, resized_height = resized_size((width, height), preprocess.resize)
    crop_height, crop_width = preprocess.crop or (resized_height, resized_width)
    columns, rows = Axis(width, resized_width, crop_width), Axis(height, resized_height, crop_height)
    return Resampling(
        _table(columns, preprocess.interpolation),
        _table(rows, preprocess.interpolation),
        _rows_first(columns, rows, _pillow_version()),
    )


def _rows_first(columns: Axis, rows: Axis, pillow: tuple[int, int]) -> bool:
    """The order of Pillow's passes: since 12.2 not always the columns first (its pull requests 9524 and 9549)."""
    if pillow < (12, 2):
        return False
    if pillow < (13, 0):
        return rows.source > columns.source * TALL and rows.resized < rows.source
    less_height, less_width = rows.source - rows.resized, columns.source - columns.resized
    return less_height > 0 and less_height > 2 * less_width


def _pillow_version() -> tuple[int, int]:
    major, minor = PIL.__version__.split(".")[:2]
    return int(major), int(minor)


def _table(axis: Axis, interpolation: str) -> NDArray[np.int32]:
    outputs = np.arange(axis.crop) + crop_start(axis.resized, axis.crop)
    inside = (outputs >= 0) & (outputs < axis.resized)
    first, weights = _weights(axis, outputs[inside], interpolation)
    table = np.zeros((WEIGHTS + len(weights), axis.crop), np.int32)
    table[FIRST, inside] = first
    table[COUNT, inside] = len(weights) - (weights != 0)[::-1].argmax(axis=0)
    table[WEIGHTS:, inside] = weights
    table.setflags(write=False)
    return table


def _weights(axis: Axis, outputs: NDArray[np.int64], interpolation: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first source pixel of each output, `[outputs]`, and the weights from there on, `[taps, outputs]`."""
    if axis.source == axis.resized:
        return outputs, np.full((1, len(outputs)), ONE)
    if interpolation == "nearest":
        return _nearest(axis)[outputs], np.full((1, len(outputs)), ONE)
    return _antialiased(axis, outputs, interpolation)


def _nearest(axis: Axis) -> NDArray[np.int64]:
    """The source pixel of every resized one; Pillow adds up the steps, with the rounding of each sum."""
    step = axis.source / axis.resized
    centres = np.cumsum(np.concatenate([[step * 0.5], np.full(axis.resized - 1, step)]))
    return np.minimum(centres.astype(np.int64), axis.source - 1)


def _antialiased(
    axis: Axis, outputs: NDArray[np.int64], interpolation: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`precompute_coeffs` and `normalize_coeffs_8bpc` of Resample.c."""
    filter_, radius = FILTERS[interpolation]
    scale = axis.source / axis.resized
    stretch = max(scale, 1.0)
    support = radius * stretch
    centres = (outputs + 0.5) * scale
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)  # astype cuts off, as C does
    last = np.minimum((centres + support + 0.5).astype(np.int64), axis.source)
    taps = np.arange((last - first).max(initial=1))[:, None]
    weights = filter_((taps + first - centres + 0.5) * (1.0 / stretch))
    weights[taps >= last - first] = 0.0
    sums = np.cumsum(weights, axis=0)[-1]  # one after the other; np.sum adds in pairs
    weights /= np.where(sums == 0.0, 1.0, sums)
    return first, np.where(weights < 0, -0.5 + weights * ONE, 0.5 + weights * ONE).astype(np.int64)


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a = -0.5  # Keys 1981, "Cubic convolution interpolation for digital image processing"
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: NDArray[np.float64]) -> NDArray[np.float64]:
    angle = x * math.pi
    sine = np.array([math.sin(value) for value in angle.ravel()]).reshape(x.shape)  # C's; numpy has its own
    return np.where(x == 0.0, 1.0, sine / np.where(x == 0.0, 1.0, angle))


FILTERS: dict[str, tuple[Filter, float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
"""By interpolation: the weight at a distance from the centre, and how far it reaches; in resized pixels, or in source
pixels where the image grows."""
