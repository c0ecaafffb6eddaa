"""GoogLeNet for 1×96×96 images (Szegedy et al. 2015, table 1; section 8.4 of Zhang et al., Dive into Deep Learning).

Without the auxiliary classifiers and local response normalization of the paper.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from edgewright.export.zoo.initialization import xavier_initialized

__all__ = ["Inception", "fashion_googlenet"]


class Inception(nn.Module):
    """Four branches side by side, joined along the channels; `[N, in_channels, H, W]` → `[N, out_channels, H, W]`.

    * `point`: channels of the 1×1 convolution
    * `middle`, `wide`: channels of the 1×1 reduction and of the 3×3 or 5×5 convolution after it
    * `pooled`: channels of the 1×1 convolution after a maximum over 3×3
    """

    def __init__(
        self, in_channels: int, point: int, middle: tuple[int, int], wide: tuple[int, int], pooled: int
    ) -> None:
        super().__init__()
        self.out_channels = point + middle[1] + wide[1] + pooled
        self.point = _convolution(in_channels, point, 1)
        self.middle = nn.Sequential(_convolution(in_channels, middle[0], 1), _convolution(*middle, 3))
        self.wide = nn.Sequential(_convolution(in_channels, wide[0], 1), _convolution(*wide, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _convolution(in_channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The four results in the order of the constructor."""
        return torch.cat((self.point(x), self.middle(x), self.wide(x), self.pooled(x)), dim=1)


def fashion_googlenet(classes: int = 10) -> nn.Module:
    """GoogLeNet; input `[N, 1, 96, 96]` float32, or any other size; output logits `[N, classes]`."""
    stem = nn.Sequential(_convolution(1, 64, 7, stride=2), _halving())
    stage1 = nn.Sequential(_convolution(64, 64, 1), _convolution(64, 192, 3), _halving())
    stage2 = nn.Sequential(
        Inception(192, 64, (96, 128), (16, 32), 32),
        Inception(256, 128, (128, 192), (32, 96), 64),
        _halving(),
    )
    stage3 = nn.Sequential(
        Inception(480, 192, (96, 208), (16, 48), 64),
        Inception(512, 160, (112, 224), (24, 64), 64),
        Inception(512, 128, (128, 256), (24, 64), 64),
        Inception(512, 112, (144, 288), (32, 64), 64),
        Inception(528, 256, (160, 320), (32, 128), 128),
        _halving(),
    )
    stage4 = nn.Sequential(
        Inception(832, 256, (160, 320), (32, 128), 128),
        Inception(832, 384, (192, 384), (48, 128), 128),
    )
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes))
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        stem=stem, stage1=stage1, stage2=stage2, stage3=stage3, stage4=stage4, classifier=classifier
    )
    return xavier_initialized(nn.Sequential(stages))


def _convolution(in_channels: int, channels: int, kernel_size: int, *, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2)
    return nn.Sequential(convolution, nn.ReLU())


def _halving() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, padding=1)
