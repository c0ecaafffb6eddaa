"""onnxruntime on a GPU: with a fake package, with the real onnxruntime-gpu on a machine without one, and for real."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.runtime.backends import BACKENDS, onnxruntime_providers
from edgewright.runtime.errors import EngineError
from textual_graphs import model_of, normal

ONNXRUNTIME = BACKENDS["onnxruntime"]
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
FELL_BACK = "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been"
GPU_PACKAGE = Path(__file__).parents[2] / ".venv-ortgpu/bin/python"


def graph() -> bytes:
    body = "[conv] c = Conv (x, w) [relu] r = Relu (c) [pool] p = GlobalAveragePool (r) [flat] y = Flatten (p)"
    proto = model_of(body, "float[N, 3, 8, 8] x", "float[N, 5] y", w=normal("w", 5, 3, 3, 3))
    content: bytes = proto.SerializeToString()
    return content


# --- A fake package ----------------------------------------------------------------------------------------------


@dataclass
class FakeOptions:
    """As `SessionOptions`."""

    entries: dict[str, str] = field(default_factory=dict)

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@dataclass
class FakeSession:
    """As `InferenceSession`: notes what it was given."""

    providers: list[Any]
    options: FakeOptions
    falls_back: bool = True

    def get_providers(self) -> list[str]:
        return [each if isinstance(each, str) else each[0] for each in self.providers] + [CPU]

    def disable_fallback(self) -> None:
        self.falls_back = False

    def get_inputs(self) -> list[Any]:
        return []

    get_outputs = get_inputs


class FakePackage(ModuleType):
    """An onnxruntime-gpu that finds all it needs; but `failure` is raised for a session, and `taken` is what it got."""

    cuda_version = "12.8"
    SessionOptions = FakeOptions

    def __init__(self, folder: Path) -> None:
        super().__init__("onnxruntime")
        self.__spec__ = ModuleSpec("onnxruntime", None)
        self.__file__ = str(folder / "__init__.py")
        (folder / "capi").mkdir()
        self.available = [TENSORRT, CUDA, CPU]
        self.sessions: list[FakeSession] = []
        self.severities: list[int] = []
        self.preloaded = 0
        self.failure: Exception | None = None
        self.taken: list[Any] | None = None

    def get_available_providers(self) -> list[str]:
        return self.available

    def set_default_logger_severity(self, severity: int) -> None:
        self.severities.append(severity)

    def preload_dlls(self) -> None:
        self.preloaded += 1
        print("Failed to load libcudnn.so")

    def InferenceSession(  # noqa: N802
        self, content: bytes, options: FakeOptions, *, providers: list[Any], enable_fallback: int
    ) -> FakeSession:
        assert content == b"graph"
        assert not enable_fallback
        if self.failure is not None:
            raise self.failure
        for provider in providers:
            if provider[0] == TENSORRT:
                _check_switches(provider[1])
        self.sessions.append(FakeSession(self.taken if self.taken is not None else providers, options))
        return self.sessions[-1]


def _check_switches(options: dict[str, str]) -> None:
    """As onnxruntime_pybind_state.cc does for TensorRT; CUDA's own options take 0 and 1 too."""
    for key, value in options.items():
        if key.endswith("_enable") and value not in ("True", "true", "False", "false"):
            raise RuntimeError(f"[ERROR] [TensorRT] The value for the key '{key}' should be 'True' or 'False'.")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePackage:
    fake = FakePackage(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return fake


@pytest.mark.parametrize("provider", ["", "cpu"])
def test_the_processor_is_the_default(package: FakePackage, provider: str) -> None:
    ONNXRUNTIME.open(b"graph", provider=provider)
    (session,) = package.sessions
    assert session.providers == [CPU]
    assert "session.disable_cpu_ep_fallback" not in session.options.entries
    assert (package.severities, package.preloaded) == ([], 0), "nothing of a GPU was touched"


@pytest.mark.parametrize(("provider", "chain"), [("cuda", [CUDA]), ("tensorrt", [TENSORRT, CUDA])])
def test_a_gpu_runs_every_node_or_none(
    package: FakePackage, capsys: pytest.CaptureFixture[str], provider: str, chain: list[str]
) -> None:
    ONNXRUNTIME.open(b"graph", provider=provider)
    (session,) = package.sessions
    assert [name for name, _ in session.providers] == chain
    assert session.options.entries["session.disable_cpu_ep_fallback"] == "1"
    assert not session.falls_back
    assert (package.severities, package.preloaded) == ([4, 2], 1)
    assert capsys.readouterr().out == "", "what the package prints is kept back"


def test_no_engine_comes_from_a_cache_and_fp32_is_fp32(package: FakePackage) -> None:
    ONNXRUNTIME.open(b"graph", provider="tensorrt")
    options = dict(package.sessions[0].providers)
    assert options[TENSORRT] == {
        "device_id": "0",
        "trt_engine_cache_enable": "False",
        "trt_timing_cache_enable": "False",
    }
    assert options[CUDA]["use_tf32"] == "0"


def test_a_package_without_the_provider(package: FakePackage, monkeypatch: pytest.MonkeyPatch) -> None:
    package.available = [CPU]
    monkeypatch.setattr(onnxruntime_providers, "two_onnxruntimes", lambda: False)
    with pytest.raises(EngineError, match=r"without CUDAEx.*: onnxruntime-gpu is not installed; .*'edgewright\[gpu\]'"):
        ONNXRUNTIME.open(b"graph", provider="cuda")
    monkeypatch.setattr(onnxruntime_providers, "two_onnxruntimes", lambda: True)
    with pytest.raises(EngineError, match=r"installed over each other, and Tensorrt.* is gone; pip uninstall -y onnx"):
        ONNXRUNTIME.open(b"graph", provider="tensorrt")
    assert package.sessions == []


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_silent_fallback_is_an_error(package: FakePackage, provider: str) -> None:
    package.taken = []
    with pytest.raises(EngineError, match="ExecutionProvider of onnxruntime does not start: it took CPUExecution"):
        ONNXRUNTIME.open(b"graph", provider=provider)
    assert package.severities == [4, 2]


def test_tensorrt_that_became_cuda_is_an_error(package: FakePackage) -> None:
    package.taken = [CUDA]
    with pytest.raises(EngineError, match=f"it took {CUDA}, {CPU} instead"):
        ONNXRUNTIME.open(b"graph", provider="tensorrt")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ValueError(f"1 : FAIL : {FELL_BACK} disabled\nmore"),
            "does not run all of the graph, the rest would run on the",
        ),
        (
            RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nat x.cc"),
            "does not start: CUDA failure 100",
        ),
        (RuntimeError(""), r"does not start: RuntimeError\(''\)"),
    ],
)
def test_what_the_package_says_is_passed_on_in_one_line(package: FakePackage, failure: Exception, message: str) -> None:
    package.failure = failure
    with pytest.raises(EngineError, match=message) as raised:
        ONNXRUNTIME.open(b"graph", provider="cuda")
    assert "\n" not in str(raised.value)
    assert package.severities == [4, 2]


@pytest.mark.parametrize(("provider", "needs"), [("cuda", "CUDA 12.8, cuDNN and"), ("tensorrt", "cuDNN, TensorRT and")])
def test_a_library_that_does_not_load_is_the_reason(package: FakePackage, provider: str, needs: str) -> None:
    library = Path(package.__file__ or "").parent / f"capi/libonnxruntime_providers_{provider}.so"
    library.write_bytes(b"no library")
    package.failure = RuntimeError(FELL_BACK)
    with pytest.raises(
        EngineError, match=f"does not load: .*providers_{provider}.so: .*; it needs .*{needs} an NVIDIA"
    ):
        ONNXRUNTIME.open(b"graph", provider=provider)


@pytest.mark.parametrize("provider", ["gpu", "CUDA", CUDA])
def test_unknown_providers_are_refused(provider: str) -> None:
    with pytest.raises(EngineError, match=f"no provider '{provider}'; choose one of cpu, cuda, tensorrt"):
        ONNXRUNTIME.open(graph(), provider=provider)


def test_each_backend_says_what_it_offers() -> None:
    assert {name: backend.providers for name, backend in BACKENDS.items() if backend.providers} == {
        "onnxruntime": ("cpu", "cuda", "tensorrt")
    }


def test_openvino_has_none() -> None:
    openvino = BACKENDS["openvino"]
    if (absence := openvino.absence()) is not None:
        pytest.skip(absence.reason)
    with pytest.raises(EngineError, match="openvino has no providers, asked for was 'cuda'"):
        openvino.open(graph(), provider="cuda")


def test_the_onnxruntime_of_this_environment_has_no_gpu() -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here")
    with pytest.raises(EngineError, match="onnxruntime-gpu is not installed"):
        ONNXRUNTIME.open(graph(), provider="cuda")


# --- The real onnxruntime-gpu, in an environment of its own (make ort-gpu-env) -------------------------------------

IMAGES = normal("images", 7, 3, 8, 8)
CHILD = """
import json, sys, time
import numpy as np
from edgewright.runtime.backends import backend_named
from edgewright.runtime.errors import EngineError

backend = backend_named("onnxruntime")
graph, images, results = open(sys.argv[1], "rb").read(), np.load(sys.argv[2]), sys.argv[3]
try:
    with backend.open(graph, provider=sys.argv[4]) as runner:
        np.save(results, runner.infer({"x": images})["y"])
    error = None
except EngineError as failure:
    error = str(failure)
heavy = [name for name in ("torch", "onnx", "scipy") if name in sys.modules]
print(json.dumps({"error": error, "version": backend.version(), "heavy": heavy}))
"""


@dataclass(frozen=True)
class Ran:
    """What an engine made in the other environment; `error` is what was raised instead."""

    outputs: NDArray[np.float32] | None
    error: str
    version: str


@pytest.fixture(scope="module")
def with_gpu_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """Runs IMAGES on a provider in the other environment, once."""
    if not GPU_PACKAGE.is_file():
        pytest.skip("there is no environment with onnxruntime-gpu; make ort-gpu-env")
    return functools.cache(lambda provider: _ran(tmp_path_factory.mktemp(provider), provider))


def _ran(folder: Path, provider: str) -> Ran:
    (folder / "graph.onnx").write_bytes(graph())
    np.save(folder / "images.npy", IMAGES)
    files = [str(folder / name) for name in ("graph.onnx", "images.npy", "results.npy")]
    command = [str(GPU_PACKAGE), "-c", CHILD, *files, provider]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ended.stderr == "", "the error says it all"
    said = json.loads(ended.stdout)
    assert said["heavy"] == []
    outputs = None if said["error"] else np.load(folder / "results.npy")
    return Ran(outputs, said["error"] or "", said["version"])


def outputs_here() -> NDArray[np.float32]:
    with ONNXRUNTIME.open(graph()) as runner:
        return runner.infer({"x": IMAGES})["y"]


def test_onnxruntime_gpu_computes_the_same_on_the_processor(with_gpu_package: Callable[[str], Ran]) -> None:
    ran = with_gpu_package("cpu")
    assert ran.error == ""
    assert ran.outputs is not None
    np.testing.assert_allclose(ran.outputs, outputs_here(), rtol=1e-5, atol=1e-6)
    (installed,) = {found.version for found in _distributions_there() if found.metadata["Name"] == "onnxruntime-gpu"}
    assert ran.version == installed


def _distributions_there() -> list[metadata.Distribution]:
    (packages,) = GPU_PACKAGE.parents[1].glob("lib/python3*/site-packages")
    return list(metadata.distributions(path=[str(packages)]))


@pytest.mark.parametrize(("provider", "name"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_asking_for_a_gpu_where_there_is_none_says_what_is_missing(
    with_gpu_package: Callable[[str], Ran], provider: str, name: str
) -> None:
    ran = with_gpu_package(provider)
    if not ran.error:
        pytest.skip("there is a GPU here")
    assert ran.error.startswith(f"{name} of onnxruntime does not load: lib")
    assert ": cannot open shared object file: No such file or directory; it needs CUDA " in ran.error
    assert "\n" not in ran.error
    assert ran.outputs is None


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_agrees_with_the_processor(with_gpu_package: Callable[[str], Ran], provider: str) -> None:
    ran = with_gpu_package(provider)
    if ran.error:
        pytest.skip(ran.error)
    assert ran.outputs is not None
    np.testing.assert_allclose(ran.outputs, outputs_here(), rtol=1e-4, atol=1e-5)


def test_the_session_does_not_keep_the_serialized_graph() -> None:
    """With it every session would take more memory by its graph, which is loaded already."""
    kept = graph()
    before = sys.getrefcount(kept)
    with ONNXRUNTIME.open(kept) as runner:
        assert sys.getrefcount(kept) == before
        assert runner.infer({"x": IMAGES})["y"].shape == (7, 5), "and it still runs"
