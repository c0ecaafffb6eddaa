"""The kernel of resize.cu on the processor: compiled by the system's C compiler instead of NVRTC."""

from __future__ import annotations

from pathlib import Path

from edgewright.runtime.cuda.resize_kernel import SOURCE
from host_cuda import compiled

__all__ = ["host_cubin"]

SHIM = Path(__file__).with_suffix(".c")


def host_cubin(source: str, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """In place of `cubin`, for the host-memory CUDA driver: there the image of a module is the path of a library."""
    assert source == SOURCE.read_text()
    options = [*(f"-D{define}" for define in defines), f'-DRESIZE_CU="{SOURCE}"', "-O2", "-Wno-sign-compare"]
    library = compiled("resize.so", [SHIM], *options, headers=(SOURCE,))
    return f"HOSTCUDA:{library}\0".encode()
