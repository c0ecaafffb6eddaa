"""Convolutions and matrix products as rows times filters, of which a sample is as good as all.

    y[g, r, o] = Σₖ x[g, r, k] · w[g, o, k] + b[g, o]

Group g has K inputs and O outputs; a row is what one place of the output sees of the input: a patch for a convolution
(im2col), a vector for a matrix product. Only the rows that are asked for are ever copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.learned.padding import padding_of, spans
from edgewright.optimize.windows import window_of

__all__ = ["Places", "as_filters", "as_weight", "has_rows", "input_rows", "output_rows", "sampled_places"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Places:
    """Some places of a layer's output.

    * images: int64 `[R]`, indices into a batch
    * coordinates: int64 `[R]` for each axis of the output that is neither batch nor channels
    """

    images: NDArray[np.int64]
    coordinates: tuple[NDArray[np.int64], ...]

    def index(self, *, channels_first: bool) -> tuple[Any, ...]:
        """What gives all channels of these places as `[R, C]`, or `[R, C, …]`, for `[N, C, …]` or `[N, …, C]`."""
        channels = (slice(None),) if channels_first else ()
        return (self.images, *channels, *self.coordinates)


def has_rows(node: ir.Node, rank: int) -> bool:
    """Whether a layer whose weight has `rank` axes is of this form.

    ConvTranspose is not, whose places see different filters; nor are stacks of matrices, and transposed inputs.
    """
    if node.op_type == "Conv":
        return rank > 2
    return node.op_type in ("Gemm", "MatMul") and rank == 2 and not node.attributes.get_int("transA", 0)


def as_filters(node: ir.Node, weight: NDArray[np.generic]) -> NDArray[np.generic]:
    """A weight as `[G, O, K]`: of Conv `[G·O, C, kH, kW]` with K = C·kH·kW, of Gemm and MatMul `[K, O]` or `[O, K]`."""
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        return weight.reshape(groups, len(weight) // groups, -1)
    return (weight if _rows_are_outputs(node) else weight.T)[None]


def as_weight(node: ir.Node, filters: NDArray[np.generic], shape: Sequence[int]) -> NDArray[np.generic]:
    """The inverse of `as_filters`, for a weight of `shape`."""
    if node.op_type == "Conv":
        return filters.reshape(shape)
    return np.ascontiguousarray(filters[0] if _rows_are_outputs(node) else filters[0].T)


def sampled_places(node: ir.Node, output: Array, per_image: int, generator: np.random.Generator) -> Places:
    """At most `per_image` random places of each image of `output` `[N, …]`; all of them if there are no more."""
    sides = output.shape[2:] if node.op_type == "Conv" else output.shape[1:-1]
    count = int(np.prod(sides))
    if per_image < count:
        chosen = generator.integers(count, size=(len(output), per_image))
    else:
        chosen = np.tile(np.arange(count), (len(output), 1))
    images = np.repeat(np.arange(len(output)), chosen.shape[1])
    return Places(images, tuple(np.unravel_index(chosen.reshape(-1), sides)) if sides else ())


def output_rows(node: ir.Node, output: Array, places: Places) -> Array:
    """What `node` gave at `places`, `[G, R, O]`; `output` is `[N, G·O, H, W]` or, of matrix products, `[N, …, O]`."""
    rows = output[places.index(channels_first=node.op_type == "Conv")]
    return _by_group(rows, node.attributes.get_int("group", 1))


def input_rows(node: ir.Node, source: Array, places: Places) -> Array:
    """What `node` saw of its input at `places`, `[G, R, K]`."""
    if node.op_type != "Conv":
        alpha = np.float32(node.attributes.get_float("alpha", 1.0))
        return np.ascontiguousarray(source[places.index(channels_first=False)] * alpha)[None]
    window = window_of(node)
    assert window is not None
    padding = padding_of(node, window, source.shape[2:])
    padded = np.pad(source, ((0, 0), (0, 0), *padding)) if any(map(any, padding)) else source
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans(window), axis=tuple(range(2, source.ndim)))
    steps = [slice(None), slice(None), *(slice(None, None, step) for step in (*window.stride, *window.dilation))]
    patches = windows[tuple(steps)][places.index(channels_first=True)]
    return _by_group(patches.reshape(len(patches), -1), window.groups)


def _rows_are_outputs(node: ir.Node) -> bool:
    return bool(node.op_type == "Gemm" and node.attributes.get_int("transB", 0))


def _by_group(rows: Array, groups: int) -> Array:
    """`[R, G·K]` as `[G, R, K]`."""
    return np.ascontiguousarray(rows.reshape(len(rows), groups, -1).transpose(1, 0, 2))
