"""Plan and ranges → explicit Q/DQ, in the dialect of onnxruntime on the CPU.

    x ── QuantizeLinear (U8, asymmetric, per tensor) ── DequantizeLinear ── Conv ── …
         INT8 initializer ── DequantizeLinear (symmetric, per output channel) ──┘   bias stays float

Integer arithmetic follows Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference": real = scale · (integer − zero_point).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.ranges import Range
from edgewright.optimize.plan import COMPUTE_OPERATORS, QuantPlan, clamped_output, constant_weight
from edgewright.runtime.errors import QuantizationError

__all__ = ["QParams", "asymmetric_u8", "quantize", "quantize_for_cpu", "symmetric_i8"]

BIAS_LIMIT = 2**30
"""Half of an int32: rounding of the bias in float32 and the products that are added to it fit into the other half."""
VALUE_KEEPING = ("MaxPool", "Reshape", "Flatten", "Transpose")
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class QParams:
    """Parameters of QuantizeLinear and DequantizeLinear (ONNX specification, opset 19).

    * scale: float32, `[]` per tensor or `[C]` per channel; zero_point: uint8 or int8, same shape
    * axis: of the channels, None per tensor
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.uint8] | NDArray[np.int8]
    axis: int | None = None


def asymmetric_u8(interval: Range) -> QParams:
    """Scale and zero-point so that 0…255 covers `interval` and 0.0 is exact; a tensor of zeros gets scale 1."""
    interval = interval.with_zero()
    width = interval.high - interval.low
    scale = np.float32(max(width / 255, SMALLEST_SCALE) if width else 1.0)
    zero_point = np.clip(np.rint(-interval.low / float(scale)), 0, 255)
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.uint8))


def symmetric_i8(weight: NDArray[np.float32], axis: int, floor: NDArray[np.float64] | float = 0.0) -> QParams:
    """Scales `[C]` so that ±127 covers each slice of `weight` along `axis`; zero-points are 0.

    No scale is below `floor` (`[C]` or a number), nor subnormal; a channel of zeros gets 1.
    Raises `QuantizationError` if a weight is not finite.
    """
    magnitude = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)).astype(np.float64)
    if not np.isfinite(magnitude).all():
        raise QuantizationError("a weight is NaN or infinite", "export the model again from sound weights")
    scale = np.where(magnitude > 0, np.maximum(magnitude / 127, SMALLEST_SCALE), 1.0)
    scale = np.maximum(scale, floor).astype(np.float32)
    return QParams(scale, np.zeros(scale.shape, np.int8), axis)


def quantize(values: NDArray[np.float32], params: QParams) -> NDArray[np.uint8] | NDArray[np.int8]:
    """QuantizeLinear: round(values / scale) to even, plus zero-point, saturated; the shape of `values`."""
    shape = [1] * values.ndim
    if params.axis is not None:
        shape[params.axis] = -1
    limits = np.iinfo(params.zero_point.dtype)
    integers = np.rint(values / params.scale.reshape(shape)) + params.zero_point.reshape(shape)
    quantized: NDArray[np.uint8] | NDArray[np.int8] = np.clip(integers, limits.min, limits.max).astype(limits.dtype)
    return quantized


def quantize_for_cpu(model: ir.Model, plan: QuantPlan, ranges: Mapping[str, Range]) -> ir.Model:
    """A copy of FP32 `model` with Q/DQ where `plan` says so; `ranges` per activation tensor.

    Raises `QuantizationError` if a range is missing, a weight is not finite, or nodes share a name.
    """
    names = Counter(decision.node for decision in plan.decisions)
    for name, count in names.items():
        if count > 1 or not name:
            raise QuantizationError(f"{count} nodes are called {name!r}, expected a name for each", "name every node")
    quantized = ir.from_proto(ir.to_proto(model))
    graph = quantized.graph
    integer_nodes = {decision.node for decision in plan.nodes_in("int8")}
    params = {name: asymmetric_u8(_range_of(name, ranges)) for name in plan.activations}
    for node in graph:
        if node.name in integer_nodes and node.op_type in VALUE_KEEPING:
            _share_params(node, params)
    for node in tuple(graph):
        if node.name in integer_nodes and node.op_type in COMPUTE_OPERATORS:
            _quantize_weight(graph, node, params)
            if node.op_type == "Gemm" and str(clamped_output(node).name) not in params:
                _add_bias_apart(graph, node)
    values = {value.name: value for value in graph.inputs}
    values |= {value.name: value for node in graph for value in node.outputs}
    for name in plan.activations:
        _insert_activation_pair(graph, values[name], params[name])
    graph.sort()
    return quantized


def _share_params(node: ir.Node, params: dict[str, QParams]) -> None:
    """Gives the output of a node that only selects or moves values the parameters of its input.

    Nothing is rounded twice, and onnxruntime runs such a node on integers only where both sides are equal.
    """
    source, result = node.inputs[0], node.outputs[0]
    if source is not None and str(source.name) in params and str(result.name) in params:
        params[str(result.name)] = params[str(source.name)]


def _range_of(name: str, ranges: Mapping[str, Range]) -> Range:
    if name not in ranges:
        raise QuantizationError(f"the calibration has no range for {name}", "calibrate this graph again")
    return ranges[name]


def _quantize_weight(graph: ir.Graph, node: ir.Node, params: Mapping[str, QParams]) -> None:
    value = constant_weight(node)
    assert value is not None, "the plan leaves computed weights in float"
    assert value.const_value is not None
    weight = value.const_value.numpy()
    axis = _channel_axis(node, weight.ndim)
    source = node.inputs[0]
    assert source is not None
    floor = _bias_floor(node, params[str(source.name)])
    try:
        weight_params = symmetric_i8(weight, axis, floor)
    except QuantizationError as error:
        raise QuantizationError(f"{node.name}: {error.message}", error.remedy) from None
    integers = _initializer(graph, f"{value.name}::int8::{node.name}", quantize(weight, weight_params))
    dequantized = _dequantize_node(graph, integers, weight_params, f"{node.name}::weight")
    graph.insert_before(node, dequantized)
    node.replace_input_with(1, dequantized.outputs[0])
    if not value.uses() and str(value.name) in graph.initializers:
        del graph.initializers[str(value.name)]


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


def _channel_axis(node: ir.Node, rank: int) -> int:
    """The weight's output-channel axis: Conv [O, I/g, kH, kW], Gemm [K, N] or with transB [N, K], MatMul [K, N]."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return rank - 1 if node.op_type == "MatMul" else 0


def _insert_activation_pair(graph: ir.Graph, value: ir.Value, params: QParams) -> None:
    """Puts Q/DQ behind `value`; everything that read it reads the dequantized tensor."""
    readers = tuple(value.uses())
    quantize_node = ir.node(
        "QuantizeLinear", [value, *_parameter_values(graph, str(value.name), params)], name=f"{value.name}::quantize"
    )
    quantize_node.outputs[0].name = f"{value.name}::uint8"
    dequantize_node = _dequantize_node(graph, quantize_node.outputs[0], params, str(value.name))
    result = dequantize_node.outputs[0]
    result.shape, result.dtype = value.shape, ir.DataType.FLOAT
    for node, index in readers:
        node.replace_input_with(index, result)
    for index, output in enumerate(graph.outputs):
        if output is value:  # a convolution at the very end: the graph yields the dequantized tensor under the old name
            value.name, result.name = f"{value.name}::float", value.name
            graph.outputs[index] = result
    graph.extend([quantize_node, dequantize_node])


def _dequantize_node(graph: ir.Graph, integers: ir.Value, params: QParams, name: str) -> ir.Node:
    attributes = {} if params.axis is None else {"axis": params.axis}
    node = ir.node(
        "DequantizeLinear", [integers, *_parameter_values(graph, name, params)], attributes, name=f"{name}::dequantize"
    )
    node.outputs[0].name = f"{name}::dequantized"
    return node


def _parameter_values(graph: ir.Graph, name: str, params: QParams) -> tuple[ir.Value, ir.Value]:
    return (
        _initializer(graph, f"{name}::scale", params.scale),
        _initializer(graph, f"{name}::zero_point", params.zero_point),
    )


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """The initializer `name`, made unless it is there already (Q and DQ of a tensor share theirs)."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value
