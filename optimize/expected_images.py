"""Do the images look like those that the network was trained on? Its first normalization layer remembers them.

Batch normalization keeps the mean and the variance, per channel, of everything that reached it in training. What
reaches it from the calibration images can be compared with that: as they are prepared, and with the colours swapped or
another usual normalization instead. If one of those fits much better, the preprocessing is the suspect. If none does,
the images are of another kind, or prepared in a way of their own: which of the two, nobody can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.segments import GraphRun, segment
from edgewright.runtime.preprocess import Preprocess

__all__ = ["Evidence", "Expectation", "expectation_of", "moments", "preprocessing_evidence"]

Batch = NDArray[np.float32]
Statistics = NDArray[np.float64]

BN_EPSILON = 1e-5  # ONNX BatchNormalization default
MOST_IMAGES = 64
FEW_IMAGES = 16
FAR, FAR_OF_FEW, NEAR, FACTOR = 0.02, 0.5, 0.25, 2.0
"""Distances: beyond `FAR` images are suspicious if prepared otherwise they come `NEAR`; if `FACTOR` closer, clearly so.

On EfficientNet-Lite0 64 photographs are at 0.01 … 0.02, scaled to 300 pixels before at 0.02 … 0.04; with red and blue
swapped 0.02 further away, with ImageNet's mean and standard deviation at 0.6. 16 are at up to 0.02, one alone at up to
0.25.
"""
RGB = 3
RESAMPLES, SURE, RESAMPLING_SEED = 400, 0.98, 0
"""Another preparation must fit better in so many of the bootstrap's resamples (Efron 1979): more than chance does.

Of 64 photographs with red and blue swapped, at four sizes, 100 % were found like this, of 32 92 %, of 16 70 %; of right
ones none was called swapped.
"""
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

    def distance(self, seen: Statistics) -> float:
        """How far activations with `moments` `seen` are from it: the mean over the channels of a KL divergence.

        That of normal distributions, KL(seen ‖ remembered) = ½ (v/V + (m − M)²/V − 1 − ln(v/V)) (Kullback 1959), with
        the epsilon in both variances, so that a dead channel counts for nothing.
        """
        mean, square = seen.mean(axis=0)
        ratio = (np.maximum(square - mean**2, 0.0) + self.epsilon) / self.variance
        return float(np.mean(ratio + (mean - self.mean) ** 2 / self.variance - 1 - np.log(ratio)) / 2)


@dataclass(frozen=True)
class Evidence:
    """How far the images are from what the network was trained on, None if it does not say, and sentences or "".

    * warning: names a preparation that fits better; clear: it does so by `FACTOR`, which images of another kind, with
      more blue than red, hardly do
    * unexplained: says that the images are far and no preparation fits
    """

    distance: float | None = None
    warning: str = ""
    clear: bool = False
    unexplained: str = ""

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


def preprocessing_evidence(
    exported: ir.Model | None, preprocess: Preprocess, images: Batch, *, threads: int = 0
) -> Evidence:
    """With a sentence if another preparation of preprocessed `images` `[N, C, H, W]` fits the network better.

    `exported`: the graph with batch normalization visible, None if it was never trained. At most 64 of the images,
    evenly spread, are looked at.
    """
    expected = None if exported is None else expectation_of(exported)
    if exported is None or expected is None or not len(images):
        return Evidence()
    (source,) = (str(value.name) for value in exported.graph.inputs)
    run = GraphRun(segment(exported, [source], [expected.value]), threads=threads)

    def reaching(prepared: Batch) -> Statistics:
        return np.concatenate([moments(part[expected.value]) for part in run.batches({source: prepared})])

    chosen = _spread(images, MOST_IMAGES)
    as_given = reaching(chosen)
    given = expected.distance(as_given)
    if not given > (FAR if len(chosen) >= FEW_IMAGES else FAR_OF_FEW):
        return Evidence(given)
    pixels = _pixels(chosen, preprocess)
    few = _spread(pixels, FEW_IMAGES)
    best = min(_preparations(preprocess, pixels.shape[1]), key=lambda other: expected.distance(reaching(other(few))))
    otherwise = reaching(best(pixels))
    found = expected.distance(otherwise)
    if found > NEAR or _share_closer(expected, otherwise, as_given) < SURE:
        far = len(chosen) >= FEW_IMAGES and given > NEAR
        return Evidence(given, unexplained=_unexplained(expected, given) if far else "")
    return Evidence(
        given,
        f"the images look unlike the preprocessing: their distance from what the first normalization layer "
        f"({expected.layer}) saw in training is {given:.2g} as given, {found:.2g} with {best.words}",
        clear=found <= given / FACTOR,
    )


def _unexplained(expected: Expectation, distance: float) -> str:
    return (
        f"the images are unlike those of training: their distance from what the first normalization layer "
        f"({expected.layer}) saw there is {distance:.2g}, and no usual preparation fits much better; they are of "
        "another kind, or prepared in another way"
    )


def moments(activations: Batch) -> Statistics:
    """The means of the values of `activations` `[N, C, …]` and of their squares, float64 `[N, 2, C]`."""
    values = activations.reshape(*activations.shape[:2], -1).astype(np.float64)
    return np.stack([values.mean(axis=2), np.einsum("ncp,ncp->nc", values, values) / values.shape[2]], axis=1)


def _spread(images: Batch, count: int) -> Batch:
    """At most `count` of `images`, evenly spread."""
    chosen: Batch = images[np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)]
    return chosen


def _share_closer(expected: Expectation, otherwise: Statistics, as_given: Statistics) -> float:
    """In which share of resamples of the images the `moments` of `otherwise` are closer to what is expected."""
    resamples = np.random.default_rng(RESAMPLING_SEED).integers(0, len(as_given), (RESAMPLES, len(as_given)))
    closer = [expected.distance(otherwise[drawn]) < expected.distance(as_given[drawn]) for drawn in resamples]
    return float(np.mean(closer))


@dataclass(frozen=True)
class _Preparation:
    """Another way to prepare images; mean and deviation are float32 `[C, 1, 1]` on the scale 0 … 1."""

    words: str
    mean: Batch
    deviation: Batch
    swapped: bool = False

    def __call__(self, pixels: Batch) -> Batch:
        """Of `pixels` `[N, C, H, W]` from 0 to 1."""
        prepared: Batch = ((pixels[:, ::-1] if self.swapped else pixels) - self.mean) / self.deviation
        return prepared


def _preparations(preprocess: Preprocess, channels: int) -> list[_Preparation]:
    """Red and blue swapped, other normalizations, and both."""
    mean, deviation = _as_given(preprocess)
    found = [_Preparation("red and blue swapped (BGR)", mean, deviation, swapped=True)] if channels == RGB else []
    for words, normalization in NORMALIZATIONS.items():
        centre, spread = (_per_channel(values, channels) for values in normalization)
        if np.allclose(centre, mean, atol=0.01) and np.allclose(spread, deviation, rtol=0.02):
            continue  # as given
        found.append(_Preparation(words, centre, spread))
        if channels == RGB:
            found.append(_Preparation(f"{words}, red and blue swapped (BGR)", centre, spread, swapped=True))
    return found


def _pixels(images: Batch, preprocess: Preprocess) -> Batch:
    """Of preprocessed `images`, from 0 to 1."""
    mean, deviation = _as_given(preprocess)
    pixels: Batch = images * deviation + mean
    return pixels


def _as_given(preprocess: Preprocess) -> tuple[Batch, Batch]:
    """Mean and standard deviation, float32 `[C, 1, 1]`."""
    mean, deviation = (np.asarray(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return mean, deviation


def _per_channel(values: tuple[float, ...], channels: int) -> Batch:
    """Float32 `[C, 1, 1]`; of three values for another number of channels the mean stands for all."""
    row = values if len(values) == channels else (sum(values) / len(values),) * channels
    return np.asarray(row, np.float32)[:, None, None]
