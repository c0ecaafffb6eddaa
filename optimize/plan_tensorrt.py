"""Which nodes run in INT8 on NVIDIA's GPUs, and which tensors carry integers: for TensorRT and for TensorRT-RTX.

TensorRT fuses what follows an INT8 convolution (bias, activation, residual addition, requantization) into its kernel,
so Q/DQ stands on the inputs of convolutions and matrix products and nowhere else, but for one: a residual addition
takes integers on the branch that does not come straight from a convolution, so that the other convolution absorbs it.
MaxPool and concatenation need no pair of their own: the compiler moves one through them, and then all inputs of a
concatenation have the same scale. Source: NVIDIA, "Working with Quantized Types" (TensorRT documentation), and the
placement rules of NVIDIA's Model Optimizer.

TensorRT-RTX 1.7 does less. Read off its listings: an INT8 convolution with one scale for all its weights absorbs bias,
ReLU, Clip and a residual addition, and gives FP16; with a scale per channel, or with SiLU behind it, a second kernel
follows. And nothing that gives FP16 absorbs the quantization of what comes next, unless it is an elementwise kernel of
its own. Every pair elsewhere is one more kernel with the traffic of a whole tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping

import onnx_ir as ir

from edgewright.optimize.plan import (
    COMPUTE_OPERATORS,
    NOTHING_LEFT_OUT,
    Decision,
    QuantPlan,
    constant_weight,
    gate_nodes,
    unmeasured,
)
from edgewright.optimize.qdq import channel_axis

__all__ = ["plan_for_rtx", "plan_for_tensorrt"]

NARROW = 16
"""Below so many input or output channels INT8 kernels pad more than they save (as in NVIDIA's Model Optimizer)."""
NOT_ABSORBED = ("Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Div", "Tanh", "LeakyRelu", "PRelu", "Elu", "Gelu", "Erf")
"""Elementwise operators that TensorRT-RTX fuses with an FP16 convolution, but not with an INT8 one."""


def plan_for_tensorrt(
    model: ir.Model, measured: Container[str] | None = None, left_out: Mapping[str, str] = NOTHING_LEFT_OUT
) -> QuantPlan:
    """A plan for folded FP32 `model` by NVIDIA's rules: what is not "int8" in it is the remainder.

    `measured` names the activations that the calibration could measure, None for all; what needs another stays float.
    `left_out`: layers that are to stay float though they could be INT8, and why.
    """
    plan = _Plan(model, measured)
    for node in model.graph:
        if node.op_type in COMPUTE_OPERATORS:
            obstacle = plan.obstacle(node) or _too_little_work(node)
            plan.decide(node, obstacle or _left_out(node, left_out))
    for node in model.graph:
        branch = _identity_branch(node) if node.op_type == "Add" else None
        if branch is not None and plan.holds_integer_convolution(node, branch):
            plan.read_integers(node, branch, "residual addition: the convolution on its other side absorbs it")
    return plan.finished()


def plan_for_rtx(
    model: ir.Model, measured: Container[str] | None = None, left_out: Mapping[str, str] = NOTHING_LEFT_OUT
) -> QuantPlan:
    """A plan for folded FP32 `model` in which INT8 costs no kernel beyond those of FP16; see `plan_for_tensorrt`."""
    plan = _Plan(model, measured)
    products = _gated_maps(model.graph)
    for node in model.graph:
        if node.op_type in COMPUTE_OPERATORS:
            plan.decide(
                node, plan.obstacle(node) or _costs_a_kernel(node, products) or left_out.get(str(node.name), "")
            )
    return plan.finished()


def _left_out(node: ir.Node, left_out: Mapping[str, str]) -> str:
    """Why a layer is to stay float though it could be INT8, or ""."""
    return left_out[str(node.name)] or "it was left out" if node.name in left_out else ""


class _Plan:
    """Decisions as they are made, and who reads the integers of each tensor."""

    def __init__(self, model: ir.Model, measured: Container[str] | None) -> None:
        self._gates = dict(gate_nodes(model.graph))
        self._measured = measured
        self._decisions: list[Decision] = []
        self._integer: set[ir.Node] = set()
        self._readers: defaultdict[str, list[str]] = defaultdict(list)

    def obstacle(self, node: ir.Node) -> str:
        """Why a convolution or matrix product stays float on any of these targets, or ""."""
        if node in self._gates:
            return self._gates[node]
        if constant_weight(node) is None:
            return "its weight is computed at run time"
        source = node.inputs[0]
        if source is None or source.const_value is not None:
            return "its input is a constant"
        return unmeasured([str(source.name)], self._measured)

    def decide(self, node: ir.Node, obstacle: str) -> None:
        """INT8 unless there is an obstacle."""
        if obstacle:
            self._decisions.append(Decision(str(node.name), node.op_type, "fp16", obstacle))
            return
        source = node.inputs[0]
        assert source is not None
        self._integer.add(node)
        self.read_integers(node, source, "constant weight, dense")

    def read_integers(self, node: ir.Node, value: ir.Value, reason: str) -> None:
        """Notes that `node` reads the integers of `value`, if these could be measured."""
        if not unmeasured([str(value.name)], self._measured):
            self._decisions.append(Decision(str(node.name), node.op_type, "int8", reason))
            self._readers[str(value.name)].append(str(node.name))

    def holds_integer_convolution(self, addition: ir.Node, branch: ir.Value) -> bool:
        """Whether the operand of `addition` that is not `branch` comes straight from an INT8 convolution."""
        (other,) = (value for value in addition.inputs if value is not branch)
        return other is not None and other.producer() in self._integer

    def finished(self) -> QuantPlan:
        readers = {name: tuple(nodes) for name, nodes in self._readers.items()}
        return QuantPlan(tuple(self._decisions), tuple(readers), readers=readers)


def _too_little_work(node: ir.Node) -> str:
    """Why INT8 would not pay for a layer on TensorRT, or ""."""
    if node.attributes.get_int("group", 1) > 1:
        return "grouped or depthwise: INT8 kernels pad its channels, and it is bound by memory anyway"
    narrowest = min(_channels(node))
    return f"narrow: {narrowest} channels, INT8 kernels need {NARROW}" if narrowest < NARROW else ""


def _channels(node: ir.Node) -> tuple[int, int]:
    """Input and output channels of a layer without groups."""
    weight = constant_weight(node)
    assert weight is not None
    assert weight.const_value is not None
    shape = weight.const_value.numpy().shape
    output = channel_axis(node, len(shape))
    other = 1 - output if output < 2 else len(shape) - 2
    return int(shape[other]), int(shape[output])


def _identity_branch(addition: ir.Node) -> ir.Value | None:
    """The operand of a residual addition that takes the shorter way from the fork; None if it adds something else."""
    first, second = (*addition.inputs, None)[:2]
    if first is None or second is None or first is second:
        return None
    if first.const_value is not None or second.const_value is not None or first.shape != second.shape:
        return None
    return first if _layers_back_to_fork(first) < _layers_back_to_fork(second) else second


def _layers_back_to_fork(value: ir.Value) -> int:
    """Convolutions and matrix products between `value` and the last tensor before it that several nodes read."""
    layers = 0
    node = value.producer()
    while node is not None and len(value.uses()) == 1:
        layers += node.op_type in COMPUTE_OPERATORS
        source = node.inputs[0]
        if source is None:
            break
        value, node = source, source.producer()
    return layers


def _gated_maps(graph: ir.Graph) -> set[ir.Value]:
    """Results of gate × map: kernels of their own, which write integers as readily as FP16."""
    gates = {node for node, _ in gate_nodes(graph)}
    products = (node for node in graph if node.op_type == "Mul" and node not in gates)
    return {
        node.outputs[0]
        for node in products
        if any(value is not None and value.producer() in gates for value in node.inputs)
    }


def _costs_a_kernel(node: ir.Node, products: set[ir.Value]) -> str:
    """Why INT8 would cost a kernel more than FP16 on TensorRT-RTX, or ""."""
    if node.op_type != "Conv":
        return "only convolutions absorb what follows"
    if node.attributes.get_int("group", 1) > 1:
        return "grouped or depthwise: INT8 pads its channels fourfold"
    source = node.inputs[0]
    assert source is not None
    if source.producer() is not None and source not in products:
        return "its input comes from a kernel that gives FP16 only: quantizing it is a kernel more"
    if len(source.uses()) > 1 or source.is_graph_output():
        return "others read its input too, which would be written twice"
    ending = next((reader.op_type for reader in node.outputs[0].consumers() if reader.op_type in NOT_ABSORBED), None)
    return "" if ending is None else f"{ending} behind it is a kernel more in INT8, while FP16 absorbs it"
