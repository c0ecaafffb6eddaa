"""Collecting activations of small networks, against onnxruntime with every tensor made an output, and plain numpy."""

from __future__ import annotations

import gc
import json
import math
import tracemalloc
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import CalibrationTable, batch_size, collect
from edgewright.calibration.ranges import HALF_BINS, METHODS, Histogram, mse_range, silu
from edgewright.runtime.errors import CalibrationError

Array = NDArray[Any]

BODY = """
[conv] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
[sigmoid] s = Sigmoid (a)
[silu] m = Mul (a, s)
[pool] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (m)
[depthwise] d = Conv <group = 6, pads = [1, 1, 1, 1]> (p, v)
[relu] r = Relu (d)
[sum] t = Add (r, p)
[mean] g = GlobalAveragePool (t)
[flat] f = Flatten (g)
[head] y = Gemm <transB = 1> (f, u, c)
"""
TENSORS = ("x", "a", "s", "m", "p", "d", "r", "t", "g", "f", "y")


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def constants() -> dict[str, Any]:
    shapes = {"w": (6, 3, 3, 3), "b": (6,), "v": (6, 1, 3, 3), "u": (4, 6), "c": (4,)}
    return {name: normal(name, *shape) for name, shape in shapes.items()}


def graph(
    body: str = BODY, inputs: str = "float[N, 3, 20, 18] x", outputs: str = "float[N, 4] y", **arrays: Array
) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def small_net(**changes: Array) -> ir.Model:
    return graph(**{**constants(), **changes})


def images(count: int, name: str = "images") -> Array:
    return normal(name, count, 3, 20, 18)


def in_batches(array: Array, size: int) -> Iterator[Array]:
    for start in range(0, len(array), size):
        yield array[start : start + size]


def all_tensors(model: ir.Model, array: Array) -> dict[str, Array]:
    """Every intermediate tensor, by onnxruntime with no optimization."""
    proto = ir.to_proto(model)
    known = {output.name for output in proto.graph.output}
    for node in proto.graph.node:
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {"x": array, **dict(zip(names, session.run(names, {"x": array}), strict=True))}


def expected_step(size: int) -> int:
    """The first step that leaves at most 1024 values and is coprime to `size`, by search from 1."""
    return next(step for step in range(1, size + 2) if len(range(0, size, step)) <= 1024 and math.gcd(step, size) == 1)


def expected_samples(array: Array) -> Array:
    rows = array.reshape(len(array), -1)
    return rows[:, :: expected_step(rows.shape[1])].astype(np.float64)


def assert_histogram_of(histogram: Histogram, samples: Array) -> None:
    edges = np.ldexp(np.arange(-HALF_BINS, HALF_BINS + 1, dtype=np.float64), histogram.exponent)
    np.testing.assert_array_equal(histogram.counts, np.histogram(samples, edges)[0])


# --- What is collected -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_every_activation_is_measured_exactly(batch_size: int) -> None:
    model, array = small_net(), images(13)
    table = collect(model, in_batches(array, batch_size), identity={}, threads=1)
    expected = all_tensors(model, array)
    assert set(table.histograms) == set(expected) == set(TENSORS)
    for name, values in expected.items():
        histogram = table.histograms[name]
        if name in ("x", "a", "r", "m", "p", "d", "t"):  # kernels whose sums do not depend on the optimization
            np.testing.assert_allclose(
                (histogram.minimum, histogram.maximum), (values.min(), values.max()), rtol=2e-6, atol=0
            )
        assert histogram.counts.sum() == expected_samples(values).size


def test_minimum_maximum_and_histogram_of_the_samples_are_exact() -> None:
    # scaling by powers of two and selection have no rounding, so that the expectation holds to the last bit
    body = """[half] a = Mul (x, half) [relu] r = Relu (a) [shift] k = Neg (r)
    [mean] g = GlobalMaxPool (k) [flat] f = Flatten (g) [head] y = Gemm (f, u)"""
    selection = np.eye(3, 4, dtype=np.float32)
    model = graph(body, "float[N, 3, 29, 31] x", half=np.array(0.5, np.float32), u=selection)
    array = normal("exact", 11, 3, 29, 31)
    table = collect(model, in_batches(array, 4), identity={})
    rectified = np.maximum(array / 2, 0)
    largest = (-rectified).max(axis=(2, 3), keepdims=True)
    expected = {"x": array, "a": array / 2, "r": rectified, "k": -rectified, "g": largest, "f": largest[..., 0, 0]}
    expected["y"] = expected["f"] @ selection
    assert set(table.histograms) == set(expected)
    for name, values in expected.items():
        histogram = table.histograms[name]
        assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
        assert_histogram_of(histogram, expected_samples(values))
    with pytest.raises(AssertionError):  # a mutant that looks at the first values of each image only
        assert_histogram_of(table.histograms["x"], array.reshape(11, -1)[:, : expected_samples(array).shape[1]])


def test_extremes_between_the_samples_are_seen() -> None:
    array = images(3) * np.float32(0.01)
    assert expected_step(3 * 20 * 18) > 1
    array[1].reshape(-1)[1] = 77.0
    array[2].reshape(-1)[1] = -55.0
    histogram = collect(small_net(), [array], identity={}).histograms["x"]
    assert (histogram.minimum, histogram.maximum) == (-55.0, 77.0)
    assert histogram.counts[HALF_BINS + 2000 :].sum() == 0


@pytest.mark.parametrize(
    ("side", "expected"),
    [(1, 8), (4096, 8), (8192, 8), (8193, 7), (16384, 2), (20000, 1), (40000, 1)],
)
def test_large_activations_are_passed_through_a_few_at_a_time(side: int, expected: int) -> None:
    """8192 × 8192 float32 are 256 MiB, of which eight images have 2 GiB."""
    value = ir.Value(name="y", shape=ir.Shape(["batch", 1, side, side]), type=ir.TensorType(ir.DataType.FLOAT))
    image = ir.Value(name="x", shape=ir.Shape(["batch", 1, side, side]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Relu", [image], outputs=[value])
    assert batch_size(ir.Model(ir.Graph([image], [value], nodes=[node]), ir_version=10)) == expected


def test_batch_size_does_not_matter() -> None:
    body = "[half] a = Mul (x, half) [mean] g = GlobalMaxPool (a) [flat] f = Flatten (g) [head] y = Gemm (f, u)"
    model = graph(body, half=np.array(0.5, np.float32), u=np.eye(3, 4, dtype=np.float32))
    array = images(10)
    tables = [collect(model, in_batches(array, size), identity={}) for size in (1, 3, 10)]
    assert tables[0].to_json() == tables[1].to_json() == tables[2].to_json()


@pytest.mark.parametrize("size", [1, 2, 7, 1023, 1024, 1025, 1030, 2048, 2310, 30030, 62720, 96 * 112 * 112])
def test_samples_are_spread_by_a_step_that_shares_no_factor_with_the_size(size: int) -> None:
    # a step that divides the length of a row would look at a few columns only
    model = graph("y = Identity (x)", f"float[N, {size}] x", "float[N, M] y")
    array = normal("rows", 2, size)
    step = expected_step(size)
    assert math.gcd(step, size) == 1
    assert math.ceil(size / step) <= 1024
    assert_histogram_of(collect(model, [array], identity={}).histograms["x"], array[:, ::step].astype(np.float64))


CLAMPS = {
    "relu": ("Relu (a)", 0, np.inf),
    "relu6": ("Clip (a, low, high)", -0.3, 0.7),
    "low only": ("Clip (a, low)", -0.3, np.inf),
    "high only": ("Clip (a, , high)", -np.inf, 0.7),
    "no limits": ("Clip (a)", -np.inf, np.inf),
}


@pytest.mark.parametrize("clamp", CLAMPS)
def test_what_stands_behind_a_clamp_is_exact_too(clamp: str) -> None:
    call, low, high = CLAMPS[clamp]
    body = f"[half] a = Mul (x, half) [clamp] c = {call} [again] y = Relu (c)"
    limits = {"low": np.array(-0.3, np.float32), "high": np.array(0.7, np.float32)}
    constants: dict[str, Any] = {"half": np.array(0.5, np.float32), **{k: v for k, v in limits.items() if k in call}}
    model = graph(body, "float[N, 3, 29, 31] x", "float[N, C, H, W] y", **constants)
    array = normal("clamped", 6, 3, 29, 31)
    table = collect(model, in_batches(array, 4), identity={})
    clamped = np.clip(array / 2, np.float32(low), np.float32(high))
    assert set(table.histograms) == {"x", "a", "c", "y"}
    for name, values in {"a": array / 2, "c": clamped, "y": np.maximum(clamped, 0)}.items():
        histogram = table.histograms[name]
        assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
        assert_histogram_of(histogram, expected_samples(values))


def test_a_clamp_between_computed_limits_is_exact_too() -> None:
    body = "[low] l = Neg (limit) [clamp] y = Clip (x, l, limit)"
    model = graph(body, "float[N, 3, 29, 31] x", "float[N, 3, 29, 31] y", limit=np.array(0.5, np.float32))
    array = normal("computed", 5, 3, 29, 31)
    histogram = collect(model, [array], identity={}).histograms["y"]
    assert (histogram.minimum, histogram.maximum) == (-0.5, 0.5)
    assert_histogram_of(histogram, expected_samples(np.clip(array, -0.5, 0.5)))


def test_tensors_that_are_no_batched_floats_are_left_out() -> None:
    body = """[shape] n = Shape (x) [half] a = Mul (x, half) [cast] i = Cast <to = 7> (a) [flat] f = Flatten (a)
    [head] y = Gemm (f, u) [const] z = Mul (half, half)"""
    model = graph(body, "float[N, 3, 2, 2] x", half=np.array([0.5], np.float32), u=normal("u", 12, 4))
    table = collect(model, [normal("x", 2, 3, 2, 2)], identity={})
    assert set(table.histograms) == {"x", "a", "f", "y"}


def test_progress_counts_images_and_identity_is_kept() -> None:
    seen: list[int] = []
    table = collect(small_net(), in_batches(images(7), 3), identity={"graph": "abc"}, progress=seen.append)
    assert seen == [3, 6, 7]
    assert table.samples == 7
    assert table.identity == {"graph": "abc"}


def test_the_given_model_is_not_changed() -> None:
    model = small_net()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    collect(model, [images(2)], identity={})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# --- Streaming ---------------------------------------------------------------------------------------------------


def test_one_batch_is_alive_at_a_time() -> None:
    living: list[weakref.ref[Array]] = []
    most = 0

    def stream() -> Iterator[Array]:
        nonlocal most
        for index in range(12):
            batch = images(2, f"batch {index}")
            living.append(weakref.ref(batch))
            yield batch
            del batch
            gc.collect()
            most = max(most, sum(reference() is not None for reference in living))

    assert collect(small_net(), stream(), identity={}).samples == 24
    assert most <= 1


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    model = small_net()

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            collect(model, (images(4, f"{index % 3}") for index in range(count)), identity={}, threads=1)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)
    assert peak(64) < 1.05 * peak(8)


# --- What is refused ---------------------------------------------------------------------------------------------


def test_no_images_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"no calibration images.*random data is never used"):
        collect(small_net(), iter(()), identity={})


@pytest.mark.parametrize("name", ["w", "b", "v", "u", "c"])
def test_a_single_nan_among_the_weights_is_refused_by_name(name: str) -> None:
    broken = constants()[name]
    broken.reshape(-1)[-1] = np.nan
    with pytest.raises(CalibrationError, match=f"weight {name} holds NaN, which layer "):
        collect(small_net(**{name: broken}), [images(2)], identity={})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 700, -1])
def test_a_single_bad_pixel_is_refused_with_its_images(bad: float, place: int) -> None:
    # onnxruntime's ReduceMin and ReduceMax pass over a lone NaN, and the samples need not meet it
    array = images(7)
    array[5].reshape(-1)[place] = bad
    with pytest.raises(CalibrationError, match=r"image 6 holds (NaN|infinite values) behind the preprocessing"):
        collect(small_net(), in_batches(array, 3), identity={})


def test_an_overflowing_activation_is_refused_by_name() -> None:
    huge = constants()["v"] * np.float32(1e38)
    reason = r"layer depthwise \(Conv\) gives .*infinite values for image 1: .*exceed float32; check the weights"
    with pytest.raises(CalibrationError, match=reason):
        collect(small_net(v=huge), [images(2) * np.float32(100)], identity={})


def test_an_infinite_weight_is_named_with_its_layer() -> None:
    broken = constants()["v"]
    broken[2, 0, 1, 1] = np.inf
    with pytest.raises(CalibrationError, match=r"layer depthwise \(Conv\) .*: its weight v holds infinite values"):
        collect(small_net(v=broken), [images(2)], identity={})


def test_the_second_image_alone_overflows_and_is_named() -> None:
    array = images(3) * np.float32(1e-3)
    array[1] *= np.float32(1e10)
    with pytest.raises(CalibrationError, match=r"layer depthwise .* for image 5: it reads finite values from"):
        collect(small_net(v=constants()["v"] * np.float32(1e33)), [images(3) * np.float32(1e-6), array], identity={})


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("Div (x, zero)", r"layer odd \(Div\) gives infinite values for image 1: it divides by 0"),
        ("Log (x)", r"layer odd \(Log\) gives NaN for image 1: it is not defined for all of the finite values"),
        ("Sqrt (x)", r"layer odd \(Sqrt\) gives NaN for image 1: it is not defined for all of the finite values"),
    ],
)
def test_what_the_arithmetic_cannot_do_is_named(call: str, reason: str) -> None:
    model = graph(
        f"[odd] o = {call} [flat] y = Flatten (o)",
        "float[N, 3, 4, 4] x",
        "float[N, 48] y",
        zero=np.zeros((), np.float32),
    )
    with pytest.raises(CalibrationError, match=reason):
        collect(model, [normal("odd", 2, 3, 4, 4)], identity={})


def test_an_infinite_limit_is_no_fault() -> None:
    model = graph(
        "[clip] y = Clip (x, low, high)",
        "float[N, 3, 4, 4] x",
        "float[N, 3, 4, 4] y",
        low=np.zeros((), np.float32),
        high=np.array(np.inf, np.float32),
    )
    assert collect(model, [normal("limit", 2, 3, 4, 4)], identity={}).samples == 2


def test_channels_of_one_value_over_all_images_are_found() -> None:
    weight, bias = constants()["w"], constants()["b"]
    weight[[1, 4]], bias[1], bias[4] = 0.0, -2.0, 0.0
    table = collect(small_net(w=weight, b=bias), in_batches(images(5), 2), identity={})
    assert table.constant_channels["a"] == {1: -2.0, 4: 0.0}
    assert table.constant_channels["m"].keys() == {1, 4}
    again = CalibrationTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again.constant_channels == table.constant_channels
    assert "a" not in collect(small_net(), in_batches(images(5), 2), identity={}).constant_channels


def test_a_channel_that_one_image_alone_moves_is_not_constant() -> None:
    array = np.ones((3, 3, 20, 18), np.float32)
    array[2, 1, 4, 4] = 1.5
    assert collect(small_net(), in_batches(array, 1), identity={}).constant_channels["x"] == {0: 1.0, 2: 1.0}


# --- The table ---------------------------------------------------------------------------------------------------


def test_table_round_trip_is_exact() -> None:
    table = collect(small_net(), [images(5)], identity={"graph": "abc", "images": "5 of them"})
    again = CalibrationTable.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False)))
    assert again.to_json() == table.to_json()
    assert (again.identity, again.samples) == (table.identity, 5)
    assert {method: again.ranges(method) for method in METHODS} == {m: table.ranges(m) for m in METHODS}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_ranges_of_a_table_hold_zero_and_stay_inside_the_values(method: str) -> None:
    table = collect(small_net(), [images(5)], identity={})
    for name, interval in table.ranges(method).items():
        histogram = table.histograms[name]
        assert interval == METHODS[method](histogram).with_zero()
        assert min(histogram.minimum, 0) <= interval.low <= 0 <= interval.high <= max(histogram.maximum, 0)


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    table = collect(small_net(), [images(1)], identity={})
    with pytest.raises(CalibrationError, match=r"unknown range method 'magic'; choose one of auto, minmax, percentile"):
        table.ranges("magic")


def test_ranges_of_some_tensors_measure_behind_what_follows_them() -> None:
    table = collect(small_net(), [images(5)], identity={})
    names = ["a", "r"]
    plain, behind = table.ranges("mse", names), table.ranges("mse", names, {"a": silu})
    assert set(plain) == set(behind) == {"a", "r"}
    assert behind["a"] == mse_range(table.histograms["a"], silu).with_zero() != plain["a"]
    assert behind["r"] == plain["r"]
    assert table.ranges("minmax", names, {"a": silu}) == table.ranges("minmax", names)


def test_a_tensor_that_was_not_measured_is_refused_by_name() -> None:
    table = collect(small_net(), [images(1)], identity={})
    with pytest.raises(CalibrationError, match="activation nothing was not measured; calibrate this graph again"):
        table.ranges("mse", ["a", "nothing"])
