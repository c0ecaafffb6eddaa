"""What is mended in the layers that run in INT8, and in no others: their biases and the rounding of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.edits import add_constant, constant_tensor, remove_if_unused, value_names

__all__ = ["Repairs", "with_bias_shifts"]


@dataclass(frozen=True)
class Repairs:
    """By the names of convolutions and matrix products.

    * bias_shifts: float32 `[O]`, added to the bias of the layer's O output channels
    * integers: int8 in the shape of the weight, instead of the nearest ones
    """

    bias_shifts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    integers: Mapping[str, NDArray[np.int8]] = field(default_factory=dict)


def with_bias_shifts(model: ir.Model, shifts: Mapping[str, NDArray[np.float32]]) -> ir.Model:
    """A copy of FP32 `model` whose convolutions and Gemms in `shifts` add them to their biases, or have one now.

    A bias that others read too stays theirs as it was. A MatMul has no bias to shift: it is left alone.
    """
    shifted = model.clone()
    names = value_names(shifted)
    for node in shifted.graph:
        shift = shifts.get(str(node.name))
        if shift is None or node.op_type == "MatMul":
            continue
        old = node.inputs[2] if len(node.inputs) > 2 else None
        constant = constant_tensor(old)
        if old is not None and constant is None:
            continue  # computed at run time: nothing constant to add to
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        scaled = np.zeros(1) if constant is None else beta * constant.numpy().reshape(-1)  # Gemm's may be [1, O]
        values = (np.broadcast_to(scaled, shift.shape) + shift).astype(np.float32)
        if beta != 1.0:
            node.attributes.add(ir.AttrFloat32("beta", 1.0))  # the old one is inside the bias now
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, add_constant(shifted.graph, values, f"{node.name}::shifted_bias", names))
        remove_if_unused(old)
    return shifted
