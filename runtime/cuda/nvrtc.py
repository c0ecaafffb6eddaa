"""CUDA source to machine code of one GPU architecture, with NVRTC, which needs no GPU; through cuda-python."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import DeviceError

__all__ = ["cubin"]

INSTALL = "pip install 'edgewright[cuda]' nvidia-cuda-nvrtc; on a Jetson NVRTC comes with JetPack's CUDA"


@functools.cache
def cubin(source: str, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """What `CudaDriver.load_module` takes, for an architecture such as "sm87"; compiled once per process.

    Nothing is kept on disk: code that is loaded from there would have to be authenticated first.
    Raises `DeviceError` if NVRTC is missing, does not know the architecture, or refuses the source.
    """
    nvrtc = _library()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"", 0, [], []))
    options = [
        f"--gpu-architecture={architecture.replace('sm', 'sm_')}",
        *(f"--define-macro={each}" for each in defines),
    ]
    try:
        with _locale_kept():
            return _compiled(nvrtc, program, options)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@contextmanager
def _locale_kept() -> Iterator[None]:
    """NVRTC of CUDA 12 leaves this thread in the locale "C", in which Python takes text files for ASCII."""
    if os.name != "posix":
        yield
        return
    select = ctypes.CDLL(None).uselocale  # POSIX.1-2008; gives the one before, and changes nothing for NULL
    select.restype, select.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = select(None)
    try:
        yield
    finally:
        select(before)


def _compiled(nvrtc: Any, program: Any, options: Sequence[str]) -> bytes:
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        said = " ".join(log.rstrip(b"\0").decode(errors="replace").split())
        raise DeviceError(f"NVRTC cannot compile for {options[0].partition('=')[2]}: {said}", _version(nvrtc))
    code = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def _library() -> Any:
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()  # loads NVRTC itself
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DeviceError(f"NVRTC, which compiles for the GPU, is not here: {reason}", INSTALL) from error
    return nvrtc


def _version(nvrtc: Any) -> str:
    _, major, minor = nvrtc.nvrtcVersion()
    return f"NVRTC here is of CUDA {major}.{minor}; take that of the driver"


def _checked(nvrtc: Any, returned: tuple[Any, ...]) -> Any:
    """The value of a call that returned (status, value), or (status,)."""
    status, *values = returned
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None
