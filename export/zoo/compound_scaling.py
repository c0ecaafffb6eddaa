"""EfficientNet's compound scaling (Tan & Le 2019, section 3.3): the layouts of B0 … B7 and of Lite0 … Lite2.

One number φ makes the baseline B0 deeper, wider and finer at once, so that its work grows by about 2^φ:

    depth α^φ, width β^φ, resolution γ^φ        α = 1.2, β = 1.1, γ = 1.15        α · β² · γ² ≈ 2

Depth and width are rounded to one decimal, as they are published; resolution to whole pixels; a stage has
ceil(depth · layers) layers and channels are multiples of 8. With this, one φ gives B0, B1, B2, B3 and B4 exactly:
φ = 0, 0.49, 1.07, 2.09, 3.78. For B5, B6 and B7 it gives width and resolution, but not depth: the published networks
are shallower than α = 1.2 says, and no φ gives both their layers and their channels. Their depth has its own φ, about
0.8 smaller. (All layer counts of B0 … B7 are those of α = 1.17, unrounded.)

Two depths differ and leave no trace: where the reference implementation has 1.4 for B3 and 1.8 for B4, the formula
gives 1.5 and 2.0; the layers, rounded up, are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edgewright.runtime.errors import ModelError

__all__ = [
    "BASELINE",
    "EFFICIENTNETS",
    "LITES",
    "Coefficients",
    "Layout",
    "Stage",
    "Variant",
    "coefficients",
    "scaled",
    "scaled_channels",
    "scaled_layers",
    "scaled_lite",
]

ALPHA = 1.2  # depth; these three: a grid search on B0 (Tan & Le 2019, section 3.3, step 1)
BETA = 1.1  # width
GAMMA = 1.15  # resolution
CHANNEL_MULTIPLE = 8
LARGEST_LOSS = 0.1  # rounding down takes at most a tenth of the channels (the reference implementation)


@dataclass(frozen=True)
class Stage:
    """One row of Table 1 in Tan & Le 2019: `layers` blocks, the first of which has `stride`."""

    expand_ratio: int
    kernel_size: int
    stride: int
    out_channels: int
    layers: int


@dataclass(frozen=True)
class Layout:
    """Everything that scaling changes; `resolution` is the side of the square input in pixels."""

    stem_channels: int
    stages: tuple[Stage, ...]
    head_channels: int
    resolution: int


@dataclass(frozen=True)
class Coefficients:
    """Factors of the baseline's layers and channels, and the input's side in pixels."""

    depth: float
    width: float
    resolution: int


@dataclass(frozen=True)
class Variant:
    """A published network: its layout and the dropout it was trained with."""

    layout: Layout
    dropout: float


BASELINE = Layout(
    stem_channels=32,
    stages=(
        Stage(1, 3, 1, 16, 1),
        Stage(6, 3, 2, 24, 2),
        Stage(6, 5, 2, 40, 2),
        Stage(6, 3, 2, 80, 3),
        Stage(6, 5, 1, 112, 3),
        Stage(6, 5, 2, 192, 4),
        Stage(6, 3, 1, 320, 1),
    ),
    head_channels=1280,
    resolution=224,
)


def coefficients(phi: float, *, depth_phi: float | None = None) -> Coefficients:
    """The coefficients of φ; `depth_phi` is another φ for the depth alone, as B5, B6 and B7 need it.

    Raises `ModelError` if a φ is negative or not finite.
    """
    depth_phi = phi if depth_phi is None else depth_phi
    if not (0 <= phi < math.inf and 0 <= depth_phi < math.inf):
        raise ModelError(
            f"compound scaling by φ = {phi} (depth {depth_phi}) has no meaning", "give a finite φ, 0 (B0) or more"
        )
    return Coefficients(
        depth=round(ALPHA**depth_phi, 1),
        width=round(BETA**phi, 1),
        resolution=round(BASELINE.resolution * GAMMA**phi),
    )


def scaled_layers(layers: int, depth: float) -> int:
    """Layers of a stage: depth · layers, rounded up (the reference implementation's `round_repeats`)."""
    return math.ceil(depth * layers)


def scaled_channels(channels: int, width: float) -> int:
    """The multiple of 8 nearest to width · channels, the next one if that is more than 10 % smaller; at least 8.

    The reference implementation's `round_filters`; halves are rounded up.
    """
    exact = width * channels
    nearest = max(CHANNEL_MULTIPLE, int(exact + CHANNEL_MULTIPLE / 2) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE)
    return nearest if nearest >= (1 - LARGEST_LOSS) * exact else nearest + CHANNEL_MULTIPLE


def scaled(by: Coefficients) -> Layout:
    """The baseline made deeper, wider and finer."""
    stages = tuple(
        replace(
            stage,
            out_channels=scaled_channels(stage.out_channels, by.width),
            layers=scaled_layers(stage.layers, by.depth),
        )
        for stage in BASELINE.stages
    )
    return Layout(
        scaled_channels(BASELINE.stem_channels, by.width),
        stages,
        scaled_channels(BASELINE.head_channels, by.width),
        by.resolution,
    )


def scaled_lite(by: Coefficients) -> Layout:
    """As `scaled`, but stem, head and the depth of the first and last stage stay: they are large already.

    (The reference implementation's `fix_head_stem`.)
    """
    layout = scaled(by)
    first, *middle, last = layout.stages
    return Layout(
        BASELINE.stem_channels,
        (
            replace(first, layers=BASELINE.stages[0].layers),
            *middle,
            replace(last, layers=BASELINE.stages[-1].layers),
        ),
        BASELINE.head_channels,
        by.resolution,
    )


EFFICIENTNETS = {  # φ = log(published resolution / 224) / log(γ) to two decimals; dropout as published
    "efficientnet_b0": Variant(scaled(coefficients(0)), 0.2),
    "efficientnet_b1": Variant(scaled(coefficients(0.49)), 0.2),
    "efficientnet_b2": Variant(scaled(coefficients(1.07)), 0.3),
    "efficientnet_b3": Variant(scaled(coefficients(2.09)), 0.3),
    "efficientnet_b4": Variant(scaled(coefficients(3.78)), 0.4),
    "efficientnet_b5": Variant(scaled(coefficients(5.09, depth_phi=4.32)), 0.4),
    "efficientnet_b6": Variant(scaled(coefficients(6.13, depth_phi=5.24)), 0.5),
    "efficientnet_b7": Variant(scaled(coefficients(7.05, depth_phi=6.21)), 0.5),
}

LITES = {  # coefficients of the reference implementation's efficientnet_lite_builder.py
    "efficientnet_lite0": Variant(scaled_lite(Coefficients(1.0, 1.0, 224)), 0.2),
    "efficientnet_lite1": Variant(scaled_lite(Coefficients(1.1, 1.0, 240)), 0.2),
    "efficientnet_lite2": Variant(scaled_lite(Coefficients(1.2, 1.1, 260)), 0.3),
}
