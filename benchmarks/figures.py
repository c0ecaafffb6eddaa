"""What a benchmark gives: figures beside the bound that the project set itself."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROOT", "Figure", "photographs", "python_seconds", "run_python", "sample_folder"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """One measured number; `bound` is the most (or, with `at_least`, the least) it may be, None for a comparison."""

    name: str
    value: float
    unit: str
    bound: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the bound is kept; None where there is none."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def sample_folder() -> Path | None:
    """Labelled ImageNet photographs with `labels.csv`: $EDGEWRIGHT_SAMPLE, or beside the checkout; None if missing."""
    places = (os.environ.get("EDGEWRIGHT_SAMPLE"), ROOT.parent / "shared" / "data" / "imagenet-sample")
    return next((Path(place) for place in places if place and (Path(place) / "labels.csv").is_file()), None)


def photographs(count: int) -> NDArray[np.float32] | None:
    """The first `count` of them, preprocessed for 224 × 224 networks, `[N, 3, 224, 224]`; None if they are missing."""
    from edgewright.export.models import MODELS

    folder = sample_folder()
    if folder is None:
        return None
    with (folder / "labels.csv").open() as stream:
        files = [row["file"] for row in csv.DictReader(stream)][:count]
    return MODELS["efficientnet_lite0"].task.preprocess.batch([folder / file for file in files])


def run_python(code: str, *arguments: str) -> str:
    """Stdout of `code` in a fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def python_seconds(command: Sequence[str]) -> tuple[float, int]:
    """Wall seconds and exit code of a command whose output nobody needs."""
    import time

    began = time.perf_counter()
    result = subprocess.run(command, check=False, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began, result.returncode
