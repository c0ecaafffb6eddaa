"""Compound scaling. Oracles: the coefficients of the reference implementation, torchvision's networks, arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgewright.export.zoo import mbconv
from edgewright.export.zoo.compound_scaling import (
    ALPHA,
    BASELINE,
    BETA,
    EFFICIENTNETS,
    GAMMA,
    LITES,
    Coefficients,
    Layout,
    coefficients,
    scaled,
    scaled_channels,
    scaled_layers,
    scaled_lite,
)
from edgewright.runtime.errors import ModelError

# width, depth, resolution, dropout: efficientnet_builder.py of the reference implementation (tensorflow/tpu)
PUBLISHED = {
    "efficientnet_b0": (1.0, 1.0, 224, 0.2),
    "efficientnet_b1": (1.0, 1.1, 240, 0.2),
    "efficientnet_b2": (1.1, 1.2, 260, 0.3),
    "efficientnet_b3": (1.2, 1.4, 300, 0.3),
    "efficientnet_b4": (1.4, 1.8, 380, 0.4),
    "efficientnet_b5": (1.6, 2.2, 456, 0.4),
    "efficientnet_b6": (1.8, 2.6, 528, 0.5),
    "efficientnet_b7": (2.0, 3.1, 600, 0.5),
}
ONE_PHI = {
    "efficientnet_b0": 0.0,
    "efficientnet_b1": 0.49,
    "efficientnet_b2": 1.07,
    "efficientnet_b3": 2.09,
    "efficientnet_b4": 3.78,
}
BETWEEN = {"efficientnet_b5": 4.5, "efficientnet_b6": 5.6, "efficientnet_b7": 6.7}  # too deep, still too narrow
UP_TO = 8.0  # beyond B7 in each dimension


def layers(layout: Layout) -> list[int]:
    return [stage.layers for stage in layout.stages]


def channels(layout: Layout) -> list[int]:
    return [layout.stem_channels, *(stage.out_channels for stage in layout.stages), layout.head_channels]


def by_published(name: str) -> Layout:
    width, depth, resolution, _ = PUBLISHED[name]
    return scaled(Coefficients(depth, width, resolution))


@pytest.fixture(scope="module", params=list(PUBLISHED))
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Name, our network, torchvision's; without memory for weights."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        return request.param, getattr(mbconv, request.param)(), getattr(models, request.param)()


# The networks are torchvision's


def test_names_and_shapes_are_torchvisions_in_its_order(pair: tuple[str, Any, Any]) -> None:
    _, ours, theirs = pair
    expected = [(name, tuple(value.shape)) for name, value in theirs.state_dict().items()]
    assert [(name, tuple(value.shape)) for name, value in ours.state_dict().items()] == expected
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count


def test_what_is_no_weight_is_torchvisions_too(pair: tuple[str, Any, Any]) -> None:
    """Strides, kernels, padding; epsilon and momentum; dropout and the chance of each block to be dropped."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Dropout, nn.SiLU, nn.Sigmoid)

    def facts(model: nn.Module) -> list[tuple[object, ...]]:
        names = ("stride", "kernel_size", "padding", "dilation", "groups", "eps", "momentum", "p")
        return [
            (type(module), *(getattr(module, name, None) for name in names))
            for module in model.modules()
            if isinstance(module, kinds)
        ]

    _, ours, theirs = pair
    assert facts(ours) == facts(theirs)
    expected = [module.p for module in theirs.modules() if type(module).__name__ == "StochasticDepth"]
    found = [module.drop_probability for module in ours.modules() if isinstance(module, mbconv.StochasticDepth)]
    assert found == pytest.approx(expected)


def test_layers_and_channels_are_those_of_torchvisions_modules(pair: tuple[str, Any, Any]) -> None:
    """Counted in the modules, not with our formulas."""
    name, _, theirs = pair
    stem, *stages, head = theirs.features
    layout = EFFICIENTNETS[name].layout
    assert layers(layout) == [len(stage) for stage in stages]
    assert channels(layout) == [
        stem[0].out_channels,
        *(stage[-1].block[-1][0].out_channels for stage in stages),
        head[0].out_channels,
    ]


# One φ


def test_phi_doubles_the_work() -> None:
    """Tan & Le 2019, equation 3: α · β² · γ² ≈ 2."""
    assert pytest.approx(2, rel=0.05) == ALPHA * BETA**2 * GAMMA**2
    assert (ALPHA, BETA, GAMMA) == (1.2, 1.1, 1.15)


def test_phi_1_written_out() -> None:
    assert coefficients(1) == Coefficients(depth=1.2, width=1.1, resolution=258)  # 224 · 1.15 = 257.6
    assert coefficients(0) == Coefficients(depth=1.0, width=1.0, resolution=224)
    assert scaled(coefficients(0)) == BASELINE


@pytest.mark.parametrize("name", ONE_PHI)
def test_one_phi_gives_b0_to_b4(name: str) -> None:
    layout = scaled(coefficients(ONE_PHI[name]))
    assert layout == by_published(name) == EFFICIENTNETS[name].layout


def test_depths_of_b3_and_b4_differ_without_consequence() -> None:
    depths = {name: coefficients(phi).depth for name, phi in ONE_PHI.items()}
    different = {name: depth for name, depth in depths.items() if depth != PUBLISHED[name][1]}
    assert different == {"efficientnet_b3": 1.5, "efficientnet_b4": 2.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_have_the_layout_and_dropout_of_the_published_coefficients(name: str) -> None:
    variant = EFFICIENTNETS[name]
    assert variant.layout == by_published(name)
    assert variant.dropout == PUBLISHED[name][3]
    assert variant.layout.resolution == PUBLISHED[name][2]


@pytest.mark.parametrize("name", BETWEEN)
def test_b5_to_b7_have_width_and_resolution_of_one_phi(name: str) -> None:
    phi = round(math.log(PUBLISHED[name][2] / 224) / math.log(1.15), 2)
    layout = scaled(coefficients(phi))
    assert (channels(layout), layout.resolution) == (channels(by_published(name)), PUBLISHED[name][2])
    assert layers(layout) != layers(by_published(name))


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("decimals", [1, 15], ids=["rounded as published", "not rounded"])
def test_no_phi_gives_both_layers_and_channels_of_b5_to_b7(name: str, decimals: int) -> None:
    """Both grow with φ (next test). In between, some stage is too deep already and some too narrow still: from there on
    no φ has the layers, before it none has the channels."""
    phi = BETWEEN[name]
    layout = scaled(Coefficients(round(1.2**phi, decimals), round(1.1**phi, decimals), 224))
    aim = by_published(name)
    assert any(found > wanted for found, wanted in zip(layers(layout), layers(aim), strict=True))
    assert any(found < wanted for found, wanted in zip(channels(layout), channels(aim), strict=True))


def test_layers_and_channels_never_shrink_with_phi() -> None:
    layouts = [scaled(coefficients(float(phi))) for phi in np.arange(0, UP_TO, 0.01)]
    for values in (layers, channels):
        assert (np.diff([values(layout) for layout in layouts], axis=0) >= 0).all()


@pytest.mark.parametrize("name", BETWEEN)
def test_the_search_that_finds_none(name: str) -> None:
    """The same without the argument; and it would find B4."""

    def fitting(aim: Layout) -> list[float]:
        found = [(float(phi), scaled(coefficients(float(phi)))) for phi in np.arange(0, UP_TO, 0.01)]
        return [phi for phi, layout in found if (layers(layout), channels(layout)) == (layers(aim), channels(aim))]

    assert fitting(by_published(name)) == []
    assert fitting(by_published("efficientnet_b4"))


def test_the_depths_are_those_of_another_alpha() -> None:
    for name, (_, _, resolution, _) in PUBLISHED.items():
        phi = math.log(resolution / 224) / math.log(1.15)
        assert [math.ceil(1.17**phi * count) for count in layers(BASELINE)] == layers(by_published(name))


@pytest.mark.parametrize("phi", [-0.1, math.nan, math.inf])
def test_senseless_phi_is_refused(phi: float) -> None:
    with pytest.raises(ModelError, match="has no meaning; give a finite φ"):
        coefficients(phi)
    with pytest.raises(ModelError, match="has no meaning; give a finite φ"):
        coefficients(1.0, depth_phi=phi)


# Rounding


@pytest.mark.parametrize(
    ("count", "width", "expected"),
    [
        (32, 1.0, 32),
        (32, 1.1, 32),  # 35.2: nearest is 32, which is 9 % smaller
        (40, 1.1, 48),  # 44, half way: up
        (24, 1.2, 32),  # 28.8
        (10, 1.1, 16),  # 11: nearest is 8, more than 10 % smaller
        (1, 0.5, 8),  # never less than 8
        (1280, 2.0, 2560),
    ],
)
def test_channels_by_hand(count: int, width: float, expected: int) -> None:
    assert scaled_channels(count, width) == expected


def test_channels_as_torchvision_rounds_them() -> None:
    make_divisible = pytest.importorskip("torchvision.models._utils")._make_divisible
    for count in (1, 8, 16, 24, 40, 80, 112, 192, 320, 1280):
        for width in np.arange(0.3, 4.0, 0.05):
            found = scaled_channels(count, float(width))
            assert found == make_divisible(count * float(width), 8)
            assert found % 8 == 0
            assert found >= 0.9 * count * width


@pytest.mark.parametrize(("count", "depth", "expected"), [(1, 1.0, 1), (1, 1.1, 2), (4, 1.2, 5), (3, 2.0, 6)])
def test_layers_are_rounded_up(count: int, depth: float, expected: int) -> None:
    assert scaled_layers(count, depth) == expected


# The Lites


@pytest.mark.parametrize("name", LITES)
def test_lites_keep_stem_head_and_the_depth_of_the_ends(name: str) -> None:
    layout = LITES[name].layout
    assert (layout.stem_channels, layout.head_channels) == (32, 1280)
    assert (layers(layout)[0], layers(layout)[-1]) == (1, 1)


def test_lites_written_out() -> None:
    """Coefficients 1.0, 1.0; 1.1, 1.0; 1.2, 1.1 (depth, width)."""
    assert LITES["efficientnet_lite0"].layout == BASELINE
    one, two = LITES["efficientnet_lite1"].layout, LITES["efficientnet_lite2"].layout
    assert (layers(one), channels(one), one.resolution) == ([1, 3, 3, 4, 4, 5, 1], channels(BASELINE), 240)
    assert layers(two) == [1, 3, 3, 4, 4, 5, 1]
    assert channels(two) == [32, 16, 24, 48, 88, 120, 208, 352, 1280]
    assert (two.resolution, LITES["efficientnet_lite2"].dropout) == (260, 0.3)


def test_scaling_a_lite_is_not_scaling_all() -> None:
    by = Coefficients(1.2, 1.2, 300)
    assert layers(scaled(by))[0] == 2
    assert layers(scaled_lite(by))[0] == 1
    assert channels(scaled(by))[0] == 40
    assert channels(scaled_lite(by))[0] == 32
    assert channels(scaled(by))[1:-1] == channels(scaled_lite(by))[1:-1]
