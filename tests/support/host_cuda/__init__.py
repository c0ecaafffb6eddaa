"""A CUDA driver on ordinary memory, a fake: `libcuda.so.1`, compiled from the C files here, and its ledger.

Tests marked `host_cuda` run in a process of their own that finds it in place of NVIDIA's; see `own_process`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["COMPILER", "HostCuda", "compiled", "library_folder"]

COMPILER = shutil.which("cc") or shutil.which("gcc")
SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O1", "-g", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")


def library_folder() -> Path:
    """Folder with the fake `libcuda.so.1`, for LD_LIBRARY_PATH; compiled once for each state of its sources."""
    sources = sorted(SOURCES.glob("*.c"))
    options = ("-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-pthread", "-ldl")
    return compiled("libcuda.so.1", sources, *options, headers=(SOURCES / "hostcuda.h",)).parent


def compiled(name: str, sources: list[Path], *options: str, headers: tuple[Path, ...] = ()) -> Path:
    """A shared library of C sources, in a temporary folder that is named by their hash; made if it is not there."""
    digest = hashlib.sha256(" ".join(options).encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"edgewright-tests-{os.getuid()}-{digest.hexdigest()[:16]}"
    if not (folder / name).is_file():
        assert COMPILER is not None
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            command = [COMPILER, *FLAGS, "-o", str(made), *map(str, sources), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
            made.replace(folder / name)
    return folder / name


class HostCuda:
    """The ledger of the fake driver that this process has loaded, and what can be made to go wrong in it.

    Kinds of objects: "context", "device", "pinned" (memory), "stream", "event", "graph", "exec", "module".
    """

    def __init__(self) -> None:
        self._library = _library()

    def reset(self) -> None:
        """Everything as at the start: one device sm87 of 1 GiB, CUDA 13.0, no object, no misuse, no planned failure."""
        self._library.hostcuda_reset()

    def live(self, kind: str = "") -> int:
        """As many objects that are not freed, of one kind or of all."""
        count = int(self._library.hostcuda_live(kind.encode()))
        assert count >= 0, f"no such kind: {kind}"
        return count

    def total_calls(self) -> int:
        """As many calls of the driver since the reset."""
        return int(self._library.hostcuda_total_calls())

    def calls(self, name: str) -> int:
        """As many calls of one function, "cuMemAlloc", since the reset."""
        return int(self._library.hostcuda_calls(name.encode()))

    def pageable_copies(self) -> int:
        """As many asynchronous copies that had to wait, as the memory of the host was not page-locked."""
        return int(self._library.hostcuda_pageable_copies())

    @property
    def misuse(self) -> list[str]:
        """What callers did wrong since the reset, the first 64."""
        count = self._library.hostcuda_misuses()
        return [self._library.hostcuda_misuse(number).decode() for number in range(min(count, 64))]

    def forgive(self) -> None:
        """Forgets what was done wrong."""
        self._library.hostcuda_forgive()

    def assert_clean(self) -> None:
        """Nothing was done wrong, and nothing is left."""
        kinds = ("context", "device", "pinned", "stream", "event", "graph", "exec", "module")
        left = {kind: self.live(kind) for kind in kinds if self.live(kind)}
        assert not self.misuse, f"misuse of the CUDA driver: {self.misuse}"
        assert not left, f"not freed: {left}"

    def fail_call(self, k: int, code: int) -> None:
        """The k-th call from now, from 1 on, fails with the code; codes of a lost device stay until the reset.

        What frees, pops, ends a capture or waits does so and then returns the code; all else does nothing.
        """
        self._library.hostcuda_fail_call(k, code)

    def fail_named(self, name: str, code: int, times: int = 1) -> None:
        """The next calls of one function fail."""
        self._library.hostcuda_fail_named(name.encode(), times, code)

    def set_devices(self, count: int) -> None:
        """As many devices are there from now on."""
        self._library.hostcuda_set_devices(count)

    def set_device(self, capability: tuple[int, int] = (8, 7), integrated: bool = False, memory: int = 1 << 30) -> None:
        """What the device is; `memory` in bytes."""
        self._library.hostcuda_set_device(*capability, int(integrated), ctypes.c_size_t(memory))

    def set_driver_version(self, version: int) -> None:
        """12060 for CUDA 12.6."""
        self._library.hostcuda_set_driver_version(version)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    assert hasattr(library, "hostcuda_reset"), "this is not the fake driver; is the test marked host_cuda?"
    library.hostcuda_misuse.restype = ctypes.c_char_p
    library.hostcuda_total_calls.restype = library.hostcuda_calls.restype = ctypes.c_long
    library.hostcuda_pageable_copies.restype = ctypes.c_long
    library.hostcuda_fail_call.argtypes = (ctypes.c_long, ctypes.c_int)
    library.hostcuda_fail_named.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
    return library
