"""OpenVINO with real engines in FP32, BF16 and INT8, and the plan that is made for it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
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
from edgewright.optimize.plan import QuantPlan, plan_for_cpu
from edgewright.optimize.plan_openvino import plan_for_openvino
from edgewright.optimize.quantize import quantize_for_cpu
from edgewright.optimize.work import planned_layers
from edgewright.runtime.audit import traffic
from edgewright.runtime.backends import openvino_cpu as module
from edgewright.runtime.backends.base import Absence, BuildRequest, Built
from edgewright.runtime.backends.naming import layer_run_by
from edgewright.runtime.backends.openvino_cpu import OpenVinoBackend
from edgewright.runtime.errors import BuildError, EngineError
from edgewright.runtime.specs import Kernel, PlannedLayer, TensorSpec
from textual_graphs import model_of, normal

if importlib.util.find_spec("openvino") is None:
    pytest.skip("the package openvino is not installed", allow_module_level=True)

Array = NDArray[Any]

OPENVINO = OpenVinoBackend()
openvino = module._openvino()  # a plain import would send telemetry
INPUT = TensorSpec("x", (None, 3, 8, 8), "float32")
OUTPUT = TensorSpec("y", (None, 5), "float32")
NET = """
[conv] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
[relu] r = Relu (a)
[depthwise] d = Conv <group = 16, pads = [1, 1, 1, 1]> (r, v)
[point] e = Conv (d, t, s)
[sigmoid] g = Sigmoid (e)
[product] h = Mul (e, g)
[last] i = Conv (h, m)
[add] j = Add (i, r)
[pool] p = GlobalAveragePool (j)
[flat] f = Flatten (p)
[head] y = Gemm <transB = 1> (f, u, c)
"""
SHAPES = {
    "w": (16, 3, 3, 3),
    "b": (16,),
    "v": (16, 1, 3, 3),
    "t": (32, 16, 1, 1),
    "s": (32,),
    "m": (16, 32, 1, 1),
    "u": (5, 16),
    "c": (5,),
}
LAYERS = ("conv", "depthwise", "point", "last", "head")

needs_bf16 = pytest.mark.skipif(
    OPENVINO.unsupported("bf16", None) is not None, reason="this processor has no BF16 arithmetic"
)


def net(batch: str = "N") -> ir.Model:
    arrays = {name: normal(name, *shape) / np.sqrt(np.prod(shape[1:])) for name, shape in SHAPES.items()}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return ir.from_proto(model_of(NET, f"float[{batch}, 3, 8, 8] x", f"float[{batch}, 5] y", **arrays))


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def quantized_by(plan: Callable[[ir.Model], QuantPlan]) -> ir.Model:
    model = net()
    ranges = collect(model, [normal("images", 9, 3, 8, 8)], identity={}).ranges("minmax")
    return quantize_for_cpu(model, plan(model), ranges)


def request_for(graph: bytes, precision: str) -> BuildRequest:
    """What the pipeline asks for: BF16 is no matter of the graph, so all its layers are to run in it."""
    planned = planned_layers(ir.from_proto(onnx.load_from_string(graph)))
    if precision == "bf16":
        planned = tuple(replace(layer, precision="bf16") for layer in planned)
    return BuildRequest(graph, precision, planned)


@pytest.fixture(scope="module")
def images() -> Array:
    return normal("images", 9, 3, 8, 8)


@pytest.fixture(scope="module")
def fp32_graph() -> bytes:
    return serialized(net())


@pytest.fixture(scope="module")
def int8_graph() -> bytes:
    return serialized(quantized_by(plan_for_openvino))


@pytest.fixture(scope="module")
def fp32_built(fp32_graph: bytes) -> Built:
    return OPENVINO.build(request_for(fp32_graph, "fp32"))


@pytest.fixture(scope="module")
def bf16_built(fp32_graph: bytes) -> Built:
    return OPENVINO.build(request_for(fp32_graph, "bf16"))


@pytest.fixture(scope="module")
def int8_built(int8_graph: bytes) -> Built:
    return OPENVINO.build(request_for(int8_graph, "int8"))


def reference(graph: bytes, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def results(built: Built, x: Array, threads: int = 0) -> Array:
    with OPENVINO.open(built.compiled.engine, threads=threads) as runner:
        return runner.infer({"x": x})["y"]


def relative_error(found: Array, graph: bytes, x: Array) -> float:
    """The largest error as a share of the range that the reference spans."""
    expected = reference(graph, x)
    return float(np.abs(found - expected).max() / np.ptp(expected))


# --- Building and reading back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16), "int8"])
def test_every_planned_layer_reads_back_in_its_precision(precision: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(f"{precision}_built")
    assert tuple(layer.name for layer in built.layers) == LAYERS
    assert {layer.actual for layer in built.layers} == {precision}
    assert (built.compiled.inputs, built.compiled.outputs) == ((INPUT,), (OUTPUT,))
    assert built.compiled.versions == {"openvino": metadata.version("openvino")}
    assert built.compiled.profile is None


def test_each_layer_is_run_by_one_kernel(int8_built: Built) -> None:
    kernels = int8_built.compiled.kernels
    assert sorted(source for kernel in kernels for source in kernel.sources) == sorted(LAYERS)
    assert all(kernel.computes == bool(kernel.sources) for kernel in kernels)
    assert not any(kernel.kind.startswith(("Const", "Input", "Output")) for kernel in kernels)


def test_bytes_are_those_of_batch_1(fp32_built: Built) -> None:
    (kernel,) = (kernel for kernel in fp32_built.compiled.kernels if "point" in kernel.sources)
    weights, bias = 32 * 16, 32
    assert kernel.bytes_read == 4 * (16 * 8 * 8 + weights + bias)
    assert kernel.bytes_written == 4 * 32 * 8 * 8


def test_integers_move_fewer_bytes(fp32_built: Built, int8_built: Built) -> None:
    plain, integers = traffic(fp32_built.compiled.kernels), traffic(int8_built.compiled.kernels)
    assert plain is not None
    assert integers is not None
    assert integers.bytes_moved < plain.bytes_moved


def test_a_layer_that_stays_float_is_refused_by_name() -> None:
    quantized = quantized_by(plan_for_openvino)
    planned = planned_layers(quantized)
    nodes = {node.name: node for node in quantized.graph}
    nodes["depthwise"].replace_input_with(0, nodes["relu"].outputs[0])  # a mutant: its input goes past Q/DQ
    with pytest.raises(BuildError, match=r"planned were 100\.0 %: depthwise \(int8 → fp32\); change the plan"):
        OPENVINO.build(BuildRequest(serialized(quantized), "int8", planned))


def test_a_silently_float_graph_is_not_taken_for_int8(fp32_graph: bytes, int8_graph: bytes) -> None:
    with pytest.raises(BuildError, match=r"runs 0\.0 % of the work in int8, .*conv \(int8 → fp32\)"):
        OPENVINO.build(BuildRequest(fp32_graph, "int8", request_for(int8_graph, "int8").planned))


@needs_bf16
def test_bf16_is_not_taken_for_fp32(fp32_graph: bytes) -> None:
    planned = request_for(fp32_graph, "fp32").planned
    with pytest.raises(BuildError, match=r"conv \(fp32 → bf16\)"):
        OPENVINO.build(BuildRequest(fp32_graph, "bf16", planned))


@needs_bf16
def test_the_rest_of_an_int8_graph_runs_in_bf16_where_it_is_planned_so(images: Array) -> None:
    model = net()
    ranges = collect(model, [images], identity={}).ranges("minmax")
    graph = quantize_for_cpu(model, plan_for_openvino(model, None, {"depthwise": "slow", "last": "slow"}), ranges)
    planned = tuple(
        replace(layer, precision="bf16") if layer.precision == "fp32" else layer for layer in planned_layers(graph)
    )
    built = OPENVINO.build(BuildRequest(serialized(graph), "int8", planned))
    actual = {layer.name: layer.actual for layer in built.layers}
    assert actual == {"conv": "int8", "depthwise": "bf16", "point": "int8", "last": "bf16", "head": "int8"}
    plain = OPENVINO.build(request_for(serialized(graph), "int8"))
    assert {layer.actual for layer in plain.layers if layer.name in ("depthwise", "last")} == {"fp32"}
    assert plain.compiled.engine != built.compiled.engine
    assert np.abs(results(built, images) - results(plain, images)).max() > 0  # the stamp tells it when it is loaded
    assert relative_error(results(built, images), serialized(graph), images) < 0.05


@needs_bf16
def test_a_rest_in_fp32_is_not_taken_for_bf16(int8_graph: bytes) -> None:
    planned = tuple(replace(layer, precision="bf16") for layer in request_for(int8_graph, "int8").planned)
    with pytest.raises(BuildError, match=r"conv \(bf16 → int8\)"):
        OPENVINO.build(BuildRequest(int8_graph, "int8", planned))


def test_other_kernels_at_other_batches_are_refused() -> None:
    planned = (PlannedLayer("conv", "Conv", "int8", 1),)
    single, several = (Kernel("k", "Convolution", ("conv",), precision) for precision in ("int8", "fp32"))
    module._check_equal_precisions(planned, [single], [single])
    with pytest.raises(BuildError, match="openvino runs conv in int8 at batch 1 and in fp32 at others"):
        module._check_equal_precisions(planned, [single], [several])


def test_building_twice_gives_the_same(int8_graph: bytes, int8_built: Built) -> None:
    again = OPENVINO.build(request_for(int8_graph, "int8"))
    assert again.compiled.engine == int8_built.compiled.engine
    assert again.layers == int8_built.layers


# --- Names -------------------------------------------------------------------------------------------------------


def layer(name: str, *aliases: str) -> PlannedLayer:
    return PlannedLayer(name, "Conv", "fp32", 1, aliases)


@pytest.mark.parametrize(
    ("originals", "expected"),
    [
        (["conv1/WithoutBiases", "Multiply_14", "conv1", "out1::quantize"], ("conv1",)),
        (["conv3/WithoutBiases", "add", "relu_3::quantize"], ("conv3",)),  # not the "relu" of conv1
        (["conv3", "relu"], ("conv3",)),  # a node's own name comes before an alias
        (["conv1", "conv3"], ("conv1", "conv3")),
        (["logits"], ("head",)),
        (["conv11"], ()),
        ([""], ()),
    ],
)
def test_fused_nodes_are_found_among_the_planned(originals: list[str], expected: tuple[str, ...]) -> None:
    planned = (layer("conv1", "out1", "relu"), layer("conv3", "out3"), layer("head", "logits"))
    assert module._sources(originals, planned) == expected


def test_the_longest_name_counts() -> None:
    planned = (layer("conv"), layer("conv/inner"))
    assert layer_run_by("conv/inner/WithoutBiases", planned) == ("conv/inner",)
    assert layer_run_by("conv_nchwc", planned) == ("conv",)
    assert layer_run_by("conv_nchwc", planned, endings=("/",)) == ()


# --- The plan ----------------------------------------------------------------------------------------------------


def test_plan_puts_no_pair_in_front_of_a_silu() -> None:
    plan, cpu = plan_for_openvino(net()), plan_for_cpu(net())
    assert set(cpu.activations) - set(plan.activations) == {"e", "y"} & set(cpu.activations)
    assert (cpu.silu_inputs, plan.silu_inputs) == (("e",), ())
    assert plan.decisions == cpu.decisions


def test_plan_keeps_what_an_unmeasured_tensor_decides() -> None:
    measured = set(plan_for_cpu(net()).activations) - {"h"}
    (decision,) = (found for found in plan_for_openvino(net(), measured).decisions if found.node == "last")
    assert decision.precision == "fp32"
    assert "h was not measured" in decision.reason


def test_plan_saves_kernels_and_rounding(int8_built: Built, fp32_graph: bytes, images: Array) -> None:
    by_cpu_plan = OPENVINO.build(request_for(serialized(quantized_by(plan_for_cpu)), "int8"))
    assert len(int8_built.compiled.kernels) < len(by_cpu_plan.compiled.kernels)
    ours, theirs = (
        np.square(results(built, images) - reference(fp32_graph, images)).mean() for built in (int8_built, by_cpu_plan)
    )
    assert ours < 1.1 * theirs


# --- Running -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_fp32_engine_is_really_fp32(fp32_built: Built, fp32_graph: bytes, images: Array, batch: int) -> None:
    assert relative_error(results(fp32_built, images[:batch]), fp32_graph, images[:batch]) < 3e-6  # BF16: 1e-3


@needs_bf16
def test_bf16_engine_differs_as_bf16_must(bf16_built: Built, fp32_graph: bytes, images: Array) -> None:
    assert 3e-4 < relative_error(results(bf16_built, images), fp32_graph, images) < 3e-2


def test_int8_engine_computes_the_quantized_graph(
    int8_built: Built, int8_graph: bytes, fp32_graph: bytes, images: Array
) -> None:
    found = results(int8_built, images)
    assert relative_error(found, int8_graph, images) < 0.03  # ties may fall to either side
    assert 1e-4 < relative_error(found, fp32_graph, images) < 0.06


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batches_do_not_change_the_result(precision: str, images: Array, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(f"{precision}_built")
    with OPENVINO.open(built.compiled.engine, threads=1) as runner:
        together = np.concatenate([runner.infer({"x": images[:7]})["y"], runner.infer({"x": images[7:]})["y"]])
        alone = np.concatenate([runner.infer({"x": image[None]})["y"] for image in images])
        again = runner.infer({"x": images})["y"]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5 * np.ptp(together))
    np.testing.assert_array_equal(again, together)


def test_only_other_batches_need_a_second_copy(fp32_built: Built, images: Array) -> None:
    with OPENVINO.open(fp32_built.compiled.engine) as runner:
        runner.infer({"x": images[:1]})
        assert vars(runner)["_several"] is None
        runner.infer({"x": images[:2]})
        assert vars(runner)["_several"] is not None


def test_a_fixed_batch_is_run_as_it_is(images: Array) -> None:
    graph = serialized(net("4"))
    built = OPENVINO.build(request_for(graph, "fp32"))
    assert built.compiled.inputs == (replace(INPUT, shape=(4, 3, 8, 8)),)
    assert relative_error(results(built, images[:4]), graph, images[:4]) < 3e-6
    with pytest.raises(EngineError, match=r"expected \[4, 3, 8, 8\]"):
        results(built, images[:1])


def test_outputs_belong_to_the_caller(fp32_built: Built, images: Array) -> None:
    with OPENVINO.open(fp32_built.compiled.engine) as runner:
        first = runner.infer({"x": images[:2]})["y"]
        kept = first.copy()
        second = runner.infer({"x": images[2:4]})["y"]
        np.testing.assert_array_equal(first, kept)
        assert not np.shares_memory(first, second)
        second[:] = 0
        assert np.abs(runner.infer({"x": images[2:4]})["y"]).max() > 0
    np.testing.assert_array_equal(first, kept)  # also after the engine is gone


def test_inputs_are_not_changed(fp32_built: Built, images: Array) -> None:
    given = images.copy()
    given.setflags(write=False)
    results(fp32_built, given)
    np.testing.assert_array_equal(given, images)


def test_an_input_given_once_is_not_read_again(fp32_built: Built, images: Array) -> None:
    with OPENVINO.open(fp32_built.compiled.engine) as runner:
        given = images[:2].copy()
        expected = runner.infer({"x": given})["y"]
        given[:] = 0
        np.testing.assert_array_equal(runner.infer({"x": images[:2]})["y"], expected)


def test_closed_engine_is_refused_and_its_memory_freed(fp32_built: Built, images: Array) -> None:
    runner = OPENVINO.open(fp32_built.compiled.engine)
    runner.close()
    runner.close()
    assert {name: vars(runner)[name] for name in ("_graph", "_single", "_several")} == dict.fromkeys(
        ("_graph", "_single", "_several")
    )
    with pytest.raises(EngineError, match="the engine is closed"):
        runner.infer({"x": images})


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_number_of_threads_and_precision_reach_openvino(fp32_built: Built, images: Array, threads: int) -> None:
    with OPENVINO.open(fp32_built.compiled.engine, threads=threads) as runner:
        compiled = vars(runner)["_single"].get_compiled_model()
        given = compiled.get_property("INFERENCE_NUM_THREADS")
        assert given == threads or (threads != 1 and 1 <= given <= (os.cpu_count() or 1))
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
        assert compiled.get_property("NUM_STREAMS") == 1
        runner.infer({"x": images})


# --- Engines that are none ---------------------------------------------------------------------------------------


def test_an_engine_is_an_onnx_file_with_its_precision(fp32_built: Built, fp32_graph: bytes) -> None:
    engine = onnx.load_from_string(fp32_built.compiled.engine)
    assert {entry.key: entry.value for entry in engine.metadata_props} == {"edgewright.precision": "fp32"}
    assert engine.graph == onnx.load_from_string(fp32_graph).graph


def test_a_graph_that_was_stamped_before_is_stamped_again(int8_built: Built) -> None:
    again = OPENVINO.build(request_for(int8_built.compiled.engine, "int8"))
    assert {layer.actual for layer in again.layers} == {"int8"}


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "garbage with a precision", "truncated inside"])
def test_bytes_that_are_no_engine_are_an_error_of_one_line(fp32_built: Built, fp32_graph: bytes, damage: str) -> None:
    garbage, stamp = b"\x00\xffgarbage" * 50, module._stamp("fp32")
    content = {
        "empty": b"",
        "garbage": garbage,
        "truncated": fp32_built.compiled.engine[:-3],
        "garbage with a precision": garbage + stamp,
        "truncated inside": fp32_graph[: len(fp32_graph) // 2] + stamp,
    }[damage]
    with pytest.raises(EngineError, match=r"^openvino cannot load the .*; build it again$") as opening:
        OPENVINO.open(content)
    assert "\n" not in str(opening.value)


def test_an_unknown_operator_is_named_in_one_line() -> None:
    graph = model_of("y = Nonsense (x)", "float[N, 5] x", "float[N, 5] y").SerializeToString()
    with pytest.raises(BuildError, match=r"openvino refused the fp32 graph: .*Nonsense") as building:
        OPENVINO.build(BuildRequest(graph, "fp32", ()))
    assert "\n" not in str(building.value)


def test_a_graph_that_does_not_run_is_an_error_of_one_line() -> None:
    body = "[r] z = Reshape (x, shape) [m] y = MatMul (z, w)"  # the reshape never fits one image
    arrays = {"shape": np.array([-1, 7], np.int64), "w": normal("w", 7, 5)}
    graph = model_of(body, "float[N, 5] x", "float[M, 5] y", **arrays).SerializeToString()
    with pytest.raises(BuildError, match="openvino refused the fp32 graph: openvino cannot") as building:
        OPENVINO.build(request_for(graph, "fp32"))
    assert "\n" not in str(building.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Exception from a.cpp:1:\nCheck 'x' failed at b.cpp:2:\n-- No rule for: Nonsense\n\n",
            "No rule for: Nonsense",
        ),
        ("Exception from a.cpp:1:\n\n", "Exception from a.cpp:1:"),
        ("", "RuntimeError('')"),
    ],
)
def test_the_line_that_says_why_is_kept(text: str, expected: str) -> None:
    assert module._telling_line(RuntimeError(text)) == expected


# --- What is not here --------------------------------------------------------------------------------------------


def test_present_backend_has_no_absence() -> None:
    assert OPENVINO.absence() is None
    assert OPENVINO.cannot_run() is None
    assert OPENVINO.version() == metadata.version("openvino")


def test_absent_package_is_said_with_the_hint(fp32_graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else real(name, *rest)
    )
    hint = "pip install 'edgewright[openvino]'"
    assert OPENVINO.absence() == Absence("package_missing", "the package openvino is not installed", hint)
    with pytest.raises(BuildError, match=r"not installed; pip install 'edgewright\[openvino\]'"):
        OPENVINO.build(request_for(fp32_graph, "fp32"))
    with pytest.raises(EngineError, match=r"not installed; pip install 'edgewright\[openvino\]'"):
        OPENVINO.open(fp32_graph)


def test_version_of_a_package_without_metadata_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert OPENVINO.version() == "unknown"


def test_processor_without_bf16_does_not_emulate_it(fp32_graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_capabilities", lambda: ["FP32", "INT8"])
    assert OPENVINO.unsupported("fp32", None) is None
    assert OPENVINO.unsupported("int8", None) is None
    absence = OPENVINO.unsupported("bf16", None)
    assert absence == Absence(
        "precision_unsupported", "this processor has no BF16 arithmetic", "choose another precision"
    )
    with pytest.raises(BuildError, match="this processor has no BF16 arithmetic; choose another precision"):
        OPENVINO.build(request_for(fp32_graph, "bf16"))


def test_unknown_precision_is_refused(fp32_graph: bytes) -> None:
    with pytest.raises(BuildError, match=r"openvino cannot build fp16; choose one of \('fp32', 'bf16', 'int8'\)"):
        OPENVINO.build(BuildRequest(fp32_graph, "fp16", ()))


# --- Manners -----------------------------------------------------------------------------------------------------

QUIET = """
import socket, sys
from pathlib import Path

def refused(*arguments, **options):
    raise SystemExit("network")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
from edgewright.runtime.backends.openvino_cpu import OpenVinoBackend
assert "openvino" not in sys.modules
backend = OpenVinoBackend()
assert backend.absence() is None and backend.version()
assert not {"torch", "onnx"} & sys.modules.keys()
import numpy as np
with backend.open(Path(sys.argv[1]).read_bytes(), threads=1) as runner:
    runner.infer({"x": np.zeros((2, 3, 8, 8), np.float32)})
assert not {"torch", "onnx", "openvino_telemetry"} & sys.modules.keys()
import openvino.tools.ovc
openvino.tools.ovc.telemetry.send_event("a", "b", "c")
"""


def test_nothing_is_printed_sent_or_left_behind(fp32_built: Built, tmp_path: Path) -> None:
    engine, home = tmp_path / "net.onnx", tmp_path / "home"
    engine.write_bytes(fp32_built.compiled.engine)
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(engine)],
        check=False,
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, "HOME": str(home), "PYTHONWARNINGS": "error"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []


INTERRUPTED = """
import gc, signal, sys
from pathlib import Path
import numpy as np
from edgewright.runtime.backends.openvino_cpu import OpenVinoBackend
backend, engine = OpenVinoBackend(), Path(sys.argv[1]).read_bytes()
runners = [backend.open(engine) for _ in range(3)]
while runners:  # the first one first: what it set up belongs to the others too
    runners.pop(0).infer({"x": np.zeros((1, 3, 8, 8), np.float32)})
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_an_engine_was_closed(fp32_built: Built, tmp_path: Path) -> None:
    (tmp_path / "engine").write_bytes(fp32_built.compiled.engine)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "engine")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n")
