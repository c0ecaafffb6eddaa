"""The machine a measurement was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from ..device.identity import processor
from ..device.probes import ROOT, jetson
from ..errors import EdgewrightError
from .results import Machine

__all__ = ["cores_here", "machine_here"]


def machine_here(root: Path = ROOT, *, gpu: bool = False) -> Machine:
    """The one we run on; its GPU is asked for only if `gpu`, since that may take a second."""
    board = jetson(root)
    return Machine(
        processor=processor(root / "proc/cpuinfo")[0],
        cores=cores_here(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        board="" if board is None else board.board,
        gpu=_gpu() if gpu else "",
    )


def cores_here() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu() -> str:
    from ..cuda import device_here

    try:
        device = device_here()
    except EdgewrightError:
        return ""
    return f"{device.name}, {device.architecture}"
