"""What a person asks beside top-1: which class loses most, how calibrated the confidences are, what is confused now.

`compare` is called thousands of times while ranges and layers are chosen; these figures are for the proof, once per
engine. The confidence of an image is the largest softmax probability. Images with a NaN or infinite logit of the engine
count as wrong in `worst_class`, and stay out of everything else that is said of the engine.

Source of the expected calibration error: Guo et al. 2017 (ICML, arXiv:1706.04599), equation 3, 15 bins of equal width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .intervals import newcombe_paired_interval
from .logits import checked_labels, checked_logits, chunks, finite_or_zero, finite_reference

__all__ = ["CalibrationError", "ClassLoss", "ConfusionChange", "Crossing", "Figures", "further_figures"]

CALIBRATION_BINS = 15  # Guo et al. 2017
THRESHOLDS = (0.5, 0.9)  # of confidence, at which an application may take an answer or leave it
MOST_CHANGES = 10  # of the confusion matrix


@dataclass(frozen=True)
class ClassLoss:
    """One class before and after.

    * label: its name, "" if it has none; images: how many have this class
    * reference_right, right: on how many of them the reference and the engine are right
    * loss_ci95: of the accuracy of the reference on them − that of the engine, Newcombe's; the worst of many classes
      looks worse than it is
    """

    index: int
    label: str
    images: int
    reference_right: int
    right: int
    loss_ci95: tuple[float, float]


@dataclass(frozen=True)
class CalibrationError:
    """Expected calibration error, a fraction; None for an engine that never gives finite logits."""

    reference: float
    engine: float | None


@dataclass(frozen=True)
class Crossing:
    """Shares of the images whose confidence the engine lifts from below `threshold` to it or above, or the reverse."""

    threshold: float
    rose: float
    fell: float


@dataclass(frozen=True)
class ConfusionChange:
    """A cell of the confusion matrix off its diagonal: so many images of class `true` are called `predicted`."""

    true: int
    true_label: str
    predicted: int
    predicted_label: str
    reference: int
    engine: int


@dataclass(frozen=True)
class Figures:
    """An engine beside its reference on the same images, beyond `Parity`.

    * worst_class: the one whose accuracy falls most, of several the one with more images; None without labels
    * calibration_error: None without labels
    * crossings: for each of the thresholds 0.5 and 0.9
    * confusion_changes: the ten cells that changed most, by the number of images; none without labels
    """

    worst_class: ClassLoss | None
    calibration_error: CalibrationError | None
    crossings: tuple[Crossing, ...]
    confusion_changes: tuple[ConfusionChange, ...]

    def to_json(self) -> dict[str, Any]:
        """The contract's "figures"."""
        return asdict(self)


@dataclass(frozen=True)
class _Answers:
    """Top-1 class and its confidence `[N]`, and on which images `[N]` they mean something."""

    classes: NDArray[np.int64]
    confidence: NDArray[np.float64]
    finite: NDArray[np.bool_]


def further_figures(
    reference: NDArray[Any], candidate: NDArray[Any], labels: NDArray[Any] | None, class_names: Sequence[str] = ()
) -> Figures:
    """Figures of an engine's logits beside the reference's; arguments and errors are those of `parity.compare`.

    `class_names` are in the order of the logits.
    """
    reference, candidate = checked_logits(reference, candidate)
    images, classes = reference.shape
    expected, answered = _answers(reference, finite=True), _answers(candidate, finite=False)
    crossings = tuple(_crossing(threshold, expected, answered) for threshold in THRESHOLDS)
    if labels is None:
        return Figures(None, None, crossings, ())
    labels = checked_labels(labels, images, classes)
    names = [*class_names, *[""] * (classes - len(class_names))]
    return Figures(
        worst_class=_worst_class(labels, expected, answered, names),
        calibration_error=CalibrationError(
            expected_calibration_error(expected.confidence, expected.classes == labels),
            expected_calibration_error(
                answered.confidence[answered.finite], (answered.classes == labels)[answered.finite]
            )
            if answered.finite.any()
            else None,
        ),
        crossings=crossings,
        confusion_changes=_confusion_changes(labels, expected, answered, names),
    )


def expected_calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Σ |bin| / n · |accuracy − mean confidence| over 15 bins (m/15, (m + 1)/15]; both arrays `[n]`, n at least 1."""
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    excess = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(excess).sum() / len(confidence))


def _answers(logits: NDArray[Any], *, finite: bool) -> _Answers:
    """Of the reference, which has to be finite, or of an engine."""
    images, classes = logits.shape
    answers = _Answers(np.empty(images, np.int64), np.empty(images), np.ones(images, np.bool_))
    for rows in chunks(images, classes):
        if finite:
            part = finite_reference(logits[rows], rows.start)
        else:
            part, answers.finite[rows] = finite_or_zero(logits[rows])
        answers.classes[rows] = part.argmax(axis=1)
        part -= part.max(axis=1, keepdims=True)
        answers.confidence[rows] = 1 / np.exp(part, out=part).sum(axis=1)
    return answers


def _crossing(threshold: float, expected: _Answers, answered: _Answers) -> Crossing:
    before, after = expected.confidence >= threshold, answered.confidence >= threshold
    rose, fell = answered.finite & ~before & after, answered.finite & before & ~after
    return Crossing(threshold, float(rose.mean()), float(fell.mean()))


def _worst_class(labels: NDArray[np.int64], expected: _Answers, answered: _Answers, names: Sequence[str]) -> ClassLoss:
    before, after = expected.classes == labels, answered.finite & (answered.classes == labels)
    images, reference_right, right = (
        np.bincount(labels[chosen], minlength=len(names)) for chosen in (slice(None), before, after)
    )
    lost = np.divide(reference_right - right, images, out=np.full(len(names), -np.inf), where=images > 0)
    worst = int(np.lexsort((-images, -lost))[0])
    first, second = before[labels == worst], after[labels == worst]
    cells = (first & second, first & ~second, ~first & second, ~first & ~second)
    return ClassLoss(
        worst,
        names[worst],
        int(images[worst]),
        int(reference_right[worst]),
        int(right[worst]),
        newcombe_paired_interval(*(int(cell.sum()) for cell in cells)),
    )


def _confusion_changes(
    labels: NDArray[np.int64], expected: _Answers, answered: _Answers, names: Sequence[str]
) -> tuple[ConfusionChange, ...]:
    """The largest changes first; of equal ones in the order of the classes."""
    cells, counts = [], []
    for answers in (expected, answered):
        wrong = answers.finite & (answers.classes != labels)
        found, count = np.unique(labels[wrong] * len(names) + answers.classes[wrong], return_counts=True)
        cells.append(found)
        counts.append(count)
    union = np.union1d(*cells)
    before, after = np.zeros((2, len(union)), np.int64)
    before[np.searchsorted(union, cells[0])] = counts[0]
    after[np.searchsorted(union, cells[1])] = counts[1]
    change = np.abs(after - before)
    largest = np.argsort(-change, kind="stable")[:MOST_CHANGES]
    changes = []
    for cell in largest[change[largest] > 0]:
        true, predicted = divmod(int(union[cell]), len(names))
        changes.append(
            ConfusionChange(true, names[true], predicted, names[predicted], int(before[cell]), int(after[cell]))
        )
    return tuple(changes)
