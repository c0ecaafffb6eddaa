"""What onnxruntime runs a graph on: the processor, or a GPU through CUDA or TensorRT. What was asked for, or an error.

onnxruntime itself goes on without a word on the processor where a GPU is asked for and something is missing, and runs
there what a GPU's kernels do not cover. Here both are errors: a session for a GPU that has one node elsewhere is not
opened, and none falls back later.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import EngineError
from ..installed import two_onnxruntimes

__all__ = ["PROVIDERS", "first_line", "open_session"]

CPU = "CPUExecutionProvider"
CUDA_OPTIONS = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",  # the other one doubles, and a Jetson shares its memory
    "use_tf32": "0",  # FP32 is to mean FP32
}
TENSORRT_OPTIONS = {
    "device_id": "0",
    # A cached engine is native code from a folder, loaded unseen; ours are authenticated first (the backend tensorrt).
    "trt_engine_cache_enable": "False",  # not "0": onnxruntime wants this word for the provider's switches
    "trt_timing_cache_enable": "False",
}
FATAL_ONLY, WARNINGS = 4, 2  # severities of onnxruntime's log; the second is its default
GET_GPU = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'edgewright[gpu]'; on a Jetson NVIDIA's wheel"
FALLS_BACK = "fallback to CPU EP"  # in the message of session.disable_cpu_ep_fallback


@dataclass(frozen=True)
class _Accelerator:
    """A GPU's provider: its name, those that come in this order with their options, and its library."""

    name: str
    chain: Mapping[str, Mapping[str, str]]
    library: str


CUDA = _Accelerator("CUDAExecutionProvider", {"CUDAExecutionProvider": CUDA_OPTIONS}, "onnxruntime_providers_cuda")
TENSORRT = _Accelerator(
    "TensorrtExecutionProvider",
    {"TensorrtExecutionProvider": TENSORRT_OPTIONS, **CUDA.chain},
    "onnxruntime_providers_tensorrt",
)
ACCELERATORS = {"cuda": CUDA, "tensorrt": TENSORRT}
PROVIDERS = ("cpu", *ACCELERATORS)
"""What can be asked for; "cpu" is the default."""


def open_session(graph: bytes, options: Any, provider: str) -> Any:
    """An `onnxruntime.InferenceSession` with every node on the provider; `options` are its `SessionOptions`.

    Raises `EngineError` if the graph does not load, or the provider is unknown or not here: it says what is missing.
    """
    import onnxruntime

    if provider in ("", "cpu"):
        return _session(onnxruntime, graph, options, [CPU])
    if provider not in ACCELERATORS:
        raise EngineError(f"onnxruntime has no provider {provider!r}", f"choose one of {', '.join(PROVIDERS)}")
    return _on_gpu(onnxruntime, graph, options, ACCELERATORS[provider])


def _session(onnxruntime: ModuleType, graph: bytes, options: Any, providers: list[Any]) -> Any:
    try:
        return _lean(onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0))
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise EngineError(f"onnxruntime cannot load the graph: {first_line(error)}", "build it again") from error


def _lean(session: Any) -> Any:
    """The session without the serialized graph, which it keeps to start anew with other providers: ours never does."""
    if hasattr(session, "_model_bytes"):
        session._model_bytes = b""
    return session


def _on_gpu(onnxruntime: ModuleType, graph: bytes, options: Any, accelerator: _Accelerator) -> Any:
    if accelerator.name not in onnxruntime.get_available_providers():
        raise EngineError(_not_built_in(accelerator), GET_GPU)
    options.log_severity_level = FATAL_ONLY
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    chain = [(name, dict(settings)) for name, settings in accelerator.chain.items()]
    with _quiet(onnxruntime):
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=chain, enable_fallback=0)
        except Exception as error:  # as above
            raise _explained(onnxruntime, accelerator, first_line(error)) from error
    if session.get_providers()[: len(chain)] != list(accelerator.chain):
        raise _explained(onnxruntime, accelerator, f"it took {', '.join(session.get_providers())} instead")
    session.disable_fallback()
    return _lean(session)


def _not_built_in(accelerator: _Accelerator) -> str:
    if two_onnxruntimes():
        return f"onnxruntime and onnxruntime-gpu are installed over each other, and {accelerator.name} is gone"
    return f"the onnxruntime here was built without {accelerator.name}: onnxruntime-gpu is not installed"


def _explained(onnxruntime: ModuleType, accelerator: _Accelerator, said: str) -> EngineError:
    """What stands in the way: a library that is missing, a node without a kernel, or what onnxruntime said."""
    missing = _loading_error(onnxruntime, accelerator)
    if missing:
        needs = f"CUDA {getattr(onnxruntime, 'cuda_version', '')}".strip() + ", cuDNN"
        needs += ", TensorRT" if accelerator is TENSORRT else ""
        return EngineError(
            f"{accelerator.name} of onnxruntime does not load: {missing}",
            f"it needs {needs} and an NVIDIA GPU; pip install 'onnxruntime-gpu[cuda,cudnn]' brings the first two",
        )
    if FALLS_BACK in said:
        return EngineError(
            f"{accelerator.name} does not run all of the graph, the rest would run on the processor: {said}",
            "see with edgewright doctor if there is a GPU; else take the provider cpu",
        )
    return EngineError(
        f"{accelerator.name} of onnxruntime does not start: {said}", "edgewright doctor says what is here"
    )


def _loading_error(onnxruntime: ModuleType, accelerator: _Accelerator) -> str:
    """Why the provider's library does not load, "" if it does.

    Only after onnxruntime has tried: its libraries expect to be loaded by it first.
    """
    folder = Path(onnxruntime.__file__ or "").parent / "capi"
    try:
        for path in folder.glob(f"*{accelerator.library}.*"):
            ctypes.CDLL(str(path))
    except OSError as error:
        return first_line(error)
    return ""


@contextlib.contextmanager
def _quiet(onnxruntime: ModuleType) -> Iterator[None]:
    """Keeps onnxruntime from writing what our error says; and lets it find CUDA where pip has put it.

    There is no way to ask for the severity that was set before.
    """
    onnxruntime.set_default_logger_severity(FATAL_ONLY)
    try:
        if hasattr(onnxruntime, "preload_dlls"):  # since 1.21; NVIDIA's wheels for a Jetson may be older
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
                onnxruntime.preload_dlls()
        yield
    finally:
        onnxruntime.set_default_logger_severity(WARNINGS)


def first_line(error: Exception) -> str:
    """What onnxruntime says first; where it was thrown comes behind."""
    lines = str(error).splitlines()
    return lines[0] if lines else repr(error)
