"""What an engine has to reach: a gate gives a finding from a `Parity`, and all findings together are the verdict.

PASS, FAIL and INCONCLUSIVE are those of docs/contract.md. A gate with an interval is passed only if the whole interval
is on the right side of its limit, and failed only if the whole interval is on the wrong side:

    max_drop        PASS: upper bound of the loss ≤ limit              FAIL: lower bound > limit
    min_ratio       PASS: lower bound of top-1 / reference's ≥ limit   FAIL: upper bound < limit
    min_agreement   PASS: lower bound of the agreement ≥ limit         FAIL: upper bound < limit
    min_sqnr        PASS: SQNR ≥ limit                                 FAIL: otherwise; it is measured, not estimated

All gates have to hold, so that the verdict is that of the worst finding. A gate that counts right answers is not passed
where the reference itself is not clearly better than guessing: then a small loss says nothing, and the labels are the
suspect.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .errors import ParityError
from .intervals import newcombe_paired_interval, paired_ratio_interval, wilson_interval
from .parity import Parity
from .verdict import Finding, Verdict, Word, about, outward

__all__ = [
    "DEFAULT_BUDGET",
    "DEFAULT_GATES",
    "Gate",
    "MaxDrop",
    "MinAgreement",
    "MinRatio",
    "MinSqnr",
    "budget_of",
    "check_labelled",
    "gates_of",
    "judge",
]

Interval = tuple[float, float]

DEFAULT_BUDGET = 0.005  # half a point of top-1: docs/contract.md
MOST_IMAGES = 10_000_000  # nobody labels more to decide a gate


@dataclass(frozen=True)
class Gate(ABC):
    """One condition; two gates are equal if they ask the same. Raises `ParityError` if the limit makes no sense."""

    limit: float
    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 1:
            raise ParityError(f"{self.name} is {self.limit:g}, expected a fraction from 0 to 1", self._example)

    @property
    @abstractmethod
    def aim(self) -> float | None:
        """The loss of top-1, a fraction, that quantization may aim at on calibration images; None: any."""

    @abstractmethod
    def finding(self, parity: Parity) -> Finding:
        """What the gate says. Raises `ParityError` if it needs labels and there are none."""

    @property
    def _example(self) -> str:
        return "99 % is 0.99"


class _IntervalGate(Gate):
    """A gate that an interval has to pass as a whole."""

    def finding(self, parity: Parity) -> Finding:
        if self.needs_labels:
            check_labelled([self], labelled=parity.labelled)
        lower, upper = self._interval(parity, parity.images)
        word, needed = self._word(lower, upper), None
        if word != "fail" and self._counts_right_answers(parity) and parity.guessing:
            word, claim = "inconclusive", _guessing(parity)
        elif word == "inconclusive":
            needed = self._images_needed(parity)
            claim = self._open(parity, needed)
        else:
            claim = self._claim(parity, word, lower, upper)
        ci95 = (lower, upper if upper < math.inf else None)
        return Finding(self.name, self.limit, self._value(parity), ci95, word, claim, needed)

    def _counts_right_answers(self, parity: Parity) -> bool:
        """Whether its value rests on the labels."""
        return self.needs_labels

    @abstractmethod
    def _value(self, parity: Parity) -> float | None:
        """What was observed; None where it has no value."""

    @abstractmethod
    def _interval(self, parity: Parity, images: int) -> Interval:
        """Its 95 % interval if `images` images had shown the proportions of `parity`."""

    @abstractmethod
    def _claim(self, parity: Parity, word: Word, lower: float, upper: float) -> str:
        """The clause of a gate that is passed or failed."""

    @abstractmethod
    def _asked(self, parity: Parity) -> str:
        """What was asked for, as in "would decide a budget of 0.5"."""

    def _word(self, lower: float, upper: float) -> Word:
        """For a value that is to be large."""
        if lower >= self.limit:
            return "pass"
        return "fail" if upper < self.limit else "inconclusive"

    def _open(self, parity: Parity, needed: int | None) -> str:
        some = "no realistic number of" if needed is None else f"about {about(needed)}"
        return f"{some} images would decide {self._asked(parity)}"

    def _images_needed(self, parity: Parity) -> int | None:
        """Smallest number of images that decides if the observed proportions stay: all cells are scaled alike."""

        def decides(images: int) -> bool:
            return self._word(*self._interval(parity, images)) != "inconclusive"

        if parity.images >= MOST_IMAGES or not decides(MOST_IMAGES):  # never, for one, where the value is the limit
            return None
        too_few, enough = parity.images, min(2 * parity.images, MOST_IMAGES)
        while not decides(enough):
            too_few, enough = enough, min(2 * enough, MOST_IMAGES)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if decides(middle) else (middle, enough)
        return enough


@dataclass(frozen=True)
class MaxDrop(_IntervalGate):
    """The budget: top-1 of the reference − top-1 of the engine is at most `limit`, a fraction; half a point is 0.005.

    Interval: Newcombe 1998, method 10. Without labels the same is asked of the share of images on which the two
    disagree, with Wilson's interval.
    """

    limit: float = DEFAULT_BUDGET
    name: ClassVar[str] = "max_drop"

    @property
    def aim(self) -> float:
        """The budget itself."""
        return self.limit

    @property
    def _example(self) -> str:
        return "half a point is 0.005"

    def _counts_right_answers(self, parity: Parity) -> bool:
        return parity.labelled

    def _value(self, parity: Parity) -> float:
        return parity.loss

    def _interval(self, parity: Parity, images: int) -> Interval:
        scale = images / parity.images
        if parity.pairs is None:
            return wilson_interval(min(parity.disagreeing * scale, images), images)
        cells = parity.pairs
        return newcombe_paired_interval(
            cells.both * scale, cells.reference_only * scale, cells.engine_only * scale, cells.neither * scale
        )

    def _word(self, lower: float, upper: float) -> Word:
        if upper <= self.limit:
            return "pass"
        return "fail" if lower > self.limit else "inconclusive"

    def _claim(self, parity: Parity, word: Word, lower: float, upper: float) -> str:
        if word == "pass":
            bound, points = "at most", outward(100 * upper, lambda rounded: rounded <= 100 * self.limit, up=True)
        else:
            bound, points = "at least", outward(100 * lower, lambda rounded: rounded > 100 * self.limit, up=False)
        budget = f"(95 %), budget {_plain(100 * self.limit)}"
        if not parity.labelled:
            return f"differs on {bound} {points} % of the images {budget} %"
        if points.startswith("-"):
            return f"gains at least {points[1:]} points {budget}"
        return f"loses {bound} {points} points {budget}"

    def _asked(self, parity: Parity) -> str:
        return f"a budget of {_plain(100 * self.limit)}" + ("" if parity.labelled else " %")


@dataclass(frozen=True)
class MinRatio(_IntervalGate):
    """Top-1 of the engine / top-1 of the reference is at least `limit`: MLPerf's form, 0.99 or 0.999 there.

    MLPerf Inference takes both accuracies for exact, on the whole data set; here the interval has to be above the limit
    (Bonett & Price 2006), so that what passes on a sample would pass on more of the same images.
    """

    name: ClassVar[str] = "min_ratio"
    needs_labels: ClassVar[bool] = True

    @property
    def aim(self) -> float:
        """(1 − limit) · top-1 of the reference, which calibration images, without labels, cannot say: at most 1."""
        return 1 - self.limit

    def _value(self, parity: Parity) -> float | None:
        return parity.top1 / parity.reference_top1 if parity.reference_top1 and parity.top1 is not None else None

    def _interval(self, parity: Parity, images: int) -> Interval:
        assert parity.pairs is not None
        scale, cells = images / parity.images, parity.pairs
        return paired_ratio_interval(cells.both * scale, cells.engine_only * scale, cells.reference_only * scale)

    def _claim(self, parity: Parity, word: Word, lower: float, upper: float) -> str:
        return f"keeps {_share_claim(word, lower, upper, self.limit)} % of the reference's top-1 {_minimum(self.limit)}"

    def _asked(self, parity: Parity) -> str:
        return f"a ratio of {_plain(self.limit)}"


@dataclass(frozen=True)
class MinAgreement(_IntervalGate):
    """The share of images on which both have the same top-1 is at least `limit`; Wilson's interval."""

    name: ClassVar[str] = "min_agreement"

    @property
    def aim(self) -> float:
        """Half of what may differ: quantization keeps its flips to twice what it may lose."""
        return (1 - self.limit) / 2

    def _value(self, parity: Parity) -> float:
        return parity.agreement

    def _interval(self, parity: Parity, images: int) -> Interval:
        agreeing = parity.images - parity.disagreeing
        return wilson_interval(min(agreeing * (images / parity.images), images), images)

    def _claim(self, parity: Parity, word: Word, lower: float, upper: float) -> str:
        return f"agrees on {_share_claim(word, lower, upper, self.limit)} % of the images {_minimum(self.limit)}"

    def _asked(self, parity: Parity) -> str:
        return f"an agreement of {_plain(self.limit)}"


@dataclass(frozen=True)
class MinSqnr(Gate):
    """The SQNR of the logits is at least `limit`, in decibels; measured on these images, so without an interval."""

    name: ClassVar[str] = "min_sqnr"

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit):
            raise ParityError(f"{self.name} is {self.limit}, expected decibels", "20 asks for a tenth of the amplitude")

    @property
    def aim(self) -> None:
        """Any loss: decibels bound none."""

    def finding(self, parity: Parity) -> Finding:
        """PASS or FAIL; FAIL too where no image has finite logits."""
        value, minimum = parity.sqnr_db, f"dB, minimum {_plain(self.limit)}"
        if value is None:
            return Finding(self.name, self.limit, None, None, "fail", f"no image has finite logits, no {minimum}")
        if value >= self.limit:
            decibels = _nearest(value, lambda rounded: rounded >= self.limit)
            return Finding(self.name, self.limit, value, None, "pass", f"SQNR of the logits {decibels} {minimum}")
        decibels = _nearest(value, lambda rounded: rounded < self.limit)
        return Finding(self.name, self.limit, value, None, "fail", f"SQNR of the logits {decibels} {minimum}")


DEFAULT_GATES: tuple[Gate, ...] = (MaxDrop(),)


def gates_of(
    *,
    max_drop: float | None = None,
    min_ratio: float | None = None,
    min_agreement: float | None = None,
    min_sqnr: float | None = None,
) -> tuple[Gate, ...]:
    """The gates that options of these names ask for, `max_drop` in points of top-1, `min_sqnr` in dB, shares otherwise.

    The loss of accuracy is always bounded: by half a point if neither `max_drop` nor `min_ratio` is given.
    Raises `ParityError` if a limit makes no sense.
    """
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise ParityError(f"max_drop is {max_drop:g} points, expected from 0 to 100", "half a point is 0.5")
    gates: list[Gate] = []
    if max_drop is not None or min_ratio is None:
        gates.append(MaxDrop(DEFAULT_BUDGET if max_drop is None else max_drop / 100))
    if min_ratio is not None:
        gates.append(MinRatio(min_ratio))
    if min_agreement is not None:
        gates.append(MinAgreement(min_agreement))
    if min_sqnr is not None:
        gates.append(MinSqnr(min_sqnr))
    return tuple(gates)


def judge(parity: Parity, gates: Sequence[Gate] = DEFAULT_GATES) -> Verdict:
    """What the gates say of a comparison. Raises `ParityError` if there are none, or one needs labels that are not."""
    if not gates:
        raise ParityError("there is no gate to judge by", "give one, such as MaxDrop(0.005)")
    return Verdict(tuple(gate.finding(parity) for gate in gates))


def check_labelled(gates: Sequence[Gate], *, labelled: bool) -> None:
    """Raises `ParityError` if a gate needs labels and there are none."""
    for gate in gates:
        if gate.needs_labels and not labelled:
            raise ParityError(
                f"{gate.name} compares accuracies, and the evaluation images have no labels",
                "label them, or ask for an agreement instead",
            )


def budget_of(gates: Sequence[Gate]) -> float:
    """The loss of top-1, a fraction, that all gates allow: what quantization aims at on calibration images."""
    return min((gate.aim for gate in gates if gate.aim is not None), default=DEFAULT_BUDGET)


def _nearest(value: float, holds: Callable[[float], bool]) -> str:
    """A measured value to one decimal, or to as many more as keep it on its side of the limit."""
    texts = (f"{value:.{digits}f}" for digits in range(1, 9))
    return next((text for text in texts if holds(float(text))), repr(value))


def _guessing(parity: Parity) -> str:
    assert parity.reference_top1 is not None
    assert parity.chance is not None
    right, chance = f"{100 * parity.reference_top1:.2f} %", f"{_plain(100 * parity.chance)} %"
    return (
        f"the reference is right on {right} of the images, not clearly better than guessing ({chance}): "
        "the labels may be in another order than its classes"
    )


def _share_claim(word: Word, lower: float, upper: float, limit: float) -> str:
    """Such as "at least 99.12", in percent, of a share that is to be large."""
    if word == "pass":
        return "at least " + outward(100 * lower, lambda rounded: rounded >= 100 * limit, up=False)
    return "at most " + outward(100 * upper, lambda rounded: rounded < 100 * limit, up=True)


def _minimum(limit: float) -> str:
    return f"(95 %), minimum {_plain(100 * limit)}"


def _plain(value: float) -> str:
    return f"{value:.6g}"
