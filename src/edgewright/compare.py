"""Two builds side by side: what they were made of, what their engines are worth, and whether the second is worse.

Accuracy is compared image by image where both builds judged the same images and kept their logits. Where they did not,
each loss stands against its own reference, and the two are taken for independent, which needs a larger difference to
tell. Medians of two runs on different days differ by more than their intervals say, so that a slowdown has to be larger
than a twentieth too, and larger than what an engine that is the same file in both builds seems to have changed.

Sources
* paired: Newcombe 1998, method 10 (`runtime/intervals.py`)
* independent: the square-and-add limits of a difference, Newcombe 1998 (Stat Med 17:873-890), method 10; Zou & Donner
  2008 (Stat Med 27:1693-1702) for any two estimates with intervals
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.report_view import engine_name, loss_of
from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.errors import ParityError
from edgewright.runtime.intervals import newcombe_paired_interval

__all__ = ["AccuracyChange", "Build", "Comparison", "EnginePair", "LatencyChange", "compare_builds"]

Document = Mapping[str, Any]
Bits = NDArray[np.bool_]
UNTOLD = ("build dir", "budget")
"""Options that say where a build lies, and what the gates say already."""
LEAST_SLOWDOWN = 0.05
"""Medians of the same engine from two runs on a machine that is not alone differ by some per cent."""


@dataclass(frozen=True)
class Build:
    """A document `edgewright.engine/1`, and the folder in which its logits lie, None if only the file was given."""

    path: Path
    document: Document
    folder: Path | None

    @property
    def provenance(self) -> Document:
        """Empty of a document of an older version."""
        found: Document = self.document.get("provenance") or {}
        return found

    @property
    def images(self) -> str | None:
        """Identity of the evaluation images and their labels."""
        evaluation = self.provenance.get("evaluation") or {}
        identity: str | None = evaluation.get("identity")
        return identity


@dataclass(frozen=True)
class AccuracyChange:
    """What the second engine loses against the first, a fraction: of top-1, or without labels of agreement.

    * paired: image by image; otherwise the losses against each one's own reference are compared
    """

    paired: bool
    loss: float
    low: float
    high: float

    @property
    def regression(self) -> bool:
        """Whether the whole interval says that it is worse."""
        return self.low > 0


@dataclass(frozen=True)
class LatencyChange:
    """Median time of the second by that of the first, with an interval that holds both medians' intervals.

    * tolerance: the slowdown, a fraction, that may be the machine's
    * same_file: the engines are one file, so that whatever differs is the machine's
    """

    ratio: float
    low: float
    high: float
    tolerance: float
    same_file: bool

    @property
    def regression(self) -> bool:
        """Whether it is slower by more than noise."""
        return not self.same_file and self.low > 1 + self.tolerance


@dataclass(frozen=True)
class EnginePair:
    """The engine of one backend, precision and target in both builds; None where one has none that was judged."""

    name: str
    first: Document | None
    second: Document | None
    accuracy: AccuracyChange | None
    latency: LatencyChange | None


@dataclass(frozen=True)
class Comparison:
    """All of it. differences: what is not the same, with both values; notes: what could not be compared, and why."""

    first: Build
    second: Build
    engines: tuple[EnginePair, ...]
    differences: Mapping[str, tuple[str, str]]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[str, ...]:
        """A sentence for each thing that is worse."""
        return tuple(self._regressions())

    def _regressions(self) -> Iterator[str]:
        if self.first.document["recommended"] is not None and self.second.document["recommended"] is None:
            yield "no engine of B passes, one of A does"
        for pair in self.engines:
            change, time = pair.accuracy, pair.latency
            if change is not None and change.regression:
                yield f"{pair.name} loses at least {100 * change.low:.2f} points against A (95 %)"
            if time is not None and time.regression:
                yield f"{pair.name} takes {time.ratio:.2f} times as long as in A"


def compare_builds(first: Build, second: Build) -> Comparison:
    """`second` held against `first`.

    Raises `ParityError` if no engine was judged in both, or if a document's figures contradict each other.
    """
    rows, others = _judged(first), _judged(second)
    if not rows.keys() & others.keys():
        raise ParityError(
            f"no engine was judged in both: A has {', '.join(rows) or 'none'}, B has {', '.join(others) or 'none'}",
            "compare builds with the same backend, precision and target",
        )
    same_images = first.images is not None and first.images == second.images
    timing = _timing_difference(first, second)
    drift = _drift(rows, others) if not timing else 0.0
    pairs, notes = [], list(_notes(first, second, same_images, timing))
    for name in dict.fromkeys([*rows, *others]):
        row, other = rows.get(name), others.get(name)
        accuracy, latency = None, None
        if row is not None and other is not None:
            accuracy, note = _accuracy(first, second, row, other, same_images)
            notes += [f"{name}: {note}"] if note else []
            latency = None if timing else _latency(row, other, max(LEAST_SLOWDOWN, drift))
        pairs.append(EnginePair(name, row, other, accuracy, latency))
    return Comparison(first, second, tuple(pairs), _differences(first, second), tuple(notes))


def _judged(build: Build) -> dict[str, Document]:
    return {engine_name(row): row for row in build.document["engines"] if row["parity"] is not None}


def _accuracy(
    first: Build, second: Build, row: Document, other: Document, same_images: bool
) -> tuple[AccuracyChange | None, str]:
    """Paired if it can be, and why not where that is a surprise."""
    if row["parity"]["labelled"] != other["parity"]["labelled"]:
        return None, "one build has labels, the other has none"
    if not same_images:
        return _unpaired(row, other), ""
    bits, other_bits = _bits(first, row), _bits(second, other)
    if bits is None or other_bits is None or bits.shape != other_bits.shape:
        return _unpaired(
            row, other
        ), "the logits of a build are not there, so that its loss is not paired with the other's"
    cells = (
        int((bits & other_bits).sum()),
        int((bits & ~other_bits).sum()),
        int((~bits & other_bits).sum()),
        int((~bits & ~other_bits).sum()),
    )
    low, high = newcombe_paired_interval(*cells)
    return AccuracyChange(True, (cells[1] - cells[2]) / len(bits), low, high), ""


def _bits(build: Build, row: Document) -> Bits | None:
    """On which images the engine is right, or without labels agrees with its reference; None if nobody kept that.

    Logits that are not those of the report, since another run has replaced them, are none.
    """
    if build.folder is None:
        return None
    answers = _array(build.folder / "logits" / _logits_file(row))
    truth = _array(build.folder / "logits" / ("labels.npy" if row["parity"]["labelled"] else "reference.npy"))
    if answers is None or truth is None or answers.ndim != 2 or len(answers) != len(truth):
        return None
    right = truth if row["parity"]["labelled"] else truth.argmax(axis=1)
    bits: Bits = np.isfinite(answers).all(axis=1) & (answers.argmax(axis=1) == right)
    told = row["parity"]["top1"] if row["parity"]["labelled"] else row["parity"]["agreement"]
    return bits if math.isclose(float(bits.mean()), told, abs_tol=0.5 / len(bits)) else None


def _logits_file(row: Document) -> str:
    precision, target = row["precision"]["requested"], row["target"]
    if row["parity"]["source"] == "engine":
        return "-".join(word for word in (row["backend"], precision, target) if word) + ".npy"
    dialect = f"-{BACKENDS[row['backend']].dialect}" if precision == "int8" else ""
    return f"simulated-{precision}{dialect}.npy"


def _array(file: Path) -> NDArray[Any] | None:
    try:
        found: NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found


def _unpaired(row: Document, other: Document) -> AccuracyChange:
    """Square-and-add: the distances of the limits from the estimates, as if they were at right angles."""
    loss, other_loss = loss_of(row["parity"]), loss_of(other["parity"])
    (low, high), (other_low, other_high) = row["parity"]["loss_ci95"], other["parity"]["loss_ci95"]
    change = other_loss - loss
    return AccuracyChange(
        False,
        change,
        change - math.hypot(other_loss - other_low, high - loss),
        change + math.hypot(other_high - other_loss, loss - low),
    )


def _latency(row: Document, other: Document, tolerance: float) -> LatencyChange | None:
    time, other_time = row["latency_ms"], other["latency_ms"]
    if not time or not other_time or not time.get("p50_ci95") or not other_time.get("p50_ci95"):
        return None
    if any(time[name] != other_time[name] for name in ("batch", "threads")):
        return None
    (low, high), (other_low, other_high) = time["p50_ci95"], other_time["p50_ci95"]
    return LatencyChange(
        other_time["p50"] / time["p50"], other_low / high, other_high / low, tolerance, _same_file(row, other)
    )


def _same_file(row: Document, other: Document) -> bool:
    return row.get("sha256") is not None and row.get("sha256") == other.get("sha256")


def _drift(rows: Mapping[str, Document], others: Mapping[str, Document]) -> float:
    """By how much the machine seems to have changed: the most of the engines that are the same file in both builds."""
    ratios = [
        others[name]["latency_ms"]["p50"] / row["latency_ms"]["p50"]
        for name, row in rows.items()
        if name in others and _same_file(row, others[name]) and row["latency_ms"] and others[name]["latency_ms"]
    ]
    return max((max(ratio, 1 / ratio) - 1 for ratio in ratios), default=0.0)


def _timing_difference(first: Build, second: Build) -> str:
    """Why the clocks of the two cannot be compared, or ""."""
    machine, other = first.provenance.get("machine"), second.provenance.get("machine")
    if machine is None or other is None:
        return "a report does not say on which machine it was made"
    return "" if machine == other else "they were made on different machines"


def _notes(first: Build, second: Build, same_images: bool, timing: str) -> Iterator[str]:
    if timing:
        yield f"latencies are not compared: {timing}"
    if first.images is None or second.images is None:
        yield "a report does not say which images it was judged on; losses are compared as of independent samples"
    elif not same_images:
        yield "they were judged on different images; losses are compared as of independent samples"


def _differences(first: Build, second: Build) -> dict[str, tuple[str, str]]:
    """What is not the same in what the builds were made of and by."""
    found = {name: (str(first.document.get(name)), str(second.document.get(name))) for name in ("model", "weights")}
    ours, theirs = first.provenance, second.provenance
    for name in ("machine", "python"):
        found[name] = str(ours.get(name, "unknown")), str(theirs.get(name, "unknown"))
    found["hash of the weights"] = str(ours.get("weights", "unknown")), str(theirs.get("weights", "unknown"))
    found["evaluation images"] = str(first.images), str(second.images)
    found["calibration images"] = _calibration(first), _calibration(second)
    for kind in ("versions", "options"):
        values, others = ours.get(kind), theirs.get(kind)
        if values is None or others is None:  # of an older version, which is said once
            continue
        for name in dict.fromkeys([*values, *others]):
            found[name.replace("_", " ")] = _in_words(values.get(name, "none")), _in_words(others.get(name, "none"))
    return {name: both for name, both in found.items() if both[0] != both[1] and name not in UNTOLD}


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each is not None) or "none"
    return ", ".join(map(_in_words, value)) or "none" if isinstance(value, list) else str(value)


def _calibration(build: Build) -> str:
    return str((build.document.get("calibration") or {}).get("identity", "none"))
