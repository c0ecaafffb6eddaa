# ruff: noqa: D102  # as the base class says
"""CUDA's driver through cuda-python, from version 12.6 on."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import ClosedError, DeviceError
from .driver import CudaDriver, Device, PinnedMemory
from .failures import failure

__all__ = ["CudaPython"]

INSTALL = "pip install 'edgewright[cuda]'"


class CudaPython(CudaDriver):
    """`cuda.bindings.driver`, whose handles are integers in a wrapper and whose functions return (code, value)."""

    name = "cuda-python"
    captures = True

    def __init__(self, library: Any, device: Device) -> None:
        self.device = device
        self._cuda = library
        self._closed = False
        self._context = self._call("cuDevicePrimaryCtxRetain", 0)

    @classmethod
    def open(cls) -> CudaPython:
        library = _library()
        return cls(library, _first_device(library))

    @classmethod
    def find_device(cls) -> Device:
        return _first_device(_library())

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._call("cuDevicePrimaryCtxRelease", 0)

    @contextmanager
    def current(self) -> Iterator[None]:
        if self._closed:
            raise ClosedError("the CUDA driver is closed", "open it again")
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        except BaseException:
            self._cuda.cuCtxPopCurrent()  # unchecked: what went wrong before is what matters
            raise
        self._call("cuCtxPopCurrent")

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_pinned(self, size: int, *, mapped: bool = False) -> PinnedMemory:
        address = int(self._call("cuMemHostAlloc", size, self._cuda.CU_MEMHOSTALLOC_DEVICEMAP if mapped else 0))
        try:
            device_address = int(self._call("cuMemHostGetDevicePointer", address, 0)) if mapped else 0
        except DeviceError:
            self._cuda.cuMemFreeHost(address)
            raise
        return PinnedMemory(address, device_address, size)

    def free_pinned(self, memory: PinnedMemory) -> None:
        self._call("cuMemFreeHost", memory.address)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self) -> int:
        return int(self._call("cuEventCreate", int(self._cuda.CUevent_flags.CU_EVENT_DEFAULT)))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed(self, start: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def copy_to_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", target, source, size, stream)

    def copy_to_host(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", target, source, size, stream)

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, size, stream)

    def begin_capture(self, stream: int) -> None:
        # thread-local: other threads may allocate meanwhile
        self._call("cuStreamBeginCapture", stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        graph = self._call("cuStreamEndCapture", stream)
        try:
            executable = int(self._call("cuGraphInstantiate", graph, 0))
        except DeviceError:
            self._cuda.cuGraphDestroy(graph)
            raise
        try:
            self._call("cuGraphDestroy", graph)
        except DeviceError:
            self._cuda.cuGraphExecDestroy(executable)
            raise
        return executable

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def load_module(self, image: bytes) -> int:
        return int(self._call("cuModuleLoadData", image))

    def unload_module(self, module: int) -> None:
        self._call("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        return int(self._call("cuModuleGetFunction", module, name.encode()))

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[ctypes._SimpleCData[Any]],
        stream: int,
    ) -> None:
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._call("cuLaunchKernel", function, *grid, *block, 0, stream, ctypes.addressof(addresses), 0)

    def _call(self, function: str, *arguments: Any) -> Any:
        return _call(self._cuda, function, *arguments)


def _library() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DeviceError(f"cuda-python from 12.6 on is not installed ({error})", INSTALL) from error


def _first_device(cuda: Any) -> Device:
    try:
        _call(cuda, "cuInit", 0)
        version = int(_call(cuda, "cuDriverGetVersion"))
    except DeviceError as error:
        raise DeviceError(f"there is no NVIDIA GPU here, or no driver: {error.message}", error.remedy) from error
    if version // 1000 < cuda.CUDA_VERSION // 1000:
        raise DeviceError(
            f"cuda-python is for CUDA {_version(cuda.CUDA_VERSION)}, the driver supports {_version(version)}",
            f"update the driver, or pip install 'cuda-python=={version // 1000}.*'",
        )
    attributes = cuda.CUdevice_attribute
    major, minor, integrated = (
        int(_call(cuda, "cuDeviceGetAttribute", attribute, 0))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            attributes.CU_DEVICE_ATTRIBUTE_INTEGRATED,
        )
    )
    name = _call(cuda, "cuDeviceGetName", 128, 0).split(b"\0")[0].decode()
    memory = int(_call(cuda, "cuDeviceTotalMem", 0))
    return Device(name, f"sm{major}{minor}", _version(version), bool(integrated), memory)


def _version(number: int) -> str:
    """12060 → "12.6"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _call(cuda: Any, function: str, *arguments: Any) -> Any:
    """What the function returns beside its code: nothing, a value, or a tuple. Raises `DeviceError`."""
    try:
        status, *values = getattr(cuda, function)(*arguments)
    except RuntimeError as error:  # cuda-python finds no library, or not this function in it
        reason = str(error).rstrip(".")
        raise DeviceError(f"{function} cannot be called: {reason}", "install or update NVIDIA's driver") from error
    check(cuda, function, status)
    return (values[0] if len(values) == 1 else tuple(values)) if values else None


def check(cuda: Any, function: str, status: Any) -> None:
    """Raises what `status`, returned by `function`, means; nothing for success."""
    code = int(status)
    if code:
        name, text = (_text(cuda.cuGetErrorName(status)), _text(cuda.cuGetErrorString(status)))
        raise failure(function, code, f"{text} ({name}, {code})")


def _text(answer: tuple[Any, bytes | None]) -> str:
    _, text = answer
    return text.decode() if text else "an unknown error"
