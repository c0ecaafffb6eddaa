"""ResNeXt's three block forms: equal outputs under mapped weights, and the arithmetic of docs/residual.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgewright.export.zoo.resnext_forms import (
    EarlyConcatenation,
    GroupedConvolution,
    SplitTransformMerge,
    early_concatenation,
    grouped_convolution,
    split_transform_merge,
)

CHANNELS, CARDINALITY, WIDTH = 256, 32, 4  # conv2 of ResNeXt-50 32×4d: Xie et al. 2017, Figure 3
TOLERANCE = 1e-12
NOTE = Path(__file__).parents[3] / "docs" / "residual.md"


@pytest.fixture(scope="module")
def split() -> SplitTransformMerge:
    torch.manual_seed(0)
    return SplitTransformMerge(CHANNELS, CARDINALITY, WIDTH).double()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn((2, CHANNELS, 6, 5), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(split: SplitTransformMerge, x: Tensor) -> Tensor:
    """relu(x + Σ Tᵢ(x)), path by path."""
    total = x.clone()
    for path in split.paths:
        assert isinstance(path, nn.Sequential)
        total += path[4](path[2](path[0](x).clamp(min=0)).clamp(min=0)).detach()
    return total.clamp(min=0)


def difference(block: nn.Module, x: Tensor, expected: Tensor) -> float:
    with torch.inference_mode():
        return float((block(x) - expected).abs().max() / (expected - x.clamp(min=0)).abs().max())


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_all_forms_compute_the_same(split: SplitTransformMerge, x: Tensor, expected: Tensor) -> None:
    early = early_concatenation(split)
    grouped = grouped_convolution(early)
    again = split_transform_merge(grouped)
    assert isinstance(early, EarlyConcatenation)
    assert isinstance(grouped, GroupedConvolution)
    for block in (split, early, grouped, again):
        assert difference(block, x, expected) <= TOLERANCE


def test_once_around_gives_the_same_weights_back(split: SplitTransformMerge) -> None:
    again = split_transform_merge(grouped_convolution(early_concatenation(split)))
    assert list(again.state_dict()) == list(split.state_dict())
    for name, value in split.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_mapped_block_has_its_own_weights(split: SplitTransformMerge) -> None:
    before = {name: value.clone() for name, value in split.state_dict().items()}
    early = early_concatenation(split)
    for block in (early, grouped_convolution(early)):
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
    assert all(torch.equal(value, before[name]) for name, value in split.state_dict().items())


def test_the_order_of_the_paths_says_nothing(split: SplitTransformMerge, x: Tensor, expected: Tensor) -> None:
    turned = SplitTransformMerge(CHANNELS, CARDINALITY, WIDTH).double()
    turned.paths = nn.ModuleList([*split.paths[1:], split.paths[0]])
    assert difference(grouped_convolution(early_concatenation(turned)), x, expected) <= TOLERANCE


@pytest.mark.parametrize("layer", ["transform.0", "transform.2", "merge"])
def test_a_permuted_mapping_is_caught(split: SplitTransformMerge, x: Tensor, expected: Tensor, layer: str) -> None:
    """One convolution that takes another path's channels."""
    grouped = grouped_convolution(early_concatenation(split))
    weight = grouped.state_dict()[f"{layer}.weight"]
    weight.copy_(weight.roll(WIDTH, 1 if layer == "merge" else 0))
    assert difference(grouped, x, expected) > 0.1


def test_other_sizes(x: Tensor) -> None:
    torch.manual_seed(2)
    split = SplitTransformMerge(12, 3, 2).double()
    small = x[:, :12]
    with torch.inference_mode():
        expected = split(small)
    assert difference(grouped_convolution(early_concatenation(split)), small, expected) <= TOLERANCE


def test_precision_is_kept() -> None:
    split = SplitTransformMerge(8, 2, 2).half()
    assert {value.dtype for value in early_concatenation(split).state_dict().values()} == {torch.float16}


# The numbers of the note


def test_parameters_of_the_forms(split: SplitTransformMerge) -> None:
    early = early_concatenation(split)
    formula = CARDINALITY * (256 * WIDTH + 3 * 3 * WIDTH * WIDTH + WIDTH * 256)
    for block in (split, early, grouped_convolution(early)):
        assert parameters(block) == formula == 70_144


def test_the_note_has_the_numbers_of_modules(split: SplitTransformMerge) -> None:
    bottleneck = nn.Sequential(
        nn.Conv2d(256, 64, 1, bias=False),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.Conv2d(64, 256, 1, bias=False),
    )
    wide = nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1, bias=False) for _ in range(2)))
    counts = [parameters(module) for module in (split, bottleneck, wide)]
    assert counts == [70_144, 69_632, 1_179_648]
    note = NOTE.read_text(encoding="utf-8")
    assert all(f"{count:,}" in note for count in counts)
