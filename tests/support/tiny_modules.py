"""The module of the tiny network; apart from `tiny_network`, which must not import torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgewright.export.zoo.mbconv import SqueezeExcitation

__all__ = ["TinyNetwork", "randomize"]


class TinyNetwork(nn.Module):
    """Convolution, depthwise convolution, squeeze-and-excitation, projection: an MBConv block in miniature.

    `linear`: nothing follows the projection, as in EfficientNet, so that TensorRT-RTX has a layer that pays in INT8.
    """

    def __init__(self, channels: int, classes: int, width: int = 8, *, linear: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            SqueezeExcitation(width, 4),
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.Identity() if linear else nn.SiLU(),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * width, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def randomize(model: nn.Module, seed: int) -> None:
    """Seeded weights; batch norm's statistics and affine parameters are far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0.0, 0.3, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 2.0, generator=generator)
                module.bias.normal_(0.0, 0.5, generator=generator)
                module.running_mean.normal_(0.0, 0.5, generator=generator)
                module.running_var.uniform_(0.2, 3.0, generator=generator)
