"""A network that takes seconds from PyTorch to engines, its images, and the command line with it in the registry.

As a script (`python tests/support/tiny_network.py engine tiny …`) it is the `edgewright` command for subprocess tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from edgewright import report_files
from edgewright.export.entries import ModelEntry, Task, Weights
from edgewright.export.models import MODELS
from edgewright.int8 import Int8Graphs, Placed
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LABELS", "TINY_MODELS", "place_by_rules", "report_in_short", "write_images"]

LABELS = ("red", "green", "blue", "grey")
SIDE = 16  # pixels
PREPROCESS = Preprocess((SIDE, SIDE), None, (0.5,) * 3, (0.25,) * 3)
GRAY_PREPROCESS = Preprocess((SIDE, SIDE), None, (0.5,), (0.25,), colour="L")
DIM_PREPROCESS = Preprocess((SIDE, SIDE), None, (0.4,) * 3, (0.25,) * 3)


def _entry(channels: int, weights: Mapping[str, Weights], *, linear: bool = False) -> ModelEntry:
    def build(classes: int) -> nn.Module:
        from tiny_modules import TinyNetwork

        return TinyNetwork(channels, classes, linear=linear)

    return ModelEntry("a tiny network for tests", build, weights["default"].task, weights)


def _weights(seed: int, preprocess: Preprocess) -> Weights:
    def load(model: nn.Module) -> None:
        from tiny_modules import randomize

        randomize(model, seed)

    task = Task(len(LABELS), preprocess, LABELS)
    return Weights(f"seed {seed}", task, load, lambda: f"seed:{seed}:{preprocess.colour}", "shipped")


TINY_MODELS = {
    "tiny": _entry(
        3,
        {
            "default": _weights(3, PREPROCESS),
            "other": _weights(2, PREPROCESS),
            "dim": _weights(3, DIM_PREPROCESS),  # the same weights behind another preprocessing
        },
    ),
    "tiny_linear": _entry(3, {"default": _weights(3, PREPROCESS)}, linear=True),
    "tiny_gray": _entry(1, {"default": _weights(1, GRAY_PREPROCESS)}),
}


def write_images(folder: Path, count: int, seed: int) -> list[Path]:
    """`count` seeded PNGs of noise around a random colour, so that their predictions differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        colour = rng.uniform(0, 255, 3)
        pixels = np.clip(rng.normal(colour, 60.0, (20, 18, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{index:03}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def place_by_rules(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Has INT8 wherever it can be, unless a test asks for it measured by setting this back."""
    set_attribute(Int8Graphs, "placed", lambda graphs, dialect: Placed({}, "fp32"))


def report_in_short(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Leaves out of a report what only explains it, which takes seconds; `tests/test_report_files.py` sets it back."""
    set_attribute(report_files, "evidence_of", lambda pipeline, outcome: {})
    set_attribute(report_files, "write_pages", lambda pipeline, document: None)


def _main() -> None:
    """The command, told by the environment to kill itself in a stage, or to say which modules it imported."""
    from edgewright import cli

    MODELS.update(TINY_MODELS)
    place_by_rules(setattr)
    if "TINY_WHOLE_REPORT" not in os.environ:
        report_in_short(setattr)
    if "TINY_KILL_IN" in os.environ:
        _kill_in(os.environ["TINY_KILL_IN"])
    if "TINY_READY" in os.environ:
        print("ready", file=sys.stderr, flush=True)
    try:
        cli.main()
    finally:
        if "TINY_MODULES_TO" in os.environ:
            Path(os.environ["TINY_MODULES_TO"]).write_text(json.dumps(sorted(sys.modules)))


def _kill_in(stage: str) -> None:
    """SIGKILL as soon as `stage` has written a temporary file and is about to rename it."""
    from edgewright.workspace import Workspace

    make_stage, replace = Workspace.stage, os.replace
    current = ""

    def noticed(self: Workspace, name: str, *arguments: Any) -> Any:
        nonlocal current
        current = name
        return make_stage(self, name, *arguments)

    def deadly(source: Any, target: Any) -> None:
        if current == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    setattr(Workspace, "stage", noticed)  # noqa: B010 - mypy refuses the plain assignment
    setattr(os, "replace", deadly)  # noqa: B010


if __name__ == "__main__":
    _main()
