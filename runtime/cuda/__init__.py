"""CUDA for the backends that run on a GPU: its driver through cuda-python or pycuda, imported when it is opened."""

from __future__ import annotations

from .driver import CudaDriver, Device, PinnedMemory
from .opening import device_here, open_driver

__all__ = ["CudaDriver", "Device", "PinnedMemory", "device_here", "open_driver"]
