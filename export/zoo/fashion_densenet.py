"""DenseNet for 1×96×96 images (Huang et al. 2017; section 8.7 of Zhang et al., Dive into Deep Learning).

Batch normalization and ReLU come before each convolution, behind a pooling or concatenation: only the stem's can be
folded into the convolution before it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from edgewright.export.zoo.initialization import xavier_initialized

__all__ = ["DenseBlock", "fashion_densenet", "transition"]

CONVOLUTIONS = (4, 4, 4, 4)  # of each dense block
GROWTH = 32  # channels that each convolution adds
STEM_CHANNELS = 64


class DenseBlock(nn.Module):
    """Each convolution sees all channels before it; `[N, C, H, W]` → `[N, C + convolutions · growth, H, W]`."""

    def __init__(self, in_channels: int, convolutions: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _norm_relu_convolution(in_channels + i * growth, growth, 3) for i in range(convolutions)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` and, after it, what each convolution adds."""
        for layer in self.layers:
            x = torch.cat((x, layer(x)), dim=1)
        return x


def transition(in_channels: int, channels: int) -> nn.Sequential:
    """Fewer channels, half the side: `[N, in_channels, H, W]` → `[N, channels, H/2, W/2]`."""
    return nn.Sequential(_norm_relu_convolution(in_channels, channels, 1), nn.AvgPool2d(2))


def fashion_densenet(classes: int = 10) -> nn.Module:
    """DenseNet; input `[N, 1, 96, 96]` float32, or another size from 29 on; output logits `[N, classes]`."""
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(
            *(nn.Conv2d(1, STEM_CHANNELS, 7, stride=2, padding=3), nn.BatchNorm2d(STEM_CHANNELS), nn.ReLU()),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
    )
    channels = STEM_CHANNELS
    for number, convolutions in enumerate(CONVOLUTIONS, start=1):
        stages[f"stage{number}"] = DenseBlock(channels, convolutions, GROWTH)
        channels += convolutions * GROWTH
        if number < len(CONVOLUTIONS):
            stages[f"transition{number}"] = transition(channels, channels // 2)
            channels //= 2
    stages["classifier"] = nn.Sequential(
        *(nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(channels, classes)),
    )
    return xavier_initialized(nn.Sequential(stages))


def _norm_relu_convolution(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.BatchNorm2d(in_channels), nn.ReLU()),
        nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2),
    )
