"""What a person reads last: the numbers behind the verdict, and the verdict itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgewright.outcome import Outcome
from edgewright.runtime.figures import ClassLoss, ConfusionChange, Figures
from edgewright.runtime.parity import Parity

__all__ = ["evidence_lines", "outcome_evidence", "verdict_line"]

WIDTH, HEADING = 80, 15  # columns
LONGEST_NAME = 20  # of a class, in letters: ImageNet's have many synonyms


def verdict_line(outcome: Outcome, folder: str) -> str:
    """The last line: the verdict of the best row, and the engine to take."""
    row = outcome.decisive
    if row is None or row.verdict is None:
        passes = "no engine could be run here" if outcome.verdict == "inconclusive" else "no engine passes"
        return f"{outcome.verdict.upper()}: {passes}; none is recommended"
    if outcome.recommended is not None:
        return f"{row.verdict.sentence}; take {row.name}: {folder}/{row.path}"
    if row.status == "undecided":
        return f"{row.verdict.sentence}; no engine is recommended"
    return f"FAIL: no engine passes; the closest is {row.name}: {row.verdict.claim}; {folder}/{row.path}"


def outcome_evidence(outcome: Outcome) -> list[str]:
    """The numbers of the row that the verdict is about, at 80 columns; none if nothing was run here."""
    row = outcome.decisive
    if row is None or row.parity is None:
        return []
    heading = f"{row.name} beside the {outcome.reference.source} reference on {row.parity.images:,} images"
    return [heading, *evidence_lines(row.parity, row.figures)]


def evidence_lines(parity: Parity, figures: Figures | None = None) -> list[str]:
    """A line for each figure, before → after where it has a reference; at 80 columns, intervals 95 %."""
    answered = figures is not None and parity.nonfinite < parity.images
    facts = [*_accuracy(parity), *_logits(parity), *(_further(figures) if figures is not None and answered else [])]
    return [f"  {name:<{HEADING - 2}}{fact}" for name, fact in facts]


def _accuracy(parity: Parity) -> Iterator[tuple[str, str]]:
    if parity.pairs is not None:
        lost, gained = parity.pairs.reference_only, parity.pairs.engine_only
        exact = f"{lost:,} lost, {gained:,} gained, exact McNemar p {parity.mcnemar_p:.2g}"
        yield "top-1", f"{_change(parity.reference_top1, parity.top1)}, {exact}"
        yield "top-5", _change(parity.reference_top5, parity.top5)
    low, high = parity.agreement_ci95
    yield "agreement", f"{100 * parity.agreement:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


def _logits(parity: Parity) -> Iterator[tuple[str, str]]:
    if parity.sqnr_db is not None:
        largest = f"largest difference {parity.max_abs:.3g}"
        yield "logits", f"SQNR {parity.sqnr_db:.1f} dB, cosine {parity.cosine:.4f}, {largest}"
    if parity.nonfinite:
        yield (
            "not finite",
            f"{parity.nonfinite:,} images; they count as {'wrong' if parity.labelled else 'disagreeing'}",
        )


def _further(figures: Figures) -> Iterator[tuple[str, str]]:
    worst, error = figures.worst_class, figures.calibration_error
    if worst is not None:
        yield "worst class", _worst_class(worst) if worst.right < worst.reference_right else "none loses"
    if error is not None:
        yield "calibration", f"expected error {_change(error.reference, error.engine)}"
    crossings = [f"{each.threshold:g} on {100 * (each.rose + each.fell):.2f} %" for each in figures.crossings]
    yield "confidence", f"crosses {', '.join(crossings)} of the images"
    if figures.confusion_changes:
        yield "confusion", _that_fit([_cell(change) for change in figures.confusion_changes])


def _worst_class(worst: ClassLoss) -> str:
    low, high = (100 * bound for bound in worst.loss_ci95)
    accuracy = _change(worst.reference_right / worst.images, worst.right / worst.images)
    counts = f": {accuracy} of {worst.images:,} images, loss [{low:.1f}, {high:.1f}]"
    return _class_name(worst.label, worst.index, min(LONGEST_NAME, WIDTH - HEADING - len(counts))) + counts


def _change(before: float | None, after: float | None) -> str:
    words = ["none" if share is None else f"{100 * share:.2f}" for share in (before, after)]
    return f"{words[0]} → {words[1]} %"


def _cell(change: ConfusionChange) -> str:
    true = _class_name(change.true_label, change.true)
    predicted = _class_name(change.predicted_label, change.predicted)
    return f"{true} as {predicted}: {change.reference} → {change.engine}"


def _class_name(label: str, index: int, longest: int = LONGEST_NAME) -> str:
    """The first of its synonyms, cut to so many letters."""
    name = label.partition(",")[0] or f"class {index}"
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _that_fit(words: Sequence[str]) -> str:
    """As many as a line takes, at least one."""
    line = words[0]
    for word in words[1:]:
        if HEADING + len(line) + len(word) + len(", ") > WIDTH:
            break
        line = f"{line}, {word}"
    return line
