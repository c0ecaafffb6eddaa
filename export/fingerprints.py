"""What identifies a network that somebody else's code built: its tensors, its structure, and the code that runs.

What forward() takes from a closure, a global or the environment is in none of them; its outputs on a seeded input show
most of that.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgewright.export.entries import InputShape
from edgewright.export.user_code import LIBRARIES
from edgewright.runtime.errors import ModelError
from edgewright.runtime.files import sha256_of, sha256_of_file

__all__ = ["network_fingerprint"]

ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)
OUTPUT_SEED = 22
OUTPUT_BATCH = 2
INTERNAL = frozenset(vars(nn.Module()))
HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # of what is internal, these compute


def network_fingerprint(
    model: nn.Module, code: Mapping[str, Path], options: Mapping[str, Any], input_shape: InputShape | None = None
) -> str:
    """The SHA-256 of all that `model` computes with, its outputs, the source files of `code`, and the options.

    What it computes with are the tensors, plain attributes and forward hooks of its modules, and the source files of
    their classes; the libraries' classes count with their version. The outputs, on a seeded `[2, C, H, W]`, count where
    the input shape is known and they can be computed; the export says why where they cannot.

    `model` is left on the CPU and in evaluation mode. Raises `ModelError` if a tensor has no values yet.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    sources = {*code.values(), *_source_files(classes)}
    words = [
        ADDRESS.sub("", str(model)),  # hyperparameters, of which no tensor tells
        json.dumps(options, sort_keys=True, default=str),
        *sorted(_versions(classes)),
        *sorted(sha256_of_file(file) for file in sources),
    ]
    network = (*(word.encode() for word in words), *_Contents(frozenset(code)).of_module(model))
    return f"sha256:{sha256_of((*network, *_output_bytes(model, input_shape)))}"


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


@dataclass
class _Contents:
    """Bytes that are the same for equal values in every process, so without addresses and the order of sets.

    * own: names of a person's own modules; of their objects the attributes count, of others what repr() says
    * seen: what has been visited, by its id, with its number; values may contain themselves
    """

    own: frozenset[str]
    seen: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def of_module(self, module: nn.Module) -> Iterator[bytes]:
        """Of its tensors, then of the plain attributes and hooks of each module in it."""
        values = {**dict(module.named_buffers()), **module.state_dict()}  # a state dict leaves some buffers out
        for name in sorted(values):
            yield f"{name} ".encode()
            yield from _tensor_bytes(name, values[name]) if isinstance(values[name], Tensor) else self.of(values[name])
        for name, part in module.named_modules():
            self.seen[id(part)] = len(self.seen), part
            plain = {word: value for word, value in vars(part).items() if word not in INTERNAL}
            hooks = {word: list(vars(part)[word].values()) for word in HOOKS if vars(part).get(word)}
            if plain or hooks:
                yield f"{name} {len(plain)} {len(hooks)} ".encode()
                yield from self._of_items({**plain, **hooks})

    def of(self, value: Any) -> Iterator[bytes]:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            yield from _text(value)
        elif id(value) in self.seen:
            yield f"again {self.seen[id(value)][0]} ".encode()
        else:
            self.seen[id(value)] = len(self.seen), value  # held: the id of what is gone is given away again
            yield f"{self._type_word(value)} ".encode()
            yield from self._of_new(value)

    def _of_new(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, Tensor):
            yield from _tensor_bytes("an attribute", value)
        elif isinstance(value, nn.Module):
            yield from self.of_module(value)
        elif isinstance(value, np.ndarray):
            yield f"{value.dtype} {value.shape} ".encode()
            yield from self.of(value.tolist()) if value.dtype.hasobject else (value.tobytes(),)
        elif isinstance(value, Mapping):
            yield from self._of_items(value)
        elif isinstance(value, Set):
            yield from sorted(b"".join(_Contents(self.own).of(item)) for item in value)
        elif isinstance(value, Sequence):
            yield f"{len(value)} ".encode()
            for item in value:
                yield from self.of(item)
        elif callable(value) and not isinstance(value, type) and not self._is_own(type(value)):
            yield from self._of_function(value)
        elif self._is_own(type(value)) and hasattr(value, "__dict__"):
            yield from self._of_items(vars(value))
        else:
            yield from _text(value)

    def _of_items(self, items: Mapping[Any, Any]) -> Iterator[bytes]:
        yield f"{len(items)} ".encode()
        for key, value in items.items():
            yield from self.of(key)
            yield from self.of(value)

    def _of_function(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, partial):
            yield from self.of((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield from self.of((value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            yield value.__qualname__.encode()
            yield from _code_bytes(value.__code__)
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            yield from self.of((value.__defaults__, value.__kwdefaults__, cells))
        else:
            yield from _text(value)

    def _is_own(self, cls: type) -> bool:
        return cls.__module__ in self.own

    def _type_word(self, value: Any) -> str:
        cls = type(value)
        return cls.__qualname__ if self._is_own(cls) else f"{cls.__module__}.{cls.__qualname__}"


def _text(value: Any) -> Iterator[bytes]:
    """What repr() says, if that is not an address."""
    word = repr(value)
    if not isinstance(value, str | bytes) and ADDRESS.search(word):
        word = getattr(value, "__qualname__", "")
    yield f"{type(value).__qualname__} {len(word)} {word} ".encode()


def _code_bytes(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames)).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_bytes(constant)
        else:
            yield from _text(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # the only way to know
    except ValueError:
        return False
    return True


def _tensor_bytes(name: str, value: Tensor) -> Iterator[bytes]:
    if is_lazy(value):
        raise ModelError(f"{name} has no shape yet", "run the network once on an example in its factory")
    if value.is_meta:
        raise ModelError(f"{name} is on the meta device, without values", "give it weights in its factory")
    yield f"{value.dtype} {list(value.shape)} ".encode()
    dense = value.detach().cpu().to_dense() if value.layout is not torch.strided else value.detach().cpu()
    yield dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def _output_bytes(model: nn.Module, input_shape: InputShape | None) -> Iterator[bytes]:
    """The outputs on a seeded input, rounded to bfloat16: not bit by bit equal from one processor to the next."""
    model.cpu().eval()
    if input_shape is None:
        return
    try:
        # forward() may keep what it computes; parameters are too many to be copied, and do not change.
        trial = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        with _reproducible(), torch.no_grad():
            outputs = trial(torch.randn((OUTPUT_BATCH, *input_shape)))
            rounded = outputs.to(torch.bfloat16)
    except Exception:  # whatever the person's code raises
        return
    yield from _tensor_bytes("the output", rounded)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Seeded, and on one thread: more of them add up in another order, which rounding hides mostly, not always."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters comes again at the export
            torch.manual_seed(OUTPUT_SEED)
            yield
    finally:
        torch.set_num_threads(threads)
