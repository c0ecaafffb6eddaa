"""Plan and ranges → explicit Q/DQ, in the dialect of onnxruntime on the CPU.

x ── QuantizeLinear (U8, asymmetric, per tensor) ── DequantizeLinear ── Conv ── …
     INT8 initializer ── DequantizeLinear (symmetric, per output channel) ──┘   bias stays float
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.ranges import Range
from edgewright.optimize.plan import COMPUTE_OPERATORS, VALUE_KEEPING, QuantPlan, clamped_output, constant_weight
from edgewright.optimize.qdq import (
    NEAREST,
    QParams,
    asymmetric_u8,
    channel_axis,
    check_names,
    dequantized_weight,
    insert_activation_pair,
    range_of,
    weight_s8,
)
from edgewright.runtime.errors import QuantizationError

__all__ = ["quantize_for_cpu"]

BIAS_LIMIT = 2**30
"""Half of an int32: rounding of the bias in float32 and the products that are added to it fit into the other half."""


def quantize_for_cpu(
    model: ir.Model,
    plan: QuantPlan,
    ranges: Mapping[str, Range],
    rounded: Mapping[str, NDArray[np.int8]] = NEAREST,
) -> ir.Model:
    """A copy of FP32 `model` with Q/DQ where `plan` says so; `ranges` per activation tensor.

    `rounded`: by the names of layers the integers of their weights, where they are not the nearest ones.

    Raises `QuantizationError` if a range is missing, a weight is not finite, or nodes share a name.
    """
    check_names(plan)
    quantized = ir.from_proto(ir.to_proto(model))
    graph = quantized.graph
    integer_nodes = {decision.node for decision in plan.nodes_in("int8")}
    params = {name: asymmetric_u8(range_of(name, ranges)) for name in plan.activations}
    for node in graph:
        if node.name in integer_nodes and node.op_type in VALUE_KEEPING:
            _share_params(node, params)
    for node in tuple(graph):
        if node.name in integer_nodes and node.op_type in COMPUTE_OPERATORS:
            _quantize_weight(graph, node, params, rounded.get(str(node.name)))
            if node.op_type == "Gemm" and str(clamped_output(node).name) not in params:
                _add_bias_apart(graph, node)
    values = {value.name: value for value in graph.inputs}
    values |= {value.name: value for node in graph for value in node.outputs}
    for name in plan.activations:
        insert_activation_pair(graph, values[name], params[name])
    graph.sort()
    return quantized


def _share_params(node: ir.Node, params: dict[str, QParams]) -> None:
    """Gives the output of a node that only selects or moves values the parameters of its input.

    Nothing is rounded twice, and onnxruntime runs such a node on integers only where both sides are equal.
    """
    source, result = node.inputs[0], node.outputs[0]
    if source is not None and str(source.name) in params and str(result.name) in params:
        params[str(result.name)] = params[str(source.name)]


def _quantize_weight(
    graph: ir.Graph, node: ir.Node, params: Mapping[str, QParams], rounded: NDArray[np.int8] | None
) -> None:
    value = constant_weight(node)
    assert value is not None, "the plan leaves computed weights in float"
    assert value.const_value is not None
    weight = value.const_value.numpy()
    source = node.inputs[0]
    assert source is not None
    floor = _bias_floor(node, params[str(source.name)])
    try:
        weight_params = weight_s8(weight, channel_axis(node, weight.ndim), floor)
    except QuantizationError as error:
        raise QuantizationError(f"{node.name}: {error.message}", error.remedy) from None
    dequantized_weight(graph, node, weight, weight_params, rounded)


def _bias_floor(node: ir.Node, source: QParams) -> NDArray[np.float64] | float:
    """The smallest weight scales at which the bias, as int32 in steps of input scale · weight scale, does not overflow.

    onnxruntime quantizes the float bias so; a channel with tiny weights and a large bias would wrap around.
    """
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return 0.0
    values = np.abs(bias.const_value.numpy().astype(np.float64)).reshape(-1)
    floor: NDArray[np.float64] = values / (float(source.scale) * BIAS_LIMIT)
    return floor


def _add_bias_apart(graph: ir.Graph, node: ir.Node) -> None:
    """Gemm(x, w, c) as Add(Gemm(x, w), c) where the result stays float, as logits do.

    onnxruntime's integer Gemm with a float result takes no float bias; with one it would run in FP32.
    """
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or node.attributes.get_float("beta", 1.0) != 1.0:
        return
    product = node.outputs[0]
    total = ir.node("Add", [product, bias], name=f"{node.name}::bias")
    result = total.outputs[0]
    result.shape, result.type, result.name = product.shape, product.type, product.name
    product.name = f"{product.name}::product"
    for reader, index in tuple(product.uses()):
        if reader is not total:
            reader.replace_input_with(index, result)
    for index, output in enumerate(graph.outputs):
        if output is product:
            graph.outputs[index] = result
    node.resize_inputs(2)
    graph.insert_after(node, total)
