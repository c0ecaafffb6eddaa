"""A network from a person's own function: `path/to/file.py:factory` or `package.module:factory`.

    def tiny(classes=10):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))

The function (a class is one too) is called once, with the options of the request, and returns an `nn.Module`, or a
`ModelSource` that also says what images it takes and what its classes are called. Running it is running code: only name
files that you would run yourself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.export.entries import ModelSource
from edgewright.export.resolve import CHECKPOINT_SUFFIXES, RANDOM_SEED, ModelRequest
from edgewright.export.user_code import Place, UserCode, attempted, imported, modules_in, place_of
from edgewright.runtime.errors import ModelError
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["factory_source"]

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def factory_source(request: ModelRequest) -> ModelSource:
    """The source that the factory of `request` gives; its module is built here, once.

    PyTorch's random numbers are seeded for the call, so that a factory without trained weights gives the same network
    each time. What the factory does not say of preprocessing, input shape and labels is None. The fingerprint is that
    of the tensors, of the options, and of the source files of the network's classes, of the factory and of what it
    imported from its own folder.

    Raises `ModelError` if the code cannot be found or imported, does not take the options, raises, or gives no
    network; and for weights other than a file, which has to fit what the factory gives.
    """
    checkpoint = _weights_file(request)
    place = place_of(request.model)
    with _seeded(), imported(place) as code:
        _check_callable(place, code.value)
        _check_options(place, code.value, request.options)
        given = _called(place, code.value, request.options)
        model = _module(place, given)
        files = _files(place, code)
    if checkpoint is not None:
        given = _with_weights(given, model, checkpoint)
    return _described(request, place, given, model, files)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seeds PyTorch's random numbers, and leaves them as they were."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        yield


def _weights_file(request: ModelRequest) -> Path | None:
    if request.weights == "default":
        return None
    if Path(request.weights).suffix in CHECKPOINT_SUFFIXES:
        return Path(request.weights)
    raise ModelError(
        f"the weights of {request.model} are what the factory gives, not {request.weights!r}",
        "leave --weights out, or give a .safetensors or .pth file",
    )


def _check_callable(place: Place, value: Any) -> None:
    from torch import nn

    if isinstance(value, nn.Module):
        raise ModelError(
            f"{place.name} in {place} is a network already, expected a function that gives one",
            f"write one that returns {place.name}",
        )
    if not callable(value):
        raise ModelError(f"{place.name} in {place} is a {type(value).__name__}", "name a function that gives a network")


def _check_options(place: Place, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a builtin tells nothing about itself; the call will
        return
    known = [parameter.name for parameter in parameters if parameter.kind in NAMED]
    unknown = [name for name in options if name not in known]
    if unknown and not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ModelError(f"{place.name} in {place} takes no option {unknown[0]}", takes)
    needed = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    nameless = [parameter.name for parameter in needed if parameter.kind is inspect.Parameter.POSITIONAL_ONLY]
    if nameless:
        raise ModelError(
            f"{place.name} in {place} needs the positional argument {nameless[0]}", "let it be given by its name"
        )
    missing = [parameter.name for parameter in needed if parameter.kind in NAMED and parameter.name not in options]
    if missing:
        remedy = " ".join(f"--option {name}=VALUE" for name in missing)
        raise ModelError(f"{place.name} in {place} needs arguments: {', '.join(missing)}", f"give {remedy}")


def _called(place: Place, factory: Callable[..., Any], options: Mapping[str, Any]) -> ModelSource:
    """What the factory gives, with its module in `build`."""
    from torch import nn

    def run() -> Any:
        given = factory(**options)
        if isinstance(given, ModelSource) and given.build is not None:
            model = given.build()
            return replace(given, build=lambda: model)
        return given

    with _seeded():  # once more: an import may have drawn numbers, or was not needed any more
        given = attempted(f"{place.name} in {place} failed", place.folder, run)
    if isinstance(given, ModelSource):
        _check_description(place, given)
        return given
    if isinstance(given, nn.Module):
        return ModelSource(build=lambda: given)
    raise ModelError(*_no_network(place, given))


def _module(place: Place, given: ModelSource) -> nn.Module:
    from torch import nn

    assert given.build is not None
    model = given.build()
    if not isinstance(model, nn.Module):
        raise ModelError(*_no_network(place, model))
    return model


def _check_description(place: Place, given: ModelSource) -> None:
    """Nobody but a person's own type checker has looked at these values yet."""
    if given.onnx is not None:
        raise ModelError(f"{place.name} in {place} gives the ONNX file {given.onnx}", "name that file as the model")
    if not isinstance(given.preprocess, Preprocess | None):
        found = type(given.preprocess).__name__
        raise ModelError(
            f"the preprocess of {place.name} is a {found}", "give an edgewright.runtime.preprocess.Preprocess"
        )
    if isinstance(given.labels, str):
        raise ModelError(f"the labels of {place.name} are one text, {given.labels!r}", "give a tuple of names")
    shape = given.input_shape
    if shape is None:
        return
    if not (isinstance(shape, tuple) and len(shape) == 3 and all(isinstance(side, int) and side > 0 for side in shape)):
        raise ModelError(f"the input shape of {place.name} is {shape!r}", "give (channels, height, width)")
    result = given.preprocess and given.preprocess.input_shape
    if result is not None and result != shape:
        raise ModelError(
            f"{place.name} says an input shape of {shape}, and its preprocess gives {result}", "make them agree"
        )


def _no_network(place: Place, given: Any) -> tuple[str, str]:
    """What is wrong, and what to do, if `given` is neither a module nor a source."""
    what = f"{place.name} in {place} gives"
    if given is None:
        return f"{what} nothing", "let it return the network"
    if isinstance(given, type):
        return f"{what} the class {given.__name__}, not a network", f"let it return {given.__name__}()"
    if isinstance(given, Mapping) and _holds_tensors(given):
        return f"{what} weights without a network (a {type(given).__name__})", (
            "let it load them with load_state_dict into the network, and return that"
        )
    return f"{what} a {type(given).__name__}, expected an nn.Module or a ModelSource", "let it return the network"


def _holds_tensors(values: Mapping[Any, Any]) -> bool:
    from torch import Tensor

    nested = [value for value in values.values() if isinstance(value, Mapping)]
    return any(isinstance(value, Tensor) for value in values.values()) or any(map(_holds_tensors, nested))


def _files(place: Place, code: UserCode) -> set[Path]:
    """The factory's source file and those of the imported modules in its folder."""
    if code.file is None:
        return set()
    return {code.file, *modules_in(code.file.parent).values()}


def _with_weights(given: ModelSource, model: nn.Module, file: Path) -> ModelSource:
    """Loads the file into `model`; what the file says of itself goes before what the factory says."""
    from edgewright.export.weights import load_into, read_checkpoint

    checkpoint = read_checkpoint(file)
    load_into(model, checkpoint.state, str(file))
    preprocess = checkpoint.preprocess or given.preprocess
    return replace(
        given,
        preprocess=preprocess,
        input_shape=given.input_shape if preprocess is given.preprocess else None,
        labels=given.labels if checkpoint.labels is None else checkpoint.labels,
        weights=str(file),
    )


def _described(
    request: ModelRequest, place: Place, given: ModelSource, model: nn.Module, files: set[Path]
) -> ModelSource:
    from edgewright.export.fingerprints import network_fingerprint

    fingerprint = network_fingerprint(model, files, request.options)
    model.cpu().eval()
    by_factory = f"the weights are what {place.name} gives" if request.weights == "default" else ""
    return replace(
        given,
        build=lambda: model,
        name=request.model,
        weights=given.weights or f"as {place.name} gives them",
        fingerprint=fingerprint,
        note="; ".join(note for note in (given.note, by_factory) if note),
    )
