"""Networks that torchvision defines: its ImageNet line-up under plain names, and any other as `torchvision:NAME`.

The table says what torchvision's weights expect of an image, so that nothing is imported to know it;
`tests/export/test_torchvision_models.py` compares it with torchvision's own presets.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgewright.export.entries import ModelEntry, Task, Weights
from edgewright.runtime.errors import ModelError
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["IMAGENET_CLASSES", "imagenet_labels", "imagenet_preprocess", "torchvision_entry", "torchvision_line_up"]

IMAGENET_CLASSES = 1000
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NO_AUXILIARY_HEADS: Mapping[str, Any] = {"aux_logits": False, "transform_input": True, "init_weights": False}
"""Inception's second classifiers serve training only; its released weights expect the input transformed inside."""


@dataclass(frozen=True)
class _Network:
    """A network of torchvision: its builder's name, the version of its weights, and their preprocessing."""

    summary: str
    builder: str
    version: str = "IMAGENET1K_V1"
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, classes: int, **options: Any) -> nn.Module:
        """An untrained module."""
        return _built(self.builder, num_classes=classes, **self.keywords, **options)


def _efficientnet(number: int, resize: int, crop: int, version: str = "V1", interpolation: str = "bicubic") -> _Network:
    return _Network(
        f"EfficientNet-B{number}", f"efficientnet_b{number}", f"IMAGENET1K_{version}", resize, crop, interpolation
    )


_NETWORKS = {
    "alexnet": _Network("AlexNet", "alexnet"),
    **{f"vgg{n}": _Network(f"VGG-{n}", f"vgg{n}") for n in (11, 16, 19)},
    **{f"vgg{n}_bn": _Network(f"VGG-{n} with batch normalization", f"vgg{n}_bn") for n in (11, 16, 19)},
    "googlenet": _Network("GoogLeNet (Inception v1)", "googlenet", keywords=NO_AUXILIARY_HEADS),
    "inception_v3": _Network("Inception v3", "inception_v3", resize=342, crop=299, keywords=NO_AUXILIARY_HEADS),
    **{f"densenet{n}": _Network(f"DenseNet-{n}", f"densenet{n}") for n in (121, 161, 169, 201)},
    "squeezenet": _Network("SqueezeNet 1.1", "squeezenet1_1"),
    "shufflenet_v2": _Network("ShuffleNet v2, width 1.0", "shufflenet_v2_x1_0"),
    "mobilenet_v2": _Network("MobileNet v2", "mobilenet_v2", "IMAGENET1K_V2", 232),
    "mobilenet_v3_small": _Network("MobileNet v3 small", "mobilenet_v3_small"),
    "mobilenet_v3_large": _Network("MobileNet v3 large", "mobilenet_v3_large", "IMAGENET1K_V2", 232),
    "mnasnet": _Network("MNASNet, depth 1.0", "mnasnet1_0"),
    "efficientnet_b0": _efficientnet(0, 256, 224),
    "efficientnet_b1": _efficientnet(1, 255, 240, "V2", "bilinear"),
    "efficientnet_b2": _efficientnet(2, 288, 288),
    "efficientnet_b3": _efficientnet(3, 320, 300),
    "efficientnet_b4": _efficientnet(4, 384, 380),
    "efficientnet_b5": _efficientnet(5, 456, 456),
    "efficientnet_b6": _efficientnet(6, 528, 528),
    "efficientnet_b7": _efficientnet(7, 600, 600),
    "efficientnet_v2_s": _Network("EfficientNet v2 small", "efficientnet_v2_s", resize=384, crop=384),
    "regnet": _Network("RegNet-Y, 400 MF", "regnet_y_400mf", "IMAGENET1K_V2", 232),
    "convnext_tiny": _Network("ConvNeXt tiny", "convnext_tiny", resize=236),
}
_RESIDUAL = {  # built by our own definition, which has options that torchvision lacks; the weights fit both
    "resnet18": _Network("ResNet-18", "resnet18"),
    "resnet34": _Network("ResNet-34", "resnet34"),
    "resnet50": _Network("ResNet-50", "resnet50", "IMAGENET1K_V2", 232),
    "resnet101": _Network("ResNet-101", "resnet101", "IMAGENET1K_V2", 232),
    "resnet152": _Network("ResNet-152", "resnet152", "IMAGENET1K_V2", 232),
    "resnext50_32x4d": _Network("ResNeXt-50, 32 groups of 4", "resnext50_32x4d", "IMAGENET1K_V2", 232),
    "resnext101_32x8d": _Network("ResNeXt-101, 32 groups of 8", "resnext101_32x8d", "IMAGENET1K_V2", 232),
}


def torchvision_line_up(residual: Callable[[str], Callable[..., nn.Module]]) -> Iterator[tuple[str, ModelEntry]]:
    """(plain name, entry) of the classic ImageNet networks; `residual` gives our own builder of a ResNet's name."""
    for name, network in _RESIDUAL.items():
        yield name, _entry(network, residual(name))
    for name, network in _NETWORKS.items():
        yield name, _entry(network, network)


def torchvision_entry(name: str) -> ModelEntry:
    """The entry of any classifier of torchvision. Raises `ModelError` for an unknown name, with the nearest."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()"
        raise ModelError(f"torchvision has no classifier {name!r}", hint)
    default = models.get_model_weights(name).DEFAULT
    preset = default.transforms()
    keywords = {"googlenet": NO_AUXILIARY_HEADS, "inception_v3": NO_AUXILIARY_HEADS}.get(name, {})
    network = _Network(
        f"{name} of torchvision",
        name,
        default.name,
        preset.resize_size[0],
        preset.crop_size[0],
        preset.interpolation.value,
        tuple(preset.mean),
        tuple(preset.std),
        keywords,
    )
    return _entry(network, network)


def imagenet_preprocess(resize: int, crop: int) -> Preprocess:
    """What most of torchvision's presets do to an image (`torchvision.transforms._presets.ImageClassification`)."""
    return Preprocess(
        resize=resize,
        crop=(crop, crop),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet, in order."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _entry(network: _Network, build: Callable[..., nn.Module]) -> ModelEntry:
    size, crop = network.resize, (network.crop, network.crop)
    preprocess = Preprocess(size, crop, network.mean, network.std, network.interpolation)
    task = Task(IMAGENET_CLASSES, preprocess, imagenet_labels)
    weights = Weights(
        summary=f"ImageNet at {network.crop}×{network.crop}, downloaded by torchvision ({network.version})",
        task=task,
        load=_download(network),
        fingerprint=lambda: f"torchvision:{network.builder}:{network.version}",
        origin="torchvision",
    )
    return ModelEntry(network.summary, build, task, {"default": weights})


def _download(network: _Network) -> Callable[[nn.Module], None]:
    def load(model: nn.Module) -> None:
        from edgewright.export.released import fitting
        from edgewright.export.weights import load_into

        try:  # without the keywords: with weights, the builders of Inception refuse to leave its second classifiers out
            released = _built(network.builder, weights=network.version, progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            raise ModelError(
                f"torchvision could not download the ImageNet weights of {network.builder} ({_line(error)})",
                "use --weights random, or --weights FILE with a downloaded .pth or .safetensors",
            ) from None
        state = fitting(released.state_dict(), model, network)
        load_into(model, state, f"torchvision's {network.builder}, {network.version}")

    return load


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _built(builder: str, **keywords: Any) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(builder, **keywords)
    return model
