"""SiLU behind integers as one operator of onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edgewright.optimize.fuse_silu import fuse_silu
from textual_graphs import graph, normal

PAIR = "[q] u = QuantizeLinear (x, s, z) [d] a = DequantizeLinear (u, s, z) "
PARAMETERS: dict[str, Any] = {"s": np.array(0.03, np.float32), "z": np.array(120, np.uint8)}


def behind_integers(body: str, outputs: str = "float[N, 3, 8, 8] y") -> ir.Model:
    return graph(PAIR + body, outputs=outputs, **PARAMETERS)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": normal("x", 2, 3, 8, 8)})[0]
    return result


@pytest.mark.parametrize("product", ["Mul (a, g)", "Mul (g, a)"])
def test_silu_behind_integers_is_one_operator_of_the_same_values(product: str) -> None:
    model = behind_integers(f"[sigmoid] g = Sigmoid (a) [product] y = {product}")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    fused = fuse_silu(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert (fused.changed, fused.skipped) == (1, ())
    assert operators(fused.model) == ["QuantizeLinear", "DequantizeLinear", "QuickGelu"]
    (silu,) = [node for node in fused.model.graph if node.op_type == "QuickGelu"]
    assert (silu.name, silu.domain, silu.outputs[0].name) == ("product", "com.microsoft", "y")
    assert silu.outputs[0].shape == model.graph.outputs[0].shape
    onnx.checker.check_model(ir.to_proto(fused.model), full_check=True)
    integers = np.clip(np.rint(normal("x", 2, 3, 8, 8) / np.float32(0.03)) + 120, 0, 255)
    x = (integers - 120) * np.float64(np.float32(0.03))
    np.testing.assert_allclose(run(fused.model), x / (1 + np.exp(-x)), rtol=0, atol=2e-6)
    np.testing.assert_allclose(run(fused.model), run(model), rtol=0, atol=2e-6)


def test_readers_behind_it_still_read_it() -> None:
    model = behind_integers("[sigmoid] g = Sigmoid (a) [product] m = Mul (a, g) [relu] y = Relu (m)")
    fused = fuse_silu(model).model
    assert operators(fused) == ["QuantizeLinear", "DequantizeLinear", "QuickGelu", "Relu"]
    np.testing.assert_allclose(run(fused), run(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("[g] g = Sigmoid (a) [t] b = Tanh (a) [m] m = Mul (a, g) [s] y = Add (m, b)", "float[N, 3, 8, 8] y"),
        ("[g] g = Sigmoid (a) [m] m = Mul (a, g) [s] y = Add (m, g)", "float[N, 3, 8, 8] y"),
        ("[g] g = Sigmoid (a) [t] b = Tanh (x) [m] y = Mul (b, g)", "float[N, 3, 8, 8] y"),
        ("[g] g = Sigmoid (a) [m] y = Mul (a, g)", "float[N, 3, 8, 8] y, float[N, 3, 8, 8] a"),
        ("[g] g = Sigmoid (a) [m] y = Add (a, g)", "float[N, 3, 8, 8] y"),
        ("[g] g = HardSigmoid (a) [m] y = Mul (a, g)", "float[N, 3, 8, 8] y"),
        ("[n] b = Neg (a) [g] g = Sigmoid (b) [m] y = Mul (b, g)", "float[N, 3, 8, 8] y"),
    ],
    ids=["x is read", "sigmoid is read", "gate", "x is given", "a sum", "hard", "float"],
)
def test_anything_else_is_left_alone(body: str, outputs: str) -> None:
    model = behind_integers(body, outputs)
    fused = fuse_silu(model)
    assert fused.changed == 0
    assert operators(fused.model) == operators(model)
    assert "com.microsoft" not in fused.model.opset_imports


def test_onnxruntime_needs_one_dequantization_less(tmp_path: Path) -> None:
    model = behind_integers("[sigmoid] g = Sigmoid (a) [product] y = Mul (a, g)")
    assert optimized(model, tmp_path).count("DequantizeLinear") == 2
    assert optimized(fuse_silu(model).model, tmp_path) == ["DequantizeLinear", "QuantizeLinear", "QuickGelu"]


def optimized(model: ir.Model, folder: Path) -> list[str]:
    """The operators that onnxruntime makes of it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that such a file is for this machine
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return sorted(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
