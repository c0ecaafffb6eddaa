"""Small ONNX graphs written as text, with seeded weights."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["IMAGE", "MAPS", "graph", "model_of", "normal"]

IMAGE = "float[N, 3, 8, 8] x"
MAPS = "float[N, C, H, L] y"


def normal(name: str, *shape: int) -> NDArray[Any]:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def model_of(body: str, inputs: str, outputs: str, **arrays: NDArray[Any]) -> onnx.ModelProto:
    """A model of opset 19; `arrays` become initializers."""
    proto = _parsed(body, inputs, outputs, 19)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return onnx.shape_inference.infer_shapes(proto)


def graph(body: str, inputs: str = IMAGE, outputs: str = MAPS, *, opset: int = 19, **arrays: Any) -> ir.Model:
    """A model with all types inferred; `arrays` become initializers, a shape alone stands for `normal` values."""
    proto = _parsed(body, inputs, outputs, opset)
    for name, array in arrays.items():
        values = normal(name, *array) if isinstance(array, tuple) else np.asarray(array)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def _parsed(body: str, inputs: str, outputs: str, opset: int) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
