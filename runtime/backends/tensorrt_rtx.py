"""TensorRT-RTX: engines for GeForce and RTX GPUs, built ahead of time on any machine, with or without a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import BuildError, DeviceError
from ..installed import installed_version
from .base import Absence, BuildRequest, Compiled
from .tensorrt_base import NvidiaBackend
from .tensorrt_builder import build_engine
from .tensorrt_listing import kernels_of_log
from .tensorrt_rtx_settings import kernels_file

if TYPE_CHECKING:
    from ..cuda.driver import Device

__all__ = ["TensorRtRtxBackend"]

PACKAGE = "tensorrt_rtx"
INSTALL = "pip install 'edgewright[rtx]'"
NO_TARGET = "TensorRT-RTX builds for a GPU architecture that is named"
IMPOSSIBLE = {  # tried with TensorRT-RTX 1.7
    ("fp32", "sm75"): "TensorRT-RTX has no FP32 matrix product for sm75 (Turing)",
    ("int8", "sm75"): "TensorRT-RTX runs the INT8 convolutions of sm75 (Turing) in FP16",
}


class TensorRtRtxBackend(NvidiaBackend):
    """FP32, FP16 and explicit-Q/DQ INT8 graphs for RTX GPUs from Turing to Blackwell; for no Jetson."""

    name = "tensorrt-rtx"
    precisions = ("fp32", "fp16", "int8")
    dialect = "rtx"
    suffix = ".engine"
    targets = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

    def absence(self) -> Absence | None:
        """The package is installed and loads, or not."""
        if importlib.util.find_spec(PACKAGE) is None:
            return Absence("package_missing", "the package tensorrt-rtx is not installed", INSTALL)
        try:
            _package()
        except (ImportError, OSError) as error:
            return Absence("package_missing", f"the package tensorrt-rtx does not load: {error}", INSTALL)
        return None

    def unsupported(self, precision: str, target: str | None) -> Absence | None:
        """Asks the package for the targets it knows, which takes its import once (0.1 s)."""
        if target is None:
            return Absence("target_unsupported", NO_TARGET, f"name one of {', '.join(self._known())}")
        if target not in self._known():
            return Absence(
                "target_unsupported",
                f"TensorRT-RTX {self.version()} does not build for {target}",
                f"it builds for {', '.join(self._known())}",
            )
        if (precision, target) in IMPOSSIBLE:
            return Absence("precision_unsupported", IMPOSSIBLE[precision, target], "take fp16 for this target")
        return None

    def cannot_run(self, target: str | None = None) -> Absence | None:
        """An RTX GPU is here, of the architecture that the engine was built for, or not."""
        absence = self.absence()
        if absence is not None:
            return absence
        try:
            architecture = _architecture()
        except DeviceError as error:
            return Absence("device_missing", error.message, error.remedy)
        fitting = self._known() if target is None else (target,)
        if architecture in fitting:
            return None
        return Absence(
            "device_missing",
            f"the GPU here is {architecture}, the engine is for {', '.join(fitting)}",
            "copy the engine to a machine with such a GPU",
        )

    def package(self) -> ModuleType:
        """Loaded once per process."""
        return _package()

    def kernels_file(self, engine: bytes, device: Device) -> Path:
        """In the user's cache folder."""
        return kernels_file(engine, self.version(), device)

    def version(self) -> str:
        """Of the installed package."""
        return installed_version(PACKAGE) or "unknown"

    def compile(self, request: BuildRequest) -> Compiled:
        """Builds for the target, and reads the kernels off the builder's log: without a GPU no engine can be loaded."""
        if request.target is None:
            raise BuildError(NO_TARGET, f"name one of {', '.join(self._known())}")
        if request.dla is not None:
            raise BuildError("TensorRT-RTX does not build for a DLA", "take the backend tensorrt on the Jetson")
        plan = build_engine(_package(), request, request.target.upper())
        return Compiled(
            plan.engine,
            plan.inputs,
            plan.outputs,
            kernels_of_log(plan.listing),
            versions={self.name: self.version()},
            profile=plan.profile,
        )

    def _known(self) -> tuple[str, ...]:
        members = _package().ComputeCapability.__members__
        return tuple(target for target in self.targets if target.upper() in members)


@functools.cache
def _package() -> ModuleType:
    return importlib.import_module(PACKAGE)


def _architecture() -> str:
    from ..cuda import device_here

    return device_here().architecture
