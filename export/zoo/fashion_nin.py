"""Network in network for 1×224×224 images (Lin et al. 2014; section 8.3 of Zhang et al., Dive into Deep Learning).

Two 1×1 convolutions after each spatial one are a small perceptron for each pixel; global average pooling of as many
channels as there are classes stands in place of linear layers.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from edgewright.export.zoo.initialization import xavier_initialized

__all__ = ["fashion_nin", "nin_block"]


def fashion_nin(classes: int = 10) -> nn.Module:
    """NiN; input `[N, 1, 224, 224]` float32, or another size from 67 on; output logits `[N, classes]`, none negative.

    Its last layer has a ReLU like the others, in the book as in the paper (equation 2).
    """
    features = nn.Sequential(
        *(nin_block(1, 96, 11, stride=4), nn.MaxPool2d(3, stride=2)),
        *(nin_block(96, 256, 5, padding=2), nn.MaxPool2d(3, stride=2)),
        *(nin_block(256, 384, 3, padding=1), nn.MaxPool2d(3, stride=2)),
        nn.Dropout(0.5),
    )
    classifier = nn.Sequential(nin_block(384, classes, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return xavier_initialized(nn.Sequential(OrderedDict(features=features, classifier=classifier)))


def nin_block(in_channels: int, channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0) -> nn.Sequential:
    """A convolution and two of 1×1, each with ReLU; output `[N, channels, H', W']`."""
    return nn.Sequential(
        *(nn.Conv2d(in_channels, channels, kernel_size, stride, padding), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 1), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 1), nn.ReLU()),
    )
