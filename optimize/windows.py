"""What an operator reads of its input at a time: a window of it, or whole axes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["WEIGHT_INPUT", "WINDOWED", "Window", "constant_ints", "summed_axes", "window_of"]

WINDOWED = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool")
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}
SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")
FIRST_OPSET_OF_ONE_AXIS = 13  # before it Softmax and its like flatten the axes from `axis` on, by default from 1


@dataclass(frozen=True)
class Window:
    """What a convolution or a pooling reads, along each spatial axis; `depthwise`: one group for each channel."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    depthwise: bool = False


def window_of(node: ir.Node) -> Window | None:
    """The window of a convolution or a pooling; None for other operators and where the kernel's shape is not known."""
    if node.op_type not in WINDOWED:
        return None
    weight = node.inputs[WEIGHT_INPUT[node.op_type]] if node.op_type in WEIGHT_INPUT else None
    sides = weight.shape if weight is not None and weight.shape is not None else ()
    shape = tuple(side if isinstance(side, int) else 0 for side in sides)
    kernel = tuple(node.attributes.get_ints("kernel_shape", ())) or shape[2:]
    if not kernel or not all(kernel):
        return None
    ones = (1,) * len(kernel)
    groups = node.attributes.get_int("group", 1)
    per_group = (shape or (0, 0))[0 if node.op_type == "ConvTranspose" else 1] if weight is not None else 0
    channels = per_group if node.op_type == "ConvTranspose" else per_group * groups
    return Window(
        kernel,
        tuple(node.attributes.get_ints("strides", ones)),
        tuple(node.attributes.get_ints("dilations", ones)),
        groups,
        depthwise=groups > 1 and groups == channels,
    )


def summed_axes(node: ir.Node, rank: int, opset: int | None) -> set[int] | None:
    """The axes over the whole of which `node` sums, normalizes or chooses; None if they are not known.

    Empty for operators that do nothing of that. `rank` is that of the first input, `opset` the version of the graph's.
    """
    operator = node.op_type
    if operator.startswith("Global") or operator == "InstanceNormalization":
        return set(range(2, rank))
    if operator == "MeanVarianceNormalization":
        return {axis % rank for axis in node.attributes.get_ints("axes", (0, 2, 3))}
    if operator == "GroupNormalization":
        return set(range(1, rank))
    if operator in ("LayerNormalization", "RMSNormalization"):
        return set(range(node.attributes.get_int("axis", -1) % rank, rank))
    if operator in SOFTMAX:
        return _softmax_axes(node, rank, opset)
    if operator in ("LpNormalization", "TopK"):
        return {node.attributes.get_int("axis", -1) % rank}
    if operator in ("ArgMax", "ArgMin"):
        return {node.attributes.get_int("axis", 0) % rank}
    if operator == "CumSum":
        axes = constant_ints(node, 1)
        return {axis % rank for axis in axes} if axes else None
    return _reduced_axes(node, rank) if operator.startswith("Reduce") else set()


def _softmax_axes(node: ir.Node, rank: int, opset: int | None) -> set[int] | None:
    if opset is None:
        return None
    if opset >= FIRST_OPSET_OF_ONE_AXIS:
        return {node.attributes.get_int("axis", -1) % rank}
    return set(range(node.attributes.get_int("axis", 1) % rank, rank))


def _reduced_axes(node: ir.Node, rank: int) -> set[int] | None:
    """Since opset 13 or 18 the axes are an input, before an attribute; without them all, or none if so wished."""
    is_input = len(node.inputs) > 1 and node.inputs[1] is not None
    axes = constant_ints(node, 1) if is_input else tuple(node.attributes.get_ints("axes", ()))
    if axes is None:
        return None
    keeps = node.attributes.get_int("noop_with_empty_axes", 0)
    return {axis % rank for axis in axes} or (set() if keeps else set(range(rank)))


def constant_ints(node: ir.Node, position: int) -> tuple[int, ...] | None:
    """The integers of a constant input; None if there is none at `position`, or it is computed."""
    value = node.inputs[position] if position < len(node.inputs) else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tuple(int(number) for number in tensor.numpy().reshape(-1))
