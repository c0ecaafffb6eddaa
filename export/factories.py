"""A network from a person's own function: `path/to/file.py:factory` or `package.module:factory`.

    def tiny(classes=10):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))

The function (a class is one too) is called once, with the options of the request, and returns an `nn.Module`, or a
`ModelSource` that also says what images it takes and what its classes are called. Naming a Python file runs its code,
but for its `if __name__ == "__main__"` part: only name files that you would run yourself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.export.entries import ModelSource
from edgewright.export.resolve import CHECKPOINT_SUFFIXES, RANDOM_SEED, ModelRequest
from edgewright.export.user_code import Place, UserCode, attempted, imported, own_modules, place_of
from edgewright.runtime.errors import ModelError
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_one_input", "factory_source"]

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def factory_source(request: ModelRequest) -> ModelSource:
    """The source that the factory of `request` gives; its module is built here, once.

    PyTorch's random numbers are seeded for the call, so that a factory without trained weights gives the same network
    each time. What the factory does not say of preprocessing, input shape and labels is None. The fingerprint is that
    of all that the network computes with and of its outputs (see `network_fingerprint`), of the options, and of the
    source files of all imported modules that are in no installed library.

    Raises `ModelError` if the code cannot be found or imported, does not take the options, raises, or gives no
    network of one input; and for weights other than a file, which has to fit what the factory gives.
    """
    checkpoint = _weights_file(request)
    place = place_of(request.model)
    with _seeded(), imported(place) as code:
        _check_callable(place, code.value)
        _check_options(place, code.value, request.options)
        given = _called(place, code.value, request.options)
        model = _module(place, given)
        check_one_input(model)
        if checkpoint is not None:
            given = _with_weights(given, model, checkpoint)
        return _described(request, place, code, given, model)


def check_one_input(model: nn.Module) -> None:
    """Raises `ModelError` if forward() can not be called with one tensor, as far as its signature tells."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty and parameter.kind not in VARIADIC
    ]
    if len(needed) > 1:
        raise ModelError(
            f"forward() takes {len(needed)} tensors: {', '.join(needed)}", "only networks of one image input are taken"
        )
    if not any(parameter.kind in (*POSITIONAL, inspect.Parameter.VAR_POSITIONAL) for parameter in parameters):
        raise ModelError("forward() takes no image", "only networks of one image input are taken")


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
    """What the factory gives, with its module in `build` and its labels evaluated."""
    from torch import nn

    def run() -> Any:
        given = factory(**options)
        if not isinstance(given, ModelSource):
            return given
        build = _checked_build(place, given)
        model = build()
        return replace(given, build=lambda: model, labels=given.labels() if callable(given.labels) else given.labels)

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


def _checked_build(place: Place, given: ModelSource) -> Callable[[], Any]:
    from torch import nn

    if given.onnx is not None:
        raise ModelError(f"{place.name} in {place} gives the ONNX file {given.onnx}", "name that file as the model")
    build: Any = given.build
    if isinstance(build, nn.Module):
        raise ModelError(f"the build of {place.name} is a network, expected a function", "give build=lambda: net")
    if not callable(build):
        raise ModelError(f"the build of {place.name} is a {type(build).__name__}", "give build=lambda: net")
    checked: Callable[[], Any] = build
    return checked


def _check_description(place: Place, given: ModelSource) -> None:
    """Nobody but a person's own type checker has looked at these values yet."""
    if not isinstance(given.preprocess, Preprocess | None):
        found = type(given.preprocess).__name__
        raise ModelError(
            f"the preprocess of {place.name} is a {found}", "give an edgewright.runtime.preprocess.Preprocess"
        )
    _check_labels(place, given.labels)
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


def _check_labels(place: Place, labels: Any) -> None:
    if labels is None:
        return
    if isinstance(labels, str):
        raise ModelError(f"the labels of {place.name} are one text, {labels!r}", "give a tuple of names")
    if not isinstance(labels, Sequence):
        raise ModelError(f"the labels of {place.name} are a {type(labels).__name__}", "give a tuple of names")
    for label in labels:
        if not isinstance(label, str):
            raise ModelError(f"{label!r} of the labels of {place.name} is no text", "give a tuple of names")


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


def _code(place: Place, code: UserCode) -> dict[str, Path]:
    """The source files of the factory and of its helpers, by the modules' names."""
    package = place.module.partition(".")[0]
    return own_modules(package) | ({} if code.file is None else {place.module: code.file})


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
    request: ModelRequest, place: Place, code: UserCode, given: ModelSource, model: nn.Module
) -> ModelSource:
    from edgewright.export.fingerprints import network_fingerprint

    shape = request.completion.input_shape or given.input_shape
    fingerprint = attempted(
        f"the network of {place.name} in {place} cannot be identified",
        place.folder,
        lambda: network_fingerprint(model, _code(place, code), request.options, shape),
    )
    by_factory = f"the weights are what {place.name} gives" if request.weights == "default" else ""
    return replace(
        given,
        build=lambda: model,
        name=request.model,
        weights=given.weights or f"as {place.name} gives them",
        fingerprint=fingerprint,
        note="; ".join(note for note in (given.note, by_factory) if note),
    )
