# ruff: noqa: D102  # as the base class says
"""CUDA's driver through pycuda, for devices that carry it. It has no CUDA graphs.

pycuda frees what its objects hold when they go, and only prints a warning if that fails; so no call here that frees
raises what the driver says.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from ..errors import ClosedError, DeviceError
from .driver import CudaDriver, Device, PinnedMemory
from .failures import LOST, OUT_OF_MEMORY, failure

__all__ = ["PyCuda"]

INSTALL = "install NVIDIA's driver, or build pycuda again for the one that is here"
NO_GRAPHS = "pycuda has no CUDA graphs"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which pycuda has no name for


class PyCuda(CudaDriver):
    """`pycuda.driver`: its objects are kept here under the integers that are given out."""

    name = "pycuda"
    captures = False

    def __init__(self, library: Any, device: Device) -> None:
        self.device = device
        self._cuda = library
        self._driver = ctypes.CDLL("libcuda.so.1")  # which pycuda has loaded
        self._objects: dict[int, Any] = {}
        self._functions: dict[int, list[int]] = {}  # of each module
        self._numbers = itertools.count(1)
        self._closed = False
        self._context = self._call(lambda: library.Device(0).retain_primary_context())

    @classmethod
    def open(cls) -> PyCuda:
        library = _library()
        return cls(library, _first_device(library))

    @classmethod
    def find_device(cls) -> Device:
        return _first_device(_library())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._call(self._context.push)  # pycuda releases only what is current, or what this thread has opened
        finally:
            self._context.detach()
            self._pop_left_over()

    @contextmanager
    def current(self) -> Iterator[None]:
        if self._closed:
            raise ClosedError("the CUDA driver is closed", "open it again")
        if self._cuda.Context.get_current() == self._context:
            yield
            return
        self._call(self._context.push)
        try:
            yield
        finally:
            self._pop()

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call(self._cuda.mem_get_info)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        memory = self._call(self._cuda.mem_alloc, size)
        return self._kept(memory, int(memory))

    def free(self, address: int) -> None:
        self._call(self._taken(address).free)

    def allocate_pinned(self, size: int, *, mapped: bool = False) -> PinnedMemory:
        flags = self._cuda.host_alloc_flags.DEVICEMAP if mapped else 0
        array = self._call(self._cuda.pagelocked_empty, size, np.uint8, mem_flags=flags)
        try:
            device_address = int(self._call(array.base.get_device_pointer)) if mapped else 0
        except DeviceError:
            array.base.free()  # the exception would keep it
            raise
        return PinnedMemory(self._kept(array, array.ctypes.data), device_address, size)

    def free_pinned(self, memory: PinnedMemory) -> None:
        self._call(self._taken(memory.address).base.free)

    def create_stream(self) -> int:
        stream = self._call(self._cuda.Stream, NON_BLOCKING)
        return self._kept(stream, int(stream.handle))

    def destroy_stream(self, stream: int) -> None:
        self._taken(stream)

    def synchronize(self, stream: int) -> None:
        self._call(self._object(stream).synchronize)

    def create_event(self) -> int:
        return self._kept(self._call(self._cuda.Event), next(self._numbers))

    def destroy_event(self, event: int) -> None:
        self._taken(event)

    def record(self, event: int, stream: int) -> None:
        if isinstance(self._objects.get(stream), self._cuda.Stream):  # 1 and 2 are streams too, CUDA's default ones
            self._call(self._object(event).record, self._object(stream))
        else:
            self._await_foreign(stream)

    def wait(self, stream: int, event: int) -> None:
        self._call(self._object(stream).wait_for_event, self._object(event))

    def synchronize_event(self, event: int) -> None:
        self._call(self._object(event).synchronize)

    def elapsed(self, start: int, end: int) -> float:
        return float(self._call(self._object(end).time_since, self._object(start)))

    def copy_to_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._call(self._cuda.memcpy_htod_async, target, _bytes_at(source, size), self._object(stream))

    def copy_to_host(self, target: int, source: int, size: int, stream: int) -> None:
        self._call(self._cuda.memcpy_dtoh_async, _bytes_at(target, size), source, self._object(stream))

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._call(self._cuda.memcpy_dtod_async, target, source, size, self._object(stream))

    def begin_capture(self, stream: int) -> NoReturn:
        raise DeviceError(NO_GRAPHS, "use cuda-python for them")

    def end_capture(self, stream: int) -> NoReturn:
        raise DeviceError(NO_GRAPHS, "use cuda-python for them")

    def launch_graph(self, graph: int, stream: int) -> NoReturn:
        raise DeviceError(NO_GRAPHS, "use cuda-python for them")

    def destroy_graph(self, graph: int) -> NoReturn:
        raise DeviceError(NO_GRAPHS, "use cuda-python for them")

    def load_module(self, image: bytes) -> int:
        return self._kept(self._call(self._cuda.module_from_buffer, image), next(self._numbers))

    def unload_module(self, module: int) -> None:
        for function in self._functions.pop(module, ()):
            self._taken(function)  # each of them keeps the module alive
        self._taken(module)

    def function(self, module: int, name: str) -> int:
        function = self._kept(self._call(self._object(module).get_function, name), next(self._numbers))
        self._functions.setdefault(module, []).append(function)
        return function

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[ctypes._SimpleCData[Any]],
        stream: int,
    ) -> None:
        values = [np.frombuffer(bytes(argument), np.dtype(f"u{ctypes.sizeof(argument)}"))[0] for argument in arguments]
        self._call(self._object(function), *values, grid=grid, block=block, stream=self._object(stream))

    def _kept(self, thing: Any, handle: int) -> int:
        self._objects[handle] = thing
        return handle

    def _object(self, handle: int) -> Any:
        if handle not in self._objects:
            raise DeviceError(f"{handle} is nothing that pycuda gave, or is freed")
        return self._objects[handle]

    def _taken(self, handle: int) -> Any:
        thing = self._object(handle)
        del self._objects[handle]
        return thing

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except self._cuda.Error as error:
            # A traceback would keep alive what pycuda destroys when nobody holds it.
            del function, arguments, options
            raise _failure(error, self._driver) from error.with_traceback(None)

    def _pop(self) -> None:
        try:
            self._call(self._cuda.Context.pop)
        except DeviceError:
            # Popped for CUDA but not for pycuda, which ends the process if its own stack is not empty in the end.
            self._driver.cuCtxPushCurrent_v2(ctypes.c_void_p(self._context.handle))
            try:
                self._cuda.Context.pop()
            except self._cuda.Error:  # the device is lost
                self._closed = True
                self._context.detach()
            raise

    def _await_foreign(self, stream: int) -> None:
        """Somebody else's stream: pycuda has no object for it, so wait now; without a mark an event is passed."""
        code = int(self._driver.cuStreamSynchronize(ctypes.c_void_p(stream)))
        if code:
            raise failure("cuStreamSynchronize", code, _text(code, self._driver))

    def _pop_left_over(self) -> None:
        """The context that pycuda has released and left current."""
        current = ctypes.c_void_p()
        failed = self._driver.cuCtxGetCurrent(ctypes.byref(current))
        if failed or current.value == self._context.handle:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(current))


def _library() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise DeviceError(f"pycuda does not load ({error})", INSTALL) from error


def _first_device(cuda: Any) -> Device:
    try:
        cuda.init()
        device = cuda.Device(0)
        major, minor = device.compute_capability()
        version = cuda.get_driver_version()
        return Device(
            name=device.name(),
            architecture=f"sm{major}{minor}",
            driver=f"{version // 1000}.{version % 1000 // 10}",
            integrated=bool(device.get_attribute(cuda.device_attribute.INTEGRATED)),
            memory=int(device.total_memory()),
        )
    except cuda.Error as error:
        raise DeviceError(f"there is no NVIDIA GPU here, or no driver: {error}", "look at nvidia-smi") from error


def _failure(error: Exception, driver: ctypes.CDLL) -> DeviceError:
    """From "cuMemAlloc failed: out of memory", which is all that pycuda says; the code is found by the text."""
    call, _, text = str(error).partition(" failed: ")
    codes = {_text(code, driver): code for code in (OUT_OF_MEMORY, *LOST)}
    return failure(call, codes.get(text.split(" - ")[0], 0), text)


def _text(code: int, driver: ctypes.CDLL) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return (text.value or b"").decode()


def _bytes_at(address: int, size: int) -> Any:
    return (ctypes.c_byte * size).from_address(address)
