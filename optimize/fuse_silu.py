"""x · sigmoid(x) behind integers as one operator, for onnxruntime on the CPU.

onnxruntime fuses Sigmoid and Mul by itself, but only where both read the same tensor. Behind a DequantizeLinear they do
not: it first gives every reader of a DequantizeLinear one of its own (so that it could fuse each with its node), and a
SiLU then dequantizes twice and takes four kernels instead of two. Measured on an EfficientNet-B0 in INT8 at 224 × 224:
18.5 ms, and 15.9 ms with the operator written here, which is the one that onnxruntime itself would have put there.

QuickGelu is no operator of ONNX but one of onnxruntime's own (domain com.microsoft, since 1.12): y = x · sigmoid(α x).
"""

from __future__ import annotations

import onnx_ir as ir

from edgewright.optimize.edits import take_over
from edgewright.optimize.passes import PassResult
from edgewright.optimize.plan import is_silu

__all__ = ["fuse_silu"]

DOMAIN, OPERATOR, VERSION = "com.microsoft", "QuickGelu", 1


def fuse_silu(model: ir.Model) -> PassResult:
    """A copy of `model` with QuickGelu instead of each x · sigmoid(x) whose x comes from a DequantizeLinear.

    Tensors keep their names, but for the sigmoid's, which goes. Others are left alone: onnxruntime fuses them itself.
    """
    fused = model.clone()
    sigmoids = [node for node in fused.graph if is_silu(node) and _is_dequantized(node.inputs[0])]
    for sigmoid in sigmoids:
        _fuse(fused.graph, sigmoid)
    if sigmoids:
        fused.opset_imports[DOMAIN] = VERSION
    return PassResult(fused, len(sigmoids), ())


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _fuse(graph: ir.Graph, sigmoid: ir.Node) -> None:
    (product,) = sigmoid.outputs[0].consumers()
    silu = ir.node(OPERATOR, [sigmoid.inputs[0]], {"alpha": 1.0}, domain=DOMAIN, name=product.name)
    graph.insert_before(product, silu)
    take_over(silu.outputs[0], product.outputs[0])
    graph.remove((product, sigmoid), safe=True)
