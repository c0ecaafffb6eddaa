"""Keeps the C library from handing memory back to the kernel between two operations of PyTorch."""

from __future__ import annotations

import ctypes
import functools
import platform

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """For the rest of this process; whether the C library knows how (glibc does).

    glibc takes each block beyond 32 MB from the kernel and gives it back when it is freed, so that every large
    activation is paged in again. For EfficientNet-B0 at batch 128 that was a third of the reference's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))
