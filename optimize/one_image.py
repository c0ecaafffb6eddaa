"""A graph for a batch of one image, with the shape of each tensor."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from edgewright.optimize.receptive_field import image_values
from edgewright.runtime.errors import ModelError

__all__ = ["for_one_image", "image_inputs"]


def for_one_image(model: ir.Model, input_shape: Sequence[int] | None) -> ir.Model:
    """A copy with all shapes for a batch of 1; a fixed batch divides the first axis of what depends on the image."""
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
    if len(batches) == 1 and (batch := batches.pop()) > 1:
        for value in image_values(copy.graph):
            sides = list(value.shape or ())
            if sides and isinstance(sides[0], int) and sides[0] % batch == 0:
                value.shape = ir.Shape([sides[0] // batch, *sides[1:]])
    return copy


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
