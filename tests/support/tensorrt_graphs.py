"""Small graphs for the TensorRT backends, in FP32, in FP16, and with Q/DQ around INT8 convolutions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgewright.runtime.specs import PlannedLayer

Array = NDArray[Any]

FLOAT = """
[conv] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
[relu] r = Relu (a)
[next] c = Conv (r, v)
[pool] p = GlobalAveragePool (c)
[flat] f = Flatten (p)
[head] y = Gemm <transB = 1> (f, u, d)
"""
HALF = """
[in] h = Cast <to = 10> (x)
[conv] a = Conv <pads = [1, 1, 1, 1]> (h, w, b)
[relu] r = Relu (a)
[next] c = Conv (r, v)
[pool] p = GlobalAveragePool (c)
[flat] f = Flatten (p)
[head] g = Gemm <transB = 1> (f, u, d)
[out] y = Cast <to = 1> (g)
"""
QUANTIZED = """
[in] h = Cast <to = 10> (x)
[q1] hq = QuantizeLinear (h, s, z)
[d1] hd = DequantizeLinear (hq, s, z)
[w1] wd = DequantizeLinear <axis = 0> (w, ws, wz)
[conv] a = Conv <pads = [1, 1, 1, 1]> (hd, wd, b)
[relu] r = Relu (a)
[q2] rq = QuantizeLinear (r, s, z)
[d2] rd = DequantizeLinear (rq, s, z)
[w2] vd = DequantizeLinear <axis = 0> (v, vs, vz)
[next] c = Conv (rd, vd)
[pool] p = GlobalAveragePool (c)
[flat] f = Flatten (p)
[head] g = Gemm <transB = 1> (f, u, d)
[out] y = Cast <to = 1> (g)
"""
SHAPES = {"w": (32, 16, 3, 3), "b": (32,), "v": (64, 32, 1, 1), "u": (8, 64), "d": (8,)}
WORK = {"conv": ("Conv", 8 * 8 * 32 * 16 * 9), "next": ("Conv", 8 * 8 * 64 * 32), "head": ("Gemm", 8 * 64)}
INPUT, OUTPUT = "float[N, 16, 8, 8] x", "float[N, 8] y"


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def serialized(body: str, arrays: Mapping[str, Array], inputs: str = INPUT, outputs: str = OUTPUT) -> bytes:
    """The graph with `arrays` as its initializers."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    content: bytes = proto.SerializeToString()
    return content


def float_arrays() -> dict[str, Array]:
    """Initializers of `FLOAT`."""
    return {name: normal(name, *shape) / 4 for name, shape in SHAPES.items()}


def half_arrays() -> dict[str, Array]:
    """Initializers of `HALF`."""
    return {name: array.astype(np.float16) for name, array in float_arrays().items()}


def quantized_arrays(scale_type: type = np.float16, *, per_tensor: bool = False) -> dict[str, Array]:
    """Initializers of `QUANTIZED`: activations in steps of 1/32, weights in 127 steps of their largest."""
    arrays = half_arrays()
    arrays["s"], arrays["z"] = np.asarray(1 / 32, scale_type), np.asarray(0, np.int8)
    for name in ("w", "v"):
        weights = float_arrays()[name]
        axes = None if per_tensor else (1, 2, 3)
        scales = (np.abs(weights).max(axis=axes, keepdims=True) / 127).astype(scale_type)
        arrays[name] = np.rint(weights / scales.astype(np.float32)).clip(-127, 127).astype(np.int8)
        arrays[f"{name}s"] = scales.reshape(() if per_tensor else -1)
        arrays[f"{name}z"] = np.zeros_like(arrays[f"{name}s"], np.int8)
    return arrays


def graph(precision: str, **sides: str) -> bytes:
    """The small network in "fp32", "fp16" or "int8" (convolutions only, the rest FP16); `sides`: inputs, outputs."""
    if precision == "fp32":
        return serialized(FLOAT, float_arrays(), **sides)
    if precision == "fp16":
        return serialized(HALF, half_arrays(), **sides)
    return serialized(QUANTIZED, quantized_arrays(), **sides)


def planned(precision: str) -> tuple[PlannedLayer, ...]:
    """What its three layers are to run in."""
    return tuple(
        PlannedLayer(name, operator, "fp16" if precision == "int8" and name == "head" else precision, macs)
        for name, (operator, macs) in WORK.items()
    )
