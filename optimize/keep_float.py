"""A float layer between Q/DQ stays float in onnxruntime.

    x ── QuantizeLinear ── DequantizeLinear ── Conv (float weight) ── Relu or Clip ── QuantizeLinear ── …

From 1.21 on onnxruntime takes such a layer for one whose weight was forgotten, and quantizes it: one scale for all
channels (`WeightBiasQuantization`, onnxruntime/core/optimizer/qdq_transformer). Leaving the first depthwise of
EfficientNet-Lite0 in float so costs 9 dB of logit SQNR instead of bringing 1. It does this only behind a
DequantizeLinear with a single scale, so the layer gets one of its own here, with the same scale for each channel.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgewright.optimize.edits import add_constant, constant_tensor, remove_if_unused, value_names
from edgewright.optimize.passes import PassResult, Skip

__all__ = ["keep_float"]

REQUANTIZED = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose weight and bias onnxruntime quantizes unasked."""


def keep_float(model: ir.Model) -> PassResult:
    """Q/DQ graph `model` with a DequantizeLinear along axis 1 in front of each float layer that reads integers.

    One whose input has an unknown number of channels is skipped: there is no scale to write for each.
    """
    kept = model.clone()
    names = value_names(kept)
    skipped: list[Skip] = []
    changed = 0
    for node in kept.graph:
        dequantize = _dequantize_before(node) if node.op_type in REQUANTIZED else None
        if dequantize is None or constant_tensor(node.inputs[1]) is None:
            continue
        channels = _channels(dequantize.outputs[0])
        if channels is None:
            skipped.append(Skip(str(node.name), "the number of its input channels is not known"))
            continue
        _read_per_channel(kept.graph, node, dequantize, channels, names)
        changed += 1
    return PassResult(kept, changed, tuple(skipped))


def _dequantize_before(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear with a single scale that gives `node` its data."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or len(producer.inputs) < 3:
        return None
    scale = constant_tensor(producer.inputs[1])
    return producer if scale is not None and len(scale.shape) == 0 else None


def _channels(value: ir.Value) -> int | None:
    side = value.shape[1] if value.shape is not None and value.shape.rank() > 1 else None
    return side if isinstance(side, int) else None


def _read_per_channel(
    graph: ir.Graph, node: ir.Node, dequantize: ir.Node, channels: int, names: set[str | None]
) -> None:
    """Gives `node` the values of `dequantize` from a DequantizeLinear of its own with a scale per channel."""
    shared = dequantize.outputs[0]
    parameters = [constant_tensor(value) for value in dequantize.inputs[1:3]]
    repeated = [np.full(channels, tensor.numpy()) for tensor in parameters if tensor is not None]
    scale, zero_point = (
        add_constant(graph, array, f"{node.name}::input::{word}", names)
        for array, word in zip(repeated, ("scale", "zero_point"), strict=True)
    )
    own = ir.node(
        "DequantizeLinear",
        [dequantize.inputs[0], scale, zero_point],
        {"axis": 1},
        name=f"{node.name}::input::dequantize",
    )
    result = own.outputs[0]
    result.name, result.shape, result.type = f"{node.name}::input", shared.shape, shared.type
    graph.insert_before(node, own)
    node.replace_input_with(0, result)
    remove_if_unused(shared)
