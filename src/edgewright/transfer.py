"""What a training starts from: fresh weights, those of a checkpoint with another head, or EfficientNet-Lite0's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from edgewright.export.weights import head_names, initialize_from_lite0, load_into, read_checkpoint
from edgewright.export.zoo.mbconv import EfficientNet
from edgewright.recipes import default_start, trainable_entry
from edgewright.runtime.errors import ModelError

__all__ = ["initialize", "load_with_fresh_head"]

SUFFIXES = (".safetensors", ".pth", ".pt")


def initialize(name: str, model: nn.Module, start: str | None) -> str:
    """Gives the freshly built network `name` its first weights; returns what they are, in words.

    `start` is "none" (as built), "lite0", a .safetensors or .pth file, or None for what is usual for this network.
    Raises `ModelError` if that is none of these, or does not fit.
    """
    start = default_start(name) if start is None else start
    if start == "none":
        return "fresh weights"
    if start == "lite0":
        if not isinstance(model, EfficientNet):
            raise ModelError(
                f"{name} cannot start from lite0, whose layers it does not have",
                "leave --from out, or give a checkpoint of this network",
            )
        initialize_from_lite0(model)
        return "EfficientNet-Lite0's ImageNet weights, the gates and the head fresh"
    path = Path(start)
    if path.suffix not in SUFFIXES:
        raise ModelError(f"cannot start from {start!r}", "give none, lite0, or a .safetensors or .pth file")
    state = read_checkpoint(path).state
    fresh = load_with_fresh_head(model, state, str(path), trainable_entry(name).build)
    if not fresh:
        return str(path)
    return f"{path}, {' and '.join(fresh)} fresh since it has {len(state[fresh[0]])} classes"


def load_with_fresh_head(
    model: nn.Module, state: Mapping[str, Tensor], origin: str, build: Callable[[int], nn.Module]
) -> tuple[str, ...]:
    """Copies `state` into `model`, but keeps the model's own head if `state` has another number of classes.

    `build(classes)` gives the network that both are of. Returns the names of the entries that were kept.
    Raises `ModelError`, as `load_into` does, if anything else differs: the head must be whole, and of one number of
    classes.
    """
    own, head = model.state_dict(), head_names(build)
    shapes = {name: value.shape for name, value in state.items() if name in head}
    theirs = _shapes_for(build, state.get(head[0]))
    other = shapes == {name: theirs.get(name) for name in head} != {name: own[name].shape for name in head}
    fresh = head if other else ()
    load_into(model, {**state, **{name: own[name] for name in fresh}}, origin)
    return fresh


def _shapes_for(build: Callable[[int], nn.Module], matrix: Tensor | None) -> Mapping[str, torch.Size]:
    """The shapes of the network whose classifier has as many rows as `matrix`; none if it has no rows."""
    if matrix is None or matrix.ndim == 0 or len(matrix) == 0:
        return {}
    with torch.device("meta"):
        return {name: value.shape for name, value in build(len(matrix)).state_dict().items()}
