"""How much memory there is, and how much a process has: as Linux says it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "least_available", "memory_here", "resident_memory"]

PROC = Path("/proc")
KIBIBYTES = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
SHARE_KEPT, BYTES_KEPT = 0.05, 200_000_000
"""So much memory stays for the rest of the device: below it Linux begins to push out the programs that run."""


@dataclass(frozen=True)
class Memory:
    """Of the machine, in bytes; `available` is what programs can still take without pushing others out."""

    total: int
    available: int


def memory_here(proc: Path = PROC) -> Memory | None:
    """What /proc/meminfo says, None where it says nothing."""
    sizes = _sizes(proc / "meminfo")
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        return None
    return Memory(sizes["MemTotal"], sizes["MemAvailable"])


def least_available(memory: Memory) -> int:
    """Bytes that a build has to leave available: 5 % of the machine's, 200 MB at least."""
    return max(round(SHARE_KEPT * memory.total), BYTES_KEPT)


def resident_memory(process: int, proc: Path = PROC) -> int:
    """Bytes that a process has in memory; 0 if it has ended."""
    return _sizes(proc / str(process) / "status").get("VmRSS", 0)


def _sizes(path: Path) -> dict[str, int]:
    """Bytes by name."""
    try:
        return {name: int(size) << 10 for name, size in KIBIBYTES.findall(path.read_text())}
    except OSError:
        return {}
