"""Streams and buffers, owned by an `ExitStack`: what was taken is given back, also when something fails half-way."""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .driver import CudaDriver
from .interchange import DeviceArray

__all__ = ["Buffer", "Streams"]


class Streams:
    """Two own queues: what is copied to the device in one overlaps what is computed in the other."""

    def __init__(self, driver: CudaDriver, owner: ExitStack) -> None:
        self._driver = driver
        self.copy = self._stream(owner)
        self.compute = self._stream(owner)

    def synchronize(self) -> None:
        """Waits for both. Raises what went wrong in one of them."""
        with ExitStack() as both:
            both.callback(self._driver.synchronize, self.compute)
            both.callback(self._driver.synchronize, self.copy)

    def _stream(self, owner: ExitStack) -> int:
        stream = self._driver.create_stream()
        owner.callback(self._driver.destroy_stream, stream)
        return stream


class Buffer:
    """Room for one tensor of up to `shape`: `address` for the device, `host` page-locked memory as an array.

    Where the GPU shares the processor's memory both are the same (zero-copy), and nothing is copied. Smaller tensors
    use the beginning.
    """

    def __init__(self, driver: CudaDriver, shape: tuple[int, ...], dtype: DTypeLike, owner: ExitStack) -> None:
        self._driver = driver
        self._shared = driver.device.integrated
        kind = np.dtype(dtype)
        size = max(1, math.prod(shape)) * kind.itemsize
        self._pinned = driver.allocate_pinned(size, mapped=self._shared)
        owner.callback(driver.free_pinned, self._pinned)
        self.address = self._pinned.device_address
        if not self._shared:
            self.address = driver.allocate(size)
            owner.callback(driver.free, self.address)
        memory = (ctypes.c_byte * size).from_address(self._pinned.address)
        self.host: NDArray[Any] = np.ctypeslib.as_array(memory).view(kind)[: math.prod(shape)].reshape(shape)

    def view(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The beginning of `host` as an array of that shape."""
        return self.host.reshape(-1)[: math.prod(shape)].reshape(shape)

    def upload(self, array: NDArray[Any] | DeviceArray, stream: int) -> None:
        """Brings the images of a batch to the device in the stream; an array of the host may be changed at once."""
        if isinstance(array, DeviceArray):
            self._driver.copy_on_device(self.address, array.address, array.nbytes, stream)
        else:
            self.host[: len(array)] = array
            self._send(0, len(array), stream)

    def clear(self, start: int, stop: int, stream: int) -> None:
        """Sets these images to zeros in the stream."""
        if start < stop:
            self.host[start:stop] = 0
            self._send(start, stop, stream)

    def download(self, size: int, stream: int) -> None:
        """Brings the first `size` bytes to `host`; they are there when the stream is done."""
        if not self._shared:
            self._driver.copy_to_host(self._pinned.address, self.address, size, stream)

    def _send(self, start: int, stop: int, stream: int) -> None:
        if not self._shared:
            first, end = start * self.host.strides[0], stop * self.host.strides[0]
            self._driver.copy_to_device(self.address + first, self._pinned.address + first, end - first, stream)
