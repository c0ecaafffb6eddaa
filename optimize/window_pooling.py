"""Global average pooling behind a convolution as pooling over a window of the map's fixed size.

With a dynamic batch TensorRT-RTX 1.7 makes two kernels of GlobalAveragePool behind a convolution, a transposition and
a mean, and one of AveragePool (read off its listings: EfficientNet-Lite0 has 52 instead of 53, ResNet-50 57 instead
of 58). Behind an elementwise kernel the mean is fused into that, and GlobalAveragePool is the better form.
"""

from __future__ import annotations

import onnx_ir as ir

from edgewright.calibration.observers import clamp_limits
from edgewright.optimize.passes import PassResult, Skip

__all__ = ["window_pooling"]


def window_pooling(model: ir.Model) -> PassResult:
    """GlobalAveragePool over `[N, C, H, W]` behind a convolution as AveragePool with a window of H × W."""
    pooled = model.clone()
    skipped: list[Skip] = []
    changed = 0
    for node in pooled.graph:
        if node.op_type != "GlobalAveragePool":
            continue
        reason = _reason_to_stay(node)
        if reason:
            skipped.append(Skip(str(node.name), reason))
            continue
        node.op_type = "AveragePool"
        sides = _map_sides(node)
        node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", sides)
        node.attributes["strides"] = ir.AttrInt64s("strides", [1] * len(sides))
        changed += 1
    return PassResult(pooled, changed, tuple(skipped))


def _reason_to_stay(node: ir.Node) -> str:
    source = node.inputs[0]
    if source is None or source.shape is None or not _map_sides(node):
        return "the size of its map is not fixed"
    producer = source.producer()
    while producer is not None and (clamp_limits(producer) is not None or producer.op_type == "Add"):
        source = producer.inputs[0]
        producer = source.producer() if source is not None else None
    if producer is None or producer.op_type not in ("Conv", "ConvTranspose"):
        return "it does not follow a convolution: the mean is fused into the kernel before it"
    return ""


def _map_sides(node: ir.Node) -> list[int]:
    """Height and width, or nothing if either is dynamic."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    sides = [] if shape is None else [side for side in shape[2:] if isinstance(side, int)]
    return sides if shape is not None and len(sides) == shape.rank() - 2 else []
