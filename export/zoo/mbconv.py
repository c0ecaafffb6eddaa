"""The MBConv family: EfficientNet-B0 and EfficientNet-Lite0.

An MBConv block (Sandler et al. 2018, MobileNetV2; Tan & Le 2019, EfficientNet) is an inverted residual:

    x ── 1×1 expand ── k×k depthwise ── [squeeze-and-excitation] ── 1×1 project ──(+ x, when shapes allow)

B0 uses SiLU and squeeze-and-excitation; Lite0 drops the excitation and uses ReLU6, which is what makes it easy to
quantize. Module names follow torchvision's `efficientnet_b0`, so that its state dicts load unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "STAGES",
    "EfficientNet",
    "MBConv",
    "SqueezeExcitation",
    "Stage",
    "efficientnet_lite0",
    "mobilenet_effnet_b0",
]

LITE_BN_EPSILON = 1e-3  # TensorFlow's EfficientNet default, kept by the released Lite0 weights
TORCH_BN_EPSILON = 1e-5  # torch.nn.BatchNorm2d default, used by torchvision's efficientnet_b0


@dataclass(frozen=True)
class Stage:
    """One row of Table 1 in Tan & Le 2019: `layers` blocks, the first of which has `stride`."""

    expand_ratio: int
    kernel_size: int
    stride: int
    out_channels: int
    layers: int


@dataclass(frozen=True)
class Flavour:
    """What distinguishes the members of the family that share `STAGES`."""

    squeeze: bool
    activation: Callable[[], nn.Module]
    epsilon: float
    same_padding: bool


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
STAGES = (  # EfficientNet-B0; Lite0 shares it
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class Conv2dSame(nn.Conv2d):
    """Convolution padded as TensorFlow's "SAME": the odd zero of a strided convolution stands right and below.

    For weights that were trained there; with symmetric padding Lite0 loses eight points on 224×224 photographs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → `[N, C', ceil(H / stride), ceil(W / stride)]`."""
        height, width = (self._zeros(int(x.shape[axis]), axis - 2) for axis in (2, 3))
        padded = functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _zeros(self, length: int, axis: int) -> int:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        return max((-(-length // stride) - 1) * stride + kernel - length, 0)


class ConvNormAct(nn.Sequential):
    """Convolution (no bias), batch normalization and, unless `activation` is None, an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        flavour: Flavour,
        activation: Callable[[], nn.Module] | None,
    ) -> None:
        convolution = Conv2dSame if flavour.same_padding else nn.Conv2d
        padding = kernel_size // 2
        layers: list[nn.Module] = [
            convolution(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels, eps=flavour.epsilon),
        ]
        if activation is not None:
            layers.append(activation())
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """Channel gate (Hu et al. 2018): x · sigmoid(fc2(silu(fc1(mean(x))))), the mean over height and width."""

    def __init__(self, channels: int, squeeze_channels: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """`x` times its gate `[N, C, 1, 1]`."""
        gate: Tensor = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return x * gate


class StochasticDepth(nn.Module):
    """Drops a residual branch per sample during training (Huang et al. 2016); the identity otherwise."""

    def __init__(self, drop_probability: float) -> None:
        super().__init__()
        self.drop_probability = drop_probability

    def forward(self, x: Tensor) -> Tensor:
        """`x`, or in training 0 or x / (1 − p) for each sample."""
        if not self.training or self.drop_probability == 0.0:
            return x
        keep = 1.0 - self.drop_probability
        mask = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * mask / keep


class MBConv(nn.Module):
    """Inverted residual block; input `[N, in_channels, H, W]`, output `[N, out_channels, H/stride, W/stride]`."""

    def __init__(
        self,
        in_channels: int,
        stage: Stage,
        stride: int,
        *,
        flavour: Flavour,
        drop_probability: float,
    ) -> None:
        super().__init__()
        expanded = in_channels * stage.expand_ratio
        layers: list[nn.Module] = []
        if expanded != in_channels:
            layers.append(ConvNormAct(in_channels, expanded, 1, flavour=flavour, activation=flavour.activation))
        layers.append(
            ConvNormAct(
                expanded,
                expanded,
                stage.kernel_size,
                stride=stride,
                groups=expanded,
                flavour=flavour,
                activation=flavour.activation,
            )
        )
        if flavour.squeeze:
            layers.append(SqueezeExcitation(expanded, max(1, in_channels // 4)))
        layers.append(ConvNormAct(expanded, stage.out_channels, 1, flavour=flavour, activation=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop_probability)
        self.is_residual = stride == 1 and in_channels == stage.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, `x` added where the shapes allow it."""
        out: Tensor = self.block(x)
        return x + self.stochastic_depth(out) if self.is_residual else out


class EfficientNet(nn.Module):
    """EfficientNet classifier; input `[N, 3, H, W]` float32, output logits `[N, classes]`."""

    def __init__(
        self,
        classes: int,
        *,
        flavour: Flavour,
        dropout: float = 0.2,
        stochastic_depth: float = 0.2,
    ) -> None:
        super().__init__()
        total = sum(stage.layers for stage in STAGES)
        features: list[nn.Module] = [
            ConvNormAct(3, STEM_CHANNELS, 3, stride=2, flavour=flavour, activation=flavour.activation)
        ]
        channels = STEM_CHANNELS
        block_index = 0
        for stage in STAGES:
            blocks: list[nn.Module] = []
            for layer in range(stage.layers):
                blocks.append(
                    MBConv(
                        channels,
                        stage,
                        stage.stride if layer == 0 else 1,
                        flavour=flavour,
                        drop_probability=stochastic_depth * block_index / total,
                    )
                )
                channels = stage.out_channels
                block_index += 1
            features.append(nn.Sequential(*blocks))
        features.append(ConvNormAct(channels, HEAD_CHANNELS, 1, flavour=flavour, activation=flavour.activation))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(HEAD_CHANNELS, classes))
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                bound = module.out_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]`."""
        pooled = torch.flatten(self.avgpool(self.features(x)), 1)
        logits: Tensor = self.classifier(pooled)
        return logits


def _relu6() -> nn.Module:
    return nn.ReLU6(inplace=True)


def _silu() -> nn.Module:
    return nn.SiLU(inplace=True)


B0 = Flavour(squeeze=True, activation=_silu, epsilon=TORCH_BN_EPSILON, same_padding=False)
LITE0 = Flavour(squeeze=False, activation=_relu6, epsilon=LITE_BN_EPSILON, same_padding=True)


def mobilenet_effnet_b0(classes: int = 10) -> EfficientNet:
    """EfficientNet-B0: squeeze-and-excitation and SiLU; state dict equal in names and shapes to torchvision's."""
    return EfficientNet(classes, flavour=B0)


def efficientnet_lite0(classes: int = 1000) -> EfficientNet:
    """EfficientNet-Lite0: B0 without squeeze-and-excitation, ReLU6 instead of SiLU, nothing scaled."""
    return EfficientNet(classes, flavour=LITE0)
