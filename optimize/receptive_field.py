"""How much of the image one element of each tensor sees, and how far apart the windows of neighbours lie.

The recurrence of Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks" (Distill,
2019), along each axis of the image, for a window of k elements, dilation d and stride s:

    r_out = r_in + d · (k − 1) · j_in,    j_out = j_in · s,    r = j = 1 at the image

A transposed convolution reads ⌈(d · (k − 1) + 1) / s⌉ elements and divides the jump by s; Resize divides it by its
scale. Of several inputs the largest counts. What sums over a whole axis sees all of it, such as global pooling or a
matrix product over a flattened map. So that a matrix product over the channels is told from one over the image
(ConvNeXt has the former), each tensor axis knows the image axes that it runs along.

The gate of squeeze-and-excitation sees the whole image, but only scales what a channel has seen: a factor of one
element per channel that sees everything does not count for the product.

As in the paper, fields are those of an endless image: they may be larger than the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

__all__ = ["Reach", "Window", "image_values", "receptive_fields", "window_of"]

WINDOWED = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool")
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}
PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
REGROUPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
SAMPLES = {"nearest": 1, "linear": 2, "cubic": 4}  # elements that Resize reads along an axis to give one
UNKNOWN = (
    "Attention", "DeformConv", "Einsum", "GRU", "GatherElements", "GatherND", "GridSample", "If", "LSTM", "Loop",
    "NonMaxSuppression", "RNN", "RoiAlign", "Scan",
)  # fmt: skip
CHANNEL_COUNTS = (1, 3, 4)  # of an image


@dataclass(frozen=True)
class Window:
    """What a convolution or a pooling reads, along each spatial axis; `depthwise`: one group for each channel."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    depthwise: bool = False


@dataclass(frozen=True)
class Reach:
    """What one element of a tensor sees of the image.

    * size: in pixels along each spatial axis of the image (height, width); infinite where it sees everything
    * jump: pixels between the windows of neighbours; of no meaning where `size` is infinite
    * axes: for each axis of the tensor, the image axes (0: height, 1: width) that it runs along
    * split: image axes that are cut into pieces, such as the windows of a Swin transformer
    """

    size: tuple[float, ...]
    jump: tuple[float, ...]
    axes: tuple[frozenset[int], ...]
    split: frozenset[int] = frozenset()

    @property
    def everything(self) -> bool:
        """Whether it sees the whole image."""
        return bool(self.size) and all(math.isinf(side) for side in self.size)


def image_values(graph: ir.Graph) -> dict[ir.Value, None]:
    """The tensors that depend on what is in the image, in their order; what depends on its shape alone is not among
    them.
    """
    found = {value: None for value in graph.inputs if value.const_value is None}
    for node in graph:
        if node.op_type in ("Shape", "Size"):
            continue
        if any(value in found for value in node.inputs) or _has_subgraph(node):
            found.update((output, None) for output in node.outputs if output.name)
    return found


def receptive_fields(graph: ir.Graph) -> dict[ir.Value, Reach | None]:
    """The reach of each tensor of `image_values`; None where it is not known.

    Requires inferred shapes; not known is what comes from control flow, operators of other domains, or a tensor without
    a shape where the shape is needed.
    """
    values = image_values(graph)
    found: dict[ir.Value, Reach | None] = {value: _pixel(value) for value in values if value.producer() is None}
    for node in graph:
        outputs = [output for output in node.outputs if output in values]
        if outputs:
            reach = _after(node, found)
            found.update((output, reach) for output in outputs)
    return found


def window_of(node: ir.Node) -> Window | None:
    """The window of a convolution or a pooling; None for other operators and where the kernel's shape is not known."""
    if node.op_type not in WINDOWED:
        return None
    weight = node.inputs[WEIGHT_INPUT[node.op_type]] if node.op_type in WEIGHT_INPUT else None
    shape = () if weight is None else _sides(weight)
    kernel = tuple(node.attributes.get_ints("kernel_shape", ())) or tuple(side or 0 for side in shape or ())[2:]
    if not kernel or not all(kernel):
        return None
    ones = (1,) * len(kernel)
    groups = node.attributes.get_int("group", 1)
    per_group = (shape or (0, 0))[0 if node.op_type == "ConvTranspose" else 1] if weight is not None else 0
    channels = per_group if node.op_type == "ConvTranspose" else (per_group or 0) * groups
    return Window(
        kernel,
        tuple(node.attributes.get_ints("strides", ones)),
        tuple(node.attributes.get_ints("dilations", ones)),
        groups,
        depthwise=groups > 1 and groups == channels,
    )


def _pixel(image: ir.Value) -> Reach:
    """Of a graph input: NCHW, or NHWC as TensorFlow writes it; with two axes or fewer there is nothing spatial."""
    shape = _sides(image) or ()
    last = len(shape) == 4 and shape[3] in CHANNEL_COUNTS and shape[1] not in CHANNEL_COUNTS
    spatial = range(1, len(shape) - 1) if last else range(2, len(shape))
    ones = (1.0,) * len(spatial)
    axes = (frozenset({axis - spatial.start}) if axis in spatial else frozenset[int]() for axis in range(len(shape)))
    return Reach(ones, ones, tuple(axes))


def _after(node: ir.Node, found: Mapping[ir.Value, Reach | None]) -> Reach | None:
    """The reach of what `node` gives."""
    reaches = [found[value] for value in node.inputs if value is not None and value in found]
    known = [reach for reach in reaches if reach is not None]
    if len(known) < len(reaches) or not known or node.op_type in UNKNOWN or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in WINDOWED:
        return _through_window(node, known[0])
    if node.op_type in PRODUCTS:
        return _through_product(node, found)
    if node.op_type in REGROUPING:
        return _regrouped(node, known[0])
    if node.op_type in ("Resize", "Upsample"):
        return _resized(node, known[0])
    if node.op_type == "Transpose":
        return _transposed(node, known[0])
    if node.op_type == "Gather" and node.inputs[0] in found:
        return _gathered(node, known[0])
    summed = _summed_axes(node, len(known[0].axes))
    if summed is None:
        largest = _largest(_without_gates(node, found) if node.op_type == "Mul" else known)
        return largest if largest is not None and _rank(node.outputs[0]) in (None, len(largest.axes)) else None
    whole = _over_all(known[0], summed)
    rank = _rank(node.outputs[0])
    if whole is None or rank is None or rank == len(whole.axes):
        return whole
    return replace(whole, axes=tuple(axes for axis, axes in enumerate(whole.axes) if axis not in summed))


def _through_window(node: ir.Node, reach: Reach) -> Reach | None:
    window = window_of(node)
    if window is None or len(window.kernel) != len(reach.axes) - 2:
        return None
    size, jump = list(reach.size), list(reach.jump)
    for axes, kernel, stride, dilation in zip(
        reach.axes[2:], window.kernel, window.stride, window.dilation, strict=True
    ):
        extent = dilation * (kernel - 1) + 1
        for axis in axes:
            if len(axes) > 1 and extent > 1:  # height and width in one axis: a window there is none in the image
                return None
            if node.op_type == "ConvTranspose":
                size[axis] += (math.ceil(extent / stride) - 1) * jump[axis]
                jump[axis] /= stride
            else:
                size[axis] += (extent - 1) * jump[axis]
                jump[axis] *= stride
    return replace(reach, size=tuple(size), jump=tuple(jump))


def _through_product(node: ir.Node, found: Mapping[ir.Value, Reach | None]) -> Reach | None:
    """Rows of the left operand times columns of the right one; what both sum over is seen as a whole."""
    sides = [node.inputs[index] for index in PRODUCTS[node.op_type]]
    flipped = [bool(node.attributes.get_int(name, 0)) for name in ("transA", "transB")]
    parts = []
    for position, value in enumerate(sides):
        reach = found.get(value) if value is not None else None
        if reach is None:
            continue
        axes = reach.axes[:-2] + (reach.axes[:-3:-1] if flipped[position] else reach.axes[-2:])
        summed = len(axes) - (1 if position == 0 or len(axes) == 1 else 2)
        whole = _over_all(replace(reach, axes=axes), {summed})
        if whole is None:
            return None
        kept = [frozenset[int]() if axis == summed else part for axis, part in enumerate(whole.axes)]
        parts.append(replace(whole, axes=tuple(kept)))
    largest = _largest(parts) if parts else None
    rank = _rank(node.outputs[0])
    return largest if largest is None or rank in (None, len(largest.axes)) else None


def _transposed(node: ir.Node, reach: Reach) -> Reach | None:
    order = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(reach.axes))))))
    if len(order) != len(reach.axes):
        return None
    return replace(reach, axes=tuple(reach.axes[axis] for axis in order))


def _regrouped(node: ir.Node, reach: Reach) -> Reach | None:
    """Axes that are merged or split: the new axes of a group run along all that its old axes ran along."""
    before, after = _sides(node.inputs[0]), _sides(node.outputs[0])
    if before is None or after is None or None in before or None in after:
        return None
    axes, split = [], reach.split
    for old, new in _groups([side or 0 for side in before], [side or 0 for side in after]):
        along = frozenset[int]().union(*(reach.axes[axis] for axis in old))
        axes += [along if after[axis] != 1 or len(new) == 1 else frozenset[int]() for axis in new]
        if sum(after[axis] != 1 for axis in new) > 1:
            split |= along
    return replace(reach, axes=tuple(axes), split=split)


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Shortest runs of axes with equal numbers of elements: [8, 4, 4] and [2, 4, 16] give 8 | 2·4 and 4·4 | 16."""
    old, new = 0, 0
    while old < len(before) or new < len(after):
        left, right = [old][: len(before) - old], [new][: len(after) - new]
        elements = [math.prod(before[axis] for axis in left), math.prod(after[axis] for axis in right)]
        while elements[0] != elements[1]:
            if elements[0] < elements[1] and left and left[-1] + 1 < len(before):
                left.append(left[-1] + 1)
                elements[0] *= before[left[-1]]
            elif right and right[-1] + 1 < len(after):
                right.append(right[-1] + 1)
                elements[1] *= after[right[-1]]
            else:
                break
        yield left, right
        old, new = old + len(left), new + len(right)


def _resized(node: ir.Node, reach: Reach) -> Reach | None:
    before, after = _sides(node.inputs[0]), _sides(node.outputs[0])
    if before is None or after is None or None in before or None in after:
        return None
    samples = SAMPLES.get(node.attributes.get_string("mode", "nearest"), 2)
    size, jump = list(reach.size), list(reach.jump)
    for axes, old, new in zip(reach.axes, before, after, strict=True):
        for axis in axes:
            if old != new and old and new:
                size[axis] += (samples - 1) * jump[axis]
                jump[axis] *= old / new
    return replace(reach, size=tuple(size), jump=tuple(jump))


def _gathered(node: ir.Node, reach: Reach) -> Reach | None:
    """Elements chosen along one axis, which the axes of the indices replace."""
    rank = _rank(node.inputs[1])
    if rank is None:
        return None
    axis = node.attributes.get_int("axis", 0) % len(reach.axes)
    return replace(reach, axes=reach.axes[:axis] + (reach.axes[axis],) * rank + reach.axes[axis + 1 :])


def _summed_axes(node: ir.Node, rank: int) -> set[int] | None:
    """The axes over the whole of which an operator sums, normalizes or chooses; None if it does nothing of that."""
    operator = node.op_type
    if operator.startswith("Global") or operator in ("InstanceNormalization", "MeanVarianceNormalization"):
        return set(range(2, rank))
    if operator == "GroupNormalization":
        return set(range(1, rank))
    if operator in ("LayerNormalization", "RMSNormalization"):
        return set(range(node.attributes.get_int("axis", -1) % rank, rank))
    if operator in ("Softmax", "LogSoftmax", "LpNormalization", "CumSum", "TopK"):
        return {node.attributes.get_int("axis", -1) % rank}
    if operator in ("ArgMax", "ArgMin"):
        return {node.attributes.get_int("axis", 0) % rank}
    return _reduced_axes(node, rank) if operator.startswith("Reduce") else None


def _reduced_axes(node: ir.Node, rank: int) -> set[int]:
    """Since opset 13 or 18 the axes are an input, before an attribute; without them all."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = ir.convenience.get_const_tensor(given) if given is not None else None
    axes = tensor.numpy().reshape(-1).tolist() if tensor is not None else node.attributes.get_ints("axes", ())
    return {axis % rank for axis in axes} or set(range(rank))


def _over_all(reach: Reach, summed: Iterable[int]) -> Reach | None:
    """With everything seen along the tensor axes `summed`; None if one of them runs along pieces of an image axis."""
    whole = frozenset[int]().union(*(reach.axes[axis] for axis in summed))
    if whole & reach.split:
        return None
    size = tuple(math.inf if axis in whole else side for axis, side in enumerate(reach.size))
    return replace(reach, size=size)


def _without_gates(node: ir.Node, found: Mapping[ir.Value, Reach | None]) -> Sequence[Reach]:
    """Of the factors of a product; one that sees everything may stand beside none but its like."""
    factors = [(value, found[value]) for value in node.inputs if value is not None and value in found]
    known = [(value, reach) for value, reach in factors if reach is not None]
    return [reach for value, reach in known if not _is_gate(value, reach)] or [reach for _, reach in known]


def _is_gate(value: ir.Value, reach: Reach) -> bool:
    """One element per channel that sees everything."""
    sides = _sides(value)
    return (
        reach.everything
        and sides is not None
        and all(side == 1 for side, axes in zip(sides, reach.axes, strict=True) if axes)
    )


def _largest(reaches: Sequence[Reach]) -> Reach | None:
    """Of inputs that are broadcast to one shape; None if they come from images of different ranks."""
    if len({len(reach.size) for reach in reaches}) > 1:
        return None
    rank = max(len(reach.axes) for reach in reaches)
    aligned = [(frozenset[int](),) * (rank - len(reach.axes)) + reach.axes for reach in reaches]
    return Reach(
        tuple(max(sides) for sides in zip(*(reach.size for reach in reaches), strict=True)),
        tuple(max(sides) for sides in zip(*(reach.jump for reach in reaches), strict=True)),
        tuple(frozenset[int]().union(*axes) for axes in zip(*aligned, strict=True)),
        frozenset[int]().union(*(reach.split for reach in reaches)),
    )


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _rank(value: ir.Value | None) -> int | None:
    return value.shape.rank() if value is not None and value.shape is not None else None


def _sides(value: ir.Value | None) -> tuple[int | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(side if isinstance(side, int) else None for side in value.shape)
