"""Any classifier of timm, as `timm:NAME` or `timm:NAME.TAG`, where the tag names one of its sets of weights.

Its preprocessing is what timm's own evaluation does, `timm.data.create_transform` of the weights' configuration.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import metadata
from math import floor
from typing import TYPE_CHECKING, Any

from edgewright.export.entries import Labels, ModelEntry, Task, Weights
from edgewright.export.torchvision_models import IMAGENET_CLASSES, imagenet_labels
from edgewright.runtime.errors import DataError, ModelError
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["timm_entry"]


def timm_entry(name: str) -> ModelEntry:
    """The entry of a classifier of timm.

    Raises `ModelError` if timm is not installed, for an unknown name or tag (with the nearest), for a network without
    classes, and for a preprocessing that `Preprocess` cannot do.
    """
    try:
        import timm
        from timm.data.config import resolve_data_config
        from timm.models import get_pretrained_cfg
    except ImportError:
        raise ModelError("timm is not installed here", "pip install 'edgewright[timm]'") from None
    tagged = timm.list_models(pretrained=True)
    if name not in tagged and name not in timm.list_models():
        raise ModelError(f"timm has no classifier {name!r}", _nearest(name, [*timm.list_models(), *tagged]))
    found = get_pretrained_cfg(name)
    config = {} if found is None else found.to_dict()
    classes = config.get("num_classes", IMAGENET_CLASSES)
    if not classes:
        raise ModelError(f"timm's {name} gives features, expected a classifier", "take one with classes")
    task = Task(classes, _preprocess(name, resolve_data_config(pretrained_cfg=config)), _labels(classes))
    weights = {"default": _weights(name, task)} if found is not None and found.has_weights else {}
    return ModelEntry(f"{name} of timm", _builder(name), task, weights)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"


def _preprocess(name: str, config: Mapping[str, Any]) -> Preprocess:
    """The counterpart of timm's `transforms_imagenet_eval`, where there is one."""
    _, height, width = config["input_size"]
    scaled = (floor(height / config["crop_pct"]), floor(width / config["crop_pct"]))
    if config["crop_mode"] == "border":
        raise ModelError(f"timm's {name} expects images with borders in the mean colour", "which is not supported")
    if config["crop_mode"] == "center" and scaled[0] != scaled[1]:
        raise ModelError(
            f"timm's {name} expects images of {height}×{width} cut from their middle, which is supported for squares",
            "take another network",
        )
    try:
        return Preprocess(
            resize=scaled if config["crop_mode"] == "squash" else scaled[0],
            crop=(height, width),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
        )
    except DataError as error:
        raise ModelError(f"timm's {name} expects images that are not supported: {error.message}") from None


def _labels(classes: int) -> Labels:
    return imagenet_labels if classes == IMAGENET_CLASSES else tuple(f"class {index}" for index in range(classes))


def _builder(name: str) -> Callable[..., nn.Module]:
    def build(classes: int, **options: Any) -> nn.Module:
        return _created(name, num_classes=classes, **options)

    return build


def _weights(name: str, task: Task) -> Weights:
    _, height, width = task.preprocess.input_shape or (0, 0, 0)
    version = metadata.version("timm")

    def load(model: nn.Module) -> None:
        from edgewright.export.weights import load_into

        try:
            released = _created(name, pretrained=True)
        except Exception as error:  # whatever the client of the hub raises, which differs from version to version
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"timm could not download the weights of {name} ({reason})",
                "use --weights random, or --weights FILE with a downloaded .pth or .safetensors",
            ) from None
        load_into(model, released.state_dict(), f"timm's {name}")

    summary = f"{task.classes} classes at {height}×{width}, downloaded by timm ({version})"
    return Weights(summary, task, load, lambda: f"timm:{name}:{version}", "timm")


def _created(name: str, **keywords: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **keywords)
    return model
