"""Tensors of other libraries, taken where they lie: DLPack, and CUDA's array interface.

DLPack: https://dmlc.github.io/dlpack/latest/c_api.html, https://dmlc.github.io/dlpack/latest/python_spec.html;
`__cuda_array_interface__`: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

__all__ = ["DeviceArray", "exchanged"]

T = TypeVar("T")

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
TYPE_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}  # DLDataTypeCode
FIRST_GPU = 0
MAKE_CONTIGUOUS = "make it contiguous first"


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array in the memory of the GPU, which belongs to somebody else.

    * stream: of the producer; what is in it now must be done before the array is read, None if nothing is to be awaited
    * owner: keeps the memory alive
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    owner: Any

    @property
    def nbytes(self) -> int:
        """Of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def release(self) -> None:
        """Tells the owner, if it wants to know, that the array is not used any more."""
        if isinstance(self.owner, _Taken):
            self.owner.release()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> DeviceArray:
        """Some images of the batch."""
        start, stop, _ = part.indices(len(self))
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, address=self.address + start * step, shape=(stop - start, *self.shape[1:]))


def exchanged(name: str, given: Any, stream: int | None) -> NDArray[Any] | DeviceArray:
    """The input `name` without a copy on the host: an array, or where its memory is on the GPU.

    `stream` is where a GPU's data will be read, None for an engine on the processor. What speaks neither protocol goes
    through `np.asarray`. Raises `InputError` if the data is on a device that does not fit, or is not contiguous there.
    """
    if hasattr(given, "__dlpack_device__"):
        kind, index = _answer(name, given.__dlpack_device__)
        if kind in (CPU, CUDA_HOST):
            return _answer(name, np.from_dlpack, given)
        if kind not in (CUDA, CUDA_MANAGED):
            raise InputError(
                f"input {name!r} lies on a device of DLPack's type {int(kind)}", "copy it to the processor"
            )
        return _of_dlpack(name, given, index, _reading(name, stream))
    if hasattr(given, "__cuda_array_interface__"):
        _reading(name, stream)
        return _of_interface(name, given)
    return np.asarray(given)


def _reading(name: str, stream: int | None) -> int:
    if stream is None:
        raise InputError(
            f"input {name!r} lies on the GPU, the engine takes it from the processor",
            "copy it there, such as by .cpu(), or open an engine of TensorRT",
        )
    return stream


def _answer(name: str, call: Callable[..., T], *arguments: Any) -> T:
    """What the call into another library gives. Raises `InputError` where that refuses."""
    try:
        return call(*arguments)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:  # a gradient, a type that numpy lacks
        raise InputError(f"input {name!r} cannot be taken over: {error}", "give it as a numpy array") from error


def _of_interface(name: str, given: Any) -> DeviceArray:
    content = given.__cuda_array_interface__
    shape, dtype = tuple(content["shape"]), np.dtype(content["typestr"])
    strides = content.get("strides")
    if content.get("mask") is not None:
        raise InputError(f"input {name!r} has a mask", "give the values alone")
    if strides is not None:
        _check_contiguous(name, shape, [stride / dtype.itemsize for stride in strides])
    return DeviceArray(content["data"][0], shape, dtype, content.get("stream"), given)


# --- DLPack's structures, dlpack.h ------------------------------------------------------------------------------------


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_ManagedTensor))
_ManagedTensor._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Taken:
    """A tensor whose producer is told when it is not used any more."""

    def __init__(self, capsule: Any) -> None:
        self.managed: Any = ctypes.cast(_pointer_of(capsule, UNUSED), ctypes.POINTER(_ManagedTensor))
        _rename(capsule, USED)  # from here on the deleter is ours to call

    def release(self) -> None:
        managed, self.managed = self.managed, None
        if managed and managed.contents.deleter:
            managed.contents.deleter(managed)

    def __del__(self) -> None:
        if hasattr(self, "managed"):
            self.release()


UNUSED, USED = b"dltensor", b"used_dltensor"
"""Names of a capsule; they must live as long as it does."""


def _of_dlpack(name: str, given: Any, index: int, stream: int) -> DeviceArray:
    if index != FIRST_GPU:
        raise InputError(f"input {name!r} lies on GPU {index}, the engine is on GPU {FIRST_GPU}", "copy it there")
    taken = _answer(name, lambda: _Taken(given.__dlpack__(stream=stream)))
    try:
        return _device_array(name, taken)
    except InputError:
        taken.release()  # now, not when somebody lets go of the error
        raise


def _device_array(name: str, taken: _Taken) -> DeviceArray:
    tensor = taken.managed.contents.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        _check_contiguous(name, shape, tensor.strides[: tensor.ndim])
    dtype = _dtype_of(name, tensor.dtype)
    return DeviceArray((tensor.data or 0) + tensor.byte_offset, shape, dtype, None, taken)


def _dtype_of(name: str, kind: _DataType) -> np.dtype[Any]:
    word = TYPE_CODES.get(kind.code, f"type {kind.code} of DLPack with ")
    try:
        if kind.lanes == 1:
            return np.dtype("bool" if word == "bool" else f"{word}{kind.bits}")
    except TypeError:
        pass
    raise InputError(f"input {name!r} is {word}{kind.bits}, expected a type that numpy has", "convert it first")


def _check_contiguous(name: str, shape: Sequence[int], strides: Sequence[float]) -> None:
    """Row by row without gaps; `strides` are counted in elements, those of axes of length 1 mean nothing."""
    step = 1
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side != 1 and stride != step:
            raise InputError(f"input {name!r} is not contiguous on the GPU", MAKE_CONTIGUOUS)
        step *= side


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
