"""VGG-11 for 1×224×224 images, its channels divided by 4.

Simonyan & Zisserman 2015, configuration A; section 8.2 of Zhang et al., Dive into Deep Learning.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from edgewright.export.zoo.initialization import xavier_initialized

__all__ = ["fashion_vgg11", "vgg_block"]

BLOCKS = ((1, 16), (1, 32), (2, 64), (2, 128), (2, 128))
"""Convolutions and channels of each block: a quarter of 64, 128, 256, 512, 512."""


def fashion_vgg11(classes: int = 10, *, hidden: int = 4096) -> nn.Module:
    """VGG-11 with a quarter of the channels and `hidden` units in its two hidden layers.

    Input `[N, 1, 224, 224]` float32, output logits `[N, classes]`.
    """
    blocks: list[nn.Module] = []
    in_channels = 1
    for convolutions, channels in BLOCKS:
        blocks.append(vgg_block(in_channels, channels, convolutions))
        in_channels = channels
    classifier = nn.Sequential(
        *(nn.Linear(in_channels * 7 * 7, hidden), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(hidden, classes),
    )
    features = nn.Sequential(*blocks, nn.Flatten())
    return xavier_initialized(nn.Sequential(OrderedDict(features=features, classifier=classifier)))


def vgg_block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    """3×3 convolutions with ReLU, then a maximum over 2×2: `[N, in_channels, H, W]` → `[N, channels, H/2, W/2]`."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers, nn.MaxPool2d(2))
