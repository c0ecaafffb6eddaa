"""Float layers between Q/DQ: onnxruntime, which quantizes their weights unasked, beside onnxruntime unoptimized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.optimize.keep_float import keep_float
from textual_graphs import graph, normal

Array = NDArray[Any]

INPUT = "float[N, 4, 6, 6] x"
BETWEEN = """
[q1] xq = QuantizeLinear (x, s, z)
[d1] xd = DequantizeLinear (xq, s, z)
[layer] a = {operator} (xd, w, b)
[relu] r = Relu (a)
[q2] rq = QuantizeLinear (r, s, z)
[d2] y = DequantizeLinear (rq, s, z)
"""
PARAMETERS: dict[str, Any] = {"s": np.asarray(1 / 32, np.float32), "z": np.asarray(120, np.uint8), "b": (4,)}


def weight(*shape: int) -> Array:
    """With channels of very different size, for which one scale does not do."""
    sizes = np.geomspace(0.01, 1.0, 4, dtype=np.float32)
    return normal("w", *shape) * sizes.reshape(4, *[1] * (len(shape) - 1))


def between(operator: str = "Conv", x: str = INPUT, y: str = "float[N, C, H, L] y", **arrays: Any) -> ir.Model:
    return graph(BETWEEN.format(operator=operator), x, y, **{"w": weight(4, 4, 1, 1), **PARAMETERS, **arrays})


def run(model: ir.Model, x: Array, *, optimized: bool) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x})
    assert isinstance(result, np.ndarray)
    return result


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


CASES = {
    "Conv": (between(), (3, 4, 6, 6)),
    "Conv, depthwise": (between("Conv <group = 4>", w=weight(4, 1, 3, 3)), (3, 4, 6, 6)),
    "ConvTranspose": (between("ConvTranspose", w=weight(4, 4, 2, 2)), (3, 4, 6, 6)),
    "Gemm": (between("Gemm <transB = 1>", "float[N, 6] x", "float[N, 4] y", w=weight(4, 6)), (3, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_weight_stays_float(name: str) -> None:
    model, shape = CASES[name]
    x = normal(name, *shape) * 2
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = keep_float(model)
    assert (result.changed, result.skipped) == (1, ())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert operators(result.model) == operators(model)  # its own DequantizeLinear instead of the one it alone read
    expected = run(model, x, optimized=False)
    np.testing.assert_array_equal(run(result.model, x, optimized=False), expected)
    step = 1.001 / 32  # float32 rounding may move single values to the neighbouring integer
    np.testing.assert_allclose(run(result.model, x, optimized=True), expected, rtol=0, atol=step)
    assert np.mean(run(result.model, x, optimized=True) != expected) < 0.01


def test_without_the_pass_onnxruntime_quantizes_it_with_one_scale() -> None:
    """The reason for the pass; where a later onnxruntime fails this, it is needed no more."""
    x = normal("Conv", 3, 4, 6, 6) * 2
    differs = run(between(), x, optimized=True) != run(between(), x, optimized=False)
    assert np.mean(differs) > 0.05


def test_other_readers_keep_the_shared_dequantized_tensor() -> None:
    body = BETWEEN.format(operator="Conv").replace("y = Deq", "c = Deq") + "[add] y = Add (c, xd)"
    model = graph(body, INPUT, "float[N, C, H, L] y", w=weight(4, 4, 1, 1), **PARAMETERS)
    result = keep_float(model)
    assert result.changed == 1
    nodes = {node.name: node for node in result.model.graph}
    assert nodes["add"].inputs[1] is nodes["d1"].outputs[0]
    own = nodes["layer"].inputs[0]
    assert own is not None
    producer = own.producer()
    assert producer is not None
    assert producer is not nodes["d1"]
    assert producer.inputs[0] is nodes["q1"].outputs[0]
    x = normal("x", 2, 4, 6, 6)
    np.testing.assert_array_equal(run(result.model, x, optimized=False), run(model, x, optimized=False))


LEFT_ALONE = {
    "an INT8 layer": """
        xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)
        wd = DequantizeLinear <axis = 0> (i, is, iz) y = Conv (xd, wd, b)""",
    "a layer that reads floats": "r = Relu (x) y = Conv (r, w, b)",
    "a layer at the input": "y = Conv (x, w, b)",
    "a scale per channel": """
        xq = QuantizeLinear <axis = 1> (x, cs, cz) xd = DequantizeLinear <axis = 1> (xq, cs, cz) y = Conv (xd, w, b)""",
    "a computed weight": """
        xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z) v = Relu (w) y = Conv (xd, v, b)""",
    "another operator": "xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z) y = Mul (xd, s)",
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    arrays = {
        **PARAMETERS,
        "w": weight(4, 4, 1, 1),
        "i": np.ones((4, 4, 1, 1), np.int8),
        "is": np.full(4, 0.1, np.float32),
        "iz": np.zeros(4, np.int8),
        "cs": np.full(4, 1 / 32, np.float32),
        "cz": np.full(4, 120, np.uint8),
    }
    body = LEFT_ALONE[name]
    model = graph(
        body, INPUT, **{key: array for key, array in arrays.items() if f" {key}" in body or f"({key}" in body}
    )
    result = keep_float(model)
    assert (result.changed, result.skipped) == (0, ())
    assert ir.to_proto(result.model).SerializeToString() == ir.to_proto(model).SerializeToString()


def test_an_unknown_number_of_channels_is_skipped() -> None:
    result = keep_float(between(x="float[N, C, 6, 6] x"))
    assert result.changed == 0
    (skip,) = result.skipped
    assert skip.node == "layer"
    assert "number of its input channels" in skip.reason


def test_names_that_are_taken_are_not_used_again() -> None:
    body = BETWEEN.format(operator="Conv").replace("(r, s, z)", "(r, layer_s, z)")
    arrays = {"w": weight(4, 4, 1, 1), "layer_s": np.asarray(1 / 32, np.float32), **PARAMETERS}
    model = graph(body, INPUT, "float[N, C, H, L] y", **arrays)
    model.graph.initializers["layer_s"].name = "layer::input::scale"
    result = keep_float(model)
    x = normal("x", 2, 4, 6, 6)
    assert "layer::input::scale_1" in result.model.graph.initializers
    np.testing.assert_array_equal(run(result.model, x, optimized=False), run(model, x, optimized=False))
