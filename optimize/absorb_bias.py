"""High-bias absorption: what a channel always gives, at the least, moves into the bias of the next layer.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.3: if the
pre-activations W₁x + b₁ of a channel are never below some c > 0, ReLU does nothing to the c below them, and

    b₁ → b₁ − c        b₂ → b₂ + W₂ c

leaves everything as it was, but that the activation between the two now reaches from 0 on: none of the levels of a
range that has to hold 0 is spent on what is below c. The paper takes c = max(0, β − 3γ) from batch normalization; here
c is the least that was observed, which changes nothing on the images it was observed on.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.channel_statistics import channel_statistics
from edgewright.optimize.edits import label
from edgewright.optimize.layer_pairs import Pair, bias_of, layout_of, pair_behind, weight_of
from edgewright.optimize.passes import PassResult, Skip
from edgewright.optimize.plan import COMPUTE_OPERATORS
from edgewright.optimize.repairs import with_bias_shifts

__all__ = ["absorb_high_biases"]

SHIFT_KEEPING = (
    *("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
    *("Flatten", "Reshape", "Squeeze", "Dropout", "Identity"),
)
"""f(x + c) = f(x) + c for each channel, as long as x ≥ 0."""


def absorb_high_biases(model: ir.Model, images: NDArray[np.float32], *, threads: int = 0) -> PassResult:
    """A copy of folded FP32 `model` whose ReLUs give less by what they always give; `changed` counts the pairs.

    `images` `[N, C, H, W]` are those of the calibration: on them the model computes what it did, on others it differs
    where a channel falls below all that was observed. Layers that cannot hand on a shift are in `skipped`, but not
    those that have none.
    """
    pairs: list[Pair] = []
    skipped: list[Skip] = []
    for node in model.graph:
        if node.op_type in COMPUTE_OPERATORS:
            found = _absorbing_pair(node)
            if isinstance(found, Pair):
                pairs.append(found)
            else:
                skipped.append(Skip(label(node), found))
    results = [str(pair.first.outputs[0].name) for pair in pairs]
    lowest = channel_statistics(model, results, images, "ReduceMin", threads=threads) if pairs else {}
    shifts: dict[str, NDArray[np.float32]] = {}
    changed = 0
    for pair, result in zip(pairs, results, strict=True):
        constant = np.maximum(lowest[result].min(axis=0), 0.0)
        if constant.any():
            _add(shifts, pair.first, -constant)
            _add(shifts, pair.second, _answer(pair, constant))
            changed += 1
    return PassResult(with_bias_shifts(model, shifts), changed, tuple(skipped))


def _absorbing_pair(first: ir.Node) -> Pair | str:
    """The pair that layer `first` begins, if a shift passes from one bias to the other, or the reason."""
    pair = pair_behind(first, SHIFT_KEEPING)
    if isinstance(pair, str):
        return pair
    if not any(node.op_type == "Relu" for node in pair.between):
        return "no ReLU is behind it"
    if "MatMul" in (first.op_type, pair.second.op_type):
        return "MatMul has no bias"
    averaging = next((node for node in pair.between if node.op_type == "AveragePool" and _averages_zeros(node)), None)
    if averaging is not None:
        return f"{averaging.name} averages over zeros too, which are not shifted"
    if pair.second.op_type == "ConvTranspose" or _is_padded(pair.second):
        return f"{pair.second.name} pads with zeros, which are not shifted"
    channels = _channels(pair.second)
    bias = bias_of(pair.second, channels)
    return bias if isinstance(bias, str) else pair


def _averages_zeros(pool: ir.Node) -> bool:
    return _is_padded(pool) and bool(pool.attributes.get_int("count_include_pad", 0))


def _is_padded(node: ir.Node) -> bool:
    """Whether a convolution or pooling looks beyond the border of its map."""
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return automatic not in ("NOTSET", "VALID") or any(node.attributes.get_ints("pads", []))


def _channels(layer: ir.Node) -> int:
    """Output channels of a layer with a constant weight."""
    weight = weight_of(layer)
    assert not isinstance(weight, str), "it belongs to a pair"
    layout = layout_of(layer, weight.shape)
    return layout.channels(layout.outputs)


def _answer(pair: Pair, constant: NDArray[np.float32]) -> NDArray[np.float32]:
    """W₂ c: what `pair.second` gives for c `[C]` on its input channels, at every place, float32 `[O]`."""
    weight = weight_of(pair.second)
    assert not isinstance(weight, str), "it belongs to a pair"
    layout = layout_of(pair.second, weight.shape, pair.repeats)
    products = weight.reshape(layout.shape) * layout.along(layout.inputs, constant)
    sums: NDArray[np.float64] = products.sum(axis=layout.others(layout.outputs), dtype=np.float64)
    alpha = pair.second.attributes.get_float("alpha", 1.0) if pair.second.op_type == "Gemm" else 1.0
    return (alpha * sums.reshape(-1)).astype(np.float32)


def _add(shifts: dict[str, NDArray[np.float32]], layer: ir.Node, shift: NDArray[np.float32]) -> None:
    name = str(layer.name)
    shifts[name] = shifts[name] + shift if name in shifts else shift
