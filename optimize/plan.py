"""Which nodes run in integers, which stay in floating point, and why: the plan, apart from any dialect.

Rules for the CPU. They follow what onnxruntime can fuse: a convolution becomes an integer kernel only if its input,
its weights and its output are quantized, so Q/DQ stands behind a convolution and its ReLU, never between them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from edgewright.calibration.observers import clamp_limits

__all__ = [
    "COMPUTE_OPERATORS",
    "NOTHING_LEFT_OUT",
    "VALUE_KEEPING",
    "Decision",
    "QuantPlan",
    "activation_inputs",
    "clamped_output",
    "constant_weight",
    "gate_nodes",
    "is_silu",
    "plan_for_cpu",
    "unmeasured",
]

COMPUTE_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
INTEGER_FOLLOWERS = ("MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "Reshape", "Flatten", "Transpose")
VALUE_KEEPING = ("MaxPool", "Reshape", "Flatten", "Transpose")
"""They select or move values: what comes out of them needs no rounding of its own."""
GATE_ENDS = ("Sigmoid", "HardSigmoid", "Clip")
GATE_PARTS = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Sigmoid", "HardSigmoid", "Clip", "Reshape", "Flatten")
POOLS = ("GlobalAveragePool", "ReduceMean")
NOTHING_LEFT_OUT: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Decision:
    """What one node runs in ("int8", "fp16" or "fp32"), and why."""

    node: str
    operator: str
    precision: str
    reason: str


@dataclass(frozen=True)
class QuantPlan:
    """Decisions for the nodes that could be quantized, and the activation tensors that go through Q/DQ.

    * silu_inputs: those of `activations` that a SiLU alone reads, so that only what is left behind it matters
    * readers: per activation the nodes that read the integers; an activation that is not in it has no other readers
    """

    decisions: tuple[Decision, ...]
    activations: tuple[str, ...]
    silu_inputs: tuple[str, ...] = ()
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def nodes_in(self, precision: str) -> tuple[Decision, ...]:
        """The decisions for `precision`."""
        return tuple(decision for decision in self.decisions if decision.precision == precision)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file that a person can read."""
        return {
            "schema": "edgewright.plan/1",
            "decisions": [vars(decision) for decision in self.decisions],
            "activations": list(self.activations),
            "silu_inputs": list(self.silu_inputs),
            "readers": {name: list(nodes) for name, nodes in self.readers.items()},
        }


def plan_for_cpu(
    model: ir.Model, measured: Container[str] | None = None, left_out: Mapping[str, str] = NOTHING_LEFT_OUT
) -> QuantPlan:
    """A plan for folded `model` (FP32, batch normalization gone), for onnxruntime on the CPU.

    `measured` names the activations that the calibration could measure, None for all; what needs another stays float.
    `left_out`: layers that are to stay float though they could be INT8, and why.
    """
    gates = dict(gate_nodes(model.graph))
    decisions: list[Decision] = []
    activations: dict[str, None] = {}  # keeps the order of the graph
    outputs = set(model.graph.outputs)
    for node in model.graph:
        precision, reason = _decide(node, gates, activations)
        if precision == "int8" and node.name in left_out:
            precision, reason = "fp32", left_out[str(node.name)]
        if precision is None:
            continue
        tensors = _quantized_tensors(node, outputs) if precision == "int8" else ()
        names = [str(value.name) for value in tensors]
        missing = unmeasured(names, measured)
        if missing:
            precision, reason = "fp32", missing
        else:
            activations |= dict.fromkeys(names)
        decisions.append(Decision(str(node.name), node.op_type, precision, reason))
    silu_inputs = (str(node.inputs[0].name) for node in model.graph if is_silu(node) and node.inputs[0] is not None)
    return QuantPlan(tuple(decisions), tuple(activations), tuple(name for name in silu_inputs if name in activations))


def unmeasured(names: Iterable[str], measured: Container[str] | None) -> str:
    """Why an operator that needs the ranges of `names` stays float, or "" if all of them are `measured`."""
    missing = next((name for name in names if measured is not None and name not in measured), None)
    return "" if missing is None else f"{missing} was not measured: it has no batch axis in front of a fixed size"


def _quantized_tensors(node: ir.Node, outputs: set[ir.Value]) -> tuple[ir.Value, ...]:
    """The tensors that go through Q/DQ for an integer `node`; logits of a matrix product stay float."""
    result = clamped_output(node)
    stays_float = node.op_type in ("Gemm", "MatMul") and result in outputs
    return activation_inputs(node) if stays_float else (*activation_inputs(node), result)


def _decide(node: ir.Node, gates: Mapping[ir.Node, str], activations: Mapping[str, None]) -> tuple[str | None, str]:
    if node in gates:
        return ("fp32", gates[node]) if node.op_type != "GlobalAveragePool" else (None, "")
    if node.op_type == "ConvTranspose":
        return "fp32", "onnxruntime has no integer ConvTranspose"
    if node.op_type in COMPUTE_OPERATORS:
        if constant_weight(node) is None:
            return "fp32", "its weight is computed at run time"
        return "int8", "constant weight, integer kernel"
    if node.op_type in INTEGER_FOLLOWERS:
        if node.op_type in ("Add", "Concat") and any(value.const_value is not None for value in node.inputs if value):
            return "fp32", "one of its operands is a constant, which stays float"
        if all(str(value.name) in activations for value in activation_inputs(node)):
            return "int8", "all its inputs are integers already"
        return "fp32", "not all its inputs are integers"
    if is_silu(node):
        return "fp32", "SiLU: eight bits for the sigmoid and again for the product lose too much"
    return None, ""


def constant_weight(node: ir.Node) -> ir.Value | None:
    """The constant second operand of a convolution or matrix product, or None if it is computed."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or weight.const_value is None or weight.is_graph_input():
        return None
    return weight


def activation_inputs(node: ir.Node) -> tuple[ir.Value, ...]:
    """The data inputs of a node: not weights, biases, shapes or other constants."""
    values = node.inputs[:1] if node.op_type in (*COMPUTE_OPERATORS, "Reshape") else node.inputs
    return tuple(value for value in values if value is not None and value.const_value is None)


def clamped_output(node: ir.Node) -> ir.Value:
    """The node's output, or that of the ReLU or ReLU6 that alone reads it.

    A range that starts at 0 clamps for free when an integer kernel requantizes; other limits are kernels of their own.
    """
    output = node.outputs[0]
    readers = output.consumers()
    if len(readers) != 1 or output.is_graph_output():
        return output
    limits = clamp_limits(readers[0])
    return readers[0].outputs[0] if limits is not None and limits[0] == 0.0 else output


def is_silu(node: ir.Node) -> bool:
    """Whether `node` is the Sigmoid of x · sigmoid(x), and nothing else reads x."""
    source = node.inputs[0] if node.op_type == "Sigmoid" else None
    products = node.outputs[0].consumers()
    if source is None or len(products) != 1 or products[0].op_type != "Mul" or source not in products[0].inputs:
        return False
    return set(source.consumers()) == {node, products[0]} and not source.is_graph_output()


def gate_nodes(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    """Nodes of squeeze-and-excitation gates: from a global pooling to the sigmoid whose result multiplies a map."""
    for product in graph:
        if product.op_type not in ("Mul", "Div"):  # relu6(x + 3) / 6 is a gate too
            continue
        for gate in product.inputs:
            end = gate.producer() if gate is not None else None
            if end is None or end.op_type not in GATE_ENDS:
                continue
            branch = _branch_from_pooling(end)
            others = [value.producer() for value in product.inputs if value is not None and value is not gate]
            if any(other in branch for other in others if other is not None):
                continue  # x · sigmoid(x) behind a pooling: a SiLU in the classifier's head
            if any(part.op_type in COMPUTE_OPERATORS for part in branch):
                reason = (
                    f"squeeze-and-excitation gate of {product.name}: a tiny share of the work scales whole channels"
                )
                yield from ((part, reason) for part in branch)


def _branch_from_pooling(end: ir.Node) -> tuple[ir.Node, ...]:
    """All nodes between a global pooling and `end`, or nothing if some path leads elsewhere."""
    branch: dict[ir.Node, None] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in branch:
            continue
        branch[node] = None
        if node.op_type in POOLS:
            continue
        if node.op_type not in GATE_PARTS:
            return ()
        producers = [value.producer() for value in activation_inputs(node)]
        if any(producer is None for producer in producers):
            return ()
        waiting += [producer for producer in producers if producer is not None]
    return tuple(branch)
