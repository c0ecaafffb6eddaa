"""What the TensorRT backends need of CUDA, through cuda-python: a stream, memory, copies. Imported to use a GPU."""

from __future__ import annotations

from .driver import Cuda, Device, device_here
from .memory import Buffer, Stream

__all__ = ["Buffer", "Cuda", "Device", "Stream", "device_here"]
