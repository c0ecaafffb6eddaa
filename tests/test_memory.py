"""What `keep_freed_memory` does to the C library, seen in page faults of a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from edgewright.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(64 << 20, np.uint8)  # 64 MiB: the first time it has to come from the kernel
before = faults()
for _ in range(4):
    np.ones(64 << 20, np.uint8)
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_large_blocks_are_paged_in_once() -> None:
    assert page_faults("kept") < page_faults("given back") / 4


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("loaded a library"))
    assert memory.keep_freed_memory.__wrapped__() is False
