"""FP16 numerics on a CPU: an FP32 graph in which every tensor that a device would store as FP16 is rounded to FP16.

onnxruntime runs FP16 nodes on a CPU in FP32 and proves nothing: what overflows on a device stays finite there. Here
each FP16 tensor goes through a pair Cast → FLOAT16 → Cast → FLOAT, which onnxruntime keeps: it rounds to nearest even,
and beyond 65504 it yields infinity.

What is assumed of the device: a kernel computes one node in FP32, accumulators included, and rounds what it stores.
TensorRT accumulates FP16 convolutions in FP32 or in FP16, as the tactic has it; the latter is less exact than this.
Every elementwise node rounds, and so does a convolution in front of QuantizeLinear; a device that fuses them,
x · sigmoid(x) above all, rounds once or not at all and is more exact than this.

What needs no pair, since the result is the same:

* operators that select or move values (VALUE_KEEPING), of tensors that are rounded already;
* a tensor that only such an operator reads: they are monotonic and their limits FP16 numbers, so that rounding behind
  them is as good. onnxruntime then fuses a convolution with its ReLU;
* what DequantizeLinear gives a convolution or matrix product: on the device it multiplies the integers.

With an FP16 remainder there is always a pair between DequantizeLinear and the next QuantizeLinear, so that onnxruntime
fuses no integer kernel: convolutions of integers run in float32, on weights that are dequantized here. That is faster
(EfficientNet-B0: 2.2 instead of 2.4 times FP32), does not depend on VNNI, and is exact but for float32's order of
summation. With an FP32 remainder onnxruntime does fuse them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass

from edgewright.optimize.plan import COMPUTE_OPERATORS
from edgewright.runtime.errors import QuantizationError

__all__ = ["VALUE_KEEPING", "signed_to_unsigned", "simulate_fp16"]

VALUE_KEEPING = (
    *("Relu", "Clip", "Max", "Min", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Where", "Dropout"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Pad", "Identity"),
    *("Concat", "Split", "Slice", "Gather", "DepthToSpace", "SpaceToDepth"),
)
"""Operators whose outputs are values of their inputs: rounded if these are."""


def simulate_fp16(model: ir.Model) -> ir.Model:
    """An FP32 model that yields on a CPU what FP16 `model` yields on a device, under the assumptions above.

    `model` is what `cast_fp16` returns, possibly with Q/DQ in it; it stays as it was. Initializers become float32 of
    the same values. A tensor keeps its name and holds the rounded values; one that is not rounded at once, because an
    operator of VALUE_KEEPING follows, holds exact ones.

    Raises `QuantizationError` if a graph input or output is FP16.
    """
    simulated = model.clone()
    graph = simulated.graph
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            raise QuantizationError(
                f"{value.name} is FP16 at the border of the graph", "give it the result of cast_fp16"
            )
    _widen_initializers(graph)
    halves = [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT16]
    _round(graph, halves)
    for value in halves:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    _widen_casts(graph)
    for value in halves:
        _dequantize_constant(graph, value)
    IdentityEliminationPass()(simulated)
    return simulated


def _widen_initializers(graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _widen_casts(graph: ir.Graph) -> None:
    """Casts yield the type that their output has by now; those from float32 to float32 do nothing any more."""
    for node in graph:
        if node.op_type != "Cast":
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is not None and source.dtype == result.dtype == ir.DataType.FLOAT:
            node.op_type = "Identity"
            node.attributes.clear()
        elif result.dtype == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)


def _round(graph: ir.Graph, halves: list[ir.Value]) -> None:
    """Puts a pair behind each of `halves`, sorted topologically, that holds more than FP16 numbers and is read so."""
    stored_later: set[ir.Value | None] = set()
    for value in halves:
        node = value.producer()
        assert node is not None
        if node.op_type in VALUE_KEEPING and stored_later.isdisjoint(node.inputs):
            continue  # rounded already
        readers = value.consumers()
        if len(readers) == 1 and readers[0].op_type in VALUE_KEEPING and readers[0].outputs[0] in halves:
            stored_later.add(value)
            continue
        uses = list(value.uses())
        if node.op_type == "DequantizeLinear":
            uses = [use for use in uses if use.node.op_type not in COMPUTE_OPERATORS]
        if uses:
            _insert_pair(graph, value, uses)


def _insert_pair(graph: ir.Graph, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> None:
    """Cast → FLOAT16 → Cast → FLOAT between `value` and `uses`; the result takes over its name."""
    name, producer = str(value.name), value.producer()
    assert producer is not None
    narrow = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}, name=f"{name}::round")
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}::widen")
    for node, data_type in ((narrow, ir.DataType.FLOAT16), (wide, ir.DataType.FLOAT)):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(data_type), value.shape
    value.name, narrow.outputs[0].name, wide.outputs[0].name = f"{name}::exact", f"{name}::half", name
    for node, index in uses:
        node.replace_input_with(index, wide.outputs[0])
    graph.insert_after(producer, (narrow, wide))


def _dequantize_constant(graph: ir.Graph, value: ir.Value) -> None:
    """If DequantizeLinear yields `value` from constants, makes it an initializer: scale · (integer − zero_point)."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return
    tensors = [ir.convenience.get_const_tensor(source) if source is not None else None for source in node.inputs]
    if tensors[0] is None or tensors[1] is None:
        return
    integers, scale = tensors[0].numpy().astype(np.float32), tensors[1].numpy()
    zero_point = tensors[2].numpy() if len(tensors) > 2 and tensors[2] is not None else np.zeros_like(scale)
    along = [1] * integers.ndim
    if scale.size > 1:  # per channel
        along[node.attributes.get_int("axis", 1)] = -1
    values = (integers - zero_point.reshape(along).astype(np.float32)) * scale.reshape(along)
    sources = [source for source in node.inputs if source is not None]
    constant = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    constant.const_value = ir.tensor(values, name=constant.name)
    value.replace_all_uses_with(constant)
    graph.remove(node, safe=True)
    graph.register_initializer(constant)
    for source in sources:
        _remove_if_unused(graph, source)


def signed_to_unsigned(model: ir.Model) -> ir.Model:
    """A copy of `model` whose INT8 activations with zero-point 0 are UINT8 with zero-point 128; weights stay.

    Both hold the same values, scale · (−128 … 127), but only for unsigned ones has onnxruntime fast kernels. On x86
    without VNNI those are exact with `session.x64quantprecision` only. An activation that anything but
    DequantizeLinear reads as an integer is left alone.
    """
    unsigned = model.clone()
    for node in unsigned.graph:
        if node.op_type == "QuantizeLinear" and _is_signed_activation(node):
            pair = (node, *node.outputs[0].consumers())
            for member in pair:
                _replace_zero_point(unsigned.graph, member)
            node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    return unsigned


def _is_signed_activation(node: ir.Node) -> bool:
    """Whether all that read the integers of QuantizeLinear `node` are DequantizeLinear, with INT8 zeros throughout."""
    source, integers = node.inputs[0], node.outputs[0]
    if source is None or source.const_value is not None or integers.is_graph_output():
        return False
    readers = integers.consumers()
    return all(reader.op_type == "DequantizeLinear" for reader in readers) and all(
        _has_signed_zeros(member) for member in (node, *readers)
    )


def _has_signed_zeros(node: ir.Node) -> bool:
    zero_point = ir.convenience.get_const_tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    return zero_point is not None and zero_point.dtype == ir.DataType.INT8 and not zero_point.numpy().any()


def _replace_zero_point(graph: ir.Graph, node: ir.Node) -> None:
    """128 as UINT8 in the shape of the zero-point that was there."""
    old = node.inputs[2]
    assert old is not None
    assert old.const_value is not None
    name = f"{old.name}::unsigned"
    if name not in graph.initializers:
        zero_point = np.full(old.const_value.shape.numpy(), 128, np.uint8)
        value = ir.Value(name=name, shape=old.shape, type=ir.TensorType(ir.DataType.UINT8))
        value.const_value = ir.tensor(zero_point, name=name)
        graph.register_initializer(value)
    node.replace_input_with(2, graph.initializers[name])
    _remove_if_unused(graph, old)


def _remove_if_unused(graph: ir.Graph, constant: ir.Value) -> None:
    if not constant.uses() and constant.is_initializer() and not constant.is_graph_output():
        del graph.initializers[str(constant.name)]
