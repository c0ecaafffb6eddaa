"""The backend interface with a fake one, and onnxruntime with real engines in FP32 and INT8."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping
from dataclasses import replace
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
from edgewright.optimize.work import planned_layers
from edgewright.runtime.audit import audited
from edgewright.runtime.backends import (
    BACKENDS,
    Absence,
    Backend,
    BuildRequest,
    Built,
    Compiled,
    Runner,
    backend_named,
)
from edgewright.runtime.backends import onnxruntime_backend as module
from edgewright.runtime.errors import BuildError, EngineError
from edgewright.runtime.specs import BatchProfile, Kernel, PlannedLayer, TensorSpec
from textual_graphs import model_of, normal

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


def net() -> ir.Model:
    arrays = {name: normal(name, *shape) for name, shape in SHAPES.items()}
    return ir.from_proto(model_of(NET, "float[N, 3, 8, 8] x", "float[N, 5] y", **arrays))


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def request_for(graph: bytes, precision: str) -> BuildRequest:
    """To build `graph`, planned as it is."""
    return BuildRequest(graph, precision, planned_layers(ir.from_proto(onnx.load_from_string(graph))))


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
    return ONNXRUNTIME.build(request_for(int8_graph, "int8"))


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
    """Gives planned layer i a kernel of the i-th precision that it was made with."""

    name = "fake"
    precisions = ("fp32", "int8")
    dialect = "cpu"
    suffix = ".fake"

    def __init__(self, *precisions: str, absence: Absence | None = None) -> None:
        self.kernels = tuple(
            Kernel(f"kernel {i}", "conv", (f"layer {i}",), word, computes=True) for i, word in enumerate(precisions)
        )
        self.absent = absence
        self.builds = 0

    def absence(self) -> Absence | None:
        return self.absent

    def version(self) -> str:
        return "1"

    def unsupported(self, precision: str, target: str | None) -> Absence | None:
        return Absence("target_unsupported", f"fake does not know {target}", "leave it out") if target else None

    def compile(self, request: BuildRequest) -> Compiled:
        self.builds += 1
        return Compiled(request.onnx, (INPUT,), (OUTPUT,), self.kernels)

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        return FakeRunner()


def fake_feeds(**changes: Any) -> dict[str, Any]:
    return {"x": np.ones((2, 3, 8, 8), np.float32), "k": np.ones(2, np.float16), **changes}


def fake_request(*planned: str, macs: tuple[int, ...] = (), **more: Any) -> BuildRequest:
    """For as many layers, the i-th planned in the i-th precision, with so much work, or with equal work."""
    work = macs or (100,) * len(planned)
    layers = [PlannedLayer(f"layer {i}", "Conv", word, work[i]) for i, word in enumerate(planned)]
    return BuildRequest(b"graph", "int8", tuple(layers), **more)


@pytest.mark.parametrize("planned", [(), ("int8",), ("fp32", "int8"), ("int8", "fp16", "int8"), ("fp32", "fp32")])
def test_build_accepts_an_engine_that_keeps_the_plan(planned: tuple[str, ...]) -> None:
    built = FakeBackend(*planned).build(fake_request(*planned))
    assert tuple(layer.actual for layer in built.layers) == planned
    assert tuple(layer.kernel for layer in built.layers) == tuple(f"kernel {i}" for i in range(len(planned)))
    assert built.compiled.engine == b"graph"


@pytest.mark.parametrize(
    ("planned", "found", "message"),
    [
        (
            ("int8", "int8"),
            ("fp32", "fp32"),
            r"fake runs 0.0 % of the work in int8, planned were 100.0 %: layer 0 \(int8 → fp32\), "
            r"layer 1 \(int8 → fp32\); change the plan or the target; such an engine is not kept",
        ),
        (("int8", "int8"), ("int8", "fp16"), r"runs 50.0 % .* planned were 100.0 %: layer 1 \(int8 → fp16\);"),
        (("int8", "fp16"), ("int8", "fp32"), r"runs 50.0 % .* planned were 50.0 %: layer 1 \(fp16 → fp32\);"),
        (("fp32", "fp32"), ("int8", "fp32"), r"runs 50.0 % .* planned were 0.0 %: layer 0 \(fp32 → int8\);"),
        (("int8",), (), r"runs 0.0 % .* planned were 100.0 %: layer 0 \(int8 → missing\);"),
    ],
)
def test_build_refuses_an_engine_that_departs_from_the_plan(
    planned: tuple[str, ...], found: tuple[str, ...], message: str
) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        FakeBackend(*found).build(fake_request(*planned))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more"), (99, " and 94 more")])
def test_build_names_the_five_layers_with_the_most_work(count: int, more: str) -> None:
    work = tuple((7 * i) % count + 1 if count % 7 else i + 1 for i in range(count))
    assert sorted(work) == list(range(1, count + 1)), "each amount of work once, in no order"
    request = fake_request(*["int8"] * count, "int8", macs=(*work, 10_000))
    with pytest.raises(BuildError) as caught:
        FakeBackend(*["fp16"] * count, "int8").build(request)
    largest = [work.index(macs) for macs in range(count, count - 5, -1)]
    named = ", ".join(f"layer {index} (int8 → fp16)" for index in largest)
    share = 100 * 10_000 / (10_000 + sum(work))
    assert caught.value.message == (f"fake runs {share:.1f} % of the work in int8, planned were 100.0 %: {named}{more}")


def test_build_refuses_what_is_not_supported_without_trying() -> None:
    backend = FakeBackend("int8")
    with pytest.raises(BuildError, match="fake does not know sm1; leave it out"):
        backend.build(fake_request("int8", target="sm1"))
    assert backend.builds == 0


def test_an_engine_can_run_where_its_backend_is() -> None:
    absence = Absence("package_missing", "fake is not here", "pip install fake")
    assert FakeBackend().cannot_run() is None
    assert FakeBackend(absence=absence).cannot_run() == absence


def test_what_is_not_asked_for_is_the_usual() -> None:
    request = BuildRequest(b"", "int8", ())
    assert (request.target, request.workspace, request.dla, request.timing_cache) == (None, None, None, b"")
    assert request.profile == BatchProfile(1, 8, 32)


def test_build_refuses_an_unknown_precision_without_trying() -> None:
    backend = FakeBackend("int4")
    with pytest.raises(BuildError, match=r"fake cannot build int4; choose one of \('fp32', 'int8'\)"):
        backend.build(BuildRequest(b"graph", "int4", ()))
    assert backend.builds == 0


def test_build_of_an_absent_backend_says_what_helps() -> None:
    backend = FakeBackend("int8", absence=Absence("package_missing", "fake is not here", "pip install fake"))
    with pytest.raises(BuildError, match="fake is not here; pip install fake"):
        backend.build(fake_request("int8"))
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
    built = ONNXRUNTIME.build(request_for(fp32_graph, "fp32"))
    assert [(layer.name, layer.actual) for layer in built.layers] == [
        ("conv", "fp32"), ("depthwise", "fp32"), ("head", "fp32")
    ]  # fmt: skip
    assert (built.compiled.inputs, built.compiled.outputs) == ((INPUT,), (OUTPUT,))
    assert built.compiled.versions == {"onnxruntime": onnxruntime.__version__}
    assert built.compiled.engine == fp32_graph
    assert built.compiled.profile is None, "it takes any batch"


def test_int8_reads_back_as_int8_in_every_planned_layer(int8_built: Built) -> None:
    planned = [d.node for d in plan_for_cpu(net()).nodes_in("int8") if d.operator in COMPUTE_OPERATORS]
    assert [(layer.name, layer.actual) for layer in int8_built.layers] == [(name, "int8") for name in planned]
    kernels = {kernel.name: kernel for kernel in int8_built.compiled.kernels}
    kinds = sorted(kernels[layer.kernel].kind for layer in int8_built.layers)
    assert kinds == ["QGemm", "QLinearConv", "QLinearConv"]
    assert (int8_built.compiled.inputs, int8_built.compiled.outputs) == ((INPUT,), (OUTPUT,))


def test_a_layer_that_stays_float_is_seen(images: Array) -> None:
    model = net()
    plan = plan_for_cpu(model)
    ranges = collect(model, [images], identity={}).ranges("minmax")
    quantized = quantize_for_cpu(model, plan, ranges)
    for node in tuple(quantized.graph):  # a mutant: the depthwise layer reads a tensor without Q/DQ
        if node.name == "depthwise":
            node.replace_input_with(0, next(n for n in quantized.graph if n.name == "relu").outputs[0])
    request = request_for(serialized(quantized), "int8")
    assert {layer.name: layer.precision for layer in request.planned} == {
        "conv": "int8", "depthwise": "fp32", "head": "int8"
    }  # fmt: skip
    found = {layer.name: layer.actual for layer in audited(request.planned, ONNXRUNTIME.compile(request).kernels)}
    assert found == {"conv": "fp32", "depthwise": "fp32", "head": "int8"}, "two read its float result"
    with pytest.raises(BuildError, match=r"planned were 75.1 %: conv \(int8 → fp32\); change the plan"):
        ONNXRUNTIME.build(request)


def mislabelled(graph: bytes, precision: str) -> BuildRequest:
    """To build `graph`, but planned in `precision` throughout."""
    request = request_for(graph, precision)
    return replace(request, planned=tuple(replace(layer, precision=precision) for layer in request.planned))


def test_a_silently_float_graph_is_not_taken_for_int8(fp32_graph: bytes) -> None:
    with pytest.raises(
        BuildError, match=r"onnxruntime runs 0.0 % of the work in int8, planned were 100.0 %: conv \(int"
    ):
        ONNXRUNTIME.build(mislabelled(fp32_graph, "int8"))


def test_an_integer_graph_is_not_taken_for_fp32(int8_graph: bytes) -> None:
    with pytest.raises(
        BuildError, match=r"onnxruntime runs 0.0 % of the work in fp32, planned were 100.0 %: conv \(fp"
    ):
        ONNXRUNTIME.build(mislabelled(int8_graph, "fp32"))


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
        ONNXRUNTIME.build(BuildRequest(content, "fp32", ()))
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
        ONNXRUNTIME.build(BuildRequest(impossible(), "fp32", ()))
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
    ONNXRUNTIME.build(request_for(fp32_graph, "fp32"))
    assert list(tmp_path.iterdir()) == []


def test_profile_of_an_unknown_type_is_reported_as_it_is() -> None:
    def event(name: str, operator: str, types: list[Any]) -> dict[str, Any]:
        return {"name": name, "args": {"op_name": operator, "input_type_shape": types}}

    events = [
        event("a_kernel_time", "Conv", [{"float": [1]}, {"int8": [1]}]),
        event("t_token_18_kernel_time", "Transpose", [{"float": [1]}]),  # onnxruntime draws the number
        event("t_token_7_kernel_time", "Transpose", [{"float": [1]}]),  # another kernel
        event("b_kernel_time", "FusedMatMul", [{"float8": [1]}]),
        event("c_kernel_time", "QGemm", []),
        event("d_fence_before", "Conv", [{"float": [1]}]),
        event("e_kernel_time", "Relu", [{"float": [1]}]),
        {"name": "session_initialization"},
    ]
    planned = tuple(PlannedLayer(name, "Conv", "int8", 1) for name in "abcde")
    kernels = module._kernels(json.loads(json.dumps(events)), planned)
    assert [(kernel.name, kernel.precision, kernel.sources) for kernel in kernels] == [
        ("a", "fp32", ("a",)),
        ("t", "fp32", ()),
        ("t", "fp32", ()),
        ("b", "float8", ("b",)),
        ("c", "unknown", ("c",)),
        ("e", "fp32", ()),  # it computes no product
    ]


def test_traffic_is_read_off_the_profile() -> None:
    details = {"op_name": "Conv", "input_type_shape": [{"float": [1]}]}
    sizes = {"activation_size": "100", "parameter_size": "20", "output_size": "3"}  # onnxruntime writes text
    events = [
        {"name": "a_kernel_time", "args": details | sizes},
        {"name": "b_kernel_time", "args": details},
    ]
    assert [(kernel.bytes_read, kernel.bytes_written) for kernel in module._kernels(events, ())] == [(120, 3), (0, 0)]


# --- onnxruntime: running ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_fp32_engine_computes_the_graph(fp32_graph: bytes, images: Array, batch: int) -> None:
    with ONNXRUNTIME.open(fp32_graph) as runner:
        result = runner.infer({"x": images[:batch]})
    assert set(result) == {"y"}
    assert result["y"].dtype == np.float32
    np.testing.assert_allclose(result["y"], reference(fp32_graph, images[:batch]), rtol=1e-5, atol=1e-5)


def test_int8_engine_computes_the_quantized_graph(int8_built: Built, fp32_graph: bytes, images: Array) -> None:
    with ONNXRUNTIME.open(int8_built.compiled.engine) as runner:
        found = runner.infer({"x": images})["y"]
    simulated, exact = reference(int8_built.compiled.engine, images), reference(fp32_graph, images)
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
        ONNXRUNTIME.build(request_for(fp32_graph, "fp32"))
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


ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "LeakyRelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", ["Gemm (x, w, c)", "MatMul (x, w) [bias] a = Add (m, c)"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_layer_is_found_whatever_is_fused_behind_it(backend: str, layer: str, activation: str) -> None:
    absence = BACKENDS[backend].absence()
    if absence is not None:
        pytest.skip(absence.reason)
    first = "a" if layer.startswith("Gemm") else "m"
    body = f"[fc] {first} = {layer} [act] y = {activation} (a)"
    proto = model_of(body, "float[N, 8] x", "float[N, 5] y", w=normal("w", 8, 5), c=normal("c", 5))
    planned = planned_layers(ir.from_proto(proto))
    built = BACKENDS[backend].build(BuildRequest(proto.SerializeToString(), "fp32", planned))
    assert [(layer.name, layer.actual) for layer in built.layers] == [("fc", "fp32")]
