"""TensorRT: engines for the GPU of this machine, a Jetson's too, with its DLA cores.

An engine is built by measuring on the device that runs it, so there is no building ahead for another one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from types import ModuleType

from ..errors import BuildError, DeviceError, EngineError
from ..installed import installed_version
from .base import Absence, BuildRequest, Compiled
from .tensorrt_base import NvidiaBackend
from .tensorrt_builder import build_engine
from .tensorrt_listing import kernels_of_inspector

__all__ = ["TensorRtBackend"]

PACKAGE = "tensorrt"
INSTALL = (
    "on a Jetson it comes with JetPack: apt install python3-libnvinfer, and a virtual environment with "
    "--system-site-packages; elsewhere pip install 'edgewright[tensorrt,cuda]'"
)
OLDEST, NEWEST = (10, 3), (11,)  # JetPack 6.1, and the newest major version whose interface is known


class TensorRtBackend(NvidiaBackend):
    """FP32, FP16 and explicit-Q/DQ INT8 graphs on the NVIDIA GPU of this machine."""

    name = "tensorrt"
    precisions = ("fp32", "fp16", "int8")
    dialect = "tensorrt"
    suffix = ".plan"

    def absence(self) -> Absence | None:
        """The package, in a version that is known, and a GPU are here, or not."""
        if importlib.util.find_spec(PACKAGE) is None:
            return Absence("package_missing", "the package tensorrt is not installed", INSTALL)
        try:
            package = _package()
        except (ImportError, OSError) as error:
            return Absence("package_missing", f"the package tensorrt does not load: {error}", INSTALL)
        version = _numbers(package.__version__)
        if not (version >= OLDEST and version[: len(NEWEST)] <= NEWEST):
            return Absence(
                "package_missing",
                f"TensorRT {package.__version__} is here, needed is one from 10.3 to 11.x",
                "on a Jetson, JetPack 6.1 or newer has one",
            )
        return _no_device()

    def unsupported(self, precision: str, target: str | None) -> Absence | None:
        """It builds for the GPU that is here, and for no other."""
        if target is None:
            return None
        return Absence("target_unsupported", f"TensorRT does not build for {target} here", "name no target")

    def package(self) -> ModuleType:
        """Loaded once per process."""
        return _package()

    def version(self) -> str:
        """Of the installed package; JetPack's may come without a record of it, then the package is asked."""
        recorded = installed_version(PACKAGE)
        if recorded is not None:
            return recorded
        return str(_package().__version__) if importlib.util.find_spec(PACKAGE) is not None else "unknown"

    def compile(self, request: BuildRequest) -> Compiled:
        """Builds, loads the engine and asks the inspector for its kernels."""
        from .tensorrt_engine import inspected

        package = _package()
        plan = build_engine(package, request)
        try:
            listing = inspected(package, plan.engine, request.dla)
        except EngineError as error:
            raise BuildError(f"cannot read what was built: {error.message}", error.remedy) from error
        return Compiled(
            plan.engine,
            plan.inputs,
            plan.outputs,
            kernels_of_inspector(listing),
            versions={self.name: self.version()},
            profile=plan.profile,
            timing_cache=plan.timing_cache,
            dla=request.dla,
        )


@functools.cache
def _package() -> ModuleType:
    return importlib.import_module(PACKAGE)


def _no_device() -> Absence | None:
    from ..cuda import device_here

    try:
        device_here()
    except DeviceError as error:
        return Absence("device_missing", error.message, error.remedy)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """(10, 3, 0) for "10.3.0.post1"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
