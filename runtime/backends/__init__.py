"""The backends, by the names of the contract; each file imports its library only when it is used."""

from __future__ import annotations

from ..errors import EngineError
from .base import Absence, Backend, BuildRequest, Built, Compiled, KernelTime
from .onnxruntime_backend import OnnxRuntimeBackend
from .openvino_cpu import OpenVinoBackend
from .runner import Runner
from .tensorrt_gpu import TensorRtBackend
from .tensorrt_rtx import TensorRtRtxBackend

__all__ = [
    "BACKENDS",
    "Absence",
    "Backend",
    "BuildRequest",
    "Built",
    "Compiled",
    "KernelTime",
    "Runner",
    "backend_named",
    "backend_reading",
]

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (OnnxRuntimeBackend(), OpenVinoBackend(), TensorRtRtxBackend(), TensorRtBackend())
}


def backend_named(name: str) -> Backend:
    """The backend of that name. Raises `EngineError` if there is none."""
    if name not in BACKENDS:
        raise EngineError(f"unknown backend {name!r}", f"there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def backend_reading(dialect: str) -> Backend:
    """The first backend that reads the quantized graphs of `dialect`. Raises `EngineError` if none does."""
    for backend in BACKENDS.values():
        if backend.dialect == dialect:
            return backend
    raise EngineError(f"no backend reads the dialect {dialect!r}")
