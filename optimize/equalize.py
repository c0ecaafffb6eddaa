"""Cross-layer equalization: the channels between two layers are scaled until both layers spread them equally.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1. ReLU passes a
positive factor on, f(s · x) = s · f(x), so that for any s > 0, one for each channel i between two layers,

    W₁ → W₁ / s,   b₁ → b₁ / s   (output channels)        W₂ → W₂ · s   (input channels)

changes nothing but how far the channels reach. With r₁ and r₂ the largest magnitudes of a channel in W₁ and W₂,

    s = √(r₁ · r₂) / r₂

makes both √(r₁ · r₂), the most that both can have (equation 11). Where layers follow each other, each pair is done in
turn until nothing changes; expansion, depthwise convolution and projection are two such pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.edits import add_constant, label, remove_if_unused, value_names
from edgewright.optimize.layer_pairs import (
    POSITIVELY_HOMOGENEOUS,
    Pair,
    bias_of,
    layout_of,
    pair_behind,
    weight_of,
)
from edgewright.optimize.passes import PassResult, Skip
from edgewright.optimize.plan import COMPUTE_OPERATORS

__all__ = ["equalize"]

Float64 = NDArray[np.float64]

NEARLY_HOMOGENEOUS = ("Clip", "SiLU", "HardSwish")
"""ReLU6 and its like: they pass on a scale only as far as an activation is small, or large."""
LARGEST_SCALE = 1e4
"""And 1 / LARGEST_SCALE the smallest: a channel that is further off is as good as dead, and its bias would explode."""
MOST_ROUNDS = 100
SETTLED = 1e-3
"""Of a scale's relative change in the last round, and of a scale's distance from 1 that is not worth a change."""


def equalize(model: ir.Model, *, inexact: bool = False) -> PassResult:
    """A copy of folded FP32 `model` with equalized pairs of layers; `changed` counts the pairs.

    `inexact` also goes through Clip, SiLU and HardSwish, and then the model computes something else: take it only if
    that was measured to be better. Everything else changes by rounding alone. Layers that begin no pair are listed in
    `skipped`. A channel that is zero on either side keeps its scale.
    """
    equalized = model.clone()
    passing = (*POSITIVELY_HOMOGENEOUS, *NEARLY_HOMOGENEOUS) if inexact else POSITIVELY_HOMOGENEOUS
    pairs: list[Pair] = []
    skipped: list[Skip] = []
    for node in equalized.graph:
        if node.op_type in COMPUTE_OPERATORS:
            found = pair_behind(node, passing)
            if isinstance(found, Pair):
                pairs.append(found)
            else:
                skipped.append(Skip(label(node), found))
    names = value_names(equalized)
    changed = 0
    for chain in _chains(pairs):
        for pair, scale in zip(chain, _settled_scales(chain), strict=True):
            if _distance(scale, np.ones_like(scale)) > SETTLED:
                _rescale(equalized.graph, pair, scale, names)
                changed += 1
    return PassResult(equalized, changed, tuple(skipped))


class _Spread:
    """The largest magnitudes of a layer's weight between each input and each output channel."""

    def __init__(self, layer: ir.Node, repeats: int) -> None:
        weight = weight_of(layer)
        assert not isinstance(weight, str), "a pair has two weights"
        self.layout = layout_of(layer, weight.shape, repeats)
        kernel = self.layout.others((*self.layout.outputs, *self.layout.inputs))
        self.magnitudes = np.abs(weight).reshape(self.layout.shape).max(axis=kernel, keepdims=True)

    def of_outputs(self, input_scale: Float64 | None) -> Float64:
        """Of each output channel, with the input channels multiplied by `input_scale`."""
        return self._largest(self.layout.outputs, self.layout.inputs, input_scale)

    def of_inputs(self, output_scale: Float64 | None) -> Float64:
        """Of each input channel, with the output channels divided by `output_scale`."""
        factors = None if output_scale is None else 1.0 / output_scale
        return self._largest(self.layout.inputs, self.layout.outputs, factors)

    def _largest(self, axes: tuple[int, int], scaled: tuple[int, int], factors: Float64 | None) -> Float64:
        magnitudes = self.magnitudes if factors is None else self.magnitudes * self.layout.along(scaled, factors)
        largest: Float64 = magnitudes.max(axis=self.layout.others(axes)).reshape(-1).astype(np.float64)
        return largest


def _settled_scales(chain: Sequence[Pair]) -> list[Float64]:
    """The scales s `[C]` of pairs of which each begins with the layer that ends the one before."""
    spreads = [_Spread(chain[0].first, 1), *(_Spread(pair.second, pair.repeats) for pair in chain)]
    scales = [np.ones(pair.channels) for pair in chain]
    for _ in range(MOST_ROUNDS):
        before = list(scales)
        for index in range(len(chain)):
            r1 = spreads[index].of_outputs(scales[index - 1] if index else None)
            r2 = spreads[index + 1].of_inputs(scales[index + 1] if index + 1 < len(chain) else None)
            scales[index] = _scale(r1, r2)
        if max(map(_distance, scales, before)) < SETTLED:
            break
    return scales


def _chains(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in runs: within one each pair begins with the layer that ends the one before."""
    after = {pair.first: pair for pair in pairs}
    seconds = {pair.second for pair in pairs}
    chains = []
    for pair in pairs:
        if pair.first not in seconds:
            chain = [pair]
            while chain[-1].second in after:
                chain.append(after[chain[-1].second])
            chains.append(chain)
    return chains


def _scale(r1: Float64, r2: Float64) -> Float64:
    """√(r₁ · r₂) / r₂ within its limits, and 1 where a channel is zero on either side."""
    alive = (r1 > 0) & (r2 > 0)
    scale = np.sqrt(r1, where=alive, out=np.ones_like(r1)) / np.sqrt(r2, where=alive, out=np.ones_like(r2))
    return np.asarray(np.clip(scale, 1 / LARGEST_SCALE, LARGEST_SCALE))


def _distance(scale: Float64, other: Float64) -> float:
    """The largest relative difference of two scales, as a logarithm."""
    return float(np.abs(np.log(scale / other)).max(initial=0.0))


def _rescale(graph: ir.Graph, pair: Pair, scale: Float64, names: set[str | None]) -> None:
    """Divides what `pair.first` gives by `scale` and multiplies what `pair.second` reads."""
    _scale_weight(graph, pair.first, 1.0 / scale, names)
    _scale_bias(graph, pair.first, 1.0 / scale, names)
    _scale_weight(graph, pair.second, scale, names, pair.repeats)


def _scale_weight(
    graph: ir.Graph, layer: ir.Node, factors: Float64, names: set[str | None], repeats: int | None = None
) -> None:
    """Multiplies output channels by `factors`, or, where `repeats` is given, input channels."""
    weight = weight_of(layer)
    assert not isinstance(weight, str), "a pair has two weights"
    layout = layout_of(layer, weight.shape, repeats or 1)
    axes = layout.outputs if repeats is None else layout.inputs
    scaled = (weight.reshape(layout.shape) * layout.along(axes, factors)).reshape(weight.shape)
    _replace(graph, layer, 1, scaled, f"{label(layer)}::equalized_weight", names)


def _scale_bias(graph: ir.Graph, layer: ir.Node, factors: Float64, names: set[str | None]) -> None:
    bias = bias_of(layer, factors.size)
    if bias is not None and not isinstance(bias, str):
        scaled = (bias * factors).astype(np.float32)
        _replace(graph, layer, 2, scaled, f"{label(layer)}::equalized_bias", names)


def _replace(
    graph: ir.Graph, layer: ir.Node, index: int, array: NDArray[np.float32], name: str, names: set[str | None]
) -> None:
    old = layer.inputs[index]
    layer.replace_input_with(index, add_constant(graph, array, name, names))
    remove_if_unused(old)
