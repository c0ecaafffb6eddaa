"""What this machine has, and which backends are ready on it."""

from __future__ import annotations

import importlib.util
import platform
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..backends import BACKENDS, Absence, Backend
from ..cache import cache_folder, checked_cache
from ..errors import EdgewrightError
from ..installed import installed_version, two_onnxruntimes
from .identity import processor
from .memory import Memory, memory_here
from .probes import ROOT, Jetson, jetson

__all__ = ["BackendState", "Examination", "Warned", "examination"]

T = TypeVar("T")
PROBE_SECONDS = 20.0  # a GPU that was powered down wakes up in a few; importing TensorRT from a slow card takes some
LIBRARIES = {
    "numpy": ("numpy",),
    "pillow": ("pillow",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "openvino": ("openvino",),
    "cuda-python": ("cuda-python", "cuda-bindings"),
    "pycuda": ("pycuda",),
    "cryptography": ("cryptography",),
}
"""Distributions that bring a library, by the name that people use."""


@dataclass(frozen=True)
class BackendState:
    """A backend: ready to build and run here, or the reason why not, and what would help.

    * version: of its library, "" where it is not ready
    """

    backend: str
    ready: bool
    version: str
    reason_code: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Warned:
    """Something that does not stop anything now, and should be mended."""

    fact: str
    remedy: str


@dataclass(frozen=True)
class Examination:
    """What was found; None, "" or empty where there is nothing, or where it could not be asked.

    * gpu: name, architecture, driver and memory in bytes of the first one, None if CUDA sees none; then `gpu_reason`
    * libraries: installed versions by name
    * providers: the execution providers that onnxruntime was built with
    """

    python: str
    system: str
    processor: str
    memory: Memory | None
    jetson: Jetson | None
    gpu: dict[str, Any] | None
    gpu_reason: str
    libraries: dict[str, str]
    providers: tuple[str, ...]
    backends: tuple[BackendState, ...]
    warnings: tuple[Warned, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def examination(root: Path = ROOT, *, cache: Path | None = None, seconds: float = PROBE_SECONDS) -> Examination:
    """Looks at everything; never raises, and takes at most `seconds` for each thing."""
    warnings: list[Warned] = []

    def asked(what: str, probe: Callable[[], T], otherwise: T) -> T:
        return _within(seconds, what, probe, otherwise, warnings)

    unknown: dict[str, Any] | str = "it could not be asked"
    gpu = asked("the GPU", _gpu, unknown)
    backends = tuple(
        asked(f"the backend {name}", lambda backend=backend: _state(backend), _unknown(name))  # type: ignore[misc]
        for name, backend in BACKENDS.items()
    )
    if asked("onnxruntime's records", two_onnxruntimes, False):
        warnings.append(
            Warned(
                "onnxruntime and onnxruntime-gpu are installed over each other: which of them runs is chance",
                "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one that is wanted",
            )
        )
    asked("the cache", lambda: _check_cache(cache, warnings), None)
    return Examination(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=asked("the processor", lambda: processor(root / "proc/cpuinfo")[0], ""),
        memory=asked("the memory", lambda: memory_here(root / "proc"), None),
        jetson=asked("the Jetson", lambda: jetson(root), None),
        gpu=gpu if isinstance(gpu, dict) else None,
        gpu_reason=gpu if isinstance(gpu, str) else "",
        libraries={
            name: version
            for name, distributions in LIBRARIES.items()
            if (version := asked(name, lambda names=distributions: installed_version(*names) or "", ""))  # type: ignore[misc]
        },
        providers=asked("onnxruntime's providers", _providers, ()),
        backends=backends,
        warnings=tuple(warnings),
    )


def _within(seconds: float, what: str, probe: Callable[[], T], otherwise: T, warnings: list[Warned]) -> T:
    """The probe's answer, or `otherwise` and a warning if it fails or takes too long; then it is left behind."""
    answers: list[T] = []
    failures: list[str] = []

    def ask() -> None:
        try:
            answers.append(probe())
        except Exception as error:  # of whatever library is broken here: that is what we are asked to find
            failures.append(" ".join(f"{type(error).__name__}: {error}".split()))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    fact = failures[0] if failures else f"no answer within {seconds:g} s"
    warnings.append(Warned(f"{what} could not be asked ({fact})", ""))
    return otherwise


def _gpu() -> dict[str, Any] | str:
    from ..cuda import device_here

    try:
        return asdict(device_here())
    except EdgewrightError as error:
        return str(error)


def _state(backend: Backend) -> BackendState:
    absence = backend.absence() or backend.cannot_run()
    if absence is None:
        return BackendState(backend.name, True, backend.version(), "", "", "")
    return _missing(backend.name, absence)


def _missing(name: str, absence: Absence) -> BackendState:
    return BackendState(name, False, "", absence.reason_code, absence.reason, absence.hint)


def _unknown(name: str) -> BackendState:
    return BackendState(name, False, "", "unknown", "it could not be asked", "see the warning")


def _providers() -> tuple[str, ...]:
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def _check_cache(cache: Path | None, warnings: list[Warned]) -> None:
    try:
        checked_cache(cache_folder(cache))
    except EdgewrightError as error:
        warnings.append(Warned(error.message, error.remedy))
