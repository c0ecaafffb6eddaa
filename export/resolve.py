"""From what a person writes to a network: `resolve("resnet18")`, `resolve("net.py:make")`, `resolve("net.onnx")`.

NAME                     a network of the registry
torchvision:NAME         any classifier of torchvision
timm:NAME                any classifier of timm
path/to/file.py:factory  a function in a file; the file is run, as `python file.py` would run it
package.module:factory   a function in an installed module
path/to/file.onnx        an existing graph; its FP32 is the reference
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.export.completion import Completion, completed
from edgewright.export.conventions import first_line
from edgewright.export.entries import Labels, ModelEntry, ModelSource, Task
from edgewright.export.models import entry_named
from edgewright.runtime.errors import ModelError
from edgewright.runtime.files import sha256_of, sha256_of_file

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RANDOM_SEED", "ModelRequest", "folder_name", "resolve"]

RANDOM_SEED = 0
RESERVED_OPTIONS = ("weights", "pretrained", "num_classes", "classes", "progress", "checkpoint_path")
PATH_LETTERS = 6
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class ModelRequest:
    """What a person says about the network of a run.

    * model: one of the forms above
    * weights: "default", another name of the entry, "random" or a file
    * options: keyword arguments of the network's builder
    * completion: what the network does not say of itself
    * already_quantized: "refuse" a graph that is, or "pass" it on as it is
    """

    model: str
    weights: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    completion: Completion = field(default_factory=Completion)
    already_quantized: str = "refuse"


def folder_name(model: str) -> str:
    """A name for the build folder: "resnet18", "timm-resnet18", "net-make-1f3a9c" for "models/net.py:make".

    Files are told apart by where they are: the last six letters are those of the hash of the whole path.
    """
    place, _, factory = model.rpartition(":") if ":" in model else (model, "", "")
    words = [place, factory]
    if is_file(place):
        path = Path(place)
        words = [path.stem.strip("."), factory, sha256_of(str(path.resolve()).encode())[:PATH_LETTERS]]
    return re.sub(r"[^\w.-]+", "-", "-".join(word for word in words if word))


def is_file(place: str) -> bool:
    """Whether that is the path of a Python file or a graph, not a name."""
    return place.lower().endswith((".py", ".onnx"))


def resolve(request: ModelRequest | str) -> ModelSource:
    """The source that `request` asks for, completed. What is still missing is None.

    Raises `ModelError` for an unknown network (with the nearest names), unknown weights or options, a factory that
    gives no module, or a file that is no graph.
    """
    if isinstance(request, str):
        request = ModelRequest(request)
    return completed(_source(request), request.completion)


def _source(request: ModelRequest) -> ModelSource:
    model = request.model
    if model.lower().endswith(".onnx"):
        from edgewright.export.from_onnx import onnx_source

        return onnx_source(request)
    kind, colon, name = model.partition(":")
    if not colon and not is_file(model):
        if Path(model).suffix in CHECKPOINT_SUFFIXES:
            raise ModelError(f"{model} holds weights, not a network", f"name the network: NAME --weights {model}")
        return _entry_source(request, entry_named(model))
    if kind == "torchvision":
        from edgewright.export.torchvision_models import torchvision_entry

        return _entry_source(request, torchvision_entry(name))
    if kind == "timm":
        from edgewright.export.timm_models import timm_entry

        return _entry_source(request, timm_entry(name))
    from edgewright.export.factories import factory_source

    return factory_source(request)


def _entry_source(request: ModelRequest, entry: ModelEntry) -> ModelSource:
    weights = request.weights
    if weights == "random":
        return _random_source(request, entry)
    if weights in entry.weights:
        return _named_source(request, entry)
    if Path(weights).suffix in CHECKPOINT_SUFFIXES:
        return _file_source(request, entry, Path(weights))
    if weights == "default":
        trainable = f"train it (edgewright train {request.model}) and " if entry.task.data else ""
        raise ModelError(
            f"{request.model} has no weights of its own", f"{trainable}give --weights FILE, or --weights random"
        )
    known = ", ".join((*entry.weights, "random"))
    raise ModelError(
        f"{request.model} has no weights {weights!r}", f"there are {known}, or give a .safetensors or .pth file"
    )


def _named_source(request: ModelRequest, entry: ModelEntry) -> ModelSource:
    weights = entry.weights[request.weights]

    def load() -> nn.Module:
        model = _built(request, entry, weights.task.classes)
        weights.load(model)
        return model

    note = f"the weights were trained without {_in_words(request.options)}" if request.options else ""
    return _source_of_task(request, entry, weights.task, load, weights.summary, weights.fingerprint(), note)


def _random_source(request: ModelRequest, entry: ModelEntry) -> ModelSource:
    def build() -> nn.Module:
        import torch

        from edgewright.export.random_weights import disturb_statistics

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = _built(request, entry, entry.task.classes)
        shape = request.completion.input_shape or entry.task.preprocess.input_shape
        assert shape is not None, "the preprocessing of every entry has a fixed size"
        disturb_statistics(model, shape, RANDOM_SEED)
        return model

    summary = f"random (seed {RANDOM_SEED}): predictions mean nothing"
    fingerprint = f"random:{RANDOM_SEED}:torch-{metadata.version('torch')}"
    source = _source_of_task(request, entry, entry.task, build, summary, fingerprint, f"the weights are {summary}")
    return replace(source, trained=False)


def _file_source(request: ModelRequest, entry: ModelEntry, path: Path) -> ModelSource:
    from edgewright.export.released import fitting
    from edgewright.export.weights import head_names, load_into, read_checkpoint

    checkpoint = read_checkpoint(path)
    head = head_names(lambda classes: _built(request, entry, classes))
    if head and (head[0] not in checkpoint.state or checkpoint.state[head[0]].ndim < 2):
        raise ModelError(f"{path} has no matrix {head[0]}, the classifier's", f"give weights of {request.model}")
    classes = len(checkpoint.state[head[0]]) if head else entry.task.classes
    tasks = (entry.task, *(weights.task for weights in entry.weights.values()))
    like = next((task for task in tasks if task.classes == classes), None)
    labels = checkpoint.labels or (like.labels if like else None) or tuple(f"class {index}" for index in range(classes))
    if not callable(labels) and len(labels) != classes:
        raise ModelError(f"{path} names {len(labels)} labels for {classes} classes", "correct its metadata")

    def build() -> nn.Module:
        model = _built(request, entry, classes)
        load_into(model, fitting(checkpoint.state, model, entry.build), str(path))
        return model

    said = {"preprocessing": checkpoint.preprocess, "labels": checkpoint.labels}
    silent = " and ".join(word for word, value in said.items() if value is None)
    note = f"{path} does not state its {silent}: assumed are those of {request.model} with {classes} classes"
    shipped = like is not None and (checkpoint.labels is None or checkpoint.labels == _names(like))
    return ModelSource(
        build=build,
        preprocess=checkpoint.preprocess or (like.preprocess if like else None),
        labels=labels if head else (),
        name=request.model,
        weights=str(path),
        fingerprint=_with_options(f"sha256:{sha256_of_file(path)}", request),
        data=like.data if like and shipped else None,
        note=note if silent and like else "",
    )


def _source_of_task(
    request: ModelRequest,
    entry: ModelEntry,
    task: Task,
    build: Callable[[], nn.Module],
    weights: str,
    fingerprint: str,
    note: str = "",
) -> ModelSource:
    return ModelSource(
        build=build,
        preprocess=task.preprocess,
        labels=_labels(request, entry, task),
        name=request.model,
        weights=weights,
        fingerprint=_with_options(fingerprint, request),
        data=task.data,
        note=note,
    )


def _labels(request: ModelRequest, entry: ModelEntry, task: Task) -> Labels:
    """The task's, or none where an option leaves the classifier out."""
    if not request.options:
        return task.labels

    def names() -> tuple[str, ...]:
        from edgewright.export.weights import head_names

        return _names(task) if head_names(lambda classes: _built(request, entry, classes)) else ()

    return names


def _built(request: ModelRequest, entry: ModelEntry, classes: int) -> nn.Module:
    """The module with the options that were asked for. Raises `ModelError` if the builder does not take them."""
    if not request.options:
        return entry.build(classes)
    reserved = [name for name in request.options if name in RESERVED_OPTIONS]
    if reserved:
        raise ModelError(f"{reserved[0]} is no option of {request.model}", "--weights says which weights and classes")
    try:
        return entry.build(classes, **request.options)
    except ModelError:
        raise
    except Exception as error:  # builders of other libraries raise whatever they like
        raise ModelError(
            f"{request.model} cannot be built with {_in_words(request.options)}: {first_line(error)}",
            "see the network's definition for its options",
        ) from error


def _in_words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())


def _with_options(fingerprint: str, request: ModelRequest) -> str:
    return f"{fingerprint} {json.dumps(request.options, sort_keys=True)}" if request.options else fingerprint


def _names(task: Task) -> tuple[str, ...]:
    return tuple(task.labels() if callable(task.labels) else task.labels)
