"""Two small ReLU networks for Fashion-MNIST, and their rescaled twins that plain quantization ruins.

A positive factor passes through ReLU and pooling. So each channel between two layers can be made s times as large,
W₁ → s · W₁, and small again by the next layer, W₂ → W₂ / s, and no image is classified otherwise. The scale that a
whole tensor shares in INT8 then leaves the small channels a handful of levels. Such spreads are what training itself
makes of depthwise networks (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", figure 2); here their size is known.

`python benchmarks/stress_networks.py` trains both, in some minutes, and writes `benchmarks/stress/`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgewright.calibration.fashion_mnist import fashion_mnist_test, fashion_mnist_training
from edgewright.export.models import MODELS
from edgewright.export.weights import load_into, read_checkpoint, save_checkpoint
from edgewright.fit import LabelledImages, fit
from edgewright.learned.numerics import numerics
from edgewright.recipes import Phase, Recipe

__all__ = ["INPUT_SHAPE", "LARGEST_FACTOR", "NETWORKS", "PREPROCESS", "rescaled", "trained"]

TASK = MODELS["lenet_bn"].task
PREPROCESS = TASK.preprocess
INPUT_SHAPE = (1, 28, 28)
FOLDER = Path(__file__).parent / "stress"
LARGEST_FACTOR = 100.0
SEED = 6
VGG_RECIPE = Recipe(
    phases=(Phase(1.0, 3),),
    batch_size=128,
    peak_learning_rate=4e-3,
    weight_decay=0.01,
    label_smoothing=0.0,
    stochastic_depth=0.0,
    ema_decay=None,
)
RECIPES: Mapping[str, Recipe] = {
    "vgg": VGG_RECIPE,
    "mobilenet": replace(VGG_RECIPE, phases=(Phase(1.0, 2),), augment=False),
}

Pair = tuple[nn.Module, nn.Module]
"""A batch normalization and the layer that alone reads its channels, through ReLU and pooling at most."""


class Vgg(nn.Module):
    """Five 3×3 convolutions and three max poolings; 70,000 parameters."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 32, 64, 64), pooled: tuple[int, ...] = (0, 2, 4)) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 1
        for index, width in enumerate(widths):
            self.features.extend(_convolution(channels, width, 3))
            if index in pooled:
                self.features.append(nn.MaxPool2d(2))
            channels = width
        self.classifier = nn.Linear(channels, TASK.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, 10]` for `images` `[N, 1, 28, 28]`."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits

    def pairs(self) -> Iterator[Pair]:
        """All neighbours."""
        yield from _neighbours([*self.features, self.classifier])


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection, and an addition where the shapes allow it."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = expansion * channels
        self.layers = nn.Sequential(
            *_convolution(channels, hidden, 1),
            *_convolution(hidden, hidden, 3, stride=stride, groups=hidden),
            *_convolution(hidden, width, 1)[:-1],
        )
        self.adds = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        """`[N, channels, H, W]` → `[N, width, H / stride, W / stride]`."""
        result: Tensor = self.layers(x)
        return x + result if self.adds else result


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) in miniature, with ReLU instead of ReLU6; 43,000 parameters."""

    def __init__(self, blocks: tuple[tuple[int, int], ...] = ((16, 1), (24, 2), (24, 1), (40, 1), (40, 1))) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(1, 16, 3, stride=2))
        self.blocks = nn.Sequential()
        channels = 16
        for width, stride in blocks:
            self.blocks.append(InvertedResidual(channels, width, stride))
            channels = width
        self.head = nn.Sequential(*_convolution(channels, 4 * channels, 1))
        self.classifier = nn.Linear(4 * channels, TASK.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, 10]` for `images` `[N, 1, 28, 28]`."""
        logits: Tensor = self.classifier(self.head(self.blocks(self.stem(images))).mean((2, 3)))
        return logits

    def pairs(self) -> Iterator[Pair]:
        """Those inside the blocks, and head and classifier: whatever an addition reads stays as it is."""
        for block in self.blocks:
            assert isinstance(block, InvertedResidual)
            yield from _neighbours(list(block.layers))
        yield from _neighbours([*self.head, self.classifier])


NETWORKS: Mapping[str, Callable[[], Vgg | MobileNet]] = {"vgg": Vgg, "mobilenet": MobileNet}


def trained(name: str) -> Vgg | MobileNet:
    """The network called `name` with the weights of its checkpoint, in evaluation mode."""
    network = NETWORKS[name]()
    file = FOLDER / f"{name}.safetensors"
    load_into(network, read_checkpoint(file).state, str(file))
    network.eval()
    return network


def rescaled(network: Vgg | MobileNet, seed: int = SEED) -> Vgg | MobileNet:
    """`network` itself, each channel between two layers as large as before times 1 … `LARGEST_FACTOR`.

    The factors are seeded and log-uniform, so that the channels of one tensor lie up to a hundredfold apart.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm, reader in network.pairs():
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(reader, nn.Conv2d | nn.Linear)
            factors = LARGEST_FACTOR ** torch.rand(norm.num_features, generator=generator)
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            depthwise = isinstance(reader, nn.Conv2d) and reader.groups > 1
            shape = [-1 if axis == (0 if depthwise else 1) else 1 for axis in range(reader.weight.ndim)]
            reader.weight.div_(factors.reshape(shape))
    return network


def _convolution(channels: int, width: int, size: int, *, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    """A convolution that keeps the size, its normalization, ReLU."""
    convolution = nn.Conv2d(channels, width, size, stride, size // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(width), nn.ReLU()


def _neighbours(modules: list[nn.Module]) -> Iterator[Pair]:
    """Each normalization with the next layer behind it, if there is one."""
    norm: nn.Module | None = None
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.Linear) and norm is not None:
            yield norm, module
        if isinstance(module, nn.BatchNorm2d):
            norm = module


def _train(name: str) -> None:
    """Writes the checkpoint of one network, float16."""
    test = fashion_mnist_test()
    assert test.labels is not None
    images = LabelledImages(np.stack([np.asarray(image) for image in test]), test.labels)
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    with numerics(threads=1):
        fitted = fit(NETWORKS[name](), PREPROCESS, LabelledImages(*fashion_mnist_training()), images, recipe=recipe)
    row = fitted.curve[-1]
    print(f"{name}: {100 * row.test_top1:.2f} % top-1 after {row.seconds:.0f} s")
    labels = TASK.labels() if callable(TASK.labels) else TASK.labels
    FOLDER.mkdir(exist_ok=True)
    save_checkpoint(FOLDER / f"{name}.safetensors", fitted.model, PREPROCESS, labels, recipe=json.dumps(asdict(recipe)))


if __name__ == "__main__":
    for name in sys.argv[1:] or NETWORKS:
        _train(name)
