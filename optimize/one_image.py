"""A graph for a batch of one image, with the shape of each tensor.

A fixed batch is often written into the shapes that Reshape takes, so that it cannot be made 1 and the shapes inferred
again. They are inferred for the batch, and the axis that holds it is followed from the inputs on and divided. Reshape
leaves the order of the elements as it is, hence the distance between two images too, by which the axis is found again.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from edgewright.optimize.receptive_field import REGROUPING, image_values
from edgewright.optimize.windows import WEIGHT_INPUT, summed_axes
from edgewright.runtime.errors import ModelError

__all__ = ["for_one_image", "image_inputs"]

OPAQUE = ("Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan")
"""Not followed: they have graphs in them, or axes in an order of their own."""


def for_one_image(model: ir.Model, input_shape: Sequence[int] | None) -> ir.Model:
    """A copy with all shapes for a batch of 1.

    Where the axis of a fixed batch is lost, such as behind a sum over all images, a tensor is left without a shape.
    """
    copy = model.clone()
    if copy.functions:
        InlinePass()(copy)
    written = {value: value.shape for node in copy.graph for value in node.outputs}
    first_sides = [value.shape[0] for value in image_inputs(copy.graph) if value.shape]
    batch_names = {str(side.value) for side in first_sides if not isinstance(side, int)}
    batches = {_set_shape(value, input_shape) for value in image_inputs(copy.graph)}
    for value in written:
        value.shape = None
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    for value, shape in written.items():
        value.shape = _completed(value.shape, shape, batch_names)
    for value in image_values(copy.graph):
        sides = list(value.shape or ())
        if sides and not isinstance(sides[0], int):  # such as what a Range over the batch has chosen
            value.shape = ir.Shape([1, *sides[1:]])
    if batches != {1}:
        _divide_by_batch(copy.graph, max(batches, default=1))
    return copy


class _Place(NamedTuple):
    """Where a tensor holds the batch: in `axis`, of which `inner` elements that follow each other are of one image."""

    axis: int
    inner: int = 1


def _divide_by_batch(graph: ir.Graph, batch: int) -> None:
    """Leaves scalars and inputs for one image as they are, and what depends on nothing else."""
    found: dict[ir.Value, _Place | None] = {}
    for value in image_values(graph):
        node, sides = value.producer(), _sides(value)
        if node is None and sides and sides[0] > 1:
            found[value] = _Place(0) if sides[0] == batch else None
        elif node is not None and sides != () and _reads_images(node, found):
            found[value] = _place_after(node, value, batch, found)
    for value, place in found.items():
        sides = _sides(value)
        if sides is not None and place is not None:
            value.shape = ir.Shape([s // batch if axis == place.axis else s for axis, s in enumerate(sides)])
        elif value.producer() is not None:
            value.shape = None


def _reads_images(node: ir.Node, found: Mapping[ir.Value, _Place | None]) -> bool:
    return node.op_type in OPAQUE or any(value in found for value in node.inputs)


def _place_after(node: ir.Node, output: ir.Value, batch: int, found: Mapping[ir.Value, _Place | None]) -> _Place | None:
    """Where `output` of `node` holds the batch; None if that is not known."""
    sides = _sides(output)
    given = [(index, value) for index, value in enumerate(node.inputs) if value is not None and value in found]
    if sides is None or node.op_type in OPAQUE:
        return None
    if node.op_type in REGROUPING:
        place, before = found[given[0][1]], _sides(given[0][1])
        return None if place is None or before is None else _regrouped(place, before, sides, batch)
    places = {_carried(node, index, value, found[value], sides) for index, value in given}
    return places.pop() if len(places) == 1 else None


def _carried(node: ir.Node, index: int, value: ir.Value, place: _Place | None, after: Sequence[int]) -> _Place | None:
    """Where input `index` brings its batch in an output of sides `after`; the axis must be as long as it was."""
    before = _sides(value)
    if before is None or place is None:
        return None
    moved = _moved(node, index, place, len(before), len(after))
    kept = moved is not None and 0 <= moved.axis < len(after) and after[moved.axis] == before[place.axis]
    return moved if kept else None


def _moved(node: ir.Node, index: int, place: _Place, before: int, after: int) -> _Place | None:
    """Where input `index` of rank `before` brings its batch in an output of rank `after`."""
    operator, axis = node.op_type, place.axis
    if operator == "Transpose":
        order = list(node.attributes.get_ints("perm", tuple(reversed(range(before)))))
        return place._replace(axis=order.index(axis))
    if operator in ("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm"):
        if operator == "Gemm":
            axis = abs(node.attributes.get_int("transB" if index else "transA", 0) - axis)
        summed = before - 1 if index == 0 else max(before - 2, 0)
        return None if axis == summed else place._replace(axis=axis + after - before)
    if operator == "Gather":
        chosen = node.attributes.get_int("axis", 0)
        if index == 1:
            return place._replace(axis=axis + chosen % (after - before + 1))
        chosen %= before
        return None if axis == chosen else place._replace(axis=axis if axis < chosen else axis + after - before)
    if operator in WEIGHT_INPUT and axis != 0:
        return None
    if after < before:
        gone = summed_axes(node, before, None) or set()
        return None if axis in gone else place._replace(axis=axis - sum(other < axis for other in gone))
    return place._replace(axis=axis + after - before)  # broadcast, or as it was


def _regrouped(place: _Place, before: Sequence[int], after: Sequence[int], batch: int) -> _Place | None:
    """The one axis of the new shape that holds the batch as a whole."""
    distance = math.prod(before[place.axis + 1 :]) * place.inner  # between two images
    for axis, side in enumerate(after):
        step = math.prod(after[axis + 1 :])
        if distance % step == 0 and (side * step) % (distance * batch) == 0:
            return _Place(axis, distance // step)
    return None


def _sides(value: ir.Value) -> tuple[int, ...] | None:
    """None if one of them is not known."""
    sides = tuple(side for side in value.shape or () if isinstance(side, int))
    return sides if value.shape is not None and len(sides) == len(value.shape) else None


def _completed(inferred: ir.Shape | None, written: ir.Shape | None, batch_names: Container[str]) -> ir.Shape | None:
    """Sides that shape inference did not find, such as behind a Range, as the file has them."""
    if inferred is None or written is None or inferred.rank() != written.rank():
        inferred = written = inferred or written
    if inferred is None or written is None:
        return None
    sides = (found if isinstance(found, int) else given for found, given in zip(inferred, written, strict=True))
    return ir.Shape([side if isinstance(side, int) else _for_batch_of_one(side, batch_names) for side in sides])


def _for_batch_of_one(side: ir.SymbolicDim, batch_names: Container[str]) -> int | ir.SymbolicDim:
    """Torch's exporter writes "batch" and, where heads or windows are merged with it, "8*batch"."""
    factors = str(side.value).split("*")
    numbers = [
        1 if factor in batch_names else int(factor) for factor in factors if factor in batch_names or factor.isdigit()
    ]
    return math.prod(numbers) if len(numbers) == len(factors) else side


def image_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Without initializers, which old files list among the inputs."""
    return [value for value in graph.inputs if value.const_value is None]


def _set_shape(value: ir.Value, input_shape: Sequence[int] | None) -> int:
    """Makes an input's shape known; its fixed batch, or 1."""
    sides = list(value.shape) if value.shape is not None else [None, *[None] * len(input_shape or ())]
    wanted = list(input_shape or ())
    words = f"input {value.name} of shape [{', '.join(str(side) for side in sides)}]"
    if wanted and (
        len(sides) != len(wanted) + 1
        or any(isinstance(side, int) and side != given for side, given in zip(sides[1:], wanted, strict=True))
    ):
        raise ModelError(
            f"{words} does not take images of shape {wanted}", "give the shape that the graph was made for"
        )
    rest = wanted or sides[1:]
    if not all(isinstance(side, int) and side > 0 for side in rest) or not sides:
        raise ModelError(f"{words} does not say how large an image is", "give it with --input-shape C,H,W")
    batch = sides[0] if isinstance(sides[0], int) else 1
    value.shape = ir.Shape([batch, *rest])
    return max(batch, 1)
