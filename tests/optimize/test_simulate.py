"""The simulation of FP16, against numpy.float16: what is stored is rounded, what is not gives the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.calibration.ranges import Range
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.optimize.cast_fp16 import cast_fp16
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.simulate import signed_to_unsigned, simulate_fp16
from edgewright.runtime.errors import QuantizationError
from textual_graphs import graph, normal

Array = NDArray[Any]

W = (3, 3, 1, 1)
LIE = Range(-1.0, 1.0)
CODES = np.arange(-128, 128, dtype=np.int8)


X = normal("x", 2, 3, 8, 8)


def in_fp16(model: ir.Model) -> ir.Model:
    """All of it in FP16, by ranges that need not be true."""
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    return cast_fp16(model, {str(value.name): LIE for value in values}).model


def run(model: ir.Model, x: Array = X, *, optimized: bool = True) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, {"x": x})
    return results


def simulated(model: ir.Model) -> ir.Model:
    """The simulation of FP16 `model`, after checking what holds of every one."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = simulate_fp16(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    proto, original = ir.to_proto(result), ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert list(proto.graph.input) == list(original.graph.input)
    assert list(proto.graph.output) == list(original.graph.output)
    assert all(tensor.data_type != onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    halves = [node for node in result.graph if node.outputs[0].dtype == ir.DataType.FLOAT16]
    assert {node.op_type for node in halves} <= {"Cast"}
    assert all(reader.op_type == "Cast" for node in halves for reader in node.outputs[0].consumers())
    return result


def pairs(model: ir.Model) -> int:
    return sum(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in model.graph)


def half(array: Array) -> Array:
    """Rounded to FP16."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


# --- Rounding ----------------------------------------------------------------------------------------------------


def test_each_stored_tensor_is_rounded() -> None:
    """Operators whose float32 results are the same everywhere, step by step."""
    eye, k = np.eye(8, dtype=np.float32), np.float32(0.3)
    model = graph(
        "m = MatMul (x, eye) p = Mul (m, m) s = Sqrt (p) t = Add (s, k) d = Div (p, t) y = MatMul (d, eye)",
        eye=eye,
        k=k,
    )
    square = half(half(X) * half(X))
    expected = half(square / half(half(np.sqrt(square)) + half(k)))
    result = simulated(in_fp16(model))
    assert pairs(result) == 7
    assert np.array_equal(run(result, optimized=False)[0], expected)
    assert np.array_equal(run(result)[0], expected)


@pytest.mark.parametrize("optimized", [False, True])
def test_rounding_is_that_of_numpy(optimized: bool) -> None:
    """All sorts of magnitudes: subnormal, ties, beyond the end."""
    rng = np.random.default_rng(0)
    x = rng.choice([-1, 1], 4096) * np.exp2(rng.uniform(-30, 18, 4096))
    x[:6] = [65504, 65519.99, 65520, -65520, 1 + 2**-11, 2**-25]
    model = graph(
        "p = Mul (x, k) y = MatMul (p, eye)",
        "float[N, 4] x",
        "float[N, M] y",
        k=np.float32(1),
        eye=np.eye(4, dtype=np.float32),
    )
    values = x.astype(np.float32).reshape(-1, 4)
    finite = np.where(np.abs(values) < 65520, values, 0)  # in a row of infinities 0 · ∞ is NaN
    assert np.array_equal(run(simulated(in_fp16(model)), finite, optimized=optimized)[0], half(finite))
    relu = in_fp16(
        graph("p = MatMul (x, one) y = Mul (p, one)", "float[N, 1] x", "float[N, M] y", one=np.ones((1, 1), np.float32))
    )
    column = values.reshape(-1, 1)
    assert np.array_equal(run(simulated(relu), column, optimized=optimized)[0], half(column))


def test_planted_overflow_is_seen() -> None:
    """With ranges that lie the convolution's 1e5 becomes infinite; with true ones it stays in FP32."""
    weight = np.full(W, 1e5 / 3, np.float32)
    model = graph("[a] c = Conv (x, w) [b] d = Mul (c, k) [e] y = Conv (d, v)", w=weight, k=np.float32(1e-3), v=W)
    x = np.ones_like(X)
    plain = run(model, x)[0]
    assert np.isinf(run(simulated(in_fp16(model)), x)[0]).any()
    result = cast_fp16(model, collect(model, [x], identity={}).ranges("minmax"))
    assert [d.precision for d in result.decisions] == ["fp32", "fp32", "fp16"]
    careful = run(simulated(result.model), x)[0]
    assert np.abs(careful - plain).max() <= 2e-3 * np.abs(plain).max()


def test_onnxruntime_itself_does_not_see_the_overflow() -> None:
    """Why there is a simulation; if this fails one day, onnxruntime has learnt it."""
    model = graph(
        "[a] c = Conv (x, w) [e] y = Conv (c, v)", w=np.full(W, 1e5 / 3, np.float32), v=np.full(W, 1e-5, np.float32)
    )
    half_model = in_fp16(model)
    assert np.isfinite(run(half_model, np.ones_like(X))[0]).all()
    assert not np.isfinite(run(simulated(half_model), np.ones_like(X))[0]).any()


def test_nodes_in_fp32_are_not_rounded() -> None:
    model = graph("[a] c = Exp (x) [b] y = Sqrt (c)")
    same = simulated(cast_fp16(model, {}).model)
    assert pairs(same) == 0
    assert np.array_equal(run(same)[0], run(model)[0])


def test_initializer_in_both_forms() -> None:
    model = graph("[a] c = Conv (x, w) [b] d = Exp (c) [e] y = Mul (d, w)", "float[1, 3, 1, 1] x", w=W)
    ranges = dict.fromkeys(("x", "c", "d"), LIE)
    result = simulated(cast_fp16(model, ranges).model)
    x = normal("x", 1, 3, 1, 1)
    w = normal("w", *W)
    c = half(np.einsum("ochw,ncij->noij", half(w), half(x)))
    assert np.allclose(run(result, x)[0], np.exp(c) * w, rtol=2e-3)
    values = [value.const_value for value in result.graph.initializers.values()]
    arrays = [value.numpy() for value in values if value is not None]
    assert any(np.array_equal(array, w) for array in arrays)
    assert any(np.array_equal(array, half(w)) for array in arrays)


@pytest.mark.parametrize("place", ["input", "output"])
def test_fp16_at_the_border_is_refused(place: str) -> None:
    types = ("float16", "float") if place == "input" else ("float", "float16")
    model = graph(f"y = Cast <to = {1 if place == 'input' else 10}> (x)", f"{types[0]}[4] x", f"{types[1]}[4] y")
    with pytest.raises(QuantizationError, match="FP16 at the border"):
        simulate_fp16(model)


# --- Where no rounding is needed ---------------------------------------------------------------------------------

SELECTIONS = (
    *("Relu (c)", "Clip (c, zero, limit)", "Max (c, third)", "Min (c, third)", "Where (mask, c, third)"),
    *("MaxPool <kernel_shape = [2, 2]> (c)", "GlobalMaxPool (c)", "ReduceMax (c)", "ReduceMin (c)", "Identity (c)"),
    *("Transpose <perm = [0, 1, 3, 2]> (c)", "Concat <axis = 1> (c, c)", "Concat <axis = 1> (c)", "Tile (c, twice)"),
    *("Pad (c, pads, third)", "Slice (c, one, seven, one)", "DepthToSpace <blocksize = 1> (c)"),
    *("Gather <axis = 2> (c, one)", "Reshape (c, shape)", "Expand (c, ones)", "SpaceToDepth <blocksize = 2> (c)"),
)
CONSTANTS = {
    "zero": np.float32(0),
    "third": np.float32(1 / 3),
    "limit": np.float32(1.1),
    "mask": np.arange(8) % 3 == 0,
    "pads": np.array([0, 0, 1, 1, 0, 0, 0, 2], np.int64),
    "one": np.array([1], np.int64),
    "seven": np.array([7], np.int64),
    "twice": np.array([1, 2, 1, 1], np.int64),
    "shape": np.array([0, 3, 4, 16], np.int64),
    "ones": np.array([1, 1, 1, 1], np.int64),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection_is_not_rounded_again(selection: str) -> None:
    """One pair behind image, convolution and selection each would give the same as what is there."""
    names = {name: array for name, array in CONSTANTS.items() if name in selection}
    model = graph(f"c = Conv (x, w) s = {selection} y = Neg (s)", w=W, **names)
    half_model = in_fp16(model)
    result = simulated(half_model)
    assert pairs(result) == 3  # the image, the convolution or the selection, Neg
    everywhere = graph_rounded_everywhere(half_model)
    assert np.array_equal(run(result, optimized=False)[0], run(everywhere, optimized=False)[0])


def graph_rounded_everywhere(model: ir.Model) -> ir.Model:
    """The oracle: `model` with every FP16 operator between Casts, so that each of its tensors is stored as FP16."""
    proto = ir.to_proto(model)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    halves = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    halves |= {tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    nodes = []
    for index, node in enumerate(proto.graph.node):
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        for position, name in enumerate(node.input):
            if name in halves:
                node.input[position] = f"{name}::{index}.{position}"
                nodes.append(onnx.helper.make_node("Cast", [name], [node.input[position]], to=onnx.TensorProto.FLOAT))
        nodes.append(node)
        for position, name in enumerate(node.output):
            if name in halves:
                node.output[position] = f"{name}::full"
                nodes.append(onnx.helper.make_node("Cast", [f"{name}::full"], [name], to=onnx.TensorProto.FLOAT16))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


@pytest.mark.parametrize("operator", ["Sigmoid", "Neg", "GlobalAveragePool", "Sqrt", "Tanh", "HardSwish"])
def test_other_operators_are_rounded(operator: str) -> None:
    model = in_fp16(graph(f"c = Conv (x, w) s = {operator} (c) y = Conv (s, w)", w=W))
    result = simulated(model)
    assert pairs(result) == 4
    everywhere = run(graph_rounded_everywhere(model), optimized=False)[0]
    assert np.array_equal(run(result, optimized=False)[0], everywhere, equal_nan=True)


def test_tensor_with_two_readers_is_rounded_at_once() -> None:
    model = in_fp16(graph("c = Conv (x, w) r = Relu (c) y = Add (c, r)", w=W))
    assert pairs(simulated(model)) == 3  # the image, c, y; not r
    assert np.array_equal(run(simulated(model))[0], run(graph_rounded_everywhere(model), optimized=False)[0])


def test_tensor_that_leaves_the_graph_is_rounded() -> None:
    """A selection in FP32 behind it must not read the exact values."""
    model = graph("c = Conv (x, w) y = Relu (c)", w=W)
    result = cast_fp16(model, {"x": LIE, "c": LIE})  # y is not measured: Relu is FP32
    assert [d.precision for d in result.decisions] == ["fp16", "fp32"]
    y = run(simulated(result.model))[0]
    assert np.array_equal(y, half(y))


def test_chain_of_selections_has_one_pair() -> None:
    model = in_fp16(graph("c = Conv (x, w) r = Relu (c) p = MaxPool <kernel_shape = [2, 2]> (r) y = Conv (p, w)", w=W))
    result = simulated(model)
    assert pairs(result) == 3
    everywhere = run(graph_rounded_everywhere(model), optimized=False)[0]
    assert np.array_equal(run(result, optimized=False)[0], everywhere)


# --- Q/DQ --------------------------------------------------------------------------------------------------------


def quantized(middle: str, opset: int = 19) -> ir.Model:
    """x → FP16 → Q/DQ → INT8 weight's DQ → Conv → `middle`, which reads c and yields y in FP16 → FP32."""
    body = f"""
        h = Cast <to = 10> (x)
        q = QuantizeLinear (h, s, z) d = DequantizeLinear (q, s, z)
        v = DequantizeLinear <axis = 0> (w, t, u) c = Conv (d, v, b)
        {middle}
        y = Cast <to = 1> (o)"""
    scales: dict[str, Any] = {
        "s": np.float16(0.02),
        "r": np.float16(0.05),
        "t": np.array([0.01, 0.003, 0.02], np.float16),
    }
    weight = np.random.default_rng(5).integers(-127, 128, W).astype(np.int8)
    zeros: dict[str, Any] = {"z": np.int8(0), "u": np.zeros(3, np.int8)}
    bias = np.array([0.1, -0.7, 1.3], np.float16)
    return graph(body, opset=opset, w=weight, b=bias, **scales, **zeros)


def expected_convolution(model: ir.Model) -> Array:
    """What the integer kernel accumulates, scaled: float64, not rounded."""
    graph = model.graph
    arrays = {name: v.const_value.numpy() for name, v in graph.initializers.items() if v.const_value is not None}
    integers = np.clip(np.rint(half(X) / arrays["s"].astype(np.float32)), -128, 127)
    products = np.einsum("oc,nchw->nohw", arrays["w"][:, :, 0, 0].astype(np.float64), integers.astype(np.float64))
    scale = float(arrays["s"]) * arrays["t"].astype(np.float64)
    result: Array = products * scale.reshape(1, 3, 1, 1) + arrays["b"].astype(np.float64).reshape(1, 3, 1, 1)
    return result


@pytest.mark.parametrize("optimized", [False, True])
def test_convolution_reads_the_integers_and_stores_fp16(optimized: bool) -> None:
    model = quantized("o = Relu (c)")
    result = simulated(model)
    assert pairs(result) == 2  # in front of Q; behind Relu
    y = run(result, optimized=optimized)[0]
    expected = half(np.maximum(expected_convolution(model), 0).astype(np.float32))
    ulps = np.abs(y - expected) / np.spacing(expected.astype(np.float16)).astype(np.float32)
    assert (ulps <= 1).all()
    assert (ulps == 0).mean() > 0.99  # float32's own sums end on the other side of a tie now and then


@pytest.mark.parametrize("optimized", [False, True])
def test_requantized_convolution(optimized: bool) -> None:
    """What onnxruntime's optimizer would make of Q/DQ around float weights is something else: it quantizes them."""
    model = quantized("a = Relu (c) k = QuantizeLinear (a, r, z) o = DequantizeLinear (k, r, z)")
    result = simulated(model)
    assert pairs(result) == 3
    y = run(result, optimized=optimized)[0]
    step = np.float16(0.05).astype(np.float32)
    codes = np.clip(np.rint(half(np.maximum(expected_convolution(model), 0).astype(np.float32)) / step), -128, 127)
    expected = half((codes * step).astype(np.float32))
    assert np.isclose(y, expected, rtol=0, atol=1.01 * step).all()
    assert (y == expected).mean() > 0.99


def test_other_readers_of_dequantized_tensors_read_fp16() -> None:
    result = simulated(quantized("o = Add (c, d)"))
    sources = {
        node.op_type: [str(value.producer().op_type) for value in node.inputs if value and value.producer()]  # type: ignore[union-attr]
        for node in result.graph
    }
    assert sources["Add"] == ["Cast", "Cast"]
    assert sources["Conv"] == ["DequantizeLinear"]


def test_weights_are_dequantized_as_they_would_be() -> None:
    model = quantized("o = Relu (c)")
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT16, None))
    evaluator: Any = onnx.reference.ReferenceEvaluator(proto)
    (expected,) = evaluator.run(None, {"x": X})
    weight = simulated(model).graph.initializers["v"].const_value
    assert weight is not None
    assert np.array_equal(half(weight.numpy()), expected.astype(np.float32))
    assert not np.array_equal(weight.numpy(), expected.astype(np.float32))  # the product is not rounded to FP16


def test_codes_survive_the_pair_behind_them() -> None:
    """scale · code in FP16, quantized by the same scale, is the code: 127 half ulps are not half a step."""
    model = quantized(
        "p = MaxPool <kernel_shape = [1, 1]> (d) k = QuantizeLinear (p, s, z) o = DequantizeLinear (k, s, z)"
    )
    step = np.float16(0.02).astype(np.float32)
    codes = np.resize(CODES, X.shape).astype(np.float32)
    assert np.array_equal(run(simulated(model), codes * step)[0], half(codes * step))


def test_integers_of_fp32_nodes_stay() -> None:
    """FP32 scales mean that the device has FP32 around the integers; nothing is rounded, no weight dequantized."""
    body = """
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) v = DequantizeLinear <axis = 0> (w, t, u)
        y = Conv (d, v)"""
    weight = np.random.default_rng(5).integers(-127, 128, W).astype(np.int8)
    scales = {"s": np.float32(0.02), "t": np.array([0.01, 0.003, 0.02], np.float32)}
    model = graph(body, w=weight, z=np.int8(0), u=np.zeros(3, np.int8), **scales)
    assert operators(simulated(model)) == operators(model)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("opset", [19, 20])
def test_unsigned_codes_hold_the_same_values(opset: int) -> None:
    """All 256 codes, ties between them, and what saturates."""
    scale = np.float32(0.0371)
    body = "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)"
    model = graph(body, "float[N] x", "float[N] y", opset=opset, s=scale, z=np.int8(0))
    steps = np.concatenate([CODES, CODES + 0.5, CODES - 0.4999, [-1e6, 1e6, -128.6, 127.6]])
    x = (steps * scale).astype(np.float32)
    unsigned = signed_to_unsigned(model)
    onnx.checker.check_model(ir.to_proto(unsigned), full_check=True)
    assert {str(node.inputs[2].dtype) for node in unsigned.graph if node.inputs[2]} == {"UINT8"}
    assert [str(value.name) for value in unsigned.graph.initializers.values()] == ["s", "z::unsigned"]
    assert np.array_equal(run(unsigned, x)[0], run(model, x)[0])
    assert len(np.unique(run(unsigned, x)[0])) == 256


@pytest.mark.parametrize(
    ("body", "zero_point"),
    [
        ("q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)", np.int8(3)),
        ("q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)", np.uint8(0)),
        ("q = QuantizeLinear (x, s, z) r = Reshape (q, shape) y = DequantizeLinear (r, s, z)", np.int8(0)),
        ("q = QuantizeLinear (w, s, z) d = DequantizeLinear (q, s, z) y = Mul (x, d)", np.int8(0)),
        ("q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)", np.int8(0)),
    ],
)
def test_other_integers_stay(body: str, zero_point: Any) -> None:
    """Asymmetric ones, those read as integers, weights."""
    model = graph(
        body, "float[4] x", "float[4] y", s=np.float32(0.1), z=zero_point, shape=np.array([4], np.int64), w=(4,)
    )
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert ir.to_proto(signed_to_unsigned(model)).SerializeToString(deterministic=True) == before


# --- A network of torch's exporter -------------------------------------------------------------------------------


def test_tiny_network(tiny_models: None) -> None:
    source = resolve("tiny")
    assert source.input_shape is not None
    exported = export_onnx(source.module(), source.input_shape)
    model = fold_batchnorm(ir.from_proto(onnx.load_from_string(exported))).model
    model.graph.inputs[0].name = "x"
    x = normal("images", 64, *source.input_shape)
    half_model = cast_fp16(model, collect(model, [x], identity={}).ranges("minmax")).model
    (logits,), (expected,) = run(simulated(half_model), x), run(model, x)
    error = float(((logits - expected) ** 2).sum() / (expected**2).sum())
    assert 1e-9 < error < 1e-5  # 50 dB: eleven bits, a handful of layers
    everywhere = run(graph_rounded_everywhere(half_model), x, optimized=False)[0]
    assert np.array_equal(run(simulated(half_model), x, optimized=False)[0], everywhere)
