"""A small network of all kinds of blocks, in whose layers INT8 costs very different amounts, and its quantizers.

Stem with ReLU6, residual block with a depthwise layer, squeeze and excitation, a plain layer, classifier. The channels
of the depthwise weights are of very different size, so that one scale for all of them would ruin the layer.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.optimize.dialects import Quantizer
from textual_graphs import graph, normal

__all__ = ["LAYERS", "LOGITS", "SIDE", "network", "photographs", "quantizer_of"]

SIDE = 12
LOGITS = "y"
LAYERS = ("stem", "expand", "depthwise", "project", "last", "head")
"""Those that onnxruntime runs in INT8."""

BODY = """
[stem] a0 = Conv <pads = [1, 1, 1, 1]> (x, stem_w, stem_b)
[stem_clip] a = Clip (a0, zero, six)
[expand] e0 = Conv (a, expand_w)
[expand_relu] e = Relu (e0)
[depthwise] d0 = Conv <group = 32, pads = [1, 1, 1, 1]> (e, depthwise_w, depthwise_b)
[depthwise_relu] d = Relu (d0)
[project] p = Conv (d, project_w)
[add] r = Add (a, p)
[squeeze] g = GlobalAveragePool (r)
[reduce] g1 = Conv (g, reduce_w)
[reduce_relu] g2 = Relu (g1)
[restore] g3 = Conv (g2, restore_w)
[gate] s = Sigmoid (g3)
[scale] m = Mul (r, s)
[last] l0 = Conv (m, last_w, last_b)
[last_relu] l = Relu (l0)
[pool] q = GlobalAveragePool (l)
[flat] f = Flatten (q)
[head] y = Gemm <transB = 1> (f, head_w, head_b)
"""
SHAPES = {
    "stem_w": (16, 3, 3, 3),
    "stem_b": (16,),
    "expand_w": (32, 16, 1, 1),
    "depthwise_w": (32, 1, 3, 3),
    "depthwise_b": (32,),
    "project_w": (16, 32, 1, 1),
    "reduce_w": (4, 16, 1, 1),
    "restore_w": (16, 4, 1, 1),
    "last_w": (32, 16, 1, 1),
    "last_b": (32,),
    "head_w": (8, 32),
    "head_b": (8,),
}


@functools.cache
def network() -> ir.Model:
    """The folded FP32 network; it is shared, and not to be changed."""
    arrays: dict[str, Any] = {
        name: normal(name, *shape) / np.float32(math.sqrt(math.prod(shape[1:]))) for name, shape in SHAPES.items()
    }
    sizes = np.geomspace(0.01, 4.0, 32, dtype=np.float32)
    arrays["depthwise_w"] *= sizes.reshape(32, 1, 1, 1)
    arrays["project_w"] /= sizes.reshape(1, 32, 1, 1)
    arrays["head_w"] *= 8.0
    arrays |= {"zero": np.asarray(0, np.float32), "six": np.asarray(6, np.float32)}
    return graph(BODY, f"float[N, 3, {SIDE}, {SIDE}] x", f"float[N, 8] {LOGITS}", **arrays)


def photographs(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Seeded noise of its own brightness and contrast in each image, float32 `[count, 3, SIDE, SIDE]`."""
    rng = np.random.default_rng(seed)
    brightness, contrast = rng.normal(size=(count, 3, 1, 1)), rng.uniform(0.3, 1.5, (count, 1, 1, 1))
    return (brightness + contrast * rng.normal(size=(count, 3, SIDE, SIDE))).astype(np.float32)


@functools.cache
def quantizer_of(dialect: str) -> Quantizer:
    """Of the network, calibrated with 32 images by min-max."""
    table = collect(network(), [photographs(32, seed=1)], identity={}, threads=1)
    return Quantizer(dialect, network(), table, method="minmax")
