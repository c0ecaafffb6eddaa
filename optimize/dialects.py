"""The quantized graphs by the names of their dialects: which plan, which integers, which remainder.

* cpu: for onnxruntime on the CPU: U8 asymmetric activations, FP32 remainder
* openvino: the same for OpenVINO, without the pairs that no integer kernel of it needs
* tensorrt: for TensorRT: S8, zero-point 0, a scale per output channel, NVIDIA's placement
* rtx: for TensorRT-RTX: S8, zero-point 0, one scale a weight, only where INT8 costs no kernel
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgewright.calibration.calib_cache import CalibCache, with_cached_ranges
from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.ranges import AUTO, Range, silu
from edgewright.optimize.cast_fp16 import CastResult, cast_fp16
from edgewright.optimize.fuse_silu import fuse_silu
from edgewright.optimize.keep_float import keep_float
from edgewright.optimize.lint import check
from edgewright.optimize.plan import COMPUTE_OPERATORS, NOTHING_LEFT_OUT, QuantPlan, plan_for_cpu
from edgewright.optimize.plan_openvino import plan_for_openvino
from edgewright.optimize.plan_tensorrt import plan_for_rtx, plan_for_tensorrt
from edgewright.optimize.quantize import quantize_for_cpu
from edgewright.optimize.quantize_tensorrt import float_weights, quantize_for_tensorrt
from edgewright.optimize.repairs import Repairs, with_bias_shifts
from edgewright.optimize.simulate import signed_to_unsigned
from edgewright.optimize.window_pooling import window_pooling

__all__ = ["DIALECTS", "Quantized", "Quantizer", "half_graph", "quantized_graph"]

Planner = Callable[[ir.Model, Container[str] | None, Mapping[str, str]], QuantPlan]


@dataclass(frozen=True)
class NvidiaDialect:
    """What differs between NVIDIA's targets.

    * parsers: the versions whose rules the graph must keep (see `optimize/lint.py`)
    """

    plan: Planner
    per_channel: bool
    parsers: tuple[str, ...]


NVIDIA = {
    "tensorrt": NvidiaDialect(plan_for_tensorrt, True, ("10.3", "10.13", "10.16", "11")),
    "rtx": NvidiaDialect(plan_for_rtx, False, ("rtx",)),
}
CPU: dict[str, Planner] = {"cpu": plan_for_cpu, "openvino": plan_for_openvino}
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


class Quantizer:
    """Writes one network in one of `DIALECTS`, as a whole or with some of its layers left in float.

    * model: folded FP32; table: what was measured of its activations
    * method: chooses the ranges, which are chosen once
    * remainder: "fp16" or "fp32", what NVIDIA's targets run the other layers in; on a CPU it is FP32
    * repairs: what is mended in the layers that are INT8
    * cache: a `calib.cache` whose ranges go before those that were measured, on NVIDIA's targets
    """

    def __init__(
        self,
        dialect: str,
        model: ir.Model,
        table: CalibrationTable,
        *,
        method: str = AUTO,
        remainder: str = "fp16",
        repairs: Repairs | None = None,
        cache: CalibCache | None = None,
    ) -> None:
        self.dialect = dialect
        self.model = model
        self.table = table
        self.method = method
        self.remainder = remainder
        self.repairs = repairs or Repairs()
        self.cache = cache if dialect in NVIDIA else None

    @functools.cached_property
    def plan(self) -> QuantPlan:
        """What can be INT8 at all in this dialect."""
        return self._plan(NOTHING_LEFT_OUT)

    @property
    def layers(self) -> tuple[str, ...]:
        """The convolutions and matrix products that can be INT8, in their order."""
        decisions = self.plan.nodes_in("int8")
        return tuple(decision.node for decision in decisions if decision.operator in COMPUTE_OPERATORS)

    @functools.cached_property
    def ranges(self) -> Mapping[str, Range]:
        """Of all activations of `plan`. Raises `CalibrationError` if the cache is another network's."""
        transfers = dict.fromkeys(self.plan.silu_inputs, silu)
        measured = self.table.ranges(self.method, self.plan.activations, transfers, signed=self.dialect in NVIDIA)
        return measured if self.cache is None else with_cached_ranges(measured, self.cache)

    def for_network(self, model: ir.Model, table: CalibrationTable) -> Quantizer:
        """The same dialect, method and remainder for another graph, without the repairs of this one."""
        return Quantizer(self.dialect, model, table, method=self.method, remainder=self.remainder, cache=self.cache)

    def repaired(self, repairs: Repairs) -> Quantizer:
        """The same with other repairs, and the ranges that were chosen already."""
        _ = self.ranges
        other = copy.copy(self)
        other.repairs = repairs
        return other

    def quantized(self, left_out: Mapping[str, str] = NOTHING_LEFT_OUT) -> Quantized:
        """The graph with Q/DQ; `left_out`: layers that stay float, and why.

        Raises `QuantizationError` if the graph cannot be quantized, or if its target could not read it.
        """
        quantized = self._written(left_out, self.remainder)
        if self.dialect == "cpu":  # an operator of onnxruntime's own: what others run and read stays ONNX
            return replace(quantized, model=fuse_silu(quantized.model).model)
        for parser in NVIDIA[self.dialect].parsers if self.dialect in NVIDIA else ():
            check(quantized.model, parser)
        return quantized

    def runnable(self, left_out: Mapping[str, str] = NOTHING_LEFT_OUT) -> ir.Model:
        """The same for onnxruntime on this CPU: same integers and scales in U8, what is not INT8 in FP32."""
        written = self._written(left_out, "fp32").model
        return signed_to_unsigned(written) if self.dialect in NVIDIA else written

    def _plan(self, left_out: Mapping[str, str]) -> QuantPlan:
        planner = CPU[self.dialect] if self.dialect in CPU else NVIDIA[self.dialect].plan
        return planner(self.model, self.table.histograms, left_out)

    def _written(self, left_out: Mapping[str, str], remainder: str) -> Quantized:
        plan = self._plan(left_out) if left_out else self.plan
        integer = {decision.node for decision in plan.nodes_in("int8")}
        shifts = {node: shift for node, shift in self.repairs.bias_shifts.items() if node in integer}
        model = with_bias_shifts(self.model, shifts) if shifts else self.model
        if self.dialect in CPU:
            quantized = quantize_for_cpu(model, plan, self.ranges, self.repairs.integers)
            return Quantized(keep_float(quantized).model, plan)
        nvidia = NVIDIA[self.dialect]
        pooled = window_pooling(model).model  # after the plan, to which a gate's pooling would look like any other
        rest, plan = _with_remainder(pooled, plan, self.table, remainder)
        quantized = quantize_for_tensorrt(
            rest,
            plan,
            self.ranges,
            float_weights(pooled),
            self.repairs.integers,
            per_channel=nvidia.per_channel,
        )
        return Quantized(quantized, plan)


def quantized_graph(
    dialect: str, model: ir.Model, table: CalibrationTable, *, method: str = AUTO, remainder: str = "fp16"
) -> Quantized:
    """Folded FP32 `model` with Q/DQ in one of `DIALECTS`, as far as it can be INT8; see `Quantizer`."""
    return Quantizer(dialect, model, table, method=method, remainder=remainder).quantized()


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
