"""FP32 → FP16 inside and FP32 at the borders: which nodes may, which would rather, and the fewest Casts between them.

A node is bound to FP32 where half precision would overflow, lose everything, or has not been looked at (`_check`).
Convolutions and matrix products that are not bound are FP16: there it pays. All other nodes take either side, and the
side is chosen so that the number of Casts is the least possible: a minimum cut (Ford and Fulkerson 1956) between the
terminals FP16 and FP32. Each float tensor, from its producer p to its readers r, is a hyperedge that costs one Cast
if p is on one side and any reader on the other, however many there are:

    p ──1──► a ──∞──► every r          cut if p is FP16 and an r is FP32
    every r ──∞──► b ──1──► p          cut if p is FP32 and an r is FP16

Graph inputs and outputs are FP32. An initializer costs nothing: where both sides read it, it exists in both forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx
import numpy as np
import onnx
import onnx_ir as ir
from networkx.algorithms.flow import shortest_augmenting_path
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from edgewright.calibration.ranges import Range
from edgewright.optimize.plan import COMPUTE_OPERATORS, Decision, constant_weight
from edgewright.runtime.errors import QuantizationError

__all__ = ["CastResult", "cast_fp16"]

FP16_MAX = float(np.finfo(np.float16).max)  # 65504
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)  # 2**-14; below, bits are lost one by one
HALF_ULP = float(np.finfo(np.float16).eps) / 2  # 2**-11: rounding to nearest loses at most this part of a number
HEADROOM = 2.0  # other images may go so far beyond the calibration's; a maximum over some hundred seldom doubles

FP16, FP32 = "fp16", "fp32"
_SUMS = "it sums squares, exponentials or the like inside, which may overflow although its inputs and outputs fit"
_STEEP = "it is too steep: a little beyond the calibrated range its output leaves FP16"
SENSITIVE_OPERATORS = {
    **dict.fromkeys(("InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"), _SUMS),
    **dict.fromkeys(("MeanVarianceNormalization", "LpNormalization", "LRN", "LpPool", "GlobalLpPool"), _SUMS),
    **dict.fromkeys(("ReduceSumSquare", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"), _SUMS),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Softplus"), _SUMS),
    **dict.fromkeys(("Exp", "Pow"), _STEEP),
}
"""Operators that stay in FP32 whatever the ranges are. Averages are not among them: like convolutions they are linear,
and kernels accumulate both in more than half precision."""
SHAPE_OPERATORS = ("Shape", "Size")  # they read no values, so any may pass and none is decided on
Float32 = NDArray[np.float32]
Uses = Sequence[tuple[ir.Node, int]]  # where a tensor is read: node and index of the input


class _StaysFloatError(Exception):
    """Carries the reason why a node is bound to FP32."""


@dataclass(frozen=True)
class CastResult:
    """What `cast_fp16` returns.

    * model: FP16 inside, FP32 at the borders
    * casts: number of Casts that were inserted
    * decisions: "fp16" or "fp32" and why, for each node that computes with floats, in the order of the graph
    """

    model: ir.Model
    casts: int
    decisions: tuple[Decision, ...]


def cast_fp16(model: ir.Model, ranges: Mapping[str, Range]) -> CastResult:
    """A copy of FP32 `model` with FP16 tensors inside; `ranges` are the calibrated extremes per activation tensor.

    Requires a topologically sorted graph, folded (`fold_batchnorm`), with the types of all tensors (as shape inference
    leaves them). Tensors keep their names, graph inputs and outputs their types too; a Cast of `x` yields `x::fp16` or
    `x::fp32`. Constant nodes become initializers.

    Raises `QuantizationError` if a node has subgraphs, a tensor has no type, or an initializer is not finite.
    """
    cast = model.clone()
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(cast)
    graph = cast.graph
    _check_supported(graph)
    nodes = [node for node in graph if any(_is_float(value) for value in (*node.inputs, *node.outputs))]
    free: dict[ir.Node, tuple[int, ...]] = {}  # the nodes that may be FP16: which of their inputs would be
    bound: dict[ir.Node, str] = {}  # the others: why not
    for node in nodes:
        try:
            free[node] = _check(node, graph.opset_imports, ranges)
        except _StaysFloatError as error:
            bound[node] = str(error)
    chosen = _fewest_casts(graph, free)
    decisions = tuple(_decision(node, bound, chosen) for node in nodes if node.op_type not in SHAPE_OPERATORS)
    casts = _retype(graph, {node: indices for node, indices in free.items() if node in chosen})
    return CastResult(cast, casts, decisions)


def _check_supported(graph: ir.Graph) -> None:
    for node in graph:
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            raise QuantizationError(f"{node.name} ({node.op_type}) has subgraphs", "export without control flow")
        for output in node.outputs:
            if output.name and output.type is None:
                raise QuantizationError(f"tensor {output.name} has no type", "run shape inference first")
    for name, value in graph.initializers.items():
        if value.const_value is not None and _is_float(value) and not np.isfinite(value.const_value.numpy()).all():
            raise QuantizationError(f"initializer {name} is not finite", "export the model again from sound weights")


def _decision(node: ir.Node, bound: Mapping[ir.Node, str], chosen: set[ir.Node]) -> Decision:
    reason = bound.get(node, "fits FP16" if node in chosen else "fits FP16, but needs more Casts there")
    return Decision(str(node.name), node.op_type, FP16 if node in chosen else FP32, reason)


def _check(node: ir.Node, opsets: Mapping[str, int], ranges: Mapping[str, Range]) -> tuple[int, ...]:
    """Indices of the float inputs that are FP16 where `node` is; raises _StaysFloatError if it must be FP32."""
    indices = _fp16_inputs(node, opsets)
    if node.op_type in SHAPE_OPERATORS:
        return indices
    if node.op_type in SENSITIVE_OPERATORS:
        raise _StaysFloatError(SENSITIVE_OPERATORS[node.op_type])
    for value in (*(node.inputs[index] for index in indices), *filter(_is_float, node.outputs)):
        assert value is not None
        _check_magnitude(node, value, ranges)
    if node.op_type in COMPUTE_OPERATORS:
        _check_channels(node, ranges)
    return indices


def _fp16_inputs(node: ir.Node, opsets: Mapping[str, int]) -> tuple[int, ...]:
    """Indices of float inputs that may be FP16 in ONNX, not Resize's scales; _StaysFloatError if outputs may not."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        raise _StaysFloatError(f"ONNX does not specify {node.domain}.{node.op_type}") from None
    inputs = {index: _formal(schema.inputs, index) for index, value in enumerate(node.inputs) if _is_float(value)}
    results = [_formal(schema.outputs, index) for index, value in enumerate(node.outputs) if _is_float(value)]
    if not {formal.type_str for formal in results} <= {formal.type_str for formal in inputs.values()}:
        raise _StaysFloatError("the type of its output is fixed, by an attribute or the specification")
    indices = tuple(index for index, formal in inputs.items() if "tensor(float16)" in formal.types)
    containers = any(isinstance(value.type, ir.SequenceType | ir.OptionalType) for value in node.outputs)
    if not indices or containers or any("tensor(float16)" not in formal.types for formal in results):
        raise _StaysFloatError(f"{node.op_type} has no FP16 form in ONNX")
    return indices


def _formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> onnx.defs.OpSchema.FormalParameter:
    return formals[min(index, len(formals) - 1)]  # the last one may be variadic


def _magnitude(value: ir.Value, ranges: Mapping[str, Range]) -> float:
    """The largest |x|, exact of a constant, else calibrated; raises _StaysFloatError if it was not measured."""
    if _is_constant(value) and value.const_value is not None:
        return float(np.abs(value.const_value.numpy()).max(initial=0.0))
    interval = ranges.get(str(value.name))
    if interval is None:
        raise _StaysFloatError(f"{value.name} was not measured")
    return max(abs(interval.low), abs(interval.high))


def _check_magnitude(node: ir.Node, value: ir.Value, ranges: Mapping[str, Range]) -> None:
    magnitude = _magnitude(value, ranges)
    limit = FP16_MAX if _is_constant(value) else FP16_MAX / HEADROOM
    if not magnitude <= limit:
        raise _StaysFloatError(f"{value.name} reaches {magnitude:.6g}, more than {limit:.0f}, the safe part of FP16")
    if _is_constant(value) and node.op_type in COMPUTE_OPERATORS:
        return  # weights are looked at channel by channel, and a tiny bias counts for nothing
    if 0 < magnitude < SMALLEST_NORMAL:
        raise _StaysFloatError(f"{value.name} stays within {magnitude:.3g}, below the normal numbers of FP16")


def _check_channels(node: ir.Node, ranges: Mapping[str, Range]) -> None:
    """Raises _StaysFloatError if an output channel's weights are all subnormal in FP16 or 0, and that matters.

    It does not where rounding them changes the output by less than rounding the output does anyway, which is about
    the channel's bias. Such are the dead channels that folding leaves where gamma is almost 0: most networks have some.
    """
    source, weight = node.inputs[0], constant_weight(node)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if source is None or weight is None or weight.const_value is None:
        return
    rows = _rows(node, weight.const_value.numpy())
    maxima = np.abs(rows).max(axis=1, initial=0.0)
    biases = np.zeros(len(rows))
    if bias is not None and bias.const_value is not None and bias.const_value.size == len(rows):
        biases = np.abs(bias.const_value.numpy().reshape(-1)) * abs(node.attributes.get_float("beta", 1.0))  # Gemm's
    lost = np.abs(rows - rows.astype(np.float16)).sum(axis=1, dtype=np.float64) * _magnitude(source, ranges) * HEADROOM
    lost *= abs(node.attributes.get_float("alpha", 1.0))  # Gemm's
    count = int(((maxima > 0) & (maxima < SMALLEST_NORMAL) & (lost > biases * HALF_ULP)).sum())
    if count:
        raise _StaysFloatError(f"{weight.name}: {count} of {len(rows)} channels are below the normal numbers of FP16")


def _rows(node: ir.Node, weight: Float32) -> Float32:
    """`weight` of `node` with all that enters one output channel in a row, `[Cout, K]`."""
    if node.op_type == "Conv":  # [Cout, Cin/g, ...]
        return np.reshape(weight, (len(weight), -1))
    if node.op_type == "ConvTranspose":  # [Cin, Cout/g, ...], in g groups of rows
        groups, columns = node.attributes.get_int("group", 1), weight.shape[1]
        grouped = weight.reshape(groups, len(weight) // groups, columns, -1)
        return np.reshape(grouped.swapaxes(1, 2), (groups * columns, -1))
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:  # [N, K]
        return weight
    matrices = weight if weight.ndim > 1 else weight[:, None]  # [..., K, N], or MatMul's [K]
    return np.reshape(matrices.swapaxes(-1, -2), (-1, matrices.shape[-2]))


def _fewest_casts(graph: ir.Graph, free: Mapping[ir.Node, tuple[int, ...]]) -> set[ir.Node]:
    """The FP16 side of a minimum cut; of several the largest. `free`: nodes to indices of inputs that would be FP16."""
    network = networkx.DiGraph()
    network.add_nodes_from((FP16, FP32))

    def side(node: ir.Node | None) -> object:
        if node is None or node not in free:
            return FP32
        return FP16 if node.op_type in COMPUTE_OPERATORS else node

    for value in _activations(graph):
        producer = side(value.producer())
        readers = {side(node) if index in free.get(node, ()) else FP32 for node, index in value.uses()}
        if value.is_graph_output():
            readers.add(FP32)
        for reader in readers - {producer}:  # an edge without a capacity has an infinite one
            network.add_edge(producer, ("a", value), capacity=1)
            network.add_edge(("a", value), reader)
            network.add_edge(reader, ("b", value))
            network.add_edge(("b", value), producer, capacity=1)
    # networkx puts what cannot reach FP32 in the residual network on FP16's side: the largest one
    _, (_, fp32) = networkx.minimum_cut(network, FP16, FP32, flow_func=shortest_augmenting_path)
    return {node for node in free if side(node) not in fp32}


def _activations(graph: ir.Graph) -> Iterator[ir.Value]:
    """Float tensors that are not constant."""
    values = (*graph.inputs, *(output for node in graph for output in node.outputs))
    return (value for value in values if _is_float(value))


def _retype(graph: ir.Graph, halves: Mapping[ir.Node, tuple[int, ...]]) -> int:
    """Types every float tensor and inserts the Casts; returns their number. `halves`: FP16 nodes to FP16 inputs."""
    for value in tuple(graph.initializers.values()):
        uses = [use for use in value.uses() if use.idx in halves.get(use.node, ())]
        if uses and _is_constant(value):
            _convert_constant(graph, value, uses)
    casts = 0
    for value in tuple(_activations(graph)):
        half = value.producer() in halves
        if half:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        others = [use for use in value.uses() if (use.idx in halves.get(use.node, ())) != half]
        if others or (half and value.is_graph_output()):
            _insert_cast(graph, value, others, ir.DataType.FLOAT if half else ir.DataType.FLOAT16)
            casts += 1
    return casts


def _convert_constant(graph: ir.Graph, value: ir.Value, uses: Uses) -> None:
    """FP16 for `uses`: in place, or beside the FP32 form if that has other readers."""
    assert value.const_value is not None
    alone = len(uses) == len(value.uses()) and not value.is_graph_output()
    half = value if alone else ir.Value(name=f"{value.name}::{FP16}", shape=value.shape)
    for node, index in uses:
        node.replace_input_with(index, half)
    half.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=half.name)  # to nearest even
    half.type = ir.TensorType(ir.DataType.FLOAT16)
    if not alone:
        graph.register_initializer(half)


def _insert_cast(graph: ir.Graph, value: ir.Value, uses: Uses, data_type: ir.DataType) -> None:
    """One Cast of `value` that all `uses` read, and that takes its name where it is an output of the graph."""
    name = f"{value.name}::{FP16 if data_type == ir.DataType.FLOAT16 else FP32}"
    cast = ir.node("Cast", [value], {"to": data_type}, name=name)
    result = cast.outputs[0]
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(data_type)
    for node, index in uses:
        node.replace_input_with(index, result)
    if value.is_graph_output() and data_type == ir.DataType.FLOAT:
        result.name, value.name = value.name, f"{value.name}::{FP16}"
        for position, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[position] = result
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _is_constant(value: ir.Value) -> bool:
    """Whether `value` is an initializer that callers cannot override."""
    return value.is_initializer() and not value.is_graph_input()
