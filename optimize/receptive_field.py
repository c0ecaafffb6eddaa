"""How much of the image one element of each tensor sees, and how far apart the windows of neighbours lie.

The recurrence of Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks" (Distill,
2019), along each axis of the image, for a window of k elements, dilation d and stride s:

    r_out = r_in + d · (k − 1) · j_in,    j_out = j_in · s,    r = j = 1 at the image

A transposed convolution reads ⌈(d · (k − 1) + 1) / s⌉ elements and divides the jump by s; Resize divides it by its
scale. A Slice with a step s multiplies the jump by s; SpaceToDepth with blocks of b is a window and a stride of b,
DepthToSpace divides the jump by b. Of several inputs the largest counts; slices that begin at different elements lie
side by side, and together they see what all of them see. What sums over a whole axis sees all of it, such as global
pooling or a matrix product over a flattened map. So that a matrix product over the channels is told from one over the
image (ConvNeXt has the former), each tensor axis knows the image axes that it runs along.

The gate of squeeze-and-excitation sees the whole image, but only scales what a channel has seen: a factor of one
element per channel that sees everything does not count for the product.

As in the paper, fields are those of an endless image: they may be larger than the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgewright.optimize.windows import WEIGHT_INPUT, WINDOWED, Window, constant_ints, summed_axes, window_of

__all__ = ["Reach", "Window", "image_values", "receptive_fields", "window_of"]

PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
REGROUPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
SAMPLES = {"nearest": 1, "linear": 2, "cubic": 4}  # elements that Resize reads along an axis to give one
UNKNOWN = (
    "Attention", "DeformConv", "Einsum", "GRU", "GatherElements", "GatherND", "GridSample", "If", "LSTM", "Loop",
    "NonMaxSuppression", "RNN", "RoiAlign", "Scan",
)  # fmt: skip
CHANNEL_COUNTS = (1, 3, 4)  # of an image


@dataclass(frozen=True)
class Reach:
    """What one element of a tensor sees of the image.

    * size: in pixels along each spatial axis of the image (height, width); infinite where it sees everything
    * jump: pixels between the windows of neighbours; of no meaning where `size` is infinite
    * axes: for each axis of the tensor, the image axes (0: height, 1: width) that it runs along
    * phase: by how many pixels slices with a step have moved it, along each image axis
    * split: image axes that are cut into pieces, such as the windows of a Swin transformer
    """

    size: tuple[float, ...]
    jump: tuple[float, ...]
    axes: tuple[frozenset[int], ...]
    phase: tuple[float, ...]
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
            reach = _after(node, found, graph.opset_imports.get(""))
            found.update((output, reach) for output in outputs)
    return found


def _pixel(image: ir.Value) -> Reach:
    """Of a graph input: NCHW, or NHWC as TensorFlow writes it; with two axes or fewer there is nothing spatial."""
    shape = _sides(image) or ()
    last = len(shape) == 4 and shape[3] in CHANNEL_COUNTS and shape[1] not in CHANNEL_COUNTS
    spatial = range(1, len(shape) - 1) if last else range(2, len(shape))
    ones = (1.0,) * len(spatial)
    axes = (frozenset({axis - spatial.start}) if axis in spatial else frozenset[int]() for axis in range(len(shape)))
    return Reach(ones, ones, tuple(axes), (0.0,) * len(spatial))


def _after(node: ir.Node, found: Mapping[ir.Value, Reach | None], opset: int | None) -> Reach | None:
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
    if node.op_type == "Slice":
        return _sliced(node, known[0])
    if node.op_type in ("SpaceToDepth", "DepthToSpace"):
        return _rearranged(node, known[0])
    if node.op_type == "Transpose":
        return _transposed(node, known[0])
    if node.op_type == "Gather" and node.inputs[0] in found:
        return _gathered(node, known[0])
    summed = summed_axes(node, len(known[0].axes), opset)
    if summed is None:
        return None
    if not summed:
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
    if node.op_type in WEIGHT_INPUT and reach.axes[1]:  # pieces of the image among the channels that it sums over
        return None
    size, jump = list(reach.size), list(reach.jump)
    for axes, kernel, stride, dilation in zip(
        reach.axes[2:], window.kernel, window.stride, window.dilation, strict=True
    ):
        extent = dilation * (kernel - 1) + 1
        for axis in axes:
            if extent > 1 and (len(axes) > 1 or axis in reach.split):  # neighbours there are none in the image
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


def _sliced(node: ir.Node, reach: Reach) -> Reach | None:
    """Every so manieth element; None if that cannot be told for an axis that runs along the image."""
    if len(node.inputs) < 5 or node.inputs[4] is None:  # no steps, as before opset 10
        return reach
    starts, steps, before = constant_ints(node, 1), constant_ints(node, 4), _sides(node.inputs[0])
    axes = constant_ints(node, 3) if node.inputs[3] is not None else tuple(range(len(steps or ())))
    if starts is None or steps is None or axes is None:
        return None
    jump, phase = list(reach.jump), list(reach.phase)
    for tensor_axis, start, step in zip(axes, starts, steps, strict=True):
        along, side = reach.axes[tensor_axis], before[tensor_axis] if before is not None else None
        if step == 1 or not along:
            continue
        if step < 0 or len(along) > 1 or along & reach.split or (start < 0 and side is None):
            return None
        for axis in along:
            phase[axis] += (start + (side or 0 if start < 0 else 0)) % step * jump[axis]
            jump[axis] *= step
    return replace(reach, jump=tuple(jump), phase=tuple(phase))


def _rearranged(node: ir.Node, reach: Reach) -> Reach | None:
    """SpaceToDepth puts the pixels of a block into the channels of one element, DepthToSpace the other way around."""
    block = node.attributes.get_int("blocksize")
    size, jump = list(reach.size), list(reach.jump)
    if any(len(along) > 1 or along & reach.split for along in reach.axes) or reach.axes[1]:
        return None
    for axis in frozenset[int]().union(*reach.axes[2:]):
        if node.op_type == "SpaceToDepth":
            size[axis] += (block - 1) * jump[axis]
            jump[axis] *= block
        else:
            jump[axis] /= block
    return replace(reach, size=tuple(size), jump=tuple(jump))


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
    """Of inputs that are joined or broadcast to one shape; None if they come from images of different ranks.

    Windows have one middle, but for their phases.
    """
    if len({len(reach.size) for reach in reaches}) > 1:
        return None
    rank = max(len(reach.axes) for reach in reaches)
    aligned = [(frozenset[int](),) * (rank - len(reach.axes)) + reach.axes for reach in reaches]
    image_axes = range(len(reaches[0].size))
    starts = [min(reach.phase[axis] - reach.size[axis] / 2 for reach in reaches) for axis in image_axes]
    ends = [max(reach.phase[axis] + reach.size[axis] / 2 for reach in reaches) for axis in image_axes]
    return Reach(
        tuple(end - start for start, end in zip(starts, ends, strict=True)),
        tuple(max(sides) for sides in zip(*(reach.jump for reach in reaches), strict=True)),
        tuple(frozenset[int]().union(*axes) for axes in zip(*aligned, strict=True)),
        tuple(min(reach.phase[axis] for reach in reaches) for axis in image_axes),
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
