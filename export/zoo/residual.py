"""The residual family: ResNet, ResNeXt, SE-ResNet and the plain network without shortcuts, in one definition.

A stage is a row of blocks, each relu(f(x) + x); where f changes the shape, a 1×1 convolution takes x to it:

    basic        3×3 ── 3×3                   He et al. 2016, Figure 5 left
    bottleneck   1×1 ── 3×3 ── 1×1 ── [SE]    Figure 5 right; the 3×3 in groups: ResNeXt (Xie et al. 2017)

Each convolution is followed by batch normalization, all but the last of a block by ReLU. Module names follow
torchvision's, so that its state dicts load unchanged; squeeze-and-excitation has the names of timm's `seresnet50`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from edgewright.export.zoo.mbconv import SqueezeExcitation
from edgewright.runtime.errors import ModelError

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "BasicBlock",
    "BlockStyle",
    "Bottleneck",
    "Options",
    "ResidualNet",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext_shallow",
    "se_resnet50",
]

STEM_CHANNELS = 64
STAGE_CHANNELS = (64, 128, 256, 512)  # before expansion; He et al. 2016, Table 1
SE_REDUCTION = 16  # Hu et al. 2018, section 6.1
STRIDE_IN: dict[str, Literal["1x1", "3x3"]] = {"v1": "1x1", "v1.5": "3x3"}


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of a network have in common.

    * `groups`, `width_per_group`: of the 3×3 convolution of a bottleneck; 32 and 4 in ResNeXt-50 32×4d
    * `stride_in`: the convolution that halves the resolution; "1x1": v1 (He et al. 2016), "3x3": v1.5 (torchvision)
    * `squeeze_reduction`: squeeze-and-excitation at the branch's end with 1/reduction of the channels; None: without
    * `shortcut`: False leaves relu(f(x)), as in He et al. 2016, Figure 3, middle

    Raises `ModelError` for numbers below 1 and for another `stride_in`.
    """

    groups: int = 1
    width_per_group: int = 64
    stride_in: Literal["1x1", "3x3"] = "3x3"
    squeeze_reduction: int | None = None
    shortcut: bool = True

    def __post_init__(self) -> None:
        numbers = (self.groups, self.width_per_group, 1 if self.squeeze_reduction is None else self.squeeze_reduction)
        if min(numbers) < 1:
            raise ModelError(
                f"groups, width_per_group and squeeze_reduction are {', '.join(map(str, numbers))}", "give 1 or more"
            )
        if self.stride_in not in STRIDE_IN.values():
            raise ModelError(f"there is no block with its stride in {self.stride_in!r}", 'give "3x3" or "1x1"')


class Options(TypedDict, total=False):
    """Options of every network of the family.

    * `replace_stride_with_dilation`: three booleans for the stages 2 to 4; default none
    * `version`: "v1" or "v1.5", default "v1.5" (`BlockStyle.stride_in`)
    * `top`: False yields the features of the last stage, `[N, C, H/32, W/32]` (larger where dilated), without pooling
      and classifier
    """

    replace_stride_with_dilation: Sequence[bool]
    version: Literal["v1", "v1.5"]
    top: bool


class _Block(nn.Module, ABC):
    """relu(branch(x) + x); `[N, in_channels, H, W]` → `[N, expansion · channels, H/stride, W/stride]`."""

    expansion: ClassVar[int]

    def _finish(self, in_channels: int, out_channels: int, stride: int, style: BlockStyle) -> None:
        """What stands behind the branch; called when its layers are there, so that names keep torchvision's order."""
        self.relu = nn.ReLU(inplace=True)
        self.se: nn.Module = nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        self.shortcut = style.shortcut
        if style.squeeze_reduction is not None:
            self.se = SqueezeExcitation(out_channels, out_channels // style.squeeze_reduction, activation=nn.ReLU)
        if style.shortcut and (stride != 1 or in_channels != out_channels):
            self.downsample = nn.Sequential(_conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """f(x), before squeeze-and-excitation; the shape of the block's result."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, not negative."""
        out: Tensor = self.se(self.branch(x))
        if self.shortcut:
            out = out + self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class BasicBlock(_Block):
    """Two 3×3 convolutions. Raises `ModelError` for options that only a bottleneck has."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, dilation: int, style: BlockStyle) -> None:
        super().__init__()
        if dilation != 1:
            raise ModelError("a network of basic blocks has no dilated form", "leave replace_stride_with_dilation out")
        if style.stride_in != "3x3":
            raise ModelError("basic blocks have no 1×1 convolution to put the stride into (v1)", "leave version out")
        if (style.groups, style.width_per_group) != (1, 64):
            raise ModelError("basic blocks have no grouped form", "leave groups and width_per_group out")
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self._finish(in_channels, channels, stride, style)

    def branch(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` → `[N, channels, H/stride, W/stride]`."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        normalized: Tensor = self.bn2(self.conv2(out))
        return normalized


class Bottleneck(_Block):
    """1×1, 3×3 in `style.groups` groups, 1×1 with four times the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, dilation: int, style: BlockStyle) -> None:
        super().__init__()
        width = channels * style.width_per_group // 64 * style.groups
        out_channels = self.expansion * channels
        first, second = (stride, 1) if style.stride_in == "1x1" else (1, stride)
        self.conv1 = _conv1x1(in_channels, width, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, second, groups=style.groups, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self._finish(in_channels, out_channels, stride, style)

    def branch(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` → `[N, 4 · channels, H/stride, W/stride]`."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        normalized: Tensor = self.bn3(self.conv3(out))
        return normalized


class ResidualNet(nn.Module):
    """Input `[N, 3, H, W]` float32; output logits `[N, classes]`, or features `[N, C, H/32, W/32]` with `top` False.

    `layers` counts the blocks of the four stages. Each True in `replace_stride_with_dilation` keeps the resolution of
    stages 2, 3, 4 and spreads their 3×3 convolutions instead: the features are then twice as fine.

    Raises `ModelError` for options of another kind, or which the block does not have.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        classes: int = 1000,
        *,
        style: BlockStyle = BlockStyle(),
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        top: bool = True,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ModelError(f"a classifier of {classes} classes has no meaning", "give 1 or more")
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        dilate = _checked(replace_stride_with_dilation)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, layers, style, dilate)
        self.top = top
        if top:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(STAGE_CHANNELS[-1] * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """What the last stage yields: `[N, C, H/32, W/32]`, finer by 2 for each stride replaced."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        result: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]`, or the features."""
        features = self.features(x)
        if not self.top:
            return features
        logits: Tensor = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits


def resnet18(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """ResNet-18. No dilation, no v1: its blocks are basic."""
    return _network(BasicBlock, (2, 2, 2, 2), classes, BlockStyle(), **options)


def resnet34(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """ResNet-34. No dilation, no v1: its blocks are basic."""
    return _network(BasicBlock, (3, 4, 6, 3), classes, BlockStyle(), **options)


def resnet50(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """ResNet-50."""
    return _network(Bottleneck, (3, 4, 6, 3), classes, BlockStyle(), **options)


def resnet101(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """ResNet-101."""
    return _network(Bottleneck, (3, 4, 23, 3), classes, BlockStyle(), **options)


def resnet152(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """ResNet-152."""
    return _network(Bottleneck, (3, 8, 36, 3), classes, BlockStyle(), **options)


def resnext50_32x4d(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """ResNeXt-50 with 32 groups of 4 channels."""
    return _network(Bottleneck, (3, 4, 6, 3), classes, BlockStyle(groups=32, width_per_group=4), **options)


def resnext101_32x8d(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """ResNeXt-101 with 32 groups of 8 channels."""
    return _network(Bottleneck, (3, 4, 23, 3), classes, BlockStyle(groups=32, width_per_group=8), **options)


def resnext_shallow(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """One grouped bottleneck of ResNeXt 32×4d per stage: the block in a network that runs in a moment."""
    return _network(Bottleneck, (1, 1, 1, 1), classes, BlockStyle(groups=32, width_per_group=4), **options)


def se_resnet50(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """SE-ResNet-50 (Hu et al. 2018): ResNet-50 whose branches end in squeeze-and-excitation."""
    return _network(Bottleneck, (3, 4, 6, 3), classes, BlockStyle(squeeze_reduction=SE_REDUCTION), **options)


def plain34(classes: int = 1000, **options: Unpack[Options]) -> ResidualNet:
    """The plain network of 34 layers that ResNet-34 is compared with (He et al. 2016, Figure 3): no shortcuts."""
    return _network(BasicBlock, (3, 4, 6, 3), classes, BlockStyle(shortcut=False), **options)


def _network(
    block: type[BasicBlock] | type[Bottleneck],
    layers: tuple[int, int, int, int],
    classes: int,
    style: BlockStyle,
    *,
    replace_stride_with_dilation: Sequence[bool] = (False, False, False),
    version: str = "v1.5",
    top: bool = True,
) -> ResidualNet:
    if version not in STRIDE_IN:
        raise ModelError(f"there is no version {version!r} of a residual network", 'give "v1" or "v1.5"')
    style = replace(style, stride_in=STRIDE_IN[version])
    return ResidualNet(
        block, layers, classes, style=style, replace_stride_with_dilation=replace_stride_with_dilation, top=top
    )


def _stages(
    block: type[BasicBlock] | type[Bottleneck],
    layers: tuple[int, int, int, int],
    style: BlockStyle,
    dilate: tuple[bool, bool, bool],
) -> Iterator[nn.Sequential]:
    """The four stages. Where a stride is replaced, the block that had it keeps the dilation of the stage before."""
    in_channels, dilation = STEM_CHANNELS, 1
    for channels, count, first_stride, replaced in zip(
        STAGE_CHANNELS, layers, (1, 2, 2, 2), (False, *dilate), strict=True
    ):
        before = dilation
        stride, dilation = (1, dilation * first_stride) if replaced else (first_stride, dilation)
        out_channels = channels * block.expansion
        first = block(in_channels, channels, stride=stride, dilation=before, style=style)
        others = (block(out_channels, channels, stride=1, dilation=dilation, style=style) for _ in range(count - 1))
        yield nn.Sequential(first, *others)
        in_channels = out_channels


def _checked(replace_stride_with_dilation: Sequence[bool]) -> tuple[bool, bool, bool]:
    """The three booleans. Raises `ModelError` for anything else."""
    match replace_stride_with_dilation:
        case [bool(second), bool(third), bool(fourth)]:
            return second, third, fourth
    raise ModelError(
        f"replace_stride_with_dilation is {replace_stride_with_dilation!r}",
        "give three booleans, for the stages 2, 3 and 4",
    )


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )
