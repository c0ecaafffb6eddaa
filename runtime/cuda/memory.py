"""A stream, and buffers that exist twice: pinned on the host and on the device."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .driver import Cuda

__all__ = ["Buffer", "Stream"]


class Stream:
    """An own queue of the GPU: on the default stream TensorRT would wait for the whole device at every run."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cudaStreamCreateWithFlags", cuda.library.cudaStreamNonBlocking)

    def __int__(self) -> int:
        return int(self.handle)

    def synchronize(self) -> None:
        """Waits until everything is done. Raises `DeviceError` if something of it failed."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Frees the stream."""
        self._cuda.call("cudaStreamDestroy", self.handle)


class Buffer:
    """Room for one tensor: `address` on the device, and pinned memory on the host, which is copied without a detour.

    `shape` is the largest that the tensor takes; smaller ones use the beginning.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._cuda = cuda
        self._dtype = np.dtype(dtype)
        self._size = max(1, math.prod(shape)) * self._dtype.itemsize
        self.address = int(cuda.call("cudaMalloc", self._size))
        try:
            self._pinned = int(cuda.call("cudaMallocHost", self._size))
        except BaseException:
            cuda.call("cudaFree", self.address)
            raise

    def upload(self, array: NDArray[Any], stream: Stream) -> None:
        """Copies the array to the device; it may be changed at once."""
        host = self._host(array.shape)
        host[...] = array
        self._copy(self.address, self._pinned, host.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, shape: tuple[int, ...], stream: Stream) -> NDArray[Any]:
        """Copies from the device. The result is a view of pinned memory: valid after `stream.synchronize()`, until the
        next download.
        """
        host = self._host(shape)
        self._copy(self._pinned, self.address, host.nbytes, "cudaMemcpyDeviceToHost", stream)
        return host

    def close(self) -> None:
        """Frees both."""
        try:
            self._cuda.call("cudaFreeHost", self._pinned)
        finally:
            self._cuda.call("cudaFree", self.address)

    def _host(self, shape: tuple[int, ...]) -> NDArray[Any]:
        count = math.prod(shape)
        memory = (ctypes.c_byte * (count * self._dtype.itemsize)).from_address(self._pinned)
        return np.ctypeslib.as_array(memory).view(self._dtype).reshape(shape)

    def _copy(self, target: int, source: int, size: int, direction: str, stream: Stream) -> None:
        kind = getattr(self._cuda.library.cudaMemcpyKind, direction)
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, stream.handle)
