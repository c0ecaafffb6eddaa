"""ResNet-18 for 1×96×96 or 1×224×224 images (He et al. 2016; section 8.6 of Zhang et al., Dive into Deep Learning).

As in the book the convolutions have a bias, which the batch normalization after them makes superfluous; a folded
convolution has one anyway.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from edgewright.export.zoo.initialization import xavier_initialized

__all__ = ["Residual", "fashion_resnet18"]


class Residual(nn.Module):
    """relu(f(x) + x), f two 3×3 convolutions; `[N, in_channels, H, W]` → `[N, channels, H/stride, W/stride]`.

    Where f changes the shape, a 1×1 convolution takes x to it. It has no batch normalization of its own, unlike the
    one of torchvision.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, not negative."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


def fashion_resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18; input `[N, 1, 96, 96]` float32, or any other size; output logits `[N, classes]`."""
    stem = nn.Sequential(
        *(nn.Conv2d(1, 64, 7, stride=2, padding=3), nn.BatchNorm2d(64), nn.ReLU()),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        stem=stem,
        stage1=nn.Sequential(Residual(64, 64), Residual(64, 64)),
        stage2=nn.Sequential(Residual(64, 128, stride=2), Residual(128, 128)),
        stage3=nn.Sequential(Residual(128, 256, stride=2), Residual(256, 256)),
        stage4=nn.Sequential(Residual(256, 512, stride=2), Residual(512, 512)),
        classifier=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)),
    )
    return xavier_initialized(nn.Sequential(stages))
