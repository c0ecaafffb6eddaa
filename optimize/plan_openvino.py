"""Which tensors carry integers for OpenVINO on the CPU: those that an integer kernel reads, and no others.

onnxruntime runs a convolution in integers only if its result is quantized too, so `plan_for_cpu` puts Q/DQ behind each
of them. OpenVINO needs it in front alone: its convolution applies a following activation, SiLU included, to its 32-bit
sums before it rounds. A pair in front of the SiLU would cut that kernel in two, and round a second time.

Both operands of a residual addition keep their pairs. One would do for the kernel that runs any batch, but where shapes
are fixed OpenVINO fuses the addition into the convolution only if both are integers. Measured on ResNet-50, batch 1: a
kernel more for 12 of its 16 additions, and a tenth more time.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import onnx_ir as ir

from edgewright.optimize.plan import NOTHING_LEFT_OUT, QuantPlan, activation_inputs, plan_for_cpu

__all__ = ["plan_for_openvino"]


def plan_for_openvino(
    model: ir.Model, measured: Container[str] | None = None, left_out: Mapping[str, str] = NOTHING_LEFT_OUT
) -> QuantPlan:
    """The decisions of `plan_for_cpu`, without the activations that only nodes in floating point read.

    `measured` names the activations that the calibration could measure, None for all; what needs another stays float.
    `left_out`: layers that are to stay float though they could be INT8, and why.
    """
    plan = plan_for_cpu(model, measured, left_out)
    integer_nodes = {decision.node for decision in plan.nodes_in("int8")}
    read = {value.name for node in model.graph if node.name in integer_nodes for value in activation_inputs(node)}
    return replace(
        plan,
        activations=tuple(name for name in plan.activations if name in read),
        silu_inputs=tuple(name for name in plan.silu_inputs if name in read),
    )
