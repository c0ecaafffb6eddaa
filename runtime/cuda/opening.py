"""Which package CUDA's driver is reached through, and the device behind it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass

from ..errors import DeviceError
from .driver import CudaDriver, Device

__all__ = ["CHOICE_VARIABLE", "device_here", "open_driver"]

CHOICE_VARIABLE = "EDGEWRIGHT_CUDA"


@dataclass(frozen=True)
class _Package:
    """A package: its name, the extra that brings it, what of it is imported, and our module and class around it."""

    name: str
    extra: str
    imported: str
    module: str
    kind: str

    def is_installed(self) -> bool:
        try:
            return importlib.util.find_spec(self.imported) is not None
        except ImportError:  # the package above it is missing
            return False

    def driver(self) -> type[CudaDriver]:
        found: type[CudaDriver] = getattr(importlib.import_module(self.module, __package__), self.kind)
        return found


PACKAGES = (
    _Package("cuda-python", "cuda", "cuda.bindings.driver", ".cuda_python", "CudaPython"),
    _Package("pycuda", "pycuda", "pycuda._driver", ".py_cuda", "PyCuda"),
)


def open_driver(name: str | None = None) -> CudaDriver:
    """CUDA's driver with the primary context of the first device; close it.

    `name` is "cuda-python" or "pycuda"; if it is None, the environment variable EDGEWRIGHT_CUDA says it, else the first
    of them that is installed is taken. Raises `DeviceError` if there is no such package, no driver or no GPU.
    """
    return _chosen(name).open()


@functools.cache
def device_here() -> Device:
    """The first GPU of this machine, through the package that `open_driver` takes; asked once.

    Raises `DeviceError` as `open_driver` does.
    """
    return _chosen(None).find_device()


def _chosen(name: str | None) -> type[CudaDriver]:
    name = name or os.environ.get(CHOICE_VARIABLE) or None
    candidates = [package for package in PACKAGES if name in (None, package.name)]
    if not candidates:
        names = ", ".join(package.name for package in PACKAGES)
        raise DeviceError(f"no package for CUDA is called {name!r}", f"choose one of {names}")
    for package in candidates:
        if package.is_installed():
            return package.driver()
    names = " or ".join(package.name for package in candidates)
    raise DeviceError(f"{names} is not installed", f"pip install 'edgewright[{candidates[0].extra}]'")
