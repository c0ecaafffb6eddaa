"""A fake of cuda-python's runtime module: the memory of its device is memory of this process."""

# ruff: noqa: N801, N802, N815  # CUDA's names

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

__all__ = ["FakeCudart"]


class FakeCudart:
    """Keeps account of what is allocated; the functions in `faults` fail with `code`."""

    cudaStreamNonBlocking = 1

    class cudaDeviceAttr(IntEnum):
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    def __init__(self, *faults: str, code: int = 2, devices: int = 1, capability: tuple[int, int] = (8, 7)) -> None:
        self.faults = dict.fromkeys(faults, code)
        self.devices, self.capability = devices, capability
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.copies: list[tuple[str, int]] = []  # direction, bytes
        self.synchronized = True

    @property
    def held(self) -> int:
        """What is not freed."""
        return len(self.device) + len(self.pinned) + len(self.streams)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory", 35: b"CUDA driver version is insufficient"}.get(code, b"unspecified failure")

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return self._code("cudaGetDeviceCount"), self.devices

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        assert device == 0
        return 0, self.capability[attribute - 75]

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        self.streams.add(77)
        return self._code("cudaStreamCreateWithFlags"), 77

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream in self.streams
        self.synchronized = True
        return (self._code("cudaStreamSynchronize"),)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams.remove(stream)
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        return self._allocate("cudaMalloc", size, self.device)

    def cudaMallocHost(self, size: int) -> tuple[int, int | None]:
        return self._allocate("cudaMallocHost", size, self.pinned)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.device[address]
        return (self._code("cudaFree"),)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self.pinned[address]
        return (self._code("cudaFreeHost"),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        assert stream in self.streams
        up = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        origin, destination = (self.pinned, self.device) if up else (self.device, self.pinned)
        assert size <= min(len(origin[source]), len(destination[target]))
        ctypes.memmove(target, source, size)
        self.copies.append(("up" if up else "down", size))
        self.synchronized = False
        return (self._code("cudaMemcpyAsync"),)

    def _allocate(self, function: str, size: int, memory: dict[int, Any]) -> tuple[int, int | None]:
        code = self._code(function)
        if code:
            return code, None
        block = (ctypes.c_byte * size)()
        address = ctypes.addressof(block)
        memory[address] = block
        return 0, address

    def _code(self, function: str) -> int:
        return self.faults.get(function, 0)
