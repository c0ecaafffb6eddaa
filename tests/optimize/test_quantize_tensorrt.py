"""Q/DQ graphs for NVIDIA's targets: dtypes, axes and readers, numbers against plain numpy, and what RTX builds."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.calibration.ranges import Range, symmetric
from edgewright.optimize import quantize_tensorrt as module
from edgewright.optimize.cast_fp16 import cast_fp16
from edgewright.optimize.dialects import DIALECTS, half_graph, quantized_graph
from edgewright.optimize.plan import COMPUTE_OPERATORS, QuantPlan
from edgewright.optimize.plan_tensorrt import plan_for_rtx, plan_for_tensorrt
from edgewright.optimize.qdq import SMALLEST_HALF, symmetric_s8, weight_s8
from edgewright.optimize.quantize_tensorrt import float_weights, quantize_for_tensorrt
from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import BACKENDS, BuildRequest
from edgewright.runtime.errors import QuantizationError

Array = NDArray[Any]

IMAGE = "float[N, 16, 8, 8] x"
MAPS = "float[A, B, C, D] y"
NET = """
[stem] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
[relu] r = Relu (a)
[dw] d = Conv <pads = [1, 1, 1, 1], group = 16> (r, k)
[two] c = Conv <pads = [1, 1, 1, 1]> (d, v)
[add] t = Add (r, c)
[act] e = Relu (t)
[pool] p = GlobalAveragePool (e)
[flat] f = Flatten (p)
[head] y = Gemm <transB = 1> (f, u, o)
"""
SHAPES: dict[str, Any] = {
    "w": (16, 16, 3, 3),
    "b": (16,),
    "k": (16, 1, 3, 3),
    "v": (16, 16, 3, 3),
    "u": (20, 16),
    "o": (20,),
}
INTEGER_LAYERS = ("stem", "two", "head")


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def graph(body: str, inputs: str = IMAGE, outputs: str = MAPS, **arrays: Any) -> ir.Model:
    """A model with its shapes inferred; `arrays` become initializers, seeded where only a shape is given."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in arrays.items():
        values = array if isinstance(array, np.ndarray) else normal(name, *array) / 4
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def net(**changes: Any) -> ir.Model:
    return graph(NET, outputs="float[N, 20] y", **{**SHAPES, **changes})


@pytest.fixture(scope="module")
def images() -> Array:
    return normal("images", 12, 16, 8, 8)


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def ranges_of(model: ir.Model, x: Array, method: str = "minmax") -> dict[str, Range]:
    return collect(model, [x], identity={}).ranges(method, signed=True)


def quantized(
    model: ir.Model, x: Array, plan: QuantPlan | None = None, *, half: bool = False, per_channel: bool = True
) -> ir.Model:
    """The Q/DQ graph over exact ranges of `x`, in the FP32 or the cast graph, after checking what holds of all."""
    plan = plan or plan_for_tensorrt(model)
    table = collect(model, [x], identity={})
    rest = cast_fp16(model, table.ranges("minmax")).model if half else model
    before = serialized(rest)
    result = quantize_for_tensorrt(
        rest, plan, table.ranges("minmax", signed=True), float_weights(model), per_channel=per_channel
    )
    assert serialized(rest) == before
    proto = ir.to_proto(result)
    onnx.checker.check_model(proto, full_check=True)
    original = ir.to_proto(model)
    assert list(proto.graph.input) == list(original.graph.input)
    assert [output.name for output in proto.graph.output] == [output.name for output in original.graph.output]
    return result


def initializers(model: ir.Model) -> dict[str, Array]:
    return {each.name: onnx.numpy_helper.to_array(each).copy() for each in ir.to_proto(model).graph.initializer}


def run(model: ir.Model, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def named(model: ir.Model, name: str) -> ir.Node:
    (node,) = (node for node in model.graph if node.name == name)
    return node


def dequantize_before(model: ir.Model, name: str, index: int) -> ir.Node | None:
    """The DequantizeLinear whose result node `name` reads as its operand `index`, or None."""
    value = named(model, name).inputs[index]
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


# --- What is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_everything_is_signed_with_zero_point_zero_in_the_type_of_its_tensor(
    images: Array, half: bool, per_channel: bool
) -> None:
    model = quantized(net(), images, half=half, per_channel=per_channel)
    arrays = initializers(model)
    pairs = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    # x, d, r for the addition, f: a pair each; and three weights
    assert sorted(node.op_type for node in pairs) == ["DequantizeLinear"] * 7 + ["QuantizeLinear"] * 4
    for node in pairs:
        assert node.inputs[1] is not None
        assert node.inputs[2] is not None
        scale, zero_point = arrays[str(node.inputs[1].name)], arrays[str(node.inputs[2].name)]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert scale.dtype == (np.float16 if half else np.float32)
        assert scale.shape == zero_point.shape
        assert (scale > 0).all()
        assert np.isfinite(scale).all()
        if node.op_type == "QuantizeLinear":
            assert scale.shape == ()


@pytest.mark.parametrize("half", [False, True])
def test_the_bias_stays_float(images: Array, half: bool) -> None:
    model = quantized(net(), images, half=half)
    for name in ("stem", "head"):
        bias = named(model, name).inputs[2]
        assert bias is not None
        assert bias.producer() is None
        assert bias.dtype == (ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
    np.testing.assert_array_equal(initializers(quantized(net(), images))["b"], initializers(net())["b"])


@pytest.mark.parametrize("half", [False, True])
def test_only_the_readers_of_the_plan_read_integers(images: Array, half: bool) -> None:
    model = quantized(net(), images, half=half)
    assert plan_for_tensorrt(net()).readers == {"x": ("stem",), "r": ("add",), "d": ("two",), "f": ("head",)}
    for name in INTEGER_LAYERS:
        assert dequantize_before(model, name, 0) is not None
        assert dequantize_before(model, name, 1) is not None
    assert dequantize_before(model, "dw", 0) is None, "it reads the float tensor that the addition reads as integers"
    assert dequantize_before(model, "dw", 1) is None
    assert dequantize_before(model, "add", 0) is not None
    assert dequantize_before(model, "add", 1) is None
    assert dequantize_before(model, "pool", 0) is None
    source = named(model, "dw").inputs[0]
    assert source is not None
    assert source.name == "r"


def test_a_plan_with_other_readers_is_followed(images: Array) -> None:
    plan = plan_for_tensorrt(net())
    mutant = quantized(net(), images, replace(plan, readers={**plan.readers, "r": ()}))
    assert dequantize_before(mutant, "add", 0) is None
    assert sum(node.op_type == "QuantizeLinear" for node in mutant.graph) == 3


def test_one_pair_serves_all_readers_of_a_tensor() -> None:
    model = graph("[c] a = Conv (x, w) [d] b = Conv (x, v) [s] y = Add (a, b)", w=(16, 16, 3, 3), v=(16, 16, 3, 3))
    result = quantized(model, normal("x", 4, 16, 8, 8))
    assert dequantize_before(result, "c", 0) is dequantize_before(result, "d", 0)


def test_the_precisions_of_the_graph_are_those_of_the_plan(images: Array) -> None:
    for half in (False, True):
        layers = {layer.name: layer.precision for layer in planned_layers(quantized(net(), images, half=half))}
        assert layers == {"stem": "int8", "dw": "fp16" if half else "fp32", "two": "int8", "head": "int8"}


@pytest.mark.parametrize("half", [False, True])
def test_a_pooling_shares_the_parameters_of_its_input(half: bool) -> None:
    body = (
        "[one] a = Conv <pads = [1, 1, 1, 1]> (x, w) [pool] b = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a) "
        "[two] c = Conv (b, v) [three] e = Conv (a, u) [p] g = GlobalMaxPool (e) [s] y = Add (c, g)"
    )
    model = graph(body, w=-np.abs(normal("w", 16, 16, 3, 3)), v=(16, 16, 1, 1), u=(16, 16, 1, 1))
    x = np.abs(normal("x", 4, 16, 8, 8))
    ranges = ranges_of(model, x)
    assert ranges["a"].high > 1.05 * ranges["b"].high, "the lowest of four negative values is lower than their maximum"
    plan = plan_for_tensorrt(model)
    assert {"a", "b"} <= set(plan.readers)
    arrays = initializers(quantized(model, x, plan, half=half))
    assert arrays["a::scale"] == arrays["b::scale"] == (np.float16 if half else np.float32)(ranges["a"].high / 127)
    only_pooled = replace(plan, readers={"x": ("one",), "b": ("two",)})
    alone = initializers(quantized(model, x, only_pooled, half=half))["b::scale"]
    assert alone == (np.float16 if half else np.float32)(ranges["b"].high / 127), "nothing to share"


# --- Weights -----------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, str, str, tuple[int, ...], int]] = {
    "Conv": ("Conv (x, w)", IMAGE, MAPS, (20, 16, 3, 3), 0),
    "ConvTranspose": ("ConvTranspose (x, w)", IMAGE, MAPS, (16, 20, 3, 3), 1),
    "Gemm": ("Gemm (x, w)", "float[N, 16] x", "float[A, B] y", (16, 20), 1),
    "Gemm transB": ("Gemm <transB = 1> (x, w)", "float[N, 16] x", "float[A, B] y", (20, 16), 0),
    "MatMul": ("MatMul (x, w)", "float[N, 7, 16] x", "float[A, B, C] y", (16, 20), 1),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_scales_follow_the_output_channels(name: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs, outputs, shape, axis = LAYERS[name]
    spread = np.ones(len(shape), int)
    spread[axis] = -1
    # channels differ a hundredfold: one scale for all, or a wrong axis, loses the small ones
    weight = normal(name, *shape) * np.geomspace(1, 1e-2, shape[axis]).astype(np.float32).reshape(spread)
    model = graph(f"[layer] y = {call}", inputs, outputs, w=weight)
    x = normal("x", 4, *(side for side in model.graph.inputs[0].shape or () if isinstance(side, int)))
    others = tuple(index for index in range(len(shape)) if index != axis)
    expected = (np.abs(weight.astype(np.float64)).max(axis=others) / 127).astype(np.float16 if half else np.float32)

    result = quantized(model, x, half=half)
    arrays = initializers(result)
    dequantize = dequantize_before(result, "layer", 1)
    assert dequantize is not None
    assert dequantize.attributes.get_int("axis", -1) == axis
    np.testing.assert_array_equal(arrays["layer::weight::scale"], expected)
    integers = arrays["w::int8::layer"]
    assert (integers.dtype, integers.shape) == (np.dtype(np.int8), shape)
    np.testing.assert_array_equal(
        integers, np.clip(np.rint(weight / expected.astype(np.float32).reshape(spread)), -128, 127)
    )
    assert not any(array.dtype != np.int8 and array.shape == shape for array in arrays.values()), (
        "no float copy is left"
    )

    whole = quantized(model, x, half=half, per_channel=False)
    dequantize = dequantize_before(whole, "layer", 1)
    assert dequantize is not None
    assert "axis" not in dequantize.attributes
    scale = initializers(whole)["layer::weight::scale"]
    assert scale.shape == ()
    assert scale == expected.max()

    monkeypatch.setattr(module, "channel_axis", lambda node, rank: 1 - axis)
    wrong = initializers(quantized(model, x, half=half))["layer::weight::scale"]
    assert wrong.shape != expected.shape or (wrong != expected).any()


def test_weights_are_quantized_from_float32_not_from_what_was_rounded_to_fp16() -> None:
    """A weight just above a half step of its scale, which FP16 rounds down onto the tie, and ties go to even."""
    weight = np.zeros((16, 16, 1, 1), np.float32)
    weight[:, 0] = 127.0  # scale 1
    weight[:, 1] = 64.5 + 2**-7
    assert np.float16(weight[0, 1, 0, 0]) == 64.5
    model = graph("[c] y = Conv (x, w)", w=weight)
    integers = initializers(quantized(model, normal("x", 2, 16, 8, 8), half=True))["w::int8::c"]
    assert (integers[:, 1] == 65).all()
    rounded = quantize_for_tensorrt(  # a mutant: the weights of the cast graph
        model, plan_for_tensorrt(model), {"x": Range(-1, 1)}, {"c": weight.astype(np.float16).astype(np.float32)}
    )
    assert (initializers(rounded)["w::int8::c"][:, 1] == 64).all()


def test_integers_fit_the_scale_as_it_is_stored() -> None:
    """An FP16 scale is up to 2⁻¹¹ off the exact one; weights are divided by what is stored."""
    weight = normal("stored", 16, 16, 3, 3)
    model = graph("[c] y = Conv (x, w)", w=weight)
    arrays = initializers(quantized(model, normal("x", 2, 16, 8, 8), half=True))
    scale = arrays["c::weight::scale"].astype(np.float64).reshape(-1, 1, 1, 1)
    assert np.abs(arrays["w::int8::c"] * scale - weight).max() <= 0.5001 * scale.max()
    exact = np.abs(weight.astype(np.float64)).max(axis=(1, 2, 3)) / 127
    assert (arrays["c::weight::scale"].astype(np.float64) != exact).any(), "or nothing was shown"


@pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e-6, 1.0, 1e4])
def test_fp16_scales_neither_vanish_nor_overflow(magnitude: float) -> None:
    for scale in (
        symmetric_s8(Range(-magnitude, magnitude / 2), np.float16).scale,
        weight_s8(np.full((2, 3), magnitude, np.float32), 0, dtype=np.float16).scale,
    ):
        assert scale.dtype == np.float16
        assert np.isfinite(scale).all()
        assert (scale >= SMALLEST_HALF).all()
        assert np.isfinite(np.float16(1) / scale).all(), "a kernel multiplies with the reciprocal"


@pytest.mark.parametrize(
    ("interval", "scale"),
    [
        (Range(-128, 127), 1.0),
        (Range(-127, 127), 1.0),
        (Range(-1, 127), 1.0),
        (Range(-128, 3), 1.0),
        (Range(0, 6), 6 / 127),
        (Range(-6, 0), 6 / 128),
        (Range(2, 6), 6 / 127),
        (Range(0, 0), 1.0),
        (symmetric(Range(-128, 3)), 1.0),  # what it is given by the calibration
        (symmetric(Range(-3, 127)), 1.0),
    ],
)
def test_symmetric_parameters(interval: Range, scale: float) -> None:
    params = symmetric_s8(interval)
    assert params.scale == np.float32(scale)
    assert (params.scale.dtype, params.zero_point.dtype, params.axis) == (np.dtype("float32"), np.dtype("int8"), None)
    assert params.zero_point == 0


def test_float_weights_are_those_of_constant_layers() -> None:
    model = net()
    weights = float_weights(model)
    assert set(weights) == {"stem", "dw", "two", "head"}
    np.testing.assert_array_equal(weights["two"], initializers(model)["v"])
    computed = graph("[n] k = Neg (w) [c] y = Conv (x, k)", w=(16, 16, 3, 3))
    assert float_weights(computed) == {}


# --- Numbers -----------------------------------------------------------------------------------------------------


def reference(x: Array, ranges: Mapping[str, Range], *, per_channel: bool = True, wrong: float = 1.0) -> Array:
    """NET in float64, fake-quantized by plain formulas on the tensors and weights that the plan names."""

    def activation(name: str, values: torch.Tensor) -> torch.Tensor:
        scale = float(np.float32(ranges[name].high / 127)) * wrong
        if name == "x":
            assert scale == pytest.approx(max(-float(x.min()) / 128, float(x.max()) / 127) * wrong, rel=1e-6)
        return (values / scale).round().clamp(-128, 127) * scale

    def weight(name: str) -> torch.Tensor:
        values = torch.from_numpy(arrays[name]).double()
        axes = tuple(range(1, values.ndim))
        largest = values.abs().amax(dim=axes, keepdim=True) if per_channel else values.abs().max()
        scale = (largest / 127).float().double()
        return (values / scale).round() * scale

    arrays = initializers(net())
    image = activation("x", torch.from_numpy(x).double())
    bias = torch.from_numpy(arrays["b"]).double()
    r = torch.nn.functional.conv2d(image, weight("w"), bias, padding=1).relu()
    d = torch.nn.functional.conv2d(r, torch.from_numpy(arrays["k"]).double(), padding=1, groups=16)
    c = torch.nn.functional.conv2d(activation("d", d), weight("v"), padding=1)
    pooled = (activation("r", r) + c).relu().mean((2, 3))
    return np.asarray(activation("f", pooled) @ weight("u").T + torch.from_numpy(arrays["o"]).double())


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_graph_computes_what_plain_formulas_do(images: Array, per_channel: bool) -> None:
    ranges = ranges_of(net(), images)
    found = run(quantized(net(), images, per_channel=per_channel), images)
    expected = reference(images, ranges, per_channel=per_channel)
    # a value on the border between two steps may fall on either side: at most a step of the pooled tensor
    tolerance = ranges["f"].high / 127 * np.abs(initializers(net())["u"]).sum(axis=1).max()
    assert np.abs(found - expected).max() <= tolerance
    assert np.median(np.abs(found - expected)) <= 1e-4
    exact = run(net(), images)
    assert np.median(np.abs(found - exact)) > 1e-3, "it was quantized"
    mutant = reference(images, ranges, per_channel=per_channel, wrong=2.0)
    assert np.median(np.abs(found - mutant)) > 1e-3
    other = reference(images, ranges, per_channel=not per_channel)
    assert np.median(np.abs(found - other)) > 1e-3


def test_the_cast_graph_computes_the_same_to_fp16(images: Array) -> None:
    ranges = ranges_of(net(), images)
    found, expected = run(quantized(net(), images, half=True), images), reference(images, ranges)
    assert found.dtype == np.float32
    spread = np.ptp(run(net(), images))
    assert np.abs(found - expected).max() <= 0.03 * spread


# --- What is refused ---------------------------------------------------------------------------------------------


def test_a_missing_range_is_named(images: Array) -> None:
    ranges = ranges_of(net(), images)
    del ranges["d"]
    with pytest.raises(QuantizationError, match="no range for d; calibrate this graph again"):
        quantize_for_tensorrt(net(), plan_for_tensorrt(net()), ranges, float_weights(net()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_that_are_not_finite_are_refused(images: Array, bad: float, per_channel: bool) -> None:
    weights = float_weights(net())
    weights["two"] = weights["two"].copy()
    weights["two"][3, 2, 1, 0] = bad
    with pytest.raises(QuantizationError, match=r"two: a weight is NaN.*export the model again"):
        quantize_for_tensorrt(
            net(), plan_for_tensorrt(net()), ranges_of(net(), images), weights, per_channel=per_channel
        )


@pytest.mark.parametrize(("name", "words"), [("stem", "2 nodes are called 'stem'"), ("", "called ''")])
def test_nodes_need_names_of_their_own(images: Array, name: str, words: str) -> None:
    model = net()
    named(model, "two").name = name
    with pytest.raises(QuantizationError, match=f"{words}.*name every node"):
        quantize_for_tensorrt(model, plan_for_tensorrt(model), ranges_of(net(), images), float_weights(model))


# --- Dialects, and what TensorRT-RTX makes of them ---------------------------------------------------------------

BLOCKS = """
[stem] a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b) [relu] r = Relu (a)
[expand] m = Conv (r, ew) [clip] c = Clip (m, zero, six)
[pool] p = GlobalAveragePool (c) [down] d = Conv (p, dw) [act] e = Relu (d) [up] u = Conv (e, uw) [sig] s = Sigmoid (u)
[scale] g = Mul (c, s) [project] j = Conv (g, pw) [add] t = Add (j, r)
[gap] q = GlobalAveragePool (t) [flat] f = Flatten (q) [head] y = Gemm <transB = 1> (f, hw)
"""
BLOCK_ARRAYS: dict[str, Any] = {
    "w": (32, 3, 3, 3), "b": (32,), "ew": (64, 32, 1, 1), "dw": (16, 64, 1, 1), "uw": (64, 16, 1, 1),
    "pw": (32, 64, 1, 1), "hw": (10, 32), "zero": np.array(0, np.float32), "six": np.array(6, np.float32),
}  # fmt: skip


def blocks() -> ir.Model:
    return graph(BLOCKS, "float[N, 3, 16, 16] x", "float[A, B] y", **BLOCK_ARRAYS)


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
@pytest.mark.parametrize("dialect", ["tensorrt", "rtx"])
def test_a_dialect_says_in_its_plan_what_its_graph_holds(dialect: str, remainder: str) -> None:
    model = blocks()
    table = collect(model, [normal("x", 8, 3, 16, 16)], identity={})
    result = quantized_graph(dialect, model, table, remainder=remainder)
    layers = {layer.name: layer.precision for layer in planned_layers(result.model)}
    decisions = {each.node: each for each in result.plan.decisions}
    assert {name: decisions[name].precision for name in layers} == layers
    integer = {"stem", "project"} if dialect == "rtx" else {"expand", "project"}  # 3 channels and the gate are narrow
    assert {name for name, precision in layers.items() if precision == "int8"} == integer
    assert {precision for precision in layers.values() if precision != "int8"} == {remainder}
    assert result.int8_layers == len(integer)
    if remainder == "fp32":
        assert decisions["down"].reason.endswith("; not FP16: FP32 was asked for")
        assert all(array.dtype != np.float16 for array in initializers(result.model).values())
    scales = [array for name, array in initializers(result.model).items() if name.endswith("::weight::scale")]
    assert {array.ndim for array in scales} == ({0} if dialect == "rtx" else {1})


def test_an_unknown_dialect_is_an_error_of_the_caller() -> None:
    assert {"cpu", "tensorrt", "rtx"} | {backend.dialect for backend in BACKENDS.values()} <= {*DIALECTS}
    with pytest.raises(KeyError):
        quantized_graph("abacus", blocks(), collect(blocks(), [normal("x", 2, 3, 16, 16)], identity={}))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the package tensorrt-rtx is not installed"
)
@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_rtx_builds_what_was_planned_and_no_kernel_more_than_fp16(remainder: str) -> None:
    model, backend = blocks(), BACKENDS["tensorrt-rtx"]
    table = collect(model, [normal("x", 8, 3, 16, 16)], identity={})
    result = quantized_graph("rtx", model, table, remainder=remainder)
    planned = planned_layers(result.model)
    built = backend.build(BuildRequest(serialized(result.model), "int8", planned, "sm86"))
    assert {layer.name: layer.actual for layer in built.layers} == {layer.name: layer.precision for layer in planned}
    assert sum(layer.actual == "int8" for layer in built.layers) == result.int8_layers == 2
    if remainder == "fp16":
        half = half_graph(model, table).model
        plain = backend.build(BuildRequest(serialized(half), "fp16", planned_layers(half), "sm86"))
        assert len(built.compiled.kernels) <= len(plain.compiled.kernels)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the package tensorrt-rtx is not installed"
)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("planner", [plan_for_tensorrt, plan_for_rtx])
def test_either_plan_builds_in_integers_for_rtx(images: Array, planner: Any, per_channel: bool) -> None:
    model = net()
    plan = planner(model)
    result = quantized(model, images, plan, half=True, per_channel=per_channel)
    built = BACKENDS["tensorrt-rtx"].build(BuildRequest(serialized(result), "int8", planned_layers(result), "sm86"))
    integer = {each.node for each in plan.nodes_in("int8") if each.operator in COMPUTE_OPERATORS}
    assert {layer.name for layer in built.layers if layer.actual == "int8"} == integer
