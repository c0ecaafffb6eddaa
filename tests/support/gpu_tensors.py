"""Tensors in the memory of the host-memory CUDA driver, lent as other libraries lend theirs: a fake of torch on a GPU.

Their data comes late: it is copied in a stream of their own, which has not begun when they are lent.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.cuda import open_driver
from edgewright.runtime.cuda.driver import CudaDriver

__all__ = ["DefaultStreamTensor", "DlpackTensor", "InterfaceTensor", "lent"]

GPU = 2  # kDLCUDA
OFFSET = 64  # bytes
LEGACY = 1  # CU_STREAM_LEGACY


class _DeviceTensor:
    """A copy of `array` on the device. `close` it inside `driver.current()`."""

    def __init__(self, driver: CudaDriver, array: NDArray[Any]) -> None:
        self.array = np.array(array, order="K")
        self._driver = driver
        self._lent: list[weakref.ref[NDArray[Any]]] = []
        self.address = driver.allocate(array.nbytes)
        self.stream = self._own_stream()
        self._event = driver.create_event()
        self._pinned = driver.allocate_pinned(array.nbytes)
        ctypes.memmove(self._pinned.address, self.array.ctypes.data, array.nbytes)
        driver.copy_to_device(self.address, self._pinned.address, array.nbytes, self.stream)

    def close(self) -> None:
        self._driver.synchronize(self.stream)
        self._driver.free(self.address)
        self._driver.free_pinned(self._pinned)
        self._driver.destroy_event(self._event)
        if self.stream != LEGACY:
            self._driver.destroy_stream(self.stream)

    def _own_stream(self) -> int:
        return self._driver.create_stream()


class DlpackTensor(_DeviceTensor):
    """Speaks DLPack: numpy's own capsule, with another device and address in it.

    * lent: how many capsules are out whose deleter was not called
    """

    device = (GPU, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        """The consumer's stream is made to wait, as the protocol asks of a producer.

        The data begins behind an offset; strides are left out every other time, if the data is contiguous.
        """
        assert stream is not None
        with self._driver.current():
            self._driver.record(self._event, self.stream)
            self._driver.wait(stream, self._event)
        lent = self.array.view()
        capsule = lent.__dlpack__()
        self._lent.append(weakref.ref(lent))
        place = _pointer_of(capsule, b"dltensor")
        ctypes.c_void_p.from_address(place).value = self.address - OFFSET  # DLTensor.data
        ctypes.c_int32.from_address(place + 8).value = self.device[0]
        ctypes.c_uint64.from_address(place + 40).value = OFFSET  # .byte_offset
        if lent.flags.c_contiguous and len(self._lent) % 2:
            ctypes.c_void_p.from_address(place + 32).value = None  # .strides
        return capsule

    @property
    def lent(self) -> int:
        return sum(reference() is not None for reference in self._lent)


class InterfaceTensor(_DeviceTensor):
    """Speaks CUDA's array interface, version 3."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        content = dict(self.array.__array_interface__)
        return {**content, "data": (self.address, False), "stream": self.stream, "version": 3}


class DefaultStreamTensor(InterfaceTensor):
    """Its data comes in CUDA's default stream, as that of most libraries does; the interface calls it 1."""

    def _own_stream(self) -> int:
        return LEGACY


@contextmanager
def lent(kind: type[_DeviceTensor] | None, array: NDArray[Any]) -> Iterator[Any]:
    """A tensor of another library on the same device, or None; at the end nobody may hold it any more."""
    if kind is None:
        yield None
        return
    owner = open_driver("cuda-python")
    with owner.current():
        tensor = kind(owner, array)
    yield tensor
    if isinstance(tensor, DlpackTensor):
        assert tensor.lent == 0
    with owner.current():
        tensor.close()
    owner.close()


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
