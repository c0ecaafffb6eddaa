"""The quantized graphs by the names of their dialects: which plan, which integers, which remainder.

* cpu: for onnxruntime on the CPU: U8 asymmetric activations, FP32 remainder
* openvino: the same for OpenVINO, without the pairs that no integer kernel of it needs
* tensorrt: for TensorRT: S8, zero-point 0, a scale per output channel, NVIDIA's placement
* rtx: for TensorRT-RTX: S8, zero-point 0, one scale a weight, only where INT8 costs no kernel
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.ranges import silu
from edgewright.optimize.cast_fp16 import CastResult, cast_fp16
from edgewright.optimize.lint import check
from edgewright.optimize.plan import COMPUTE_OPERATORS, QuantPlan, plan_for_cpu
from edgewright.optimize.plan_openvino import plan_for_openvino
from edgewright.optimize.plan_tensorrt import plan_for_rtx, plan_for_tensorrt
from edgewright.optimize.quantize import quantize_for_cpu
from edgewright.optimize.quantize_tensorrt import float_weights, quantize_for_tensorrt
from edgewright.optimize.window_pooling import window_pooling

__all__ = ["DIALECTS", "Quantized", "half_graph", "quantized_graph"]


@dataclass(frozen=True)
class NvidiaDialect:
    """What differs between NVIDIA's targets.

    * parsers: the versions whose rules the graph must keep (see `optimize/lint.py`)
    """

    plan: Callable[[ir.Model, Container[str] | None], QuantPlan]
    per_channel: bool
    parsers: tuple[str, ...]


NVIDIA = {
    "tensorrt": NvidiaDialect(plan_for_tensorrt, True, ("10.3", "10.13", "10.16", "11")),
    "rtx": NvidiaDialect(plan_for_rtx, False, ("rtx",)),
}
CPU = {"cpu": plan_for_cpu, "openvino": plan_for_openvino}
DIALECTS = (*CPU, *NVIDIA)


@dataclass(frozen=True)
class Quantized:
    """A graph with Q/DQ and the plan that it follows."""

    model: ir.Model
    plan: QuantPlan

    @property
    def int8_layers(self) -> int:
        """How many convolutions and matrix products are INT8."""
        return sum(decision.operator in COMPUTE_OPERATORS for decision in self.plan.nodes_in("int8"))


def half_graph(model: ir.Model, table: CalibrationTable) -> CastResult:
    """Folded FP32 `model` in FP16 for NVIDIA's targets, FP32 where the measured extremes demand it.

    Raises `QuantizationError` if a target could not read it.
    """
    result = cast_fp16(window_pooling(model).model, table.ranges("minmax"))
    for dialect in NVIDIA.values():
        for parser in dialect.parsers:
            check(result.model, parser)
    return result


def quantized_graph(
    dialect: str, model: ir.Model, table: CalibrationTable, *, method: str = "mse", remainder: str = "fp16"
) -> Quantized:
    """Folded FP32 `model` with Q/DQ in one of `DIALECTS`; `method` chooses the ranges.

    `remainder`, "fp16" or "fp32", is what NVIDIA's targets run the other layers in; on a CPU it is FP32.
    Raises `QuantizationError` if the graph cannot be quantized, or if its target could not read it.
    """
    if dialect in CPU:
        plan = CPU[dialect](model, table.histograms)
        ranges = table.ranges(method, plan.activations, dict.fromkeys(plan.silu_inputs, silu))
        return Quantized(quantize_for_cpu(model, plan, ranges), plan)
    nvidia = NVIDIA[dialect]
    plan = nvidia.plan(model, table.histograms)  # before the pooling of a gate looks like any other
    pooled = window_pooling(model).model
    ranges = table.ranges(method, plan.activations, signed=True)
    rest, plan = _with_remainder(pooled, plan, table, remainder)
    quantized = quantize_for_tensorrt(rest, plan, ranges, float_weights(pooled), per_channel=nvidia.per_channel)
    for parser in nvidia.parsers:
        check(quantized, parser)
    return Quantized(quantized, plan)


def _with_remainder(
    model: ir.Model, plan: QuantPlan, table: CalibrationTable, remainder: str
) -> tuple[ir.Model, QuantPlan]:
    """The graph that Q/DQ is written into, and the plan with what its other layers really are, and why."""
    if remainder == "fp32":
        return model, _with_float_layers(plan, {decision.node: "FP32 was asked for" for decision in plan.decisions})
    cast = cast_fp16(model, table.ranges("minmax"))
    reasons = {decision.node: decision.reason for decision in cast.decisions if decision.precision == "fp32"}
    return cast.model, _with_float_layers(plan, reasons)


def _with_float_layers(plan: QuantPlan, reasons: Mapping[str, str]) -> QuantPlan:
    """The plan with those of its FP16 layers in FP32 for which there is a reason."""
    decisions = (
        replace(decision, precision="fp32", reason=f"{decision.reason}; not FP16: {reasons[decision.node]}")
        if decision.precision == "fp16" and decision.node in reasons
        else decision
        for decision in plan.decisions
    )
    return replace(plan, decisions=tuple(decisions))
