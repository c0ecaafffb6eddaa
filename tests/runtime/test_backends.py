"""The backend interface with a fake one, and onnxruntime with real engines in FP32 and INT8."""

from __future__ import annotations

import importlib.util
import json
import platform
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.optimize.plan import COMPUTE_OPERATORS, plan_for_cpu
from edgewright.optimize.quantize import quantize_for_cpu
from edgewright.runtime.backends import BACKENDS, Absence, Backend, BuildRequest, Built, Runner, backend_named
from edgewright.runtime.backends import onnxruntime_cpu as module
from edgewright.runtime.errors import BuildError, EngineError
from edgewright.runtime.specs import LayerPrecision, TensorSpec

Array = NDArray[Any]

ONNXRUNTIME = BACKENDS["onnxruntime"]
INPUT = TensorSpec("x", (None, 3, 8, 8), "float32")
OUTPUT = TensorSpec("y", (None, 5), "float32")
NET = """
[conv] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
[relu] r = Relu (a)
[depthwise] d = Conv <group = 16, pads = [1, 1, 1, 1]> (r, v)
[add] t = Add (r, d)
[pool] p = GlobalAveragePool (t)
[flat] f = Flatten (p)
[head] y = Gemm <transB = 1> (f, u, c)
"""
SHAPES = {"w": (16, 3, 3, 3), "b": (16,), "v": (16, 1, 3, 3), "u": (5, 16), "c": (5,)}


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def model_of(body: str, inputs: str, outputs: str, **arrays: Array) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return onnx.shape_inference.infer_shapes(proto)


def net() -> ir.Model:
    arrays = {name: normal(name, *shape) for name, shape in SHAPES.items()}
    return ir.from_proto(model_of(NET, "float[N, 3, 8, 8] x", "float[N, 5] y", **arrays))


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


@pytest.fixture(scope="module")
def images() -> Array:
    return normal("images", 9, 3, 8, 8)


@pytest.fixture(scope="module")
def fp32_graph() -> bytes:
    return serialized(net())


@pytest.fixture(scope="module")
def int8_graph(images: Array) -> bytes:
    model = net()
    ranges = collect(model, [images], identity={}).ranges("minmax")
    return serialized(quantize_for_cpu(model, plan_for_cpu(model), ranges))


@pytest.fixture(scope="module")
def int8_built(int8_graph: bytes) -> Built:
    return ONNXRUNTIME.build(BuildRequest(int8_graph, "int8"))


def reference(graph: bytes, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


# --- The base classes, with a fake -------------------------------------------------------------------------------


class FakeRunner(Runner):
    """Adds up its input; notes what it was given."""

    def __init__(self) -> None:
        super().__init__((INPUT, TensorSpec("k", (2,), "float16")), (OUTPUT,))
        self.given: list[Mapping[str, Array]] = []
        self.closed = 0

    def infer_impl(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.given.append(feeds)
        return {"y": feeds["x"].sum(axis=(1, 2, 3))}

    def close_impl(self) -> None:
        self.closed += 1


class FakeBackend(Backend):
    """Claims to have built its layers in the precisions that it was made with."""

    name = "fake"
    precisions = ("fp32", "int8")
    dialect = "cpu"
    suffix = ".fake"

    def __init__(self, *precisions: str, absence: Absence | None = None) -> None:
        self.layers = tuple(LayerPrecision(f"layer {i}", "Conv", word) for i, word in enumerate(precisions))
        self.absent = absence
        self.builds = 0

    def absence(self) -> Absence | None:
        return self.absent

    def version(self) -> str:
        return "1"

    def build_impl(self, request: BuildRequest) -> Built:
        self.builds += 1
        return Built(request.onnx, (INPUT,), (OUTPUT,), self.layers)

    def open(self, engine: bytes, *, threads: int = 0) -> Runner:
        return FakeRunner()


def fake_feeds(**changes: Any) -> dict[str, Any]:
    return {"x": np.ones((2, 3, 8, 8), np.float32), "k": np.ones(2, np.float16), **changes}


@pytest.mark.parametrize("found", [("int8",), ("fp32", "int8"), ("int8", "fp16", "int8")])
def test_build_accepts_an_engine_with_the_precision_asked_for(found: tuple[str, ...]) -> None:
    built = FakeBackend(*found).build(BuildRequest(b"graph", "int8"))
    assert tuple(layer.precision for layer in built.layers) == found
    assert built.engine == b"graph"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (("fp32", "fp32"), r"built no layer in int8: its 2 compute layers run in fp32; look at the plan"),
        (("fp32", "fp16"), r"run in fp16, fp32"),
        ((), r"its 0 compute layers run in nothing known"),
    ],
)
def test_build_refuses_an_engine_without_the_precision_asked_for(found: tuple[str, ...], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        FakeBackend(*found).build(BuildRequest(b"graph", "int8"))


def test_build_refuses_an_unknown_precision_without_trying() -> None:
    backend = FakeBackend("int4")
    with pytest.raises(BuildError, match=r"fake cannot build int4; choose one of \('fp32', 'int8'\)"):
        backend.build(BuildRequest(b"graph", "int4"))
    assert backend.builds == 0


def test_build_of_an_absent_backend_says_what_helps() -> None:
    backend = FakeBackend("int8", absence=Absence("package_missing", "fake is not here", "pip install fake"))
    with pytest.raises(BuildError, match="fake is not here; pip install fake"):
        backend.build(BuildRequest(b"graph", "int8"))
    assert backend.builds == 0


def test_runner_gets_contiguous_inputs_and_only_its_own() -> None:
    runner = FakeRunner()
    strided = np.ones((2, 8, 8, 3), np.float32).transpose(0, 3, 1, 2)
    runner.infer(fake_feeds(x=strided, other=np.zeros(1)))
    (feeds,) = runner.given
    assert set(feeds) == {"x", "k"}
    assert feeds["x"].flags.c_contiguous
    np.testing.assert_array_equal(feeds["x"], strided)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.ones((2, 3, 8, 7), np.float32)}, r"'x' has shape \[2, 3, 8, 7\], expected \[N, 3, 8, 8\]"),
        ({"x": np.ones((3, 8, 8), np.float32)}, r"'x' has shape \[3, 8, 8\], expected \[N, 3, 8, 8\]"),
        ({"x": np.ones((1, 2, 3, 8, 8), np.float32)}, r"expected \[N, 3, 8, 8\]"),
        ({"x": np.ones((0, 3, 8, 8), np.float32)}, r"has shape \[0, 3, 8, 8\]"),
        ({"x": np.ones((2, 3, 8, 8))}, r"'x' is float64, expected float32; convert it with astype"),
        ({"x": np.ones((2, 3, 8, 8), np.uint8)}, r"'x' is uint8, expected float32"),
        ({"k": np.ones(2, np.float32)}, r"'k' is float32, expected float16"),
        ({"k": np.ones(3, np.float16)}, r"'k' has shape \[3\], expected \[2\]"),
        ({"x": 1.0}, r"'x' has shape \[\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    runner = FakeRunner()
    with pytest.raises(EngineError, match=message):
        runner.infer(fake_feeds(**changes))
    assert runner.given == []


def test_missing_input_is_named_beside_what_was_given() -> None:
    with pytest.raises(EngineError, match=r"input 'x' is missing; .*given were \['image'\]|input 'x' is missing"):
        FakeRunner().infer({"image": np.ones((2, 3, 8, 8), np.float32)})


def test_runner_closes_once_and_then_refuses() -> None:
    with FakeRunner() as runner:
        assert runner.infer(fake_feeds())["y"].shape == (2,)
    runner.close()
    assert runner.closed == 1
    with pytest.raises(EngineError, match="the engine is closed; open it again"):
        runner.infer(fake_feeds())


def test_runner_closes_after_an_error_too() -> None:
    runner = FakeRunner()
    with pytest.raises(EngineError), runner:
        runner.infer({})
    assert runner.closed == 1


# --- The table of backends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backends_stand_under_their_names(name: str) -> None:
    backend = backend_named(name)
    assert backend.name == name
    assert backend.suffix.startswith(".")
    assert backend.precisions
    assert len(set(backend.precisions)) == len(backend.precisions)


@pytest.mark.parametrize("name", ["", "onnx", "ONNXRUNTIME", "abacus"])
def test_unknown_backend_is_refused_with_the_known(name: str) -> None:
    with pytest.raises(EngineError, match=f"unknown backend '{name}'; there are onnxruntime"):
        backend_named(name)


# --- onnxruntime: building and reading back ----------------------------------------------------------------------


def test_fp32_reads_back_as_fp32(fp32_graph: bytes) -> None:
    built = ONNXRUNTIME.build(BuildRequest(fp32_graph, "fp32"))
    assert {layer.precision for layer in built.layers} == {"fp32"}
    assert len(built.layers) == 3
    assert (built.inputs, built.outputs) == ((INPUT,), (OUTPUT,))
    assert built.versions == {"onnxruntime": onnxruntime.__version__}
    assert built.engine == fp32_graph


def test_int8_reads_back_as_int8_in_every_planned_layer(int8_built: Built) -> None:
    planned = [d for d in plan_for_cpu(net()).nodes_in("int8") if d.operator in COMPUTE_OPERATORS]
    assert [layer.precision for layer in int8_built.layers] == ["int8"] * len(planned)
    assert sorted(layer.operator for layer in int8_built.layers) == ["QGemm", "QLinearConv", "QLinearConv"]
    assert (int8_built.inputs, int8_built.outputs) == ((INPUT,), (OUTPUT,))


def test_a_layer_that_stays_float_is_seen(images: Array) -> None:
    model = net()
    plan = plan_for_cpu(model)
    ranges = collect(model, [images], identity={}).ranges("minmax")
    quantized = quantize_for_cpu(model, plan, ranges)
    for node in tuple(quantized.graph):  # a mutant: the depthwise layer reads a tensor without Q/DQ
        if node.name == "depthwise":
            node.replace_input_with(0, next(n for n in quantized.graph if n.name == "relu").outputs[0])
    built = ONNXRUNTIME.build(BuildRequest(serialized(quantized), "int8"))
    assert {layer.precision for layer in built.layers} == {"fp32", "int8"}  # seen, and not taken for all INT8


def test_a_silently_float_graph_is_not_taken_for_int8(fp32_graph: bytes) -> None:
    with pytest.raises(BuildError, match=r"built no layer in int8: its 3 compute layers run in fp32"):
        ONNXRUNTIME.build(BuildRequest(fp32_graph, "int8"))


def test_an_integer_graph_is_not_taken_for_fp32(int8_graph: bytes) -> None:
    with pytest.raises(BuildError, match=r"built no layer in fp32: its 3 compute layers run in int8"):
        ONNXRUNTIME.build(BuildRequest(int8_graph, "fp32"))


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "unknown operator"])
def test_a_graph_that_does_not_load_is_an_error_of_one_line(fp32_graph: bytes, damage: str) -> None:
    unknown = model_of("y = Nonsense (x)", "float[N, 5] x", "float[N, 5] y").SerializeToString()
    content = {
        "empty": b"",
        "garbage": b"\x00\xffgarbage" * 50,
        "truncated": fp32_graph[: len(fp32_graph) // 2],
        "unknown operator": unknown,
    }[damage]
    with pytest.raises(BuildError, match="onnxruntime refused the fp32 graph: onnxruntime cannot load") as building:
        ONNXRUNTIME.build(BuildRequest(content, "fp32"))
    with pytest.raises(EngineError, match=r"onnxruntime cannot load the graph: .*build it again") as opening:
        ONNXRUNTIME.open(content)
    assert "\n" not in str(building.value) + str(opening.value)


def impossible() -> bytes:
    """A graph that loads, and fails when it runs: the reshape does not fit."""
    body = "[r] z = Reshape (x, shape) [m] y = MatMul (z, w)"
    arrays = {"shape": np.array([-1, 7], np.int64), "w": normal("w", 7, 5)}
    content: bytes = model_of(body, "float[N, 5] x", "float[M, 5] y", **arrays).SerializeToString()
    return content


def test_a_graph_that_does_not_run_is_an_error_of_one_line() -> None:
    with pytest.raises(BuildError, match="refused the fp32 graph: onnxruntime cannot run the graph") as building:
        ONNXRUNTIME.build(BuildRequest(impossible(), "fp32"))
    with (
        ONNXRUNTIME.open(impossible()) as runner,
        pytest.raises(EngineError, match="cannot run the graph") as running,
    ):
        runner.infer({"x": normal("x", 2, 5)})
    assert "\n" not in str(building.value) + str(running.value)


def test_building_leaves_nothing_behind(fp32_graph: bytes, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    ONNXRUNTIME.build(BuildRequest(fp32_graph, "fp32"))
    assert list(tmp_path.iterdir()) == []


def test_profile_of_an_unknown_type_is_reported_as_it_is() -> None:
    def event(name: str, operator: str, types: list[Any]) -> dict[str, Any]:
        return {"name": name, "args": {"op_name": operator, "input_type_shape": types}}

    events = [
        event("a_kernel_time", "Conv", [{"float": [1]}, {"int8": [1]}]),
        event("a_kernel_time", "Conv", [{"float": [1]}]),  # a second run of the same kernel
        event("b_kernel_time", "FusedMatMul", [{"float8": [1]}]),
        event("c_kernel_time", "QGemm", []),
        event("d_fence_before", "Conv", [{"float": [1]}]),
        event("e_kernel_time", "Relu", [{"float": [1]}]),
        {"name": "session_initialization"},
    ]
    layers = module._compute_layers(json.loads(json.dumps(events)))
    assert [(layer.name, layer.precision) for layer in layers] == [("a", "fp32"), ("b", "float8"), ("c", "unknown")]


# --- onnxruntime: running ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_fp32_engine_computes_the_graph(fp32_graph: bytes, images: Array, batch: int) -> None:
    with ONNXRUNTIME.open(fp32_graph) as runner:
        result = runner.infer({"x": images[:batch]})
    assert set(result) == {"y"}
    assert result["y"].dtype == np.float32
    np.testing.assert_allclose(result["y"], reference(fp32_graph, images[:batch]), rtol=1e-5, atol=1e-5)


def test_int8_engine_computes_the_quantized_graph(int8_built: Built, fp32_graph: bytes, images: Array) -> None:
    with ONNXRUNTIME.open(int8_built.engine) as runner:
        found = runner.infer({"x": images})["y"]
    simulated, exact = reference(int8_built.engine, images), reference(fp32_graph, images)
    assert np.abs(found - simulated).max() <= 0.03 * np.ptp(exact)  # ties may fall to either side
    assert 0 < np.abs(found - exact).max() <= 0.06 * np.ptp(exact)


def test_outputs_belong_to_the_caller(fp32_graph: bytes, images: Array) -> None:
    with ONNXRUNTIME.open(fp32_graph) as runner:
        first = runner.infer({"x": images[:2]})["y"]
        kept = first.copy()
        second = runner.infer({"x": images[2:4]})["y"]
        np.testing.assert_array_equal(first, kept)
        assert not np.shares_memory(first, second)
        second[:] = 0
        again = runner.infer({"x": images[2:4]})["y"]
    assert np.abs(again).max() > 0
    np.testing.assert_array_equal(first, kept)  # also after the engine is gone


def test_inputs_are_not_changed(fp32_graph: bytes, images: Array) -> None:
    given_images = images.copy()
    given_images.setflags(write=False)
    with ONNXRUNTIME.open(fp32_graph) as runner:
        runner.infer({"x": given_images})
    np.testing.assert_array_equal(given_images, images)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"image": normal("x", 1, 3, 8, 8)}, "input 'x' is missing"),
        ({"x": normal("x", 1, 3, 9, 8)}, r"expected \[N, 3, 8, 8\]"),
        ({"x": normal("x", 3, 8, 8)}, r"expected \[N, 3, 8, 8\]"),
        ({"x": normal("x", 0, 3, 8, 8)}, r"has shape \[0, 3, 8, 8\]"),
        ({"x": normal("x", 1, 3, 8, 8).astype(np.float64)}, "is float64"),
    ],
)
def test_real_engine_refuses_inputs_that_do_not_fit(fp32_graph: bytes, feeds: Any, message: str) -> None:
    with ONNXRUNTIME.open(fp32_graph) as runner, pytest.raises(EngineError, match=message):
        runner.infer(feeds)


def test_closed_engine_is_refused_and_its_session_freed(fp32_graph: bytes, images: Array) -> None:
    runner = ONNXRUNTIME.open(fp32_graph)
    runner.close()
    runner.close()
    assert vars(runner)["_session"] is None
    with pytest.raises(EngineError, match="closed"):
        runner.infer({"x": images})


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_number_of_threads_reaches_onnxruntime(fp32_graph: bytes, images: Array, threads: int) -> None:
    with ONNXRUNTIME.open(fp32_graph, threads=threads) as runner:
        options = vars(runner)["_session"].get_session_options()
        assert options.intra_op_num_threads == threads
        np.testing.assert_allclose(
            runner.infer({"x": images})["y"], reference(fp32_graph, images), rtol=1e-5, atol=1e-5
        )


# --- onnxruntime: absent, and old processors ---------------------------------------------------------------------


def test_present_backend_has_no_absence() -> None:
    assert ONNXRUNTIME.absence() is None
    assert ONNXRUNTIME.version() == onnxruntime.__version__


def test_absent_package_is_said_with_the_hint(fp32_graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else real(name, *rest)
    )
    absence = ONNXRUNTIME.absence()
    assert absence == Absence(
        "package_missing", "the package onnxruntime is not installed", "pip install 'edgewright[cpu]'"
    )
    with pytest.raises(BuildError, match=r"not installed; pip install 'edgewright\[cpu\]'"):
        ONNXRUNTIME.build(BuildRequest(fp32_graph, "fp32"))
    with pytest.raises(EngineError, match=r"not installed; pip install 'edgewright\[cpu\]'"):
        ONNXRUNTIME.open(fp32_graph)


@pytest.mark.parametrize(
    ("installed", "version"),
    [({"onnxruntime": "1.2"}, "1.2"), ({"onnxruntime-gpu": "3.4"}, "3.4"), ({}, "unknown")],
)
def test_version_is_that_of_whichever_distribution_is_there(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], version: str
) -> None:
    def fake_version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", fake_version)
    assert ONNXRUNTIME.version() == version


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags : sse2 avx2", True),
        ("AMD64", "flags : sse2 avx512_vnni", False),
        ("x86_64", "flags : avx2 avx_vnni", False),
        ("aarch64", "Features : asimd", False),
        ("x86_64", None, True),
    ],
)
def test_exact_kernels_are_asked_for_where_products_would_saturate(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, expected: bool
) -> None:
    def fake_read(path: Any) -> str:
        if flags is None:
            raise FileNotFoundError
        return flags

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", fake_read)
    assert module._saturates.__wrapped__() is expected


def test_exact_kernels_do_not_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    # 255 · 127 twice exceeds 16 bits: with saturating kernels the sum would be 32767
    model = ir.from_proto(
        model_of("[head] y = MatMul (x, w)", "float[N, 64] x", "float[N, 4] y", w=np.ones((64, 4), np.float32))
    )
    x = np.concatenate([np.ones((3, 64)), np.zeros((1, 64))]).astype(np.float32)
    ranges = collect(model, [x], identity={}).ranges("minmax")
    graph = serialized(quantize_for_cpu(model, plan_for_cpu(model), ranges))
    monkeypatch.setattr(module, "_saturates", lambda: True)
    with ONNXRUNTIME.open(graph) as runner:
        np.testing.assert_allclose(runner.infer({"x": x})["y"][:3], 64.0, rtol=1e-5)
