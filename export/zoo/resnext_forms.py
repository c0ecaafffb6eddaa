"""ResNeXt's block in its three equivalent forms (Xie et al. 2017, Figure 3), and the way from each to the next.

With C paths of d channels and D channels in and out, all compute relu(x + Σᵢ Tᵢ(x)):

    (a) split-transform-merge   C times  1×1 D→d ── 3×3 d→d ── 1×1 d→D,  summed
    (b) early concatenation     C times  1×1 D→d ── 3×3 d→d,  concatenated ── 1×1 C·d→D
    (c) grouped convolution     1×1 D→C·d ── 3×3 C·d→C·d in C groups ── 1×1 C·d→D

(a) is (b) because a 1×1 convolution of concatenated channels is the sum of the 1×1 convolutions of the parts; (b) is
(c) because a grouped convolution keeps the parts apart. ReLU follows the first two convolutions and works on each value
alone, so it stands in the way of neither; nor would batch normalization behind these two, which knows only its own
channel. Behind the last it would have to stand after the sum. The blocks here have none, and no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "EarlyConcatenation",
    "GroupedConvolution",
    "SplitTransformMerge",
    "early_concatenation",
    "grouped_convolution",
    "split_transform_merge",
]

Block = TypeVar("Block", bound=nn.Module)


class SplitTransformMerge(nn.Module):
    """Form (a); `[N, channels, H, W]` → the same."""

    def __init__(self, channels: int, cardinality: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, cardinality, width)
        self.paths = nn.ModuleList(
            nn.Sequential(*_transform(channels, width), _conv1x1(width, channels)) for _ in range(cardinality)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, not negative."""
        return functional.relu(x + torch.stack([path(x) for path in self.paths]).sum(0))


class EarlyConcatenation(nn.Module):
    """Form (b); `[N, channels, H, W]` → the same."""

    def __init__(self, channels: int, cardinality: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, cardinality, width)
        self.paths = nn.ModuleList(nn.Sequential(*_transform(channels, width)) for _ in range(cardinality))
        self.merge = _conv1x1(cardinality * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, not negative."""
        return functional.relu(x + self.merge(torch.cat([path(x) for path in self.paths], 1)))


class GroupedConvolution(nn.Module):
    """Form (c), the one that is fast; `[N, channels, H, W]` → the same."""

    def __init__(self, channels: int, cardinality: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, cardinality, width)
        self.transform = nn.Sequential(*_transform(channels, cardinality * width, groups=cardinality))
        self.merge = _conv1x1(cardinality * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, not negative."""
        return functional.relu(x + self.merge(self.transform(x)))


def early_concatenation(block: SplitTransformMerge) -> EarlyConcatenation:
    """(a) → (b): the last convolutions of the paths, side by side, are one that reads all of them."""
    state = block.state_dict()
    merge = torch.cat([state.pop(f"paths.{path}.4.weight") for path in range(len(block.paths))], 1)
    return _filled(EarlyConcatenation(*block.shape), {**state, "merge.weight": merge})


def grouped_convolution(block: EarlyConcatenation) -> GroupedConvolution:
    """(b) → (c): the paths' convolutions stacked; the 3×3 ones become the groups of one."""
    state, paths = block.state_dict(), range(len(block.paths))
    stacked = {
        f"transform.{layer}.weight": torch.cat([state[f"paths.{path}.{layer}.weight"] for path in paths])
        for layer in (0, 2)
    }
    return _filled(GroupedConvolution(*block.shape), {**stacked, "merge.weight": state["merge.weight"]})


def split_transform_merge(block: GroupedConvolution) -> SplitTransformMerge:
    """(c) → (a): each path takes its channels of all three convolutions."""
    _, cardinality, _ = block.shape
    state = block.state_dict()
    parts = {
        0: state["transform.0.weight"].chunk(cardinality),
        2: state["transform.2.weight"].chunk(cardinality),
        4: state["merge.weight"].chunk(cardinality, 1),
    }
    paths = {
        f"paths.{path}.{layer}.weight": part for layer, chunks in parts.items() for path, part in enumerate(chunks)
    }
    return _filled(SplitTransformMerge(*block.shape), paths)


def _filled(block: Block, state: Mapping[str, Tensor]) -> Block:
    """`block` with copies of the tensors of `state`, in their dtype."""
    block.to(dtype=next(iter(state.values())).dtype)
    block.load_state_dict(state)
    return block


def _transform(in_channels: int, channels: int, *, groups: int = 1) -> list[nn.Module]:
    """What all forms begin with: reduce, then look at the neighbourhood."""
    spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
    return [_conv1x1(in_channels, channels), nn.ReLU(), spatial, nn.ReLU()]


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)
