"""A pytest plugin for tests on the host-memory CUDA driver, a fake: its ledger, our driver on it, and what it gives."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.runtime.cuda import CudaDriver, PinnedMemory, open_driver
from host_cuda import HostCuda, compiled

__all__ = ["PACKAGES", "SIZE", "Owned", "current_context", "is_installed", "pattern", "view"]

SIZE = 1024  # bytes
PACKAGES = {"cuda-python": "cuda.bindings", "pycuda": "pycuda"}
"""What each package is imported as."""
KERNEL = """
#include <stddef.h>
const size_t scale_params[] = {8, 4, 4, 0};
void scale(void **params, unsigned grid[3], unsigned block[3]) {
    float *values = *(float **)params[0];
    int count = *(int *)params[1];
    for (unsigned i = 0; i < grid[0] * block[0]; i++)
        if ((int)i < count) values[i] *= *(float *)params[2];
}
"""


@functools.cache
def is_installed(name: str) -> bool:
    """Whether one of the packages is installed."""
    try:
        return importlib.util.find_spec(PACKAGES[name]) is not None
    except ImportError:
        return False


def view(memory: PinnedMemory) -> NDArray[np.uint8]:
    """The memory as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * memory.size).from_address(memory.address))


def pattern(seed: int = 1) -> NDArray[np.uint8]:
    """As many random bytes as SIZE says."""
    return np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)


def current_context() -> int | None:
    """The context that is current in this thread, as the driver says."""
    context = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    return context.value


class Owned:
    """Gives what a driver has, and frees it in the other order, everything even if one fails."""

    def __init__(self, driver: CudaDriver, stack: ExitStack) -> None:
        self._driver, self._stack = driver, stack

    def stream(self) -> int:
        """A stream."""
        made = self._driver.create_stream()
        self._stack.callback(self._driver.destroy_stream, made)
        return made

    def event(self) -> int:
        """An event."""
        made = self._driver.create_event()
        self._stack.callback(self._driver.destroy_event, made)
        return made

    def device(self, size: int = SIZE) -> int:
        """Memory of the device."""
        made = self._driver.allocate(size)
        self._stack.callback(self._driver.free, made)
        return made

    def pinned(self, *, mapped: bool = False) -> PinnedMemory:
        """Page-locked memory."""
        made = self._driver.allocate_pinned(SIZE, mapped=mapped)
        self._stack.callback(self._driver.free_pinned, made)
        return made

    def module(self, image: bytes) -> int:
        """A module."""
        made = self._driver.load_module(image)
        self._stack.callback(self._driver.unload_module, made)
        return made


@pytest.fixture
def host_cuda() -> Iterator[HostCuda]:
    """The fake driver, as at its start; at the end nothing may be left or have been done wrong, unless it is reset."""
    cuda = HostCuda()
    cuda.reset()
    yield cuda
    cuda.assert_clean()


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    """Name of each of the two packages."""
    found: str = request.param
    if not is_installed(found):
        pytest.skip(f"{found} is not installed" + ("; make pycuda-wheel" if found == "pycuda" else ""))
    return found


@pytest.fixture
def driver(package: str, host_cuda: HostCuda) -> Iterator[CudaDriver]:
    """Opened, without its context being current."""
    opened = open_driver(package)
    yield opened
    opened.close()


@pytest.fixture
def owned(driver: CudaDriver) -> Iterator[Owned]:
    """What the test takes is freed at its end; the context is current."""
    with driver.current(), ExitStack() as stack:
        yield Owned(driver, stack)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A module with the kernel `scale(values, count, factor)`."""
    source = tmp_path_factory.mktemp("kernel") / "scale.c"
    source.write_text(KERNEL)
    return b"HOSTCUDA:" + bytes(compiled("scale.so", [source])) + b"\0"
