"""Plan and ranges → explicit Q/DQ, in the dialect of TensorRT and TensorRT-RTX.

    x ── QuantizeLinear (S8, zero-point 0) ── DequantizeLinear ── Conv ── …
         INT8 initializer ── DequantizeLinear (symmetric) ─────────┘   bias stays float

Scales have the type of the tensor they belong to, FP16 in a graph that was cast (opset 19), since TensorRT builds the
network strongly typed. Only the nodes that the plan names read integers; everything else reads the tensor as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.ranges import Range
from edgewright.optimize.plan import COMPUTE_OPERATORS, VALUE_KEEPING, QuantPlan, constant_weight
from edgewright.optimize.qdq import (
    NEAREST,
    QParams,
    channel_axis,
    check_names,
    dequantized_weight,
    insert_activation_pair,
    range_of,
    symmetric_s8,
    weight_s8,
)
from edgewright.runtime.errors import QuantizationError

__all__ = ["float_weights", "quantize_for_tensorrt"]


def quantize_for_tensorrt(
    model: ir.Model,
    plan: QuantPlan,
    ranges: Mapping[str, Range],
    weights: Mapping[str, NDArray[np.float32]],
    rounded: Mapping[str, NDArray[np.int8]] = NEAREST,
    *,
    per_channel: bool = True,
) -> ir.Model:
    """A copy of `model` with Q/DQ where `plan` says so.

    `model` is the FP32 graph that the plan was made for, or what `cast_fp16` made of it. `ranges`: symmetric, per
    activation of the FP32 graph. `weights`: float32 of the planned layers, by the names of the nodes, so that none is
    rounded twice; `rounded`, by the same names, their integers where they are not the nearest ones. `per_channel` gives
    each output channel a scale of its own, else a weight has one.
    Raises `QuantizationError` if a range is missing, a weight is not finite, or nodes share a name.
    """
    check_names(plan)
    quantized = model.clone()
    graph = quantized.graph
    nodes = {str(node.name): node for node in graph}
    for decision in plan.nodes_in("int8"):
        if decision.operator in COMPUTE_OPERATORS:
            name = decision.node
            _quantize_weight(graph, nodes[name], weights[name], rounded.get(name), per_channel=per_channel)
    reads = _integer_reads(nodes, plan)
    params = {value: _params(value, reads, ranges) for value in reads}
    for value, uses in reads.items():
        insert_activation_pair(graph, value, params[value], uses)
    graph.sort()
    return quantized


def float_weights(model: ir.Model) -> dict[str, NDArray[np.float32]]:
    """The constant weights of the convolutions and matrix products of FP32 `model`, by the names of the nodes."""
    weights = {}
    for node in model.graph:
        weight = constant_weight(node) if node.op_type in COMPUTE_OPERATORS else None
        if weight is not None and weight.const_value is not None:
            weights[str(node.name)] = weight.const_value.numpy()
    return weights


def _quantize_weight(
    graph: ir.Graph,
    node: ir.Node,
    weight: NDArray[np.float32],
    rounded: NDArray[np.int8] | None,
    *,
    per_channel: bool,
) -> None:
    axis = channel_axis(node, weight.ndim) if per_channel else None
    try:
        params = weight_s8(weight, axis, dtype=_dtype(node.inputs[0]))
    except QuantizationError as error:
        raise QuantizationError(f"{node.name}: {error.message}", error.remedy) from None
    dequantized_weight(graph, node, weight, params, rounded)


def _integer_reads(nodes: Mapping[str, ir.Node], plan: QuantPlan) -> dict[ir.Value, list[tuple[ir.Node, int]]]:
    """The tensors of the graph that go through Q/DQ, and where they are read behind it.

    A Cast may stand between a tensor of the plan and its reader; then it is what the Cast gives that is quantized.
    """
    reads: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for name, readers in plan.readers.items():
        for reader in readers:
            found = [
                (value, index)
                for index, value in enumerate(nodes[reader].inputs)
                if value is not None and _measured_name(value) == name
            ]
            if not found:
                raise QuantizationError(f"{reader} does not read {name}, which was planned to be INT8")
            for value, index in found:
                reads.setdefault(value, []).append((nodes[reader], index))
    return reads


def _measured_name(value: ir.Value) -> str:
    """The name under which the calibration of the FP32 graph knows `value`."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return str(producer.inputs[0].name)
    return str(value.name)


def _params(value: ir.Value, quantized: Mapping[ir.Value, object], ranges: Mapping[str, Range]) -> QParams:
    """Those of `value`; behind a MaxPool or Reshape those of what went in, if that is quantized too.

    The compiler then moves one pair through instead of rounding twice.
    """
    source, range_name = value, _measured_name(value)
    while (node := source.producer()) is not None and node.op_type in VALUE_KEEPING and node.inputs[0] is not None:
        source = node.inputs[0]
        if source in quantized:
            range_name = _measured_name(source)
    return symmetric_s8(range_of(range_name, ranges), dtype=_dtype(value))


def _dtype(value: ir.Value | None) -> type[np.floating]:
    return np.float16 if value is not None and value.dtype == ir.DataType.FLOAT16 else np.float32
