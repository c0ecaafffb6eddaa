"""How much work each convolution and matrix product of a graph is, and what it is planned to run in."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from edgewright.optimize.plan import COMPUTE_OPERATORS
from edgewright.runtime.specs import PlannedLayer

__all__ = ["LAYER_OPERATORS", "macs", "planned_layers", "precision_of"]

INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")
"""What multiplies integers without any DequantizeLinear; QGemm is onnxruntime's."""
LAYER_OPERATORS = (*COMPUTE_OPERATORS, *INTEGER_OPERATORS)

PRECISION_OF_DTYPE = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    None: "fp32",  # no type written: ONNX's usual one
}
FUSED_ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Tanh", "Elu", "Gelu")


def planned_layers(model: ir.Model) -> tuple[PlannedLayer, ...]:
    """The convolutions and matrix products of `model` in their order, with the precision that the graph gives them."""
    return tuple(
        PlannedLayer(str(node.name), node.op_type, precision_of(node), macs(node), tuple(_aliases(node)))
        for node in model.graph
        if node.op_type in LAYER_OPERATORS
    )


def precision_of(node: ir.Node) -> str:
    """What a convolution or matrix product is to run in: "int8" if it multiplies integers, dequantized or not."""
    if node.op_type in INTEGER_OPERATORS:
        return "int8"
    operands = node.inputs[:2]
    producers = [value.producer() if value is not None else None for value in operands]
    if all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers):
        return "int8"
    return PRECISION_OF_DTYPE[operands[0].dtype if operands[0] is not None else None]


def macs(node: ir.Node) -> int:
    """Multiply-accumulates of a convolution or a matrix product, for one image; a bias does not count.

    Conv, ConvInteger, QLinearConv: outputs × inputs per output; ConvTranspose: inputs × outputs per input; Gemm, MatMul
    and their integer forms: outputs × K, the columns of the left operand.
    """
    source, result = node.inputs[0], node.outputs[0]
    weight = node.inputs[3 if node.op_type == "QLinearConv" else 1]
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        return _elements(result) * math.prod(_sides(weight)[1:])
    if node.op_type == "ConvTranspose":
        return _elements(source) * math.prod(_sides(weight)[1:])
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    return _elements(result) * _sides(source)[0 if transposed else -1]


def _elements(value: ir.Value | None) -> int:
    """Of one image: a dynamic axis counts as 1."""
    return math.prod(_sides(value))


def _sides(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        return (1,)
    return tuple(side if isinstance(side, int) else 1 for side in value.shape)


def _aliases(node: ir.Node) -> Iterator[str]:
    """The output tensor's name, and those of what may be fused behind it, nodes and outputs.

    That is a chain of activations and of additions and products with constants, each the only reader of the one before.
    """
    output = node.outputs[0]
    yield str(output.name)
    while len(readers := output.consumers()) == 1 and _is_fused(readers[0]):
        output = readers[0].outputs[0]
        yield str(readers[0].name)
        yield str(output.name)


def _is_fused(node: ir.Node) -> bool:
    with_constant = node.op_type in ("Add", "Sub", "Mul", "Div") and any(
        value is not None and value.const_value is not None for value in node.inputs
    )
    return with_constant or node.op_type in FUSED_ACTIVATIONS
