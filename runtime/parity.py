"""Does an engine predict what the PyTorch model predicts? Logits of both on the same images → figures → a verdict.

`compare` counts and measures, `judge` says PASS, FAIL or INCONCLUSIVE by the rules of docs/contract.md: with labels
about the loss of top-1 accuracy, without labels about the share of images on which the two disagree.

Ties: of equal logits the one with the lowest index ranks first, as numpy's argmax has it, for both sides alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ParityError
from .intervals import PairedCounts, mcnemar_exact_p, newcombe_paired_interval, wilson_interval

__all__ = [
    "DEFAULT_BUDGET",
    "STATUS_OF_VERDICT",
    "PairedCounts",
    "Parity",
    "Source",
    "Verdict",
    "compare",
    "judge",
    "mcnemar_exact_p",
    "newcombe_paired_interval",
    "wilson_interval",
]

Source = Literal["engine", "simulation"]
Word = Literal["pass", "fail", "inconclusive"]

DEFAULT_BUDGET = 0.005  # half a point of top-1: docs/contract.md
STATUS_OF_VERDICT: Mapping[Word, str] = {"pass": "verified", "fail": "over_budget", "inconclusive": "undecided"}

SQNR_LIMIT_DB = 300.0  # JSON has no infinity; float32 logits that differ at all stay below about 215 dB
LARGEST_LOGIT = float(np.finfo(np.float32).max)  # engines answer in float32: beyond it is as good as infinite
MOST_IMAGES = 10_000_000  # nobody labels more to decide a budget
CHUNK_ELEMENTS = 1 << 20  # 8 MiB per float64 temporary, whatever the number of images


@dataclass(frozen=True)
class Parity:
    """An engine beside its reference on the same images. Shares are fractions, 0.005 is half a point.

    * reference_top1, reference_top5, top1, top5: accuracy, None without labels; top 5 is top min(5, classes)
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
        """The inverse of `to_json`; fields that a later version added are ignored."""
        values = {name: content[name] for name in cls.__dataclass_fields__}
        for name in ("agreement_ci95", "loss_ci95"):
            values[name] = tuple(values[name])
        if values["pairs"] is not None:
            values["pairs"] = PairedCounts(**values["pairs"])
        return cls(**values)


@dataclass(frozen=True)
class Verdict:
    """What a comparison says about a budget.

    * loss, lower, upper, budget: fractions; the first three as in `Parity.loss` and `loss_ci95`
    * labelled: whether the loss is one of accuracy or, without labels, the share of disagreement
    * images_needed: in total, to decide, if the proportions stay as they are; None where it is decided, or where no
      realistic number (at most ten million) decides
    """

    word: Word
    loss: float
    lower: float
    upper: float
    budget: float
    labelled: bool
    images_needed: int | None

    @property
    def sentence(self) -> str:
        """The verdict in words; bounds are rounded outwards, so that what is written is true."""
        budget = f"{100 * self.budget:.6g}" + ("" if self.labelled else " %")
        if self.word == "inconclusive":
            some = "no realistic number of" if self.images_needed is None else f"about {_about(self.images_needed)}"
            return f"INCONCLUSIVE: {some} images would decide a budget of {budget}"
        return f"{self.word.upper()}: {self._claim()} (95 %), budget {budget}"

    def _claim(self) -> str:
        passes = self.word == "pass"
        points = _outward_percent(self.upper if passes else self.lower, self.budget, up=passes)
        bound = "at most" if passes else "at least"
        if not self.labelled:
            return f"differs from PyTorch on {bound} {points} % of the images"
        if passes and points.startswith("-"):
            return f"gains at least {points[1:]} points"
        return f"loses {bound} {points} points"


def compare(
    reference: NDArray[Any], candidate: NDArray[Any], labels: NDArray[Any] | None, *, source: Source = "engine"
) -> Parity:
    """Figures of an engine's logits beside the reference's.

    * reference, candidate: real numbers `[N, C]`, row i of both from the same image; C at least 2
    * labels: the right class of each image, integers `[N]` in 0…C−1, or None
    * source: "engine" if it ran, "simulation" if its graph's numerics were run elsewhere

    Raises `ParityError` if the shapes differ or are empty, if the reference is not finite, if the labels do not fit.
    """
    reference, candidate = _checked_logits(reference, candidate)
    images, classes = reference.shape
    if labels is not None:
        labels = _checked_labels(labels, images, classes)
    reference_rank, rank = np.empty(images, np.int64), np.empty(images, np.int64)
    agrees, finite = np.empty(images, np.bool_), np.empty(images, np.bool_)
    figures = np.empty((4, images))
    for rows in _chunks(images, classes):
        expected = _finite_reference(reference[rows], rows.start)
        answered, finite[rows] = _finite_or_zero(candidate[rows])
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
        nonfinite=images - int(finite.sum()),
        agreement=float(agrees.mean()),
        agreement_ci95=wilson_interval(int(agrees.sum()), images),
        **(_disagreement(agrees) if labels is None else _accuracy(reference_rank, rank, min(5, classes))),
        **_logit_figures(figures[:, finite]),
    )


def judge(parity: Parity, budget: float = DEFAULT_BUDGET) -> Verdict:
    """PASS if the upper bound of the loss ≤ budget, FAIL if the lower bound > budget, otherwise INCONCLUSIVE.

    The budget is a fraction in 0…1; raises `ParityError` for any other.
    """
    if not 0 <= budget <= 1:
        raise ParityError(f"the budget is {budget}, expected a fraction from 0 to 1", "half a point is 0.005")
    lower, upper = parity.loss_ci95
    word = _word(lower, upper, budget)
    needed = _images_needed(parity, budget) if word == "inconclusive" else None
    return Verdict(word, parity.loss, lower, upper, budget, parity.labelled, needed)


def _word(lower: float, upper: float, budget: float) -> Word:
    if upper <= budget:
        return "pass"
    return "fail" if lower > budget else "inconclusive"


def _images_needed(parity: Parity, budget: float) -> int | None:
    """Smallest number of images that decides if the observed proportions stay: all cells are scaled alike."""

    def decides(images: int) -> bool:
        return _word(*_loss_interval(parity, images), budget) != "inconclusive"

    if parity.images >= MOST_IMAGES or not decides(MOST_IMAGES):  # never, for one, where the loss equals the budget
        return None
    too_few, enough = parity.images, min(2 * parity.images, MOST_IMAGES)
    while not decides(enough):
        too_few, enough = enough, min(2 * enough, MOST_IMAGES)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if decides(middle) else (middle, enough)
    return enough


def _loss_interval(parity: Parity, images: int) -> tuple[float, float]:
    """The interval of the loss if `images` images had shown the proportions of `parity`."""
    scale = images / parity.images
    if parity.pairs is None:
        return wilson_interval(min(parity.disagreeing * scale, images), images)
    cells = parity.pairs
    return newcombe_paired_interval(
        cells.both * scale, cells.reference_only * scale, cells.engine_only * scale, cells.neither * scale
    )


def _checked_logits(reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    reference, candidate = np.asarray(reference), np.asarray(candidate)
    if reference.shape != candidate.shape:
        raise ParityError(
            f"the reference has logits of shape {list(reference.shape)}, the engine {list(candidate.shape)}",
            "compare the same images and the same output",
        )
    if reference.ndim != 2 or reference.shape[0] < 1 or reference.shape[1] < 2:
        raise ParityError(f"the logits have shape {list(reference.shape)}, expected [images, classes], 1 × 2 or more")
    for name, logits in (("reference", reference), ("engine", candidate)):
        if logits.dtype.kind not in "fiu":
            raise ParityError(f"the logits of the {name} are {logits.dtype}, expected real numbers")
    return reference, candidate


def _checked_labels(labels: NDArray[Any], images: int, classes: int) -> NDArray[Any]:
    labels = np.asarray(labels)
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ParityError(f"the labels are {found}, expected an integer for each of the {images} images")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        fact = f"image {outside[0]} has label {labels[outside[0]]}, expected 0 to {classes - 1}"
        raise ParityError(fact, "labels and model must use the same list of classes")
    return labels.astype(np.int64)


def _chunks(images: int, classes: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // classes)
    return (slice(start, min(start + step, images)) for start in range(0, images, step))


def _finite_reference(logits: NDArray[Any], first_image: int) -> NDArray[np.float64]:
    logits, finite = _finite_or_zero(logits)
    if not finite.all():
        image = first_image + int(finite.argmin())
        raise ParityError(
            f"the reference has a NaN or infinite logit on image {image}", "check weights and preprocessing"
        )
    return logits


def _finite_or_zero(logits: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The logits, float64 `[n, C]`, with rows that are not finite set to 0, and which rows `[n]` are finite."""
    logits = logits.astype(np.float64)
    finite = np.asarray((np.abs(logits) <= LARGEST_LOGIT).all(axis=1))  # false for NaN too
    logits[~finite] = 0
    return logits, finite


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


def _about(images: int) -> str:
    """Rounded up to two digits, such as "38,000": so many do decide."""
    unit = 10 ** max(0, len(str(images)) - 2)
    return f"{-(-images // unit) * unit:,}"


def _outward_percent(share: float, budget: float, *, up: bool) -> str:
    """A bound in percent, rounded outwards to two decimals, or to as many as keep it on its side of the budget."""
    for decimals in range(2, 9):
        scaled = 100 * share * 10**decimals
        rounded = (math.ceil(scaled - 1e-6) if up else math.floor(scaled + 1e-6)) / 10**decimals
        if (rounded <= 100 * budget) if up else (rounded > 100 * budget):
            break
    return f"{rounded + 0.0:.{decimals}f}"  # + 0.0: no "-0.00"
