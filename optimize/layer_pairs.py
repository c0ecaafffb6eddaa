"""Neighbouring layers: a convolution or matrix product, what stands behind it, and the only other layer that reads it.

What is done to a channel between the two (it is scaled, or shifted) can be undone by the second, if everything on the
way passes it on unchanged and nobody else looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.edits import constant_tensor
from edgewright.optimize.plan import COMPUTE_OPERATORS

__all__ = ["POSITIVELY_HOMOGENEOUS", "Layout", "Pair", "bias_of", "layout_of", "pair_behind", "weight_of"]

POSITIVELY_HOMOGENEOUS = (
    *("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
    *("Flatten", "Reshape", "Squeeze", "Dropout", "Identity"),
)
"""f(s · x) = s · f(x) for each channel and each s > 0."""
RESHAPING = ("Flatten", "Reshape", "Squeeze")
POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass(frozen=True)
class Pair:
    """`second` alone reads what `first` gives, through the nodes `between`, in this order.

    * channels: C, the output channels of `first`
    * repeats: columns of `second` for each of them: 1, or H · W behind a Flatten of `[N, C, H, W]`
    """

    first: ir.Node
    second: ir.Node
    between: tuple[ir.Node, ...]
    channels: int
    repeats: int


@dataclass(frozen=True)
class Layout:
    """Where the channels lie in a weight: seen as `shape`, its axes `outputs` and `inputs` are those of the channels.

    The first axis is that of the groups, which both share.
    """

    shape: tuple[int, ...]
    outputs: tuple[int, int]
    inputs: tuple[int, int]

    def along(self, axes: Sequence[int], values: NDArray[Any]) -> NDArray[np.float32]:
        """`values`, one a channel, in a form that broadcasts to `shape` along `axes`."""
        return values.astype(np.float32).reshape([side if axis in axes else 1 for axis, side in enumerate(self.shape)])

    def channels(self, axes: Sequence[int]) -> int:
        """How many there are along `axes`."""
        return math.prod(self.shape[axis] for axis in axes)

    def others(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes of `shape` that are not among `axes`."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in axes)


def layout_of(layer: ir.Node, weight_shape: Sequence[int], repeats: int = 1) -> Layout:
    """Of a Conv `[O, I/g, …]`, ConvTranspose `[I, O/g, …]`, Gemm `[I, O]` (with transB `[O, I]`) or MatMul `[I, O]`.

    `repeats`: the neighbouring columns of a matrix that belong to one input channel.
    """
    first, second, *kernel = weight_shape
    groups = layer.attributes.get_int("group", 1)
    if layer.op_type == "Conv" or (layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1):
        return Layout((groups, first // groups, second // repeats, repeats, *kernel), (0, 1), (0, 2))
    return Layout((groups, first // groups // repeats, repeats, second, *kernel), (0, 3), (0, 1))


def weight_of(layer: ir.Node) -> NDArray[np.float32] | str:
    """The constant weight of a layer that only this layer reads, or why there is none."""
    value = layer.inputs[1] if len(layer.inputs) > 1 else None
    tensor = constant_tensor(value)
    if value is None or tensor is None:
        return "its weight is computed at run time"
    sharing = [str(user.name) for user in value.consumers() if user is not layer]
    if sharing or len(value.uses()) > 1 or value.is_graph_output():
        return f"weight {value.name} is shared with {sharing[0] if sharing else 'another input'}"
    weight: NDArray[np.float32] = tensor.numpy()
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}, not float32"
    if weight.ndim < 2 or (layer.op_type in ("Gemm", "MatMul") and weight.ndim != 2):
        return f"its weight has {weight.ndim} axes"
    return weight if np.isfinite(weight).all() else "its weight is not finite"


def bias_of(layer: ir.Node, channels: int) -> NDArray[np.float32] | str | None:
    """The constant bias `[channels]` as it stands in the graph, None without one, or why it cannot be changed."""
    value = layer.inputs[2] if len(layer.inputs) > 2 else None
    if value is None:
        return None
    tensor = constant_tensor(value)
    if tensor is None:
        return "its bias is computed at run time"
    bias: NDArray[np.float32] = tensor.numpy()
    return bias.reshape(-1) if bias.size == channels else f"its bias has {bias.size} values for {channels} channels"


def pair_behind(first: ir.Node, passing: Collection[str] = POSITIVELY_HOMOGENEOUS) -> Pair | str:
    """The pair that layer `first` begins, or why it begins none.

    `passing`: the operators that may stand between the two, "SiLU" for x · sigmoid(x).
    """
    weight = weight_of(first)
    if isinstance(weight, str):
        return weight
    layout = layout_of(first, weight.shape)
    channels = layout.channels(layout.outputs)
    bias = bias_of(first, channels)
    if isinstance(bias, str):
        return bias
    between: list[ir.Node] = []
    value = first.outputs[0]
    axis = value.shape.rank() - 1 if first.op_type == "MatMul" and value.shape is not None else 1
    while True:
        reader = _only_reader(value, passing)
        if isinstance(reader, str):
            return reader
        if reader.op_type in COMPUTE_OPERATORS:
            break
        obstacle = _obstacle(reader, value, axis, passing)
        if obstacle:
            return obstacle
        between.append(reader)
        value = reader.outputs[0]
    columns = _columns(reader, value, axis)
    if isinstance(columns, str):
        return columns
    if columns > channels and reader.attributes.get_int("group", 1) > 1:
        return f"{reader.name} behind it has columns of one channel in several groups"
    return Pair(first, reader, tuple(between), channels, columns // channels)


def _only_reader(value: ir.Value, passing: Collection[str]) -> ir.Node | str:
    """The node that alone reads `value`, of a SiLU that may be passed the product; or why there is none."""
    if value.is_graph_output():
        return "its result is an output of the graph"
    readers = [node for node, _ in value.uses()]
    product = _silu_product(readers)
    if product is not None:
        return product if "SiLU" in passing else "SiLU behind it does not pass a channel on as it is"
    return readers[0] if len(readers) == 1 else f"{len(readers)} nodes read its result"


def _silu_product(readers: Sequence[ir.Node]) -> ir.Node | None:
    """The Mul of x · sigmoid(x), if that is all that reads x."""
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    products = () if sigmoid is None else sigmoid.outputs[0].consumers()
    if len(readers) != 2 or len(products) != 1 or products[0] not in readers or products[0].op_type != "Mul":
        return None
    return products[0]


def _obstacle(node: ir.Node, value: ir.Value, axis: int, passing: Collection[str]) -> str:
    """Why the channels of `value`, on `axis`, do not pass through `node`, or ""; a product here is that of a SiLU."""
    if node.op_type == "Mul" and "SiLU" in passing and _silu_product([user for user, _ in value.uses()]) is node:
        return ""
    if node.op_type not in passing or node.inputs[0] is not value:
        return f"{node.op_type} behind it does not pass a channel on as it is"
    if (node.op_type == "ReduceMean" and not _is_spatial(node, axis)) or (node.op_type in POOLING and axis != 1):
        return f"{node.name} takes more than the map together"
    if node.op_type in RESHAPING and not _keeps_channels(node, axis):
        return f"{node.name} does not keep the channels together"
    return ""


def _is_spatial(node: ir.Node, axis: int) -> bool:
    """Whether ReduceMean `node` averages over constant axes behind channel axis `axis`."""
    tensor = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes.get_ints("axes", []) if tensor is None else tensor.numpy().tolist()
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or not axes:
        return False
    return all(reduced % shape.rank() > axis for reduced in axes)


def _keeps_channels(node: ir.Node, axis: int) -> bool:
    """Whether a reshaping `node` leaves each channel on axis 1, or side by side in its columns behind a batch axis."""
    source, result = node.inputs[0], node.outputs[0]
    if axis != 1 or source is None or source.shape is None or result.shape is None:
        return False
    before, after = ([side for side in shape[1:] if isinstance(side, int)] for shape in (source.shape, result.shape))
    fixed = len(before) == source.shape.rank() - 1 > 0 and len(after) == result.shape.rank() - 1 > 0
    return fixed and math.prod(before) == math.prod(after) and (len(after) == 1 or before[0] == after[0])


def _columns(second: ir.Node, value: ir.Value, axis: int) -> int | str:
    """How many input channels or columns of layer `second` read `value`, or why it cannot take up a change."""
    weight = weight_of(second)
    if isinstance(weight, str):
        return f"{second.name} behind it cannot take it up: {weight}"
    rank = value.shape.rank() if value.shape is not None else 0
    expected = rank - 1 if second.op_type == "MatMul" else 1
    transposed = second.op_type == "Gemm" and bool(second.attributes.get_int("transA", 0))
    if second.inputs[0] is not value or axis != expected or transposed:
        return f"{second.name} behind it reads the channels along another axis"
    layout = layout_of(second, weight.shape)
    return layout.channels(layout.inputs)
