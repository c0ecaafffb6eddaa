"""Scales of a Q/DQ graph that cost more than eight bits have to: found by the error that each causes where it stands.

What eight bits have to cost is the error of the best range for the values at hand. Some tensors lose much however they
are quantized; a wrong scale is one that loses more than that.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.ranges import (
    Histogram,
    Range,
    minmax_range,
    mse_range,
    silu,
    squared_error,
    symmetric,
    symmetric_mse_range,
)
from edgewright.optimize.plan import COMPUTE_OPERATORS, constant_weight, is_silu
from edgewright.optimize.qdq import QParams, channel_axis, quantize, weight_s8

__all__ = ["FAULT_DB", "ScaleFault", "activation_scales", "scale_faults"]

FAULT_DB = 9.0
"""Lost beyond what eight bits have to lose: a bit and a half. Rounding that was learned loses up to 6 dB on weights."""
FAR_BEYOND = 2.0
"""A range by any method lies within what was seen, but for what makes it symmetric and lets it hold 0."""
NEGLIGIBLE = 1e-9
"""Of the signal's energy: errors below are all the same."""


@dataclass(frozen=True)
class ScaleFault:
    """A scale that loses more than `FAULT_DB` too much.

    * layer, operator: the node that reads what it gives
    * tensor: the activation or weight that it belongs to, by the name in the reference
    * ratio: the scale beside that of the best range; 4.0 where two bits are wasted, below 1 where values saturate
    * beyond_seen: what the integers cover beside all that was seen
    * lost_db: by how much its error exceeds that of the best range
    """

    layer: str
    operator: str
    tensor: str
    ratio: float
    beyond_seen: float
    lost_db: float

    @property
    def wastes_bits(self) -> bool:
        """Whether no method can have chosen it: they cut off outliers, but none covers what was never seen."""
        return self.beyond_seen > FAR_BEYOND


@dataclass(frozen=True)
class ActivationScale:
    """A QuantizeLinear of an activation: `reader` is the node behind it, `tensor` what it rounds."""

    reader: ir.Node
    tensor: str
    covered: Range
    signed: bool
    feeds_silu: bool


def scale_faults(
    reference: ir.Model, quantized: ir.Model, histograms: Mapping[str, Histogram]
) -> tuple[ScaleFault, ...]:
    """The faults of Q/DQ graph `quantized` in its order.

    `histograms`: of activations of `reference`, as the calibration has them; a scale of another tensor is not looked
    at, nor is the weight of a node that `reference` does not have.
    """
    by_layer: dict[str, list[ScaleFault]] = {}
    for scale in activation_scales(quantized, histograms):
        fault = _activation_fault(scale, histograms[scale.tensor])
        if fault.lost_db > FAULT_DB:
            by_layer.setdefault(fault.layer, []).append(fault)
    originals = {str(node.name): node for node in reference.graph}
    for node in quantized.graph:
        original = originals.get(str(node.name))
        fault_of_weight = None if original is None else _weight_fault(original, node)
        if fault_of_weight is not None and fault_of_weight.lost_db > FAULT_DB:
            by_layer.setdefault(fault_of_weight.layer, []).append(fault_of_weight)
    return tuple(fault for node in quantized.graph for fault in by_layer.pop(str(node.name), ()))


def activation_scales(quantized: ir.Model, known: Container[str]) -> list[ActivationScale]:
    """The activations that go through Q/DQ, as far as their names are `known`."""
    found = []
    for node in quantized.graph:
        tensor = _quantized_tensor(node, known) if node.op_type == "QuantizeLinear" else None
        readers = _readers_behind(node.outputs[0])
        if tensor is None or not readers:
            continue
        scale, zero_point = _constant(node.inputs[1]), _constant(node.inputs[2])
        limits = np.iinfo(zero_point.dtype)
        low, high = ((limit - float(zero_point)) * float(scale) for limit in (limits.min, limits.max))
        signed = zero_point.dtype == np.int8 or int(zero_point) == 128
        layer = next((reader for reader in readers if reader.op_type in COMPUTE_OPERATORS), readers[0])
        silus = any(reader.op_type == "QuickGelu" or is_silu(reader) for reader in readers)
        found.append(ActivationScale(layer, tensor, Range(low, high), signed, silus))
    return found


def _activation_fault(scale: ActivationScale, histogram: Histogram) -> ScaleFault:
    values, counts = histogram.occupied()
    transfer = silu if scale.feeds_silu else None
    best = symmetric_mse_range(histogram) if scale.signed else mse_range(histogram, transfer).with_zero()
    found, least = (squared_error(values, counts, interval, transfer) for interval in (scale.covered, best))
    signal = float(counts @ (values if transfer is None else transfer(values)) ** 2)
    whole = symmetric(minmax_range(histogram)) if scale.signed else minmax_range(histogram).with_zero()
    ratio, beyond = (_width(scale.covered) / (_width(interval) or math.inf) for interval in (best, whole))
    lost = _decibels_lost(found, least, signal)
    return ScaleFault(str(scale.reader.name), scale.reader.op_type, scale.tensor, ratio, beyond, lost)


def _weight_fault(original: ir.Node, node: ir.Node) -> ScaleFault | None:
    """None if the weight of `node` is not quantized."""
    weight = constant_weight(original) if original.op_type in COMPUTE_OPERATORS else None
    quantizer = node.inputs[1].producer() if weight is not None and node.inputs[1] is not None else None
    if weight is None or weight.const_value is None or quantizer is None or quantizer.op_type != "DequantizeLinear":
        return None
    right = weight.const_value.numpy()
    integers, scale = _constant(quantizer.inputs[0]), _constant(quantizer.inputs[1])
    axis = channel_axis(node, right.ndim) if scale.ndim else None
    best = weight_s8(right, axis)
    nearest = _dequantized(quantize(right, best), best.scale, best)
    found = _dequantized(integers, scale, best)
    others = None if axis is None else tuple(i for i in range(right.ndim) if i != axis)
    worst = int(np.argmax(((found - right) ** 2).sum(axis=others)))  # of the channels: the one that costs most
    ratio = float((scale.astype(np.float64) / best.scale).reshape(-1)[worst])
    lost = _decibels_lost(_energy(found - right), _energy(nearest - right), _energy(right))
    return ScaleFault(str(node.name), node.op_type, str(weight.name), ratio, ratio, lost)


def _dequantized(integers: NDArray[Any], scale: NDArray[Any], params: QParams) -> NDArray[np.float32]:
    shape = [1] * integers.ndim
    if params.axis is not None:
        shape[params.axis] = -1
    return integers.astype(np.float32) * scale.astype(np.float32).reshape(shape)


def _width(interval: Range) -> float:
    return interval.high - interval.low


def _energy(values: NDArray[np.float32]) -> float:
    return float((values**2).sum(dtype=np.float64))


def _decibels_lost(error: float, least: float, signal: float) -> float:
    floor = NEGLIGIBLE * signal or 1.0
    return 10 * math.log10((error + floor) / (least + floor))


def _quantized_tensor(node: ir.Node, known: Container[str]) -> str | None:
    """The known activation that QuantizeLinear `node` rounds; Casts may stand between."""
    value = node.inputs[0]
    while value is not None and str(value.name) not in known:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    return None if value is None else str(value.name)


def _readers_behind(integers: ir.Value) -> list[ir.Node]:
    """The nodes that read the values behind a QuantizeLinear, past DequantizeLinear and Casts."""
    readers: list[ir.Node] = []
    for node in integers.consumers():
        readers += _readers_behind(node.outputs[0]) if node.op_type in ("DequantizeLinear", "Cast") else [node]
    return readers


def _constant(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None, f"{value.name} is no constant"
    return value.const_value.numpy()
