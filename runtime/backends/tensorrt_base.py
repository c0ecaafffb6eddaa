"""What TensorRT and TensorRT-RTX have in common as backends: how an engine is opened, and on what."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import DeviceError, EngineError
from .base import Backend
from .runner import Runner

if TYPE_CHECKING:
    from ..cuda.driver import Device

__all__ = ["NvidiaBackend"]


class NvidiaBackend(Backend):
    """A backend whose engines run on the NVIDIA GPU of this machine, with the version that built them."""

    version_bound = True

    @abstractmethod
    def package(self) -> ModuleType:
        """NVIDIA's package. Raises ImportError or OSError if it does not load."""

    def device(self) -> str:
        """The architecture of the GPU here."""
        from ..cuda import device_here

        try:
            return device_here().architecture
        except DeviceError:
            return ""

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        """On the GPU here, or its DLA core; `threads` plays no role."""
        absence = self.cannot_run()
        if absence is not None:
            raise EngineError(absence.reason, absence.hint)
        from ..cuda import device_here, open_driver
        from .tensorrt_engine import LoadedEngine
        from .tensorrt_runner import TensorRtRunner

        kernels = self.kernels_file(engine, device_here())
        return TensorRtRunner(LoadedEngine(self.package(), engine, open_driver(), kernels, dla))

    def kernels_file(self, engine: bytes, device: Device) -> Path | None:
        """Where kernels that are compiled on the device are kept; None where all are in the engine."""
        return None
