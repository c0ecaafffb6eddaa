"""What TensorRT and TensorRT-RTX have in common as backends: how an engine is opened, and on what."""

from __future__ import annotations

from abc import abstractmethod
from types import ModuleType

from ..errors import DeviceError, EngineError
from .base import Backend, Runner

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

    def open(self, engine: bytes, *, threads: int = 0) -> Runner:
        """On the GPU here; `threads` plays no role."""
        absence = self.cannot_run()
        if absence is not None:
            raise EngineError(absence.reason, absence.hint)
        from ..cuda import Cuda
        from .tensorrt_runner import TensorRtRunner

        return TensorRtRunner(self.package(), engine, Cuda.load())
