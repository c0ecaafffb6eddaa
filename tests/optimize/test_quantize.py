"""Scales and Q/DQ graphs, against plain numpy, ONNX's reference implementation and the theory of rounding."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.calibration.ranges import Range
from edgewright.optimize import quantize as module
from edgewright.optimize.plan import COMPUTE_OPERATORS, QuantPlan, plan_for_cpu
from edgewright.optimize.qdq import QParams, asymmetric_u8, quantize, weight_s8
from edgewright.optimize.quantize import quantize_for_cpu
from edgewright.runtime.errors import QuantizationError

Array = NDArray[Any]

TINY = float(np.finfo(np.float32).tiny)
IMAGE = "float[N, 3, 8, 8] x"
MAPS = "float[N, C, H, L] y"


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def graph(body: str, inputs: str = IMAGE, outputs: str = MAPS, *, opset: int = 19, **arrays: Any) -> ir.Model:
    """A model in textual syntax; `arrays` become initializers, seeded by their names where only a shape is given."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in arrays.items():
        values = array if isinstance(array, np.ndarray) else normal(name, *array)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def run(model: ir.Model, x: Array, *, optimized: bool = False, names: list[str] | None = None) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(names, {"x": x})
    return results


def quantized(model: ir.Model, x: Array, plan: QuantPlan | None = None) -> ir.Model:
    """The Q/DQ graph over exact min-max ranges of `x`, after checking what holds of every such graph."""
    plan = plan or plan_for_cpu(model)
    before = serialized(model)
    result = quantize_for_cpu(model, plan, collect(model, [x], identity={}).ranges("minmax"))
    assert serialized(model) == before
    proto = ir.to_proto(result)
    onnx.checker.check_model(proto, full_check=True)
    original = ir.to_proto(model)
    assert list(proto.graph.input) == list(original.graph.input)
    assert [(o.name, o.type.tensor_type.elem_type) for o in proto.graph.output] == [
        (o.name, o.type.tensor_type.elem_type) for o in original.graph.output
    ]
    assert proto.opset_import == original.opset_import
    return result


def initializers(model: ir.Model) -> dict[str, Array]:
    return {
        initializer.name: onnx.numpy_helper.to_array(initializer)
        for initializer in ir.to_proto(model).graph.initializer
    }


def dequantized_weight(model: ir.Model, node_name: str) -> Array:
    """The weight that a node reads, by ONNX's reference implementation of its DequantizeLinear."""
    (node,) = [node for node in model.graph if node.name == node_name]
    source = node.inputs[1]
    assert source is not None
    producer = source.producer()
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"
    proto = ir.to_proto(model)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(str(source.name), onnx.TensorProto.FLOAT, None))
    session: Any = onnx.reference.ReferenceEvaluator(proto)
    feeds = {
        str(value.name): np.zeros([d if isinstance(d, int) else 1 for d in value.shape or ()], np.float32)
        for value in model.graph.inputs
    }
    weight: Array = session.run([source.name], feeds)[0]
    return weight


# --- Activations: U8, asymmetric ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "scale", "zero_point"),
    [
        (Range(0, 255), 1.0, 0),
        (Range(0, 6), 6 / 255, 0),
        (Range(-1, 0), 1 / 255, 255),
        (Range(-128, 127), 1.0, 128),
        (Range(-1, 3), 4 / 255, 64),
        (Range(2, 4), 4 / 255, 0),
        (Range(-4, -2), 4 / 255, 255),
        (Range(0, 0), 1.0, 0),
        (Range(-0.5, 254.5), 1.0, 0),  # half to even
        (Range(-1.5, 253.5), 1.0, 2),
    ],
)
def test_asymmetric_parameters(interval: Range, scale: float, zero_point: int) -> None:
    params = asymmetric_u8(interval)
    assert params.scale == np.float32(scale)
    assert params.zero_point == zero_point
    assert (params.scale.dtype, params.zero_point.dtype) == (np.dtype("float32"), np.dtype("uint8"))
    assert params.scale.shape == params.zero_point.shape == ()
    assert params.axis is None


bound = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=200, deadline=None)
@given(bound, bound)
def test_asymmetric_range_is_covered_to_half_a_step_and_zero_is_exact(one: float, other: float) -> None:
    interval = Range(min(one, other), max(one, other)).with_zero()
    params = asymmetric_u8(interval)
    scale, zero_point = float(params.scale), int(params.zero_point)
    assert scale >= TINY
    assert 0 <= zero_point <= 255
    ends = np.array([interval.low, interval.high, 0.0], np.float32)
    integers = quantize(ends, params).astype(np.int64)
    back = (integers - zero_point) * scale
    assert np.abs(back - ends).max() <= scale * 0.5001
    assert back[2] == 0.0


def test_asymmetric_parameters_are_those_of_torch() -> None:
    observer: Any = torch.ao.quantization.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine, eps=TINY)
    for seed in range(50):
        rng = np.random.default_rng([7, seed])
        values = (rng.normal(size=100) * 10 ** rng.uniform(-4, 4) + rng.normal()).astype(np.float32)
        observer.reset_min_max_vals()
        observer(torch.from_numpy(values))
        scale, zero_point = observer.calculate_qparams()
        params = asymmetric_u8(Range(float(values.min()), float(values.max())))
        assert params.scale == pytest.approx(scale.item(), rel=3e-7)
        assert int(params.zero_point) == zero_point.item()
        mutant = asymmetric_u8(Range(float(values.min()) - 0.1, float(values.max()) + 0.1))
        assert mutant.scale != pytest.approx(scale.item(), rel=3e-7)


# --- Weights: INT8, symmetric, per channel -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 3, 3, 3), 0), ((6, 1, 3, 3), 0), ((7, 4), 1), ((7, 4), 0), ((2, 3, 4), 2)]
)
def test_symmetric_scales_are_the_largest_magnitudes_over_127(shape: tuple[int, ...], axis: int) -> None:
    weight = normal(f"{shape}", *shape)
    params = weight_s8(weight, axis)
    expected = [np.abs(np.take(weight, index, axis)).max() / np.float32(127) for index in range(shape[axis])]
    np.testing.assert_allclose(params.scale, expected, rtol=1.2e-7)
    assert params.scale.dtype == np.float32
    np.testing.assert_array_equal(params.zero_point, np.zeros(shape[axis], np.int8))
    integers = quantize(weight, params)
    assert integers.dtype == np.int8
    assert {int(np.abs(np.take(integers, index, axis).astype(int)).max()) for index in range(shape[axis])} == {127}
    wide = params.scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    assert (np.abs(integers * wide - weight) <= wide * 0.50001).all()


def test_symmetric_scales_are_those_of_torch() -> None:
    weight = normal("torch", 6, 4, 3, 3)
    observer: Any = torch.ao.quantization.PerChannelMinMaxObserver(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0, quant_min=-127, quant_max=127, eps=TINY
    )
    observer(torch.from_numpy(weight))
    np.testing.assert_allclose(weight_s8(weight, 0).scale, observer.calculate_qparams()[0].numpy(), rtol=2e-7)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_extreme_channels_neither_vanish_nor_overflow(magnitude: float) -> None:
    weight = np.array([[magnitude, -magnitude, 0.0]], np.float32)
    params = weight_s8(weight, 0)
    assert np.isfinite(params.scale).all()
    assert (params.scale >= TINY).all()
    back = quantize(weight, params) * params.scale.astype(np.float64)
    assert np.abs(back - weight).max() <= float(params.scale[0]) * 0.50001


def test_a_channel_of_zeros_gets_scale_one() -> None:
    weight = np.stack([np.zeros(3), np.ones(3)]).astype(np.float32)
    params = weight_s8(weight, 0)
    assert params.scale[0] == 1.0
    np.testing.assert_array_equal(quantize(weight, params), [[0, 0, 0], [127, 127, 127]])


def test_floor_raises_only_the_channels_below_it() -> None:
    weight = np.array([[127.0], [1.27], [0.0]], np.float32)
    floor = np.array([0.5, 0.5, 0.5])
    np.testing.assert_allclose(weight_s8(weight, 0, floor).scale, [1.0, 0.5, 1.0], rtol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = normal("bad", 4, 3)
    weight[2, 1] = bad
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        weight_s8(weight, 0)
    model = graph("[broken] y = Conv (x, w)", w=weight.reshape(4, 3, 1, 1))
    ranges = {"x": Range(-1, 1), "y": Range(-1, 1)}
    with pytest.raises(QuantizationError, match=r"broken: a weight is NaN.*export the model again"):
        quantize_for_cpu(model, plan_for_cpu(model), ranges)


# --- QuantizeLinear ----------------------------------------------------------------------------------------------


def reference_quantize(values: Array, params: QParams) -> Array:
    """ONNX's reference implementation."""
    axis = "" if params.axis is None else f"<axis = {params.axis}>"
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> g (float x, float s, {np.dtype(params.zero_point.dtype)} z) '
        f"=> ({np.dtype(params.zero_point.dtype)} y) {{ y = QuantizeLinear {axis} (x, s, z) }}"
    )
    session: Any = onnx.reference.ReferenceEvaluator(proto)
    result: Array = session.run(None, {"x": values, "s": params.scale, "z": params.zero_point})[0]
    return result


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_quantize_is_onnx_quantizelinear_ties_and_saturation_included(dtype: Any) -> None:
    ties = np.arange(-600, 600).astype(np.float32) / 2  # every half from -300 to 300
    for scale, zero_point in [(1.0, 0), (1.0, 3), (0.25, 100), (2.0, 17)]:
        params = QParams(np.array(scale, np.float32), np.array(zero_point, dtype))
        values = np.concatenate([ties * np.float32(scale), normal("values", 500) * 100, [1e5, -1e5]]).astype(np.float32)
        expected = reference_quantize(values, params)
        np.testing.assert_array_equal(quantize(values, params), expected)
        away = np.trunc(values / scale + np.copysign(0.5, values)) + zero_point  # a mutant: ties away from zero
        limits = np.iinfo(dtype)
        assert (np.clip(away, limits.min, limits.max) != expected).any()


def test_zero_point_is_added_after_rounding() -> None:
    params = QParams(np.array(1.0, np.float32), np.array(3, np.uint8))
    np.testing.assert_array_equal(quantize(np.array([0.5, 1.5, 2.5], np.float32), params), [3, 5, 5])


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_quantize_per_channel_is_onnx_quantizelinear(axis: int) -> None:
    weight = normal("per channel", 3, 4, 5, 6)
    params = weight_s8(weight, axis)
    np.testing.assert_array_equal(quantize(weight, params), reference_quantize(weight, params))
    mutant = QParams(params.scale[::-1].copy(), params.zero_point, axis)
    assert (quantize(weight, mutant) != reference_quantize(weight, params)).any()


# --- The axis of the channels ------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, str, tuple[int, ...], int]] = {
    "Conv": ("Conv (x, w)", IMAGE, (4, 3, 3, 3), 0),
    "Conv with one channel out": ("Conv (x, w)", IMAGE, (1, 3, 3, 3), 0),
    "grouped Conv": ("Conv <group = 3> (x, w)", IMAGE, (6, 1, 3, 3), 0),
    "depthwise Conv": ("Conv <group = 3> (x, w)", IMAGE, (3, 1, 3, 3), 0),
    "1-D Conv": ("Conv (x, w)", "float[N, 3, 8] x", (5, 3, 3), 0),
    "Gemm": ("Gemm (x, w)", "float[N, 6] x", (6, 5), 1),
    "Gemm transB = 0": ("Gemm <transB = 0> (x, w)", "float[N, 6] x", (6, 5), 1),
    "Gemm transB = 1": ("Gemm <transB = 1> (x, w)", "float[N, 6] x", (5, 6), 0),
    "MatMul": ("MatMul (x, w)", "float[N, 6] x", (6, 5), 1),
    "MatMul of rank 3": ("MatMul (x, w)", "float[N, 7, 6] x", (6, 5), 1),
    "stacked MatMul": ("MatMul (x, w)", "float[N, 4, 6, 3] x", (4, 3, 5), 2),
}


def output_like(inputs: str) -> str:
    """An output y of the rank of the input, all sides free."""
    rank = inputs.count(",") + 1
    return f"float[{', '.join('NABC'[:rank])}] y"


def sides_of(model: ir.Model) -> list[int]:
    return [side if isinstance(side, int) else 4 for side in model.graph.inputs[0].shape or ()]


@pytest.mark.parametrize("name", LAYERS)
def test_scales_follow_the_output_channels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs, shape, axis = LAYERS[name]
    spread = [1.0] * len(shape)
    spread[axis] = -1
    # channels differ a thousandfold: one scale for all, or a wrong axis, loses the small ones
    weight = normal(name, *shape) * np.geomspace(1, 1e-3, shape[axis]).astype(np.float32).reshape(
        [shape[axis] if side == -1 else 1 for side in spread]
    )
    model = graph(f"[layer] y = {call}", inputs, output_like(inputs), w=weight)
    x = normal("x", *sides_of(model))
    result = quantized(model, x)
    integers = [array for array in initializers(result).values() if array.dtype == np.int8 and array.ndim > 1]
    (found,) = integers
    assert found.shape == shape
    found_weight = dequantized_weight(result, "layer")
    steps = np.abs(weight).max(axis=tuple(i for i in range(len(shape)) if i != axis), keepdims=True) / 127
    assert (np.abs(found_weight - weight) <= steps * 0.50001).all()
    if shape[axis] > 1:
        monkeypatch.setattr(module, "channel_axis", lambda node, rank: (axis + 1) % rank)
        mutant = quantize_for_cpu(model, plan_for_cpu(model), collect(model, [x], identity={}).ranges("minmax"))
        assert (np.abs(dequantized_weight(mutant, "layer") - weight) > steps * 0.50001).any()


# --- The graph ---------------------------------------------------------------------------------------------------

NET = """
[conv] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
[relu] r = Relu (a)
[depthwise] d = Conv <group = 4, pads = [1, 1, 1, 1]> (r, v)
[add] t = Add (r, d)
[pool] p = GlobalAveragePool (t)
[flat] f = Flatten (p)
[head] y = Gemm <transB = 1> (f, u, c)
"""
NET_SHAPES: dict[str, Any] = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 1, 3, 3), "u": (5, 4), "c": (5,)}


def net(**changes: Any) -> ir.Model:
    return graph(NET, outputs="float[N, 5] y", **{**NET_SHAPES, **changes})


def test_dtypes_of_the_written_graph() -> None:
    model = quantized(net(), normal("x", 6, 3, 8, 8))
    arrays = initializers(model)
    assert {name.split("::")[0] for name, array in arrays.items() if array.dtype == np.int8 and array.ndim > 1} == {
        "w", "v", "u"
    }  # fmt: skip
    assert not {"w", "v", "u"} & set(arrays)  # no float copy is left behind
    np.testing.assert_array_equal(arrays["b"], normal("b", 4))
    np.testing.assert_array_equal(arrays["c"], normal("c", 5))
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero_point = (arrays[str(value.name)] for value in node.inputs[1:] if value is not None)
            assert (scale.dtype, scale.shape, zero_point.dtype, zero_point.shape) == (
                np.dtype("float32"),
                (),
                np.dtype("uint8"),
                (),
            )
        if node.op_type in COMPUTE_OPERATORS:
            producers = [value.producer() for value in node.inputs[:2] if value is not None]
            assert [producer.op_type for producer in producers if producer] == ["DequantizeLinear"] * 2
            assert all(value.producer() is None for value in node.inputs[2:] if value is not None)


def test_quantize_and_dequantize_of_a_tensor_share_their_parameters() -> None:
    model = quantized(net(), normal("x", 6, 3, 8, 8))
    pairs = 0
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            (reader,) = node.outputs[0].consumers()
            assert reader.op_type == "DequantizeLinear"
            assert reader.inputs[1:] == node.inputs[1:]
            pairs += 1
    assert pairs == len(plan_for_cpu(net()).activations)


def simulated_net(x: Array, ranges: Mapping[str, Range], wrong: float = 1.0) -> Array:
    """NET in float64, fake-quantized by plain formulas at the tensors and weights that the plan names."""

    def fake_u8(name: str, values: Array) -> Array:
        interval = ranges[name].with_zero()
        scale = float(np.float32((interval.high - interval.low) / 255)) * wrong
        zero_point = np.rint(-interval.low / scale)
        return np.asarray((np.clip(np.rint(values / scale) + zero_point, 0, 255) - zero_point) * scale, np.float64)

    def fake_i8(weight: Array) -> Array:
        scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 127
        return np.asarray(np.clip(np.rint(weight / scale), -128, 127) * scale, np.float64)

    arrays = {name: normal(name, *shape) for name, shape in NET_SHAPES.items()}
    weight, depthwise, head = (torch.from_numpy(fake_i8(arrays[name])) for name in ("w", "v", "u"))
    image = torch.from_numpy(fake_u8("x", x.astype(np.float64)))
    first = torch.nn.functional.conv2d(image, weight, torch.from_numpy(arrays["b"]).double(), padding=1)
    rectified = torch.from_numpy(fake_u8("r", first.relu().numpy()))
    second = torch.nn.functional.conv2d(rectified, depthwise, padding=1, groups=4)
    total = fake_u8("t", rectified.numpy() + fake_u8("d", second.numpy()))
    pooled = fake_u8("f", fake_u8("p", total.mean(axis=(2, 3))))
    return np.asarray(pooled @ head.numpy().T + arrays["c"], np.float64)


@pytest.mark.parametrize("optimized", [False, True])
def test_graph_computes_what_plain_numpy_does(optimized: bool) -> None:
    x = normal("x", 16, 3, 8, 8)
    model = net()
    ranges = collect(model, [x], identity={}).ranges("minmax")
    (found,) = run(quantized(model, x), x, optimized=optimized)
    expected = simulated_net(x, ranges)
    # a value on the border between two steps may fall on either side: at most one step of the pooled tensor
    step = (ranges["p"].high - ranges["p"].low) / 255
    tolerance = step * np.abs(normal("u", 5, 4)).sum(axis=1).max()
    assert np.abs(found - expected).max() <= tolerance
    assert np.median(np.abs(found - expected)) <= 1e-5 if not optimized else True
    assert np.abs(found - simulated_net(x, ranges, wrong=3.0)).max() > tolerance


@pytest.mark.parametrize("name", [name for name in LAYERS if "stacked" not in name])
def test_one_layer_stays_within_the_theoretical_bound(name: str) -> None:
    call, inputs, shape, axis = LAYERS[name]
    model = graph(f"[layer] y = {call}", inputs, output_like(inputs), w=shape)
    x = normal("x", *sides_of(model))
    weight = normal("w", *shape)
    (expected,), (found,) = run(model, x), run(quantized(model, x), x)
    # |xq·wq − x·w| ≤ K (εx·|w|max + εw·|x|max + εx·εw), with ε half a step, then half a step of the output
    terms = weight.size // shape[axis]
    half_x = (max(x.max(), 0) - min(x.min(), 0)) / 255 / 2
    half_w = np.abs(weight).max() / 127 / 2
    bound = terms * (half_x * np.abs(weight).max() + half_w * np.abs(x).max() + half_x * half_w)
    bound += (expected.max() - expected.min()) / 255
    assert np.abs(found - expected).max() <= bound * 1.001
    wrong = quantize_for_cpu(
        model, plan_for_cpu(model), {tensor: Range(-0.02, 0.02) for tensor in ("x", "y")}
    )  # a mutant with scales a hundred times too small
    assert np.abs(run(wrong, x)[0] - expected).max() > bound


def test_a_convolution_at_the_end_keeps_the_name_of_its_output() -> None:
    x = normal("x", 4, 3, 8, 8)
    model = graph("[last] y = Conv (x, w)", w=(4, 3, 3, 3))
    result = quantized(model, x)
    (output,) = result.graph.outputs
    assert output.name == "y"
    producer = output.producer()
    assert producer is not None
    assert producer.op_type == "DequantizeLinear"
    step = np.ptp(run(model, x)[0]) / 255
    values = run(result, x)[0] / step
    assert np.abs(values - np.rint(values)).max() < 1e-3  # only the 256 levels come out


def test_output_that_is_also_read_inside_keeps_its_name() -> None:
    x = normal("x", 4, 3, 8, 8)
    model = graph("[c] a = Conv (x, w) [d] y = Conv (a, v)", outputs=f"float[N, C, H, L] a, {MAPS}",
                  w=(4, 3, 3, 3), v=(4, 4, 1, 1))  # fmt: skip
    result = quantized(model, x)
    for found, expected in zip(run(result, x), run(model, x), strict=True):
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_two_layers_may_share_a_weight() -> None:
    body = "[one] a = Conv (x, w) [two] m = MaxPool <kernel_shape = [2, 2]> (x) [three] b = Conv (m, w) "
    model = graph(body, outputs="float[N, C, H, L] a, float[N, C, H, L] b", w=(4, 3, 3, 3))
    x = normal("x", 4, 3, 8, 8)
    result = quantized(model, x)
    assert "w" not in initializers(result)
    for found, expected in zip(run(result, x), run(model, x), strict=True):
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_weight_that_is_also_read_in_float_stays_for_that_reader() -> None:
    model = graph("[one] a = Conv (x, w) [t] k = Neg (w) [two] b = Conv (x, k)",
                  outputs="float[N, C, H, L] a, float[N, C, H, L] b", w=(4, 3, 3, 3))  # fmt: skip
    x = normal("x", 4, 3, 8, 8)
    result = quantized(model, x)
    np.testing.assert_array_equal(initializers(result)["w"], normal("w", 4, 3, 3, 3))
    assert [decision.precision for decision in plan_for_cpu(model).decisions] == ["int8", "fp32"]


@pytest.mark.parametrize("opset", [18, 19, 20])
def test_every_supported_opset_is_written_validly(opset: int) -> None:
    model = graph(NET, outputs="float[N, 5] y", opset=opset, **NET_SHAPES)
    quantized(model, normal("x", 4, 3, 8, 8))


def test_nothing_planned_changes_nothing() -> None:
    model = net()
    assert serialized(quantize_for_cpu(model, QuantPlan((), ()), {})) == serialized(model)


# --- Gemm's bias -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", ["", "alpha = 1.5", "beta = 2.0", "alpha = 0.5, beta = -3.0", "transB = 1"])
def test_bias_of_the_last_gemm_means_the_same_apart(attributes: str) -> None:
    model = graph(f"[head] y = Gemm <{attributes}> (x, w, b)" if attributes else "[head] y = Gemm (x, w, b)",
                  "float[N, 6] x", "float[N, 6] y", w=(6, 6), b=(6,))  # fmt: skip
    x = normal("x", 32, 6)
    (expected,), (found,) = run(model, x), run(quantized(model, x), x)
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_last_gemm_gives_its_bias_to_an_addition() -> None:
    result = quantized(net(), normal("x", 4, 3, 8, 8))
    (head,) = [node for node in result.graph if node.name == "head"]
    assert len(head.inputs) == 2
    (output,) = result.graph.outputs
    producer = output.producer()
    assert producer is not None
    assert producer.op_type == "Add"
    assert [value.name for value in producer.inputs if value is not None and value.const_value is not None] == ["c"]


def test_a_hidden_gemm_keeps_its_bias_in_the_kernel() -> None:
    """Behind its ReLU everything is quantized, so the integer kernel takes the bias and no Add is needed."""
    model = graph("[a] h = Gemm (x, w, b) [r] g = Relu (h) [head] y = Gemm (g, v, c)",
                  "float[N, 6] x", "float[N, 6] y", w=(6, 6), b=(6,), v=(6, 6), c=(6,))  # fmt: skip
    x = normal("x", 16, 6)
    result = quantized(model, x)
    inputs = {node.name: len(node.inputs) for node in result.graph if node.op_type == "Gemm"}
    assert inputs == {"a": 3, "head": 2}
    (expected,), (found,) = run(model, x), run(result, x, optimized=True)
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


# --- Nodes that only move values ---------------------------------------------------------------------------------


def test_a_max_pooling_keeps_the_parameters_of_its_input_and_runs_on_integers(tmp_path: Path) -> None:
    model = graph("[c] a = Conv (x, w) [p] m = MaxPool <kernel_shape = [2, 2]> (a) [d] y = Conv (m, v)",
                  "float[N, 3, 8, 8] x", "float[N, 4, H, L] y", w=(4, 3, 1, 1), v=(4, 4, 1, 1))  # fmt: skip
    x = normal("x", 4, 3, 8, 8)
    result = quantized(model, x)
    values = initializers(result)
    assert values["m::scale"] == values["a::scale"]
    assert values["m::zero_point"] == values["a::zero_point"]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(serialized(result), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("DequantizeLinear") == 1, "only the result is float again"
    assert operators.count("QLinearConv") == 2


# --- The floor under the weights' scales --------------------------------------------------------------------------


def tiny_weights_large_bias() -> ir.Model:
    bias = normal("large bias", 16) + np.sign(normal("large bias", 16))
    return graph(
        "[c] y = Conv (x, w, b)", outputs="float[N, 16, H, L] y", w=np.full((16, 3, 1, 1), 1e-12, np.float32), b=bias
    )


def test_a_large_bias_over_tiny_weights_survives_integer_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal("x", 4, 3, 8, 8)
    model = tiny_weights_large_bias()
    (expected,) = run(model, x)
    step = np.ptp(expected) / 255
    (found,) = run(quantized(model, x), x, optimized=True)
    assert np.abs(found - expected).max() <= step
    # mutants: no floor, and one at the very end of int32, which float32 rounds up to 2³¹
    monkeypatch.setattr(module, "BIAS_LIMIT", 2**31 - 2)
    assert np.abs(run(quantized(model, x), x, optimized=True)[0] - expected).max() > 100 * step
    monkeypatch.setattr(module, "_bias_floor", lambda node, source: 0.0)
    assert np.abs(run(quantized(model, x), x, optimized=True)[0] - expected).max() > 100 * step


@settings(max_examples=50, deadline=None)
@given(st.floats(2**-20, 1024, width=32), st.floats(2**-20, 2**14, width=32), st.floats(0, 2**-30, width=32))
def test_floor_leaves_half_of_int32_to_the_products(largest: float, bias: float, weight: float) -> None:
    model = graph("[c] y = Conv (x, w, b)", outputs="float[N, 1, H, L] y",
                  w=np.full((1, 3, 1, 1), weight, np.float32), b=np.array([bias], np.float32))  # fmt: skip
    ranges = {"x": Range(0.0, largest), "y": Range(-abs(bias), abs(bias))}
    arrays = initializers(quantize_for_cpu(model, plan_for_cpu(model), ranges))
    integer_bias = np.float32(bias) / (arrays["x::scale"] * arrays["c::weight::scale"])
    assert np.abs(integer_bias).max() <= 2**30 * (1 + 1e-6)
    assert 2**30 * (1 + 1e-6) + 255 * 127 * 30_000 < 2**31


def test_an_ordinary_bias_changes_no_scale() -> None:
    with_bias, without = net(), net(b=np.zeros(4, np.float32))
    ranges = {name: Range(-5, 5) for name in plan_for_cpu(with_bias).activations}
    scales = [initializers(quantize_for_cpu(model, plan_for_cpu(model), ranges)) for model in (with_bias, without)]
    np.testing.assert_array_equal(scales[0]["conv::weight::scale"], scales[1]["conv::weight::scale"])


# --- What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["x", "r", "f"])
def test_a_missing_range_is_refused_by_name(missing: str) -> None:
    model = net()
    ranges = {name: Range(-1, 1) for name in plan_for_cpu(model).activations if name != missing}
    with pytest.raises(QuantizationError, match=f"no range for {missing}; calibrate this graph again"):
        quantize_for_cpu(model, plan_for_cpu(model), ranges)


@pytest.mark.parametrize("name", ["", "conv"])
def test_a_plan_that_cannot_tell_nodes_apart_is_refused(name: str) -> None:
    model = net()
    for node in model.graph:
        if node.op_type == "Conv":
            node.name = name
    plan = plan_for_cpu(model)
    with pytest.raises(QuantizationError, match=rf"2 nodes are called '{name}'.*name every node"):
        quantize_for_cpu(model, plan, {tensor: Range(-1, 1) for tensor in plan.activations})


def test_a_plan_may_leave_a_layer_out() -> None:
    model = net()
    plan = plan_for_cpu(model)
    decisions = tuple(replace(d, precision="fp32") if d.node == "head" else d for d in plan.decisions)
    result = quantized(model, normal("x", 4, 3, 8, 8), replace(plan, decisions=decisions))
    np.testing.assert_array_equal(initializers(result)["u"], normal("u", 5, 4))
