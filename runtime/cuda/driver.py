"""What the runtime needs of CUDA's driver, as one interface; cuda-python and pycuda are behind it.

Addresses, streams, events, graphs, modules and functions are plain integers here, as in C; what a package wraps them
in stays with the implementation. Each call that fails raises `DeviceError` or one of its kinds, with the driver's text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from ctypes import _SimpleCData
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import DeviceError

__all__ = ["CudaDriver", "Device", "PinnedMemory"]


@dataclass(frozen=True)
class Device:
    """A GPU, the first one that CUDA sees.

    * name: such as "Orin"; architecture: "sm87" for compute capability 8.7
    * driver: the newest CUDA version that the driver supports, "12.6"
    * integrated: it shares the memory of the processor, as on a Jetson
    * memory: of the device, in bytes
    """

    name: str
    architecture: str
    driver: str
    integrated: bool
    memory: int


@dataclass(frozen=True)
class PinnedMemory:
    """Page-locked memory of the host.

    * address: for the host; device_address: for kernels, 0 if the memory is not mapped
    * size: in bytes
    """

    address: int
    device_address: int
    size: int


class CudaDriver(ABC):
    """The device's primary context, which TensorRT and torch use too. Close it when all that it gave is freed.

    * name: of the package behind it; captures: whether it can capture CUDA graphs
    * device: what it runs on

    Calls need the context to be current in the calling thread: make them inside `with driver.current()`.
    """

    name: ClassVar[str]
    captures: ClassVar[bool]
    device: Device

    @classmethod
    @abstractmethod
    def open(cls) -> CudaDriver:
        """Retains the primary context. Raises `DeviceError` if the package, a driver or a GPU is missing."""

    @classmethod
    @abstractmethod
    def find_device(cls) -> Device:
        """What `open` would run on, without a context on it. Raises `DeviceError` as `open` does."""

    @abstractmethod
    def close(self) -> None:
        """Releases the primary context; closing twice does nothing. Not inside `current()`."""

    @abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Makes the context current in this thread; at the end the one before it is so again.

        Raises `ClosedError` if the driver is closed.
        """

    @abstractmethod
    def memory_info(self) -> tuple[int, int]:
        """Free and total memory of the device, in bytes."""

    @abstractmethod
    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory. Raises `DeviceMemoryError` if there is no room."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Frees what `allocate` gave."""

    @abstractmethod
    def allocate_pinned(self, size: int, *, mapped: bool = False) -> PinnedMemory:
        """Page-locked host memory; `mapped` gives it an address for kernels too (zero-copy)."""

    @abstractmethod
    def free_pinned(self, memory: PinnedMemory) -> None:
        """Frees what `allocate_pinned` gave."""

    @abstractmethod
    def create_stream(self) -> int:
        """An own queue, which does not wait for the default stream."""

    @abstractmethod
    def destroy_stream(self, stream: int) -> None:
        """Frees the stream."""

    @abstractmethod
    def synchronize(self, stream: int) -> None:
        """Waits until the stream is done. Raises what went wrong in it."""

    @abstractmethod
    def create_event(self) -> int:
        """A mark in a stream, which keeps its time."""

    @abstractmethod
    def destroy_event(self, event: int) -> None:
        """Frees the event."""

    @abstractmethod
    def record(self, event: int, stream: int) -> None:
        """Sets the mark behind what is in the stream now; an earlier mark of this event is forgotten."""

    @abstractmethod
    def wait(self, stream: int, event: int) -> None:
        """Lets what comes later in `stream` wait for the mark; does not wait itself."""

    @abstractmethod
    def synchronize_event(self, event: int) -> None:
        """Waits until the mark is passed."""

    @abstractmethod
    def elapsed(self, start: int, end: int) -> float:
        """Milliseconds between two marks that are passed."""

    @abstractmethod
    def copy_to_device(self, target: int, source: int, size: int, stream: int) -> None:
        """Copies `size` bytes from the host in the stream; `source` is pinned, or the call waits."""

    @abstractmethod
    def copy_to_host(self, target: int, source: int, size: int, stream: int) -> None:
        """Copies `size` bytes to the host in the stream; `target` is pinned, or the call waits."""

    @abstractmethod
    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        """Copies `size` bytes within the device in the stream."""

    @abstractmethod
    def begin_capture(self, stream: int) -> None:
        """From here on the stream's work is noted, not done. Raises `DeviceError` where `captures` is False."""

    @abstractmethod
    def end_capture(self, stream: int) -> int:
        """What was noted, as a graph that can be launched. The capture is over even if this raises."""

    def captured(self, stream: int, enqueue: Callable[[], None]) -> int:
        """What `enqueue` puts into the stream, as a graph; if it raises, the capture is over and nothing is left."""
        self.begin_capture(stream)
        try:
            enqueue()
        except BaseException:
            with suppress(DeviceError):
                self.destroy_graph(self.end_capture(stream))
            raise
        return self.end_capture(stream)

    @abstractmethod
    def launch_graph(self, graph: int, stream: int) -> None:
        """Does what was noted, in the stream."""

    @abstractmethod
    def destroy_graph(self, graph: int) -> None:
        """Frees the graph."""

    @abstractmethod
    def load_module(self, image: bytes) -> int:
        """Loads compiled kernels: a cubin, or PTX."""

    @abstractmethod
    def unload_module(self, module: int) -> None:
        """Frees the module and its functions."""

    @abstractmethod
    def function(self, module: int, name: str) -> int:
        """The kernel of that name."""

    @abstractmethod
    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[_SimpleCData[Any]],
        stream: int,
    ) -> None:
        """Runs a kernel in the stream; `arguments` are ctypes values, in the order of its parameters."""
