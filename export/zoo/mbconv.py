"""The MBConv family: EfficientNet-B0 … B7 and EfficientNet-Lite0 … Lite2.

An MBConv block (Sandler et al. 2018, MobileNetV2; Tan & Le 2019, EfficientNet) is an inverted residual:

    x ── 1×1 expand ── k×k depthwise ── [squeeze-and-excitation] ── 1×1 project ──(+ x, when shapes allow)

B0 … B7 use SiLU and squeeze-and-excitation; the Lites drop the excitation and use ReLU6, which is what makes them easy
to quantize. How many layers and channels they have is said in `compound_scaling`. Module names follow torchvision's
`efficientnet_b0` … `efficientnet_b7`, so that their state dicts load unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewright.export.zoo.compound_scaling import BASELINE, EFFICIENTNETS, LITES, Layout, Stage, Variant

__all__ = [
    "EfficientNet",
    "MBConv",
    "SqueezeExcitation",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "mobilenet_effnet_b0",
]

LITE_BN_EPSILON = 1e-3  # TensorFlow's EfficientNet default, kept by the released weights of the Lites
TORCH_BN_EPSILON = 1e-5  # torch.nn.BatchNorm2d default, used by torchvision's efficientnet_b0 … b4


@dataclass(frozen=True)
class Flavour:
    """What distinguishes members of the family beside their layout."""

    squeeze: bool
    activation: Callable[[], nn.Module]
    epsilon: float
    same_padding: bool
    momentum: float = 0.1  # of batch normalization in training; torch.nn.BatchNorm2d default


def _relu6() -> nn.Module:
    return nn.ReLU6(inplace=True)


def _silu() -> nn.Module:
    return nn.SiLU(inplace=True)


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
            nn.BatchNorm2d(out_channels, eps=flavour.epsilon, momentum=flavour.momentum),
        ]
        if activation is not None:
            layers.append(activation())
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """Channel gate (Hu et al. 2018): x · sigmoid(fc2(silu(fc1(mean(x))))), the mean over height and width.

    Hu et al. have ReLU for SiLU: give `activation`.
    """

    def __init__(self, channels: int, squeeze_channels: int, *, activation: Callable[[], nn.Module] = _silu) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)
        self.activation = activation()
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
        layout: Layout = BASELINE,
        dropout: float = 0.2,
        stochastic_depth: float = 0.2,
    ) -> None:
        super().__init__()
        total = sum(stage.layers for stage in layout.stages)
        channels = layout.stem_channels
        features: list[nn.Module] = [
            ConvNormAct(3, channels, 3, stride=2, flavour=flavour, activation=flavour.activation)
        ]
        block_index = 0
        for stage in layout.stages:
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
        features.append(ConvNormAct(channels, layout.head_channels, 1, flavour=flavour, activation=flavour.activation))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(layout.head_channels, classes))
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


B0 = Flavour(squeeze=True, activation=_silu, epsilon=TORCH_BN_EPSILON, same_padding=False)
B5 = replace(B0, epsilon=1e-3, momentum=0.01)  # TensorFlow's values, which torchvision keeps for B5, B6 and B7
LITE0 = Flavour(squeeze=False, activation=_relu6, epsilon=LITE_BN_EPSILON, same_padding=True)


def mobilenet_effnet_b0(classes: int = 10) -> EfficientNet:
    """EfficientNet-B0: squeeze-and-excitation and SiLU; state dict equal in names and shapes to torchvision's."""
    return EfficientNet(classes, flavour=B0)


def efficientnet_b0(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B0: 16 blocks, made for 224×224 images."""
    return _variant(EFFICIENTNETS["efficientnet_b0"], B0, classes)


def efficientnet_b1(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B1: 23 blocks, made for 240×240 images."""
    return _variant(EFFICIENTNETS["efficientnet_b1"], B0, classes)


def efficientnet_b2(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B2: 23 blocks, made for 260×260 images."""
    return _variant(EFFICIENTNETS["efficientnet_b2"], B0, classes)


def efficientnet_b3(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B3: 26 blocks, made for 300×300 images."""
    return _variant(EFFICIENTNETS["efficientnet_b3"], B0, classes)


def efficientnet_b4(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B4: 32 blocks, made for 380×380 images."""
    return _variant(EFFICIENTNETS["efficientnet_b4"], B0, classes)


def efficientnet_b5(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B5: 39 blocks, made for 456×456 images."""
    return _variant(EFFICIENTNETS["efficientnet_b5"], B5, classes)


def efficientnet_b6(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B6: 45 blocks, made for 528×528 images."""
    return _variant(EFFICIENTNETS["efficientnet_b6"], B5, classes)


def efficientnet_b7(classes: int = 1000) -> EfficientNet:
    """EfficientNet-B7: 55 blocks, made for 600×600 images."""
    return _variant(EFFICIENTNETS["efficientnet_b7"], B5, classes)


def efficientnet_lite0(classes: int = 1000) -> EfficientNet:
    """EfficientNet-Lite0: B0 without squeeze-and-excitation, ReLU6 instead of SiLU, nothing scaled."""
    return _variant(LITES["efficientnet_lite0"], LITE0, classes)


def efficientnet_lite1(classes: int = 1000) -> EfficientNet:
    """EfficientNet-Lite1: deeper than Lite0, made for 240×240 images."""
    return _variant(LITES["efficientnet_lite1"], LITE0, classes)


def efficientnet_lite2(classes: int = 1000) -> EfficientNet:
    """EfficientNet-Lite2: deeper and wider than Lite0, made for 260×260 images."""
    return _variant(LITES["efficientnet_lite2"], LITE0, classes)


def _variant(variant: Variant, flavour: Flavour, classes: int) -> EfficientNet:
    return EfficientNet(classes, flavour=flavour, layout=variant.layout, dropout=variant.dropout)
