"""Scales and zero-points, and the nodes that apply them: what every dialect of Q/DQ is written with.

Integer arithmetic follows Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference": real = scale · (integer − zero_point).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.ranges import Range
from edgewright.optimize.plan import QuantPlan
from edgewright.runtime.errors import QuantizationError

__all__ = [
    "NEAREST",
    "QParams",
    "asymmetric_u8",
    "channel_axis",
    "check_names",
    "dequantized_weight",
    "insert_activation_pair",
    "quantize",
    "range_of",
    "symmetric_s8",
    "weight_s8",
]

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
SMALLEST_HALF = float(np.finfo(np.float16).smallest_normal)
"""Of the scales in FP16: below, the reciprocal that a kernel multiplies with would not be finite in FP16."""

NEAREST: Mapping[str, NDArray[np.int8]] = MappingProxyType({})
"""Integers by the names of layers: none are given, so that all weights go to the nearest ones."""


@dataclass(frozen=True)
class QParams:
    """Parameters of QuantizeLinear and DequantizeLinear (ONNX specification, opset 19).

    * scale: float32 or, for tensors in FP16, float16; `[]` per tensor or `[C]` per channel
    * zero_point: uint8 or int8, same shape
    * axis: of the channels, None per tensor
    """

    scale: NDArray[np.float32] | NDArray[np.float16]
    zero_point: NDArray[np.uint8] | NDArray[np.int8]
    axis: int | None = None


def asymmetric_u8(interval: Range) -> QParams:
    """Scale and zero-point so that 0…255 covers `interval` and 0.0 is exact; a tensor of zeros gets scale 1."""
    interval = interval.with_zero()
    width = interval.high - interval.low
    scale = np.float32(max(width / 255, SMALLEST_SCALE) if width else 1.0)
    zero_point = np.clip(np.rint(-interval.low / float(scale)), 0, 255)
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.uint8))


def symmetric_s8(interval: Range, dtype: type[np.floating] = np.float32) -> QParams:
    """Scale so that −128…127 covers `interval`, zero-point 0; a tensor of zeros gets scale 1.

    `dtype` is that of the tensor and so of its scale, float32 or float16.
    """
    step = max(-interval.low / 128, interval.high / 127)
    smallest = SMALLEST_HALF if dtype is np.float16 else SMALLEST_SCALE
    scale = np.asarray(max(step, smallest) if step > 0 else 1.0, dtype)
    return QParams(scale, np.asarray(0, np.int8))


def weight_s8(
    weight: NDArray[np.float32],
    axis: int | None,
    floor: NDArray[np.float64] | float = 0.0,
    dtype: type[np.floating] = np.float32,
) -> QParams:
    """Scales so that ±127 covers each slice of `weight` along `axis` (`[C]`), or all of it (`[]`); zero-points are 0.

    No scale is below `floor` (`[C]` or a number), nor subnormal; a slice of zeros gets 1. `dtype` is that of the
    scales, float32 or float16. Raises `QuantizationError` if a weight is not finite.
    """
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    magnitude = np.abs(weight).max(axis=others).astype(np.float64)
    if not np.isfinite(magnitude).all():
        raise QuantizationError("a weight is NaN or infinite", "export the model again from sound weights")
    smallest = SMALLEST_HALF if dtype is np.float16 else SMALLEST_SCALE
    scale = np.where(magnitude > 0, np.maximum(magnitude / 127, smallest), 1.0)
    scale = np.asarray(np.maximum(scale, floor), dtype)
    return QParams(scale, np.zeros(scale.shape, np.int8), axis)


def quantize(values: NDArray[np.float32], params: QParams) -> NDArray[np.uint8] | NDArray[np.int8]:
    """QuantizeLinear: round(values / scale) to even, plus zero-point, saturated; the shape of `values`."""
    shape = [1] * values.ndim
    if params.axis is not None:
        shape[params.axis] = -1
    limits = np.iinfo(params.zero_point.dtype)
    scale = params.scale.astype(np.float32).reshape(shape)
    integers = np.rint(values / scale) + params.zero_point.reshape(shape)
    quantized: NDArray[np.uint8] | NDArray[np.int8] = np.clip(integers, limits.min, limits.max).astype(limits.dtype)
    return quantized


def check_names(plan: QuantPlan) -> None:
    """Raises `QuantizationError` unless each node that `plan` decides on has a name of its own."""
    for name, count in Counter(decision.node for decision in plan.decisions).items():
        if count > 1 or not name:
            raise QuantizationError(f"{count} nodes are called {name!r}, expected a name for each", "name every node")


def range_of(name: str, ranges: Mapping[str, Range]) -> Range:
    """The range of tensor `name`. Raises `QuantizationError` if there is none."""
    if name not in ranges:
        raise QuantizationError(f"the calibration has no range for {name}", "calibrate this graph again")
    return ranges[name]


def channel_axis(node: ir.Node, rank: int) -> int:
    """The weight's output-channel axis: Conv [O, I/g, kH, kW], ConvTranspose [I, O/g, kH, kW], Gemm [K, N] or with
    transB [N, K], MatMul [K, N].
    """
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}[node.op_type]


def dequantized_weight(
    graph: ir.Graph,
    node: ir.Node,
    weight: NDArray[np.float32],
    params: QParams,
    rounded: NDArray[np.int8] | None = None,
) -> None:
    """Gives `node` its `weight` as an INT8 initializer behind DequantizeLinear; a float one without readers goes.

    `rounded` are the integers to take, None for the nearest ones.
    """
    value = node.inputs[1]
    assert value is not None
    content = quantize(weight, params) if rounded is None else rounded
    integers = _initializer(graph, f"{value.name}::int8::{node.name}", content)
    dequantized = _dequantize_node(graph, integers, params, f"{node.name}::weight")
    result = dequantized.outputs[0]
    result.shape, result.dtype = ir.Shape(weight.shape), ir.DataType.from_numpy(params.scale.dtype)
    graph.insert_before(node, dequantized)
    node.replace_input_with(1, result)
    if not value.uses() and str(value.name) in graph.initializers:
        del graph.initializers[str(value.name)]


def insert_activation_pair(
    graph: ir.Graph, value: ir.Value, params: QParams, uses: Sequence[tuple[ir.Node, int]] | None = None
) -> None:
    """Puts Q/DQ behind `value`; `uses`, or everything that read it, reads the dequantized tensor."""
    readers: Iterable[tuple[ir.Node, int]] = tuple(value.uses()) if uses is None else uses
    quantize_node = ir.node(
        "QuantizeLinear", [value, *_parameter_values(graph, str(value.name), params)], name=f"{value.name}::quantize"
    )
    quantize_node.outputs[0].name = f"{value.name}::{params.zero_point.dtype}"
    dequantize_node = _dequantize_node(graph, quantize_node.outputs[0], params, str(value.name))
    result = dequantize_node.outputs[0]
    result.shape, result.type = value.shape, value.type
    for node, index in readers:
        node.replace_input_with(index, result)
    for index, output in enumerate(graph.outputs):
        if output is value and uses is None:  # a convolution at the very end: the graph yields the dequantized tensor
            value.name, result.name = f"{value.name}::float", value.name  # under the old name
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
