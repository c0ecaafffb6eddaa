"""Where NaN and infinity come from: the first node that makes them, for which image, and from what.

Only looked for when something was found: the images of one batch then go through the graph one by one, unoptimized and
with every tensor an output.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.sessions import cpu_session
from edgewright.runtime.errors import CalibrationError

__all__ = ["check_weights", "nonfinite_error"]

Array = NDArray[np.float32]

SUMMING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Exp", "Pow", "ReduceSum", "ReduceMean")
"""Operators whose results for finite operands are too large for float32, where they are not finite."""
SOUND_WEIGHTS = "export the model again from sound weights"


def check_weights(model: ir.Model) -> None:
    """Raises `CalibrationError` for the first node that reads a constant with NaN in it, which no layer can need.

    Infinity is allowed: the limit of a Clip or a mask may be infinite.
    """
    for node in model.graph:
        for name, weight in _constants(node):
            if np.isnan(weight).any():
                raise CalibrationError(f"weight {name} holds NaN, which {_title(node)} reads", SOUND_WEIGHTS)


def nonfinite_error(model: ir.Model, batch: Array, first: int, seen_in: str, fact: str) -> CalibrationError:
    """The error for a `batch` `[N, C, H, W]` that led to NaN or infinity in activation `seen_in`, with its cause.

    `first` is the number of the batch's first image, counted from 1. `fact` is said of `seen_in` where the cause is not
    found again.
    """
    for number, image in enumerate(batch, first):
        if not np.isfinite(image).all():
            return CalibrationError(
                f"image {number} holds {_kinds(image)} behind the preprocessing", "check the preprocessing"
            )
    observed, names = _with_all_outputs(model)
    session = cpu_session(observed, optimized=False)
    (input_name,) = (str(value.name) for value in model.graph.inputs)
    for number, image in enumerate(batch, first):
        values = dict(zip(names, session.run(list(names), {input_name: image[None]}), strict=True))
        values[input_name] = image[None]
        for node in model.graph:
            results = (values[str(value.name)] for value in node.outputs if str(value.name) in values)
            bad = next((array for array in results if not np.isfinite(array).all()), None)
            if bad is not None:
                return CalibrationError(
                    f"{_title(node)} gives {_kinds(bad)} for image {number}: {_cause(node, values)}",
                    SOUND_WEIGHTS if any(_unsound(node)) else "check the weights and the preprocessing",
                )
    last = first + len(batch) - 1
    return CalibrationError(
        f"activation {seen_in} {fact} among images {first} … {last}", "check the weights and the preprocessing"
    )


def _with_all_outputs(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """A copy that gives every float32 tensor that a node computes, and their names."""
    observed = model.clone()
    computed = [v for node in observed.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT and v.name]
    observed.graph.outputs.clear()
    observed.graph.outputs.extend(computed)
    return observed, tuple(str(value.name) for value in computed)


def _cause(node: ir.Node, values: dict[str, Array]) -> str:
    """Why the results of `node`, the first of the graph with any, are not finite."""
    unsound = next(_unsound(node), None)
    if unsound is not None:
        return f"its weight {unsound[0]} holds {_kinds(unsound[1])}"
    read = [values[str(value.name)] for value in node.inputs if value is not None and str(value.name) in values]
    operands = [*read, *(array for _, array in _constants(node))]
    if node.op_type == "Div" and not operands[-1].all():
        return "it divides by 0"
    if not read:
        return "its operands are finite, but its result is not"
    span = f"from {min(float(array.min()) for array in read):.3g} to {max(float(array.max()) for array in read):.3g}"
    if node.op_type in SUMMING:
        return f"it reads finite values {span}, and its results exceed float32"
    return f"it is not defined for all of the finite values that it reads, {span}"


def _unsound(node: ir.Node) -> Iterator[tuple[str, Array]]:
    """The weights of `node` that are not finite."""
    return ((name, weight) for name, weight in _constants(node) if not np.isfinite(weight).all())


def _constants(node: ir.Node) -> Iterator[tuple[str, Array]]:
    """The float32 initializers that `node` reads, by name."""
    for value in node.inputs:
        tensor = value.const_value if value is not None else None
        if value is not None and tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            yield str(value.name), tensor.numpy()


def _kinds(array: Array) -> str:
    """Which of NaN and infinite values `array` holds."""
    kinds = [word for word, found in (("NaN", np.isnan(array)), ("infinite values", np.isinf(array))) if found.any()]
    return " and ".join(kinds)


def _title(node: ir.Node) -> str:
    """Such as "layer features.0 (Conv)"; a node without a name is called by what it gives."""
    return f"layer {node.name or node.outputs[0].name} ({node.op_type})"
