"""Python files as a person writes them, and the sources that their factories give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgewright.export.factories import factory_source
from edgewright.export.resolve import ModelRequest

__all__ = ["SOURCE", "Written", "source_of", "write_factory"]

SOURCE = """
from torch import nn
from edgewright.export.entries import ModelSource
from edgewright.runtime.preprocess import Preprocess
GREY = Preprocess((4, 4), None, (0.5,), (0.5,), colour="L")
def net(classes=3): return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
"""

Written = Callable[..., Path]


def write_factory(folder: Path, lines: str, name: str = "net.py") -> Path:
    """Writes `name`: what most need, and the lines that are given."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SOURCE + lines)
    return path


def source_of(model: object, weights: str = "default", **options: Any) -> Any:
    return factory_source(ModelRequest(str(model), weights, options))
