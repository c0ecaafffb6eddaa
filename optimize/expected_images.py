"""Do the images look like those that the network was trained on? Its first normalization layer remembers them.

Batch normalization keeps the mean and the variance, per channel, of everything that reached it in training. What
reaches it from the calibration images can be compared with that: as they are prepared, and with the colours swapped or
another usual normalization instead. If one of those fits much better, the preprocessing is the suspect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.segments import GraphRun, segment
from edgewright.runtime.preprocess import Preprocess

__all__ = ["Evidence", "Expectation", "expectation_of", "preprocessing_evidence"]

Batch = NDArray[np.float32]
Statistics = NDArray[np.float64]

BN_EPSILON = 1e-5  # ONNX BatchNormalization default
MOST_IMAGES = 64
FEW_IMAGES = 16
FAR, FAR_OF_FEW, NEAR, FACTOR = 0.02, 0.5, 0.25, 2.0
"""Distances: beyond `FAR` images are suspicious if prepared otherwise they come `NEAR`, by `FACTOR` closer.

On EfficientNet-Lite0 64 photographs are at 0.01 … 0.02, with red and blue swapped at 0.03 … 0.04, with ImageNet's mean
and standard deviation at 0.6; 16 are at up to 0.02, one alone at up to 0.25.
"""
PARTS = 4
"""Another preparation must fit each of so many parts of the images better: what chance does, it does not do in all."""
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet's mean and standard deviation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean 0.5 and standard deviation 0.5": ((0.5,), (0.5,)),
    "values 0 … 1": ((0.0,), (1.0,)),
    "values 0 … 255": ((0.0,), (1 / 255,)),
}
"""Mean and standard deviation on the scale 0 … 1, for three channels or for all."""


@dataclass(frozen=True)
class Expectation:
    """What the first BatchNormalization of a network remembers of its training.

    * layer: its name; value: the activation that it reads, whose channels are axis 1
    * mean, variance: float64 `[C]`; the variance with the layer's epsilon
    """

    layer: str
    value: str
    mean: Statistics
    variance: Statistics
    epsilon: float

    def distance(self, activations: Batch) -> float:
        """How far `activations` `[N, C, …]` are from it: the mean over the channels of a Kullback-Leibler divergence.

        That of normal distributions, KL(seen ‖ remembered) = ½ (v/V + (m − M)²/V − 1 − ln(v/V)) (Kullback 1959), with
        the epsilon in both variances, so that a dead channel counts for nothing.
        """
        axes = (0, *range(2, activations.ndim))
        mean = activations.mean(axis=axes, dtype=np.float64)
        ratio = (activations.var(axis=axes, dtype=np.float64) + self.epsilon) / self.variance
        return float(np.mean(ratio + (mean - self.mean) ** 2 / self.variance - 1 - np.log(ratio)) / 2)


@dataclass(frozen=True)
class Evidence:
    """How far the images are from what the network was trained on, None if it does not say, and a sentence or ""."""

    distance: float | None = None
    warning: str = ""

    @property
    def fits(self) -> bool:
        """Whether the network is known to have been trained on such images."""
        return self.distance is not None and self.distance <= FAR


def expectation_of(exported: ir.Model) -> Expectation | None:
    """That of a graph in which batch normalization is visible; None without any, or if it was never trained."""
    node = next((node for node in exported.graph if node.op_type == "BatchNormalization"), None)
    if node is None or node.inputs[0] is None:
        return None
    statistics = [ir.convenience.get_const_tensor(value) if value is not None else None for value in node.inputs[3:5]]
    if len(statistics) < 2 or statistics[0] is None or statistics[1] is None:
        return None
    mean, variance = (tensor.numpy().astype(np.float64) for tensor in statistics if tensor is not None)
    if not mean.any() and (variance == 1.0).all():
        return None  # as PyTorch initializes it
    epsilon = node.attributes.get_float("epsilon", BN_EPSILON)
    return Expectation(str(node.name), str(node.inputs[0].name), mean, variance + epsilon, epsilon)


def preprocessing_evidence(exported: ir.Model, preprocess: Preprocess, images: Batch, *, threads: int = 0) -> Evidence:
    """With a sentence if another preparation of preprocessed `images` `[N, C, H, W]` fits the network much better.

    `exported`: the graph with batch normalization visible. At most 64 of the images, evenly spread, are looked at.
    """
    expected = expectation_of(exported)
    if expected is None or not len(images):
        return Evidence()
    (source,) = (str(value.name) for value in exported.graph.inputs)
    run = GraphRun(segment(exported, [source], [expected.value]), threads=threads)

    def reaching(prepared: Batch) -> Batch:
        return run.all({source: prepared})[expected.value]

    chosen = _spread(images, MOST_IMAGES)
    as_given = reaching(chosen)
    given = expected.distance(as_given)
    if not given > (FAR if len(chosen) >= FEW_IMAGES else FAR_OF_FEW):
        return Evidence(given)
    few = dict(_prepared_otherwise(_spread(chosen, FEW_IMAGES), preprocess))
    best = min(few, key=lambda words: expected.distance(reaching(few[words])))
    otherwise = reaching(dict(_prepared_otherwise(chosen, preprocess))[best])
    found = expected.distance(otherwise)
    if found > min(NEAR, given / FACTOR) or not _closer_throughout(expected, otherwise, as_given):
        return Evidence(given)
    return Evidence(
        given,
        f"the images look unlike the preprocessing: their distance from what the first normalization layer "
        f"({expected.layer}) saw in training is {given:.2g} as given, {found:.2g} with {best}",
    )


def _spread(images: Batch, count: int) -> Batch:
    """At most `count` of `images`, evenly spread."""
    chosen: Batch = images[np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)]
    return chosen


def _closer_throughout(expected: Expectation, otherwise: Batch, as_given: Batch) -> bool:
    """Whether `otherwise` is closer to what is expected in each part of the images."""
    parts = min(PARTS, len(as_given))
    return all(
        expected.distance(otherwise[part::parts]) < expected.distance(as_given[part::parts]) for part in range(parts)
    )


def _prepared_otherwise(images: Batch, preprocess: Preprocess) -> Iterator[tuple[str, Batch]]:
    """The same images with red and blue swapped, with other normalizations, and both."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    pixels = images * std + mean
    colours = pixels.shape[1] == 3
    if colours:
        yield "red and blue swapped (BGR)", (pixels[:, ::-1] - mean) / std
    for words, (centres, deviations) in NORMALIZATIONS.items():
        centre, deviation = (_per_channel(values, pixels.shape[1]) for values in (centres, deviations))
        if np.allclose(centre, mean, atol=0.01) and np.allclose(deviation, std, rtol=0.02):
            continue  # as given
        yield words, (pixels - centre) / deviation
        if colours:
            yield f"{words}, red and blue swapped (BGR)", (pixels[:, ::-1] - centre) / deviation


def _per_channel(values: tuple[float, ...], channels: int) -> Batch:
    """Float32 `[C, 1, 1]`; of three values for another number of channels the mean stands for all."""
    row = values if len(values) == channels else (sum(values) / len(values),) * channels
    return np.asarray(row, np.float32)[:, None, None]
