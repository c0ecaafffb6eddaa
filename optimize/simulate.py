"""FP16 numerics on a CPU: an FP32 graph in which every tensor that a device would store as FP16 is rounded to FP16.

onnxruntime runs FP16 nodes on a CPU in FP32 and proves nothing: what overflows on a device stays finite there. Here
each FP16 tensor goes through a pair Cast → FLOAT16 → Cast → FLOAT, which onnxruntime keeps: it rounds to nearest even,
and beyond 65504 it yields infinity.

What is assumed of the device: a kernel computes one node in FP32, accumulators included, and rounds what it stores.
TensorRT accumulates FP16 convolutions in FP32 or in FP16, as the tactic has it; the latter is less exact than this.
Every elementwise node rounds; a device that fuses a chain of them, x · sigmoid(x) above all, rounds once and is more
exact than this.

What needs no pair, since rounding there is the identity or is done elsewhere with the same result:

* operators that select or move values, of tensors that are rounded already;
* a tensor that only such an operator reads: they are monotonic and their limits FP16 numbers, so that rounding behind
  them is the same. onnxruntime then fuses a convolution with its ReLU;
* what DequantizeLinear gives a convolution or matrix product: on the device it multiplies the integers;
* what an integer convolution or matrix product gives QuantizeLinear: the kernel requantizes its accumulator.
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
    _widen_casts(graph)
    for value in halves:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    _round(graph, halves)
    IdentityEliminationPass()(simulated)
    return signed_to_unsigned(simulated)


def _widen_initializers(graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _widen_casts(graph: ir.Graph) -> None:
    """Casts to FP16 yield float32, which is rounded later; one between the two floating types does nothing any more."""
    floating = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    for node in graph:
        if node.op_type != "Cast" or node.outputs[0].dtype not in floating:
            continue
        source = node.inputs[0]
        if source is not None and source.dtype in floating:
            node.op_type = "Identity"
            node.attributes.clear()
        else:
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
        uses = [use for use in value.uses() if not _reads_integers(value, use.node)]
        if uses:
            _insert_pair(graph, value, uses)


def _reads_integers(value: ir.Value, reader: ir.Node) -> bool:
    """Whether `reader` takes the integers behind float `value`, so that the device stores no FP16 in between."""
    producer = value.producer()
    if reader.op_type in COMPUTE_OPERATORS:
        return producer is not None and producer.op_type == "DequantizeLinear"
    return reader.op_type == "QuantizeLinear" and len(value.uses()) == 1 and _is_integer_result(value)


def _is_integer_result(value: ir.Value) -> bool:
    """Whether an integer kernel computes `value`: integers alone, a convolution or matrix product of integers."""
    node = value.producer()
    if node is None or node.op_type == "DequantizeLinear":
        return node is not None
    operands = node.inputs[:2] if node.op_type in COMPUTE_OPERATORS else node.inputs
    if node.op_type in COMPUTE_OPERATORS:
        producers = [operand.producer() if operand is not None else None for operand in operands]
        return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)
    computed = [operand for operand in operands if operand is not None and operand.const_value is None]
    return node.op_type in VALUE_KEEPING and all(_is_integer_result(operand) for operand in computed)


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
    if not old.uses() and old.is_initializer() and not old.is_graph_output():
        del graph.initializers[str(old.name)]
