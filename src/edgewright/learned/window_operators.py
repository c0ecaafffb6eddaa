"""Convolutions and poolings in PyTorch, for maps with one to three spatial axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgewright.learned.operation import Operation
from edgewright.learned.padding import Padding, ceil_excess, is_symmetric, padding_of
from edgewright.optimize.edits import label
from edgewright.optimize.windows import Window, window_of
from edgewright.runtime.errors import QuantizationError

__all__ = ["WINDOW_OPERATORS", "padded"]

functional = nn.functional
CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
MAXIMA = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
MEANS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def padded(x: Tensor, padding: Padding, value: float = 0.0) -> Tensor:
    """`x` with `value` around its last axes."""
    if not any(map(any, padding)):
        return x
    return functional.pad(x, [*itertools.chain.from_iterable(reversed(padding))], value=value)


def _known_window(node: ir.Node) -> Window:
    window = window_of(node)
    if window is None:
        raise QuantizationError(f"the kernel of {node.op_type} {label(node)} is not known", "export the model again")
    return window


def _convolution(node: ir.Node) -> Operation:
    window = _known_window(node)
    convolve: Any = CONVOLUTIONS[len(window.kernel)]

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        padding = padding_of(node, window, x.shape[2:])
        inside = [begin for begin, _ in padding] if is_symmetric(padding) else [0] * len(padding)
        around = x if is_symmetric(padding) else padded(x, padding)
        result: Tensor = convolve(around, weight, bias, window.stride, inside, window.dilation, window.groups)
        return result

    return convolution


def _transposed_convolution(node: ir.Node) -> Operation:
    window = _known_window(node)
    if "output_shape" in node.attributes or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise QuantizationError(
            f"{label(node)} is a ConvTranspose whose padding follows from its output: it cannot be run in PyTorch",
            "export it with explicit pads",
        )
    convolve: Any = TRANSPOSED[len(window.kernel)]
    more = node.attributes.get_ints("output_padding", [0] * len(window.kernel))

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        padding = padding_of(node, window, x.shape[2:])
        result: Tensor = convolve(x, weight, bias, window.stride, 0, more, window.groups, window.dilation)
        inside: list[Any] = [slice(None), slice(None)]
        inside += [slice(begin, side - end) for (begin, end), side in zip(padding, result.shape[2:], strict=True)]
        return result[tuple(inside)]

    return convolution


def _max_pooling(node: ir.Node) -> Operation:
    window = _known_window(node)
    pool: Any = MAXIMA[len(window.kernel)]

    def pooling(x: Tensor) -> Tensor:
        padding = _with_excess(node, window, x)
        result: Tensor = pool(padded(x, padding, -math.inf), window.kernel, window.stride, 0, window.dilation)
        return result

    return pooling


def _average_pooling(node: ir.Node) -> Operation:
    """The mean over what a window covers of the map, or of the padded map where count_include_pad is set."""
    window = _known_window(node)
    if any(step != 1 for step in window.dilation):
        raise QuantizationError(f"{label(node)} is a dilated AveragePool: it cannot be run in PyTorch")
    pool: Any = MEANS[len(window.kernel)]
    counts_padding = node.attributes.get_int("count_include_pad", 0)

    def pooling(x: Tensor) -> Tensor:
        padding = padding_of(node, window, x.shape[2:])
        whole = _with_excess(node, window, x)
        means: Tensor = pool(padded(x, whole), window.kernel, window.stride)
        if not any(map(any, whole)):
            return means
        counted = padded(torch.ones_like(x[:1, :1]), padding, 1.0 if counts_padding else 0.0)
        excess = tuple((0, end - known) for (_, end), (_, known) in zip(whole, padding, strict=True))
        shares: Tensor = pool(padded(counted, excess), window.kernel, window.stride)
        return means / shares

    return pooling


def _with_excess(node: ir.Node, window: Window, x: Tensor) -> Padding:
    """The padding of a pooling, with what a last window reads behind it if ceil_mode is set."""
    padding = padding_of(node, window, x.shape[2:])
    if not node.attributes.get_int("ceil_mode", 0):
        return padding
    excess = ceil_excess(window, x.shape[2:], padding)
    return tuple((begin, end + more) for (begin, end), more in zip(padding, excess, strict=True))


def _global_average_pooling(node: ir.Node) -> Operation:
    return lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)


WINDOW_OPERATORS: Mapping[str, Callable[[ir.Node], Operation]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MaxPool": _max_pooling,
    "AveragePool": _average_pooling,
    "GlobalAveragePool": _global_average_pooling,
}
