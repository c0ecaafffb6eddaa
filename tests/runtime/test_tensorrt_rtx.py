"""TensorRT-RTX: real engines for each target, built here; running them needs an RTX GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest

from edgewright.runtime.backends import BACKENDS, BuildRequest, Built
from edgewright.runtime.backends import tensorrt_rtx as module
from edgewright.runtime.backends.tensorrt_builder import build_engine
from edgewright.runtime.backends.tensorrt_engine import load_engine
from edgewright.runtime.errors import BuildError, DeviceError, EngineError
from edgewright.runtime.specs import BatchProfile, Kernel, TensorSpec
from tensorrt_graphs import QUANTIZED, float_arrays, graph, normal, planned, quantized_arrays, serialized

RTX = BACKENDS["tensorrt-rtx"]
SUPPORTED = [
    (precision, target)
    for target in RTX.targets
    for precision in RTX.precisions
    if (precision, target) not in module.IMPOSSIBLE
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the package tensorrt-rtx is not installed"
)


def request(precision: str, target: str | None = "sm86", **options: Any) -> BuildRequest:
    return BuildRequest(graph(precision), precision, planned(precision), target, **options)


def quantized(body: str = QUANTIZED, **changes: Any) -> BuildRequest:
    """The INT8 graph with another body and other initializers; None removes one."""
    arrays = {**quantized_arrays(), **changes}
    content = serialized(body, {name: array for name, array in arrays.items() if array is not None})
    return BuildRequest(content, "int8", planned("int8"), "sm86")


def package() -> Any:
    return pytest.importorskip("tensorrt_rtx", exc_type=ImportError)


def arithmetic(kernels: tuple[Kernel, ...]) -> list[str]:
    return [kernel.precision for kernel in kernels if kernel.computes]


@pytest.fixture(scope="module")
def int8_built() -> Built:
    return RTX.build(request("int8"))


def no_gpu() -> bool:
    return RTX.cannot_run() is not None


# --- building ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "target"), SUPPORTED)
def test_each_target_builds_in_the_planned_precision(precision: str, target: str) -> None:
    built = RTX.build(request(precision, target))
    assert [(layer.name, layer.actual) for layer in built.layers] == [
        (layer.name, layer.precision) for layer in planned(precision)
    ]
    assert built.compiled.inputs == (TensorSpec("x", (None, 16, 8, 8), "float32"),)
    assert built.compiled.outputs == (TensorSpec("y", (None, 8), "float32"),)
    assert built.compiled.versions == {"tensorrt-rtx": package().__version__}
    assert built.compiled.profile == BatchProfile()
    assert built.compiled.timing_cache == b""


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_int8_with_scales_per_channel_and_per_tensor(target: str, per_tensor: bool) -> None:
    body = QUANTIZED.replace(" <axis = 0> ", " ") if per_tensor else QUANTIZED
    content = serialized(body, quantized_arrays(per_tensor=per_tensor))
    built = RTX.build(BuildRequest(content, "int8", planned("int8"), target))
    assert [layer.actual for layer in built.layers] == ["int8", "int8", "fp16"]


def test_the_kernel_that_multiplies_is_named(int8_built: Built) -> None:
    kernels = {kernel.name: kernel for kernel in int8_built.compiled.kernels}
    for layer in int8_built.layers:
        assert kernels[layer.kernel].computes
        assert layer.name in kernels[layer.kernel].sources


@pytest.mark.parametrize(
    ("content", "claimed", "message"),
    [
        (
            "fp32",
            "fp16",
            r"0.0 % of the work in fp16, planned were 100.0 %: conv \(fp16 → fp32\), next \(fp16 → fp32\)",
        ),
        ("fp16", "int8", r"0.0 % of the work in int8, planned were 99.9 %: conv \(int8 → fp16\), next \(int8 → fp16\)"),
        ("int8", "fp16", r"conv \(fp16 → int8\), next \(fp16 → int8\)"),
    ],
)
def test_a_mislabelled_graph_is_refused(content: str, claimed: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        RTX.build(BuildRequest(graph(content), claimed, planned(claimed), "sm86"))


def test_two_builds_have_the_same_kernels(int8_built: Built) -> None:
    assert RTX.build(request("int8")).compiled.kernels == int8_built.compiled.kernels  # bytes may differ


def test_a_fixed_batch_needs_no_profile() -> None:
    sizes = {"inputs": "float[3, 16, 8, 8] x", "outputs": "float[3, 8] y"}
    built = RTX.build(BuildRequest(graph("fp16", **sizes), "fp16", planned("fp16"), "sm86"))
    assert built.compiled.inputs[0].shape == (3, 16, 8, 8)
    assert built.compiled.profile == BatchProfile(3, 3, 3)


def test_odd_node_names_are_found() -> None:
    odd = "a, b]/[c] {d} LayerType: é"
    body = QUANTIZED.replace("[conv] ", "")
    content = serialized(body, quantized_arrays())
    import onnx

    proto = onnx.load_from_string(content)
    next(node for node in proto.graph.node if node.op_type == "Conv").name = odd
    kernels = RTX.compile(BuildRequest(proto.SerializeToString(), "int8", (), "sm86")).kernels
    (kernel,) = (kernel for kernel in kernels if kernel.computes and odd in kernel.sources)
    assert kernel.precision == "int8"


# --- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "reason"), [("fp32", "no FP32 matrix product"), ("int8", "in FP16")])
def test_turing_lacks_precisions(precision: str, reason: str) -> None:
    absence = RTX.unsupported(precision, "sm75")
    assert absence is not None
    assert absence.reason_code == "precision_unsupported"
    assert reason in absence.reason
    with pytest.raises(BuildError, match=reason):
        RTX.build(request(precision, "sm75"))


def test_turing_really_lacks_them() -> None:
    with pytest.raises(BuildError, match=r"built no engine for sm75: .*FP32 GEMM is not supported"):
        RTX.compile(request("fp32", "sm75"))
    assert arithmetic(RTX.compile(request("int8", "sm75")).kernels) == ["fp16", "fp16", "fp16"]


def test_a_failed_build_leaves_nothing_to_the_next() -> None:
    """TensorRT-RTX 1.7 would compile the next network for Turing, where INT8 is FP16."""
    with pytest.raises(BuildError, match="FP32 GEMM is not supported"):
        RTX.compile(request("fp32", "sm75"))
    assert arithmetic(RTX.compile(request("int8")).kernels) == ["int8", "int8", "fp16"]


@pytest.mark.parametrize("target", ["sm87", "sm110", "sm90", "SM86", "", None])
def test_unknown_targets_are_refused_with_the_known(target: str | None) -> None:
    absence = RTX.unsupported("fp16", target)
    assert absence is not None
    assert absence.reason_code == "target_unsupported"
    assert "sm75, sm80, sm86, sm89, sm120, sm121" in absence.hint
    with pytest.raises(BuildError, match="TensorRT-RTX"):
        RTX.build(request("fp16", target))


def test_the_builder_refuses_unknown_targets_too() -> None:
    with pytest.raises(BuildError, match="TensorRT-RTX cannot build for sm87"):
        build_engine(package(), request("fp16", "sm87"), "SM87")
    with pytest.raises(BuildError, match="for a GPU architecture that is named"):
        RTX.compile(request("fp16", None))


def test_a_package_that_does_not_know_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakePackage:
        ComputeCapability = Enum("ComputeCapability", ["NONE", "CURRENT", "SM75", "SM86"])

    monkeypatch.setattr(module, "_package", lambda: FakePackage)
    absence = RTX.unsupported("fp16", "sm120")
    assert absence is not None
    assert absence.hint == "it builds for sm75, sm86"
    assert RTX.unsupported("fp16", "sm86") is None


def test_bytes_that_are_no_graph() -> None:
    for content in (b"garbage" * 50, graph("fp16")[:1000]):
        with pytest.raises(BuildError, match=r"cannot read the graph: .*Failed to parse the ONNX model"):
            RTX.compile(BuildRequest(content, "fp16", (), "sm86"))
    for content in (b"", b"\x00\xffgarbage"):  # the parser takes both for a graph of nothing
        with pytest.raises(BuildError, match="finds no inputs and outputs in the graph"):
            RTX.compile(BuildRequest(content, "fp16", (), "sm86"))


def test_an_unknown_operator_is_named() -> None:
    content = serialized("[bar] y = Foo (x)", {}, "float[N, 8] x", "float[N, 8] y")
    with pytest.raises(BuildError, match=r"TensorRT-RTX has no importer for operator Foo \(node bar\)") as caught:
        RTX.compile(BuildRequest(content, "fp32", (), "sm86"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            lambda: quantized(
                QUANTIZED.replace("(hd, wd, b)", "(hd, wd, bd)").replace(
                    "[conv]", "[bias] bd = DequantizeLinear <axis = 0> (b, ws)\n[conv]"
                ),
                b=np.ones(32, np.int32),
            ),
            r"node bias \(DequantizeLinear\): .*has type Int32",
        ),
        (lambda: quantized(z=np.asarray(3, np.int8)), r"node q1 \(QuantizeLinear\): .*Non-zero zero point"),
        (lambda: quantized(b=normal("b", 32)), r"conv.*(Half|Float|type)"),
        (lambda: quantized(w=None), "w"),
    ],
)
def test_errors_deep_in_a_quantized_graph_arrive(asked: Callable[[], BuildRequest], message: str) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        RTX.compile(asked())
    assert "\n" not in str(caught.value)
    assert "driver version" not in str(caught.value)  # there need be no GPU, that is not the reason


@pytest.mark.parametrize("limit", [0, 1])
def test_a_workspace_that_is_too_small_is_named(limit: int) -> None:
    with pytest.raises(BuildError, match=rf"workspace.*; raise the limit of the workspace \(now {limit} B\)"):
        RTX.compile(request("int8", workspace=limit))


def test_a_workspace_that_is_large_enough() -> None:
    assert RTX.compile(request("int8", workspace=64 << 20)).engine


def test_only_the_batch_may_be_dynamic() -> None:
    content = graph("fp32", inputs="float[N, 16, H, 8] x")
    with pytest.raises(BuildError, match=r"input 'x' has the shape \[-1, 16, -1, 8\]: only the batch"):
        RTX.compile(BuildRequest(content, "fp32", (), "sm86"))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (8, 4, 32), (1, 33, 32)])
def test_batch_sizes_out_of_order_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(BuildError, match="are not in order"):
        BatchProfile(*sizes)


def test_there_is_no_dla() -> None:
    with pytest.raises(BuildError, match="does not build for a DLA"):
        RTX.compile(request("fp16", dla=0))


# --- absence, and opening ----------------------------------------------------------------------------------------


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    absence = RTX.absence()
    assert absence is not None
    assert absence.reason_code == "package_missing"
    assert absence.hint == "pip install 'edgewright[rtx]'"
    assert RTX.cannot_run() == absence
    assert RTX.version() == "unknown"
    with pytest.raises(EngineError, match="tensorrt-rtx is not installed"):
        RTX.open(b"")


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libtensorrt_rtx.so: cannot open shared object file")

    monkeypatch.setattr(module, "_package", broken)
    absence = RTX.absence()
    assert absence is not None
    assert absence.reason_code == "package_missing"
    assert "cannot open shared object file" in absence.reason


@pytest.mark.parametrize(("architecture", "runs"), [("sm86", True), ("sm90", False), ("sm87", False)])
def test_it_runs_on_rtx_gpus_alone(architecture: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_architecture", lambda: architecture)
    absence = RTX.cannot_run()
    assert (absence is None) == runs
    if absence is not None:
        assert absence.reason_code == "device_missing"
        assert f"the GPU here is {architecture}" in absence.reason


@pytest.mark.parametrize(("target", "runs"), [("sm89", True), ("sm86", False), ("sm120", False), (None, True)])
def test_an_engine_runs_on_its_own_architecture(
    target: str | None, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_architecture", lambda: "sm89")
    absence = RTX.cannot_run(target)
    assert (absence is None) == runs
    if absence is not None:
        assert f"the GPU here is sm89, the engine is for {target}" in absence.reason


@pytest.mark.skipif(not no_gpu(), reason="there is an RTX GPU here")
def test_without_a_gpu_opening_is_an_error(int8_built: Built) -> None:
    absence = RTX.cannot_run()
    assert absence is not None
    assert absence.reason_code == "device_missing"
    for engine in (int8_built.compiled.engine, int8_built.compiled.engine[:1000], b"", b"garbage" * 99):
        with pytest.raises(EngineError, match=r"GPU|cuda-python"):
            RTX.open(engine)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_engine_is_an_error(int8_built: Built, damage: str) -> None:
    whole = int8_built.compiled.engine
    engine = {"truncated": whole[: len(whole) // 2], "garbage": b"garbage" * 99, "empty": b""}[damage]
    with pytest.raises(EngineError, match=r"TensorRT-RTX .* cannot load the engine: .*build it again") as caught:
        load_engine(package(), engine)
    assert "\n" not in str(caught.value)


def test_a_process_that_builds_ends_well() -> None:
    """TensorRT's objects call their logger when they are freed, as at the end of a process."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tensorrt_graphs import graph\n"
        "from edgewright.runtime.backends import BACKENDS, BuildRequest\n"
        "for content in (graph('fp16'), b'garbage', graph('int8')):\n"
        "    try: kept = BACKENDS['tensorrt-rtx'].compile(BuildRequest(content, 'fp16', (), 'sm86'))\n"
        "    except Exception as error: failed = error\n"
        "print('done')\n"
    )
    finished = subprocess.run([sys.executable, "-c", script, *sys.path], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "done\n", "")


@pytest.mark.gpu
def test_an_engine_runs_on_the_gpu_here() -> None:
    absence = RTX.cannot_run()
    if absence is not None:
        pytest.skip(absence.reason)
    import onnxruntime

    images = normal("images", 9, 16, 8, 8)
    session = onnxruntime.InferenceSession(graph("fp32"), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"x": images})[0]
    try:
        built = RTX.build(request("fp16", module._architecture()))
    except DeviceError as error:
        pytest.skip(error.message)
    with RTX.open(built.compiled.engine) as runner:
        for batch in (1, 9, 2, 2, 2):
            result = runner.infer({"x": images[:batch]})["y"]
            np.testing.assert_allclose(result, wanted[:batch], atol=0.02)
        many = runner.infer({"x": np.concatenate([images] * 4)})["y"]  # the profile takes 32
        np.testing.assert_allclose(many, np.concatenate([wanted] * 4), atol=0.02)


def test_float_weights_are_what_the_graphs_share() -> None:
    """The INT8 graph's weights are those of the FP32 graph, within half a step."""
    arrays, floats = quantized_arrays(), float_arrays()
    for name in ("w", "v"):
        steps = arrays[f"{name}s"].astype(np.float32).reshape(-1, 1, 1, 1)
        assert np.abs(arrays[name] * steps - floats[name]).max() <= 0.51 * steps.max()
