"""What a report stands on, so that somebody else can repeat it: hashes, versions, the machine, options, the command."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.workspace import library_versions, machine

if TYPE_CHECKING:
    from edgewright.pipeline import Options, Pipeline

__all__ = ["command_line", "provenance_of"]

LIBRARIES = (
    *("edgewright", "torch", "torchvision", "timm", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *("openvino", "tensorrt", "tensorrt-rtx", "numpy", "pillow"),
)
ONLY_PRINTS = ("--json",)
"""Arguments that change nothing but what is printed."""


def provenance_of(pipeline: Pipeline, arguments: Sequence[str]) -> dict[str, Any]:
    """The field "provenance" of `edgewright.engine/1`; `arguments` are those of the command line.

    `made` is the only value that differs when the same is run again on the same machine.
    """
    context = pipeline.context
    images = pipeline.graphs.evaluation_images
    versions = dict(each.rsplit(" ", 1) for each in library_versions(*LIBRARIES).split(", "))
    return {
        "command": command_line(arguments),
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "weights": context.source.fingerprint,
        "graph": pipeline.folded.sha256,
        "evaluation": {"name": images.name, "identity": images.identity, "images": len(images)},
        "options": _plain(context.options) | {"gates": context.options.limits, "budget": context.options.budget},
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command that repeats a run, quoted for a shell."""
    return shlex.join(["edgewright", *(word for word in arguments if word not in ONLY_PRINTS)])


def _plain(options: Options) -> dict[str, Any]:
    content = dataclasses.asdict(options)
    return {
        name: str(value) if isinstance(value, Path) else json.loads(json.dumps(value, default=str))
        for name, value in content.items()
    }
