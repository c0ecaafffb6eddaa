"""CUDA's runtime library behind one call that checks: a code that is not success becomes a `DeviceError`."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import DeviceError

__all__ = ["Cuda", "Device", "device_here"]

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # cuda-python from 12.6 on, and before
SUCCESS = 0
REMEDY = "look at nvidia-smi, or on a Jetson at tegrastats"


class Cuda:
    """The functions of CUDA's runtime, by their names: `Cuda(module).call("cudaMalloc", 1024)`."""

    def __init__(self, library: Any) -> None:
        self.library = library

    @classmethod
    def load(cls) -> Cuda:
        """Through cuda-python. Raises `DeviceError` if it is not installed or does not load."""
        return cls(_library())

    def call(self, function: str, *arguments: Any) -> Any:
        """What the function returns beside its code. Raises `DeviceError` with CUDA's own words for the code."""
        status, *values = getattr(self.library, function)(*arguments)
        if int(status) != SUCCESS:
            raise DeviceError(f"{function} failed: {self._text(status)} ({int(status)})", REMEDY)
        return values[0] if values else None

    def _text(self, status: Any) -> str:
        _, text = self.library.cudaGetErrorString(status)
        return text.decode() if isinstance(text, bytes) else str(text)


@dataclass(frozen=True)
class Device:
    """The GPU that is used, the first one that CUDA sees.

    * architecture: "sm86" for compute capability 8.6
    """

    architecture: str


@functools.cache
def device_here() -> Device:
    """The GPU of this machine. Raises `DeviceError` if there is none, no driver, or no cuda-python."""
    return device_of(Cuda.load())


def device_of(cuda: Cuda) -> Device:
    """The first device of `cuda`. Raises `DeviceError` if there is none."""
    try:
        count = cuda.call("cudaGetDeviceCount")
    except DeviceError as error:
        raise DeviceError(
            f"there is no NVIDIA GPU here, or no driver that fits cuda-python: {error.message}", error.remedy
        ) from error
    if count < 1:
        raise DeviceError("there is no NVIDIA GPU here", REMEDY)
    attributes = cuda.library.cudaDeviceAttr
    major, minor = (
        cuda.call("cudaDeviceGetAttribute", attribute, 0)
        for attribute in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    )
    return Device(f"sm{major}{minor}")


@functools.cache
def _library() -> ModuleType:
    reasons = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except Exception as error:  # ImportError, OSError, or RuntimeError where the driver does not fit
            reasons.append(f"{name}: {error}")
    raise DeviceError(f"cuda-python does not load ({'; '.join(reasons)})", "pip install 'edgewright[cuda]'")
