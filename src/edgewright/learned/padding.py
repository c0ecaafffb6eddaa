"""What stands around a map where a convolution or a pooling reads beyond its borders."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgewright.optimize.windows import Window

__all__ = ["ceil_excess", "is_symmetric", "padding_of", "spans"]

Padding = tuple[tuple[int, int], ...]
"""Before and after each spatial axis."""


def spans(window: Window) -> tuple[int, ...]:
    """From the first to the last place that `window` reads along each axis, in places of the map."""
    return tuple(step * (side - 1) + 1 for side, step in zip(window.kernel, window.dilation, strict=True))


def padding_of(node: ir.Node, window: Window, sides: Sequence[int]) -> Padding:
    """As the attributes pads and auto_pad have it, for a map of `sides` (ONNX specification, Conv)."""
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        pads = node.attributes.get_ints("pads", [0] * 2 * len(sides)) if auto == "NOTSET" else [0] * 2 * len(sides)
        return tuple(zip(pads[: len(sides)], pads[len(sides) :], strict=True))
    missing = (
        max(0, (-(-side // stride) - 1) * stride + span - side)
        for side, span, stride in zip(sides, spans(window), window.stride, strict=True)
    )
    halves = ((total // 2, total - total // 2) for total in missing)
    return tuple(halves if auto == "SAME_UPPER" else ((end, begin) for begin, end in halves))


def ceil_excess(window: Window, sides: Sequence[int], padding: Padding) -> tuple[int, ...]:
    """How far the last window reaches beyond the padded map along each axis if their number is rounded up.

    A window that would start behind the map is left out (ONNX specification, AveragePool-19).
    """
    excess = []
    for side, (begin, end), span, stride in zip(sides, padding, spans(window), window.stride, strict=True):
        rest = side + begin + end - span
        windows = -(-rest // stride)
        windows -= windows * stride >= side + begin
        excess.append(max(0, windows * stride - rest))
    return tuple(excess)


def is_symmetric(padding: Padding) -> bool:
    """Whether as much stands before each axis as after it."""
    return all(begin == end for begin, end in padding)
