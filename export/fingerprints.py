"""What identifies a network that somebody else's code built: its tensors, its structure, and the code that runs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgewright.runtime.errors import ModelError
from edgewright.runtime.files import sha256_of, sha256_of_file

__all__ = ["network_fingerprint"]

LIBRARIES = ("torch", "torchvision", "timm")  # known by their version
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def network_fingerprint(model: nn.Module, files: Iterable[Path], options: Mapping[str, Any]) -> str:
    """The SHA-256 of all that `model` computes with, the contents of `files`, and the options it was built with.

    Of the code these are the source files of its modules' classes; the libraries' classes count with their version.
    Raises `ModelError` if a tensor has no values yet.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    sources = {*files, *_source_files(classes)}
    words = [
        ADDRESS.sub("", str(model)),  # hyperparameters, of which no tensor tells
        json.dumps(options, sort_keys=True, default=str),
        *sorted(_versions(classes)),
        *sorted(sha256_of_file(file) for file in sources),
    ]
    return f"sha256:{sha256_of((*(word.encode() for word in words), *_tensor_bytes(model)))}"


def _source_files(classes: Iterable[type]) -> Iterator[Path]:
    for cls in classes:
        if _package(cls) in (*LIBRARIES, "builtins"):
            continue
        try:
            source = inspect.getsourcefile(cls)
        except (TypeError, OSError):  # made at run time
            continue
        if source is not None and Path(source).is_file():
            yield Path(source).resolve()


def _versions(classes: Iterable[type]) -> set[str]:
    used = {_package(cls) for cls in classes} & set(LIBRARIES)
    return {f"{package}-{metadata.version(package)}" for package in used}


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _tensor_bytes(model: nn.Module) -> Iterator[bytes]:
    values = {**dict(model.named_buffers()), **model.state_dict()}  # a state dict leaves some buffers out
    for name in sorted(values):
        value = values[name]
        if not isinstance(value, Tensor):  # a module's extra state
            yield f"{name} {value!r}".encode()
            continue
        if is_lazy(value):
            raise ModelError(f"{name} has no shape yet", "run the network once on an example in its factory")
        if value.is_meta:
            raise ModelError(f"{name} is on the meta device, without values", "give it weights in its factory")
        yield f"{name} {value.dtype} {list(value.shape)}".encode()
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
