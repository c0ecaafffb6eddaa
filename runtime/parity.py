"""Does an engine predict what the PyTorch model predicts? Logits of both on the same images → figures.

`compare` counts and measures, with labels the top-1 accuracy of both, without labels on how many images the two agree.
Whether that is enough, `gates.py` says; what else a person wants to know of it, `figures.py`.

Ties: of equal logits the one with the lowest index ranks first, as numpy's argmax has it, for both sides alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .intervals import PairedCounts, mcnemar_exact_p, newcombe_paired_interval, wilson_interval
from .logits import checked_labels, checked_logits, chunks, finite_or_zero, finite_reference

__all__ = ["SQNR_LIMIT_DB", "PairedCounts", "Parity", "Source", "compare"]

Source = Literal["engine", "simulation"]

SQNR_LIMIT_DB = 300.0  # JSON has no infinity; float32 logits that differ at all stay below about 215 dB


@dataclass(frozen=True)
class Parity:
    """An engine beside its reference on the same images. Shares are fractions, 0.005 is half a point.

    * reference_top1, reference_top5, top1, top5: accuracy, None without labels; top 5 is top min(5, classes)
    * chance: share of the images that guessing among the classes gets right, 1 / C; None without labels
    * agreement: share of images on which both have the same top-1, with Wilson's 95 % interval
    * delta: top1 − reference_top1, None without labels
    * loss_ci95: 95 % interval of `loss`: with labels Newcombe's for paired proportions, without labels Wilson's
    * pairs: on how many images which of the two is right, None without labels
    * mcnemar_p: exact two-sided p of "both are equally often right", None without labels
    * max_abs: largest difference of two logits
    * cosine: mean over the images of the cosine between the two logit vectors (two zero vectors: 1, one: 0)
    * sqnr_db: 10 log10(Σ reference² / Σ (reference − engine)²) over all logits of all images, limited to ±300 dB
      (the definition of torch.ao.ns.fx.utils.compute_sqnr); 300 stands for exactly equal
    * nonfinite: images with a NaN or infinite logit of the engine; they count as wrong and as disagreeing, and stay
      out of the three logit figures, which are None if no image is left
    """

    source: Source
    images: int
    labelled: bool
    reference_top1: float | None
    reference_top5: float | None
    top1: float | None
    top5: float | None
    agreement: float
    agreement_ci95: tuple[float, float]
    delta: float | None
    loss_ci95: tuple[float, float]
    pairs: PairedCounts | None
    mcnemar_p: float | None
    max_abs: float | None
    cosine: float | None
    sqnr_db: float | None
    nonfinite: int
    chance: float | None = None

    @property
    def guessing(self) -> bool:
        """Whether the reference is not clearly better than chance, by Wilson's interval, so that top-1 says nothing.

        Labels in another order than the network's classes look like that, and then an engine may answer anything. Of so
        few images that not even all right answers would be clear, False.
        """
        if self.pairs is None or self.chance is None:
            return False
        right = self.pairs.both + self.pairs.reference_only
        clear, lower = (wilson_interval(count, self.images)[0] for count in (self.images, right))
        return lower <= self.chance < clear

    @property
    def loss(self) -> float:
        """reference_top1 − top1 with labels, the share of images that disagree without."""
        if self.pairs is None:
            return self.disagreeing / self.images
        return (self.pairs.reference_only - self.pairs.engine_only) / self.images

    @property
    def disagreeing(self) -> int:
        """Number of images on which the two have another top-1."""
        return self.images - round(self.agreement * self.images)

    def to_json(self) -> dict[str, Any]:
        """The contract's "parity" and more, plain and finite values, for `from_json`."""
        return asdict(self) | {"agreement_ci95": list(self.agreement_ci95), "loss_ci95": list(self.loss_ci95)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Parity:
        """The inverse of `to_json`; fields that a later version added are ignored, `chance` an earlier one lacks."""
        values = {name: content[name] for name in cls.__dataclass_fields__ if name != "chance"}
        values["chance"] = content.get("chance")
        for name in ("agreement_ci95", "loss_ci95"):
            values[name] = tuple(values[name])
        if values["pairs"] is not None:
            values["pairs"] = PairedCounts(**values["pairs"])
        return cls(**values)


def compare(
    reference: NDArray[Any], candidate: NDArray[Any], labels: NDArray[Any] | None, *, source: Source = "engine"
) -> Parity:
    """Figures of an engine's logits beside the reference's.

    * reference, candidate: real numbers `[N, C]`, row i of both from the same image; C at least 2
    * labels: the right class of each image, integers `[N]` in 0…C−1, or None
    * source: "engine" if it ran, "simulation" if its graph's numerics were run elsewhere

    Raises `ParityError` if the shapes differ or are empty, if the reference is not finite, if the labels do not fit.
    """
    reference, candidate = checked_logits(reference, candidate)
    images, classes = reference.shape
    if labels is not None:
        labels = checked_labels(labels, images, classes)
    reference_rank, rank = np.empty(images, np.int64), np.empty(images, np.int64)
    agrees, finite = np.empty(images, np.bool_), np.empty(images, np.bool_)
    figures = np.empty((4, images))
    for rows in chunks(images, classes):
        expected = finite_reference(reference[rows], rows.start)
        answered, finite[rows] = finite_or_zero(candidate[rows])
        predicted = expected.argmax(axis=1)
        agrees[rows] = finite[rows] & (answered.argmax(axis=1) == predicted)
        right = predicted if labels is None else labels[rows]
        reference_rank[rows] = _rank(expected, right)
        rank[rows] = np.where(finite[rows], _rank(answered, right), classes)  # behind every class: never right
        figures[:, rows] = _figures_per_image(expected, answered)
    return Parity(
        source=source,
        images=images,
        labelled=labels is not None,
        chance=None if labels is None else 1 / classes,
        nonfinite=images - int(finite.sum()),
        agreement=float(agrees.mean()),
        agreement_ci95=wilson_interval(int(agrees.sum()), images),
        **(_disagreement(agrees) if labels is None else _accuracy(reference_rank, rank, min(5, classes))),
        **_logit_figures(figures[:, finite]),
    )


def _rank(logits: NDArray[np.float64], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes stand before the given one `[n]` in each row; equal logits stand in the order of their index."""
    chosen = np.take_along_axis(logits, classes[:, None], axis=1)
    before = (logits == chosen) & (np.arange(logits.shape[1]) < classes[:, None])
    return np.asarray(((logits > chosen) | before).sum(axis=1))


def _figures_per_image(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signal and noise energy, largest difference and cosine of each image, float64 `[4, n]`."""
    difference = reference - candidate
    energy, other_energy = (reference * reference).sum(axis=1), (candidate * candidate).sum(axis=1)
    norms = np.sqrt(energy * other_energy)
    both_zero = (energy == other_energy).astype(np.float64)  # looked at only where a norm is 0
    cosine = np.divide((reference * candidate).sum(axis=1), norms, out=both_zero, where=norms > 0)
    return np.stack([energy, (difference * difference).sum(axis=1), np.abs(difference).max(axis=1), cosine])


def _logit_figures(figures: NDArray[np.float64]) -> dict[str, Any]:
    signal, noise, largest, cosine = figures
    if signal.size == 0:
        return {"max_abs": None, "cosine": None, "sqnr_db": None}
    mean_cosine = min(1.0, max(-1.0, float(cosine.mean())))
    return {"max_abs": float(largest.max()), "cosine": mean_cosine, "sqnr_db": _decibels(signal.sum(), noise.sum())}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0 or signal == 0:
        return SQNR_LIMIT_DB if noise == 0 else -SQNR_LIMIT_DB
    return min(SQNR_LIMIT_DB, max(-SQNR_LIMIT_DB, 10 * (math.log10(signal) - math.log10(noise))))


def _accuracy(reference_rank: NDArray[np.int64], rank: NDArray[np.int64], k: int) -> dict[str, Any]:
    first, second = reference_rank == 0, rank == 0
    cells = (first & second, first & ~second, ~first & second, ~first & ~second)
    pairs = PairedCounts(*(int(cell.sum()) for cell in cells))
    return {
        "reference_top1": float(first.mean()),
        "reference_top5": float((reference_rank < k).mean()),
        "top1": float(second.mean()),
        "top5": float((rank < k).mean()),
        "delta": (pairs.engine_only - pairs.reference_only) / len(rank),
        "loss_ci95": newcombe_paired_interval(pairs.both, pairs.reference_only, pairs.engine_only, pairs.neither),
        "pairs": pairs,
        "mcnemar_p": mcnemar_exact_p(pairs.reference_only, pairs.engine_only),
    }


def _disagreement(agrees: NDArray[np.bool_]) -> dict[str, Any]:
    unknown = dict.fromkeys(("reference_top1", "reference_top5", "top1", "top5", "delta", "pairs", "mcnemar_p"))
    return {**unknown, "loss_ci95": wilson_interval(int((~agrees).sum()), len(agrees))}
