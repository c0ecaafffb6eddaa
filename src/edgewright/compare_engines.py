"""One engine of two builds side by side: what the second loses of accuracy, and how much longer it takes.

Accuracy is compared image by image where both builds judged the same images and kept their logits. Where they did not,
each loss stands against its own reference, or, if the references differ on the same images, each accuracy stands for
itself; the two are taken for independent, which needs a larger difference to tell. Medians of two runs on different
days differ by more than their intervals say, so that a slowdown has to be larger than a twentieth too, and larger than
that of the engines that are the same in both builds.

Sources
* paired: Newcombe 1998, method 10 (`runtime/intervals.py`)
* independent: the square-and-add limits of a difference, Newcombe 1998 (Stat Med 17:873-890), method 10; Zou & Donner
  2008 (Stat Med 27:1693-1702) for any two estimates with intervals
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.report_view import loss_of
from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.intervals import newcombe_paired_interval, wilson_interval

__all__ = [
    "LEAST_SLOWDOWN",
    "AccuracyChange",
    "Build",
    "LatencyChange",
    "accuracy_change",
    "latency_change",
    "slowdown_of_the_same",
]

Document = Mapping[str, Any]
Bits = NDArray[np.bool_]
LEAST_SLOWDOWN = 0.05
"""Medians of the same engine from two runs on a machine that is not alone differ by some per cent."""


@dataclass(frozen=True)
class Build:
    """A document `edgewright.engine/1`, and the folder in which its logits may lie, None if there is none."""

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

    @property
    def labelled(self) -> bool:
        """Whether accuracy was judged, or agreement."""
        return bool(self.document["reference"]["labelled"])

    @property
    def reference_top1(self) -> float | None:
        """A fraction, None without labels."""
        top1: float | None = self.document["reference"]["top1"]
        return top1

    def versions(self, backend: str) -> dict[str, str]:
        """Of the packages that run the engines of a backend, by name."""
        known = self.provenance.get("versions") or {}
        return {name: known[name] for name in (backend, f"{backend}-gpu") if name in known}


@dataclass(frozen=True)
class AccuracyChange:
    """What the second engine loses against the first, a fraction: of top-1, or without labels of agreement.

    * paired: image by image; otherwise the losses against each one's own reference are compared, or the accuracies
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
    * same: the engines are one file, run by the same version of the library, so that whatever differs is the machine's
    """

    ratio: float
    low: float
    high: float
    tolerance: float
    same: bool

    @property
    def regression(self) -> bool:
        """Whether it is slower by more than noise."""
        return not self.same and self.low > 1 + self.tolerance


def accuracy_change(first: Build, second: Build, row: Document, other: Document) -> tuple[AccuracyChange, str]:
    """Of rows that are both judged with labels, or both without; and why they are not paired though they should be.

    Logits that are not those of the report, since another run has replaced them, pair nothing.
    """
    same_images = first.images is not None and first.images == second.images
    bits, other_bits = (_bits(first, row), _bits(second, other)) if same_images else (None, None)
    if bits is None or other_bits is None or bits.shape != other_bits.shape:
        gap = "logits are not there, so that losses are not paired" if same_images else ""
        own = same_images and first.labelled and first.reference_top1 != second.reference_top1
        return _unpaired(*_accuracies(row, other)) if own else _unpaired(*_losses(row, other)), gap
    cells = (
        int((bits & other_bits).sum()),
        int((bits & ~other_bits).sum()),
        int((~bits & other_bits).sum()),
        int((~bits & ~other_bits).sum()),
    )
    low, high = newcombe_paired_interval(*cells)
    return AccuracyChange(True, (cells[1] - cells[2]) / len(bits), low, high), ""


def latency_change(
    first: Build, second: Build, row: Document, other: Document, slowdown: float
) -> tuple[LatencyChange | None, str]:
    """Of two rows on the same machine, or None and why not; `slowdown` is that of engines that are the same."""
    time, other_time = row["latency_ms"], other["latency_ms"]
    if not time or not other_time:
        return None, ""
    unlike = [
        f"{time[name]} and {other_time[name]} {name}" for name in ("threads", "batch") if time[name] != other_time[name]
    ]
    if unlike:
        return None, f"latencies are not compared, measured with {', '.join(unlike)}"
    if not time.get("p50_ci95") or not other_time.get("p50_ci95"):
        return None, "latencies are not compared, a report has no interval of the median"
    (low, high), (other_low, other_high) = time["p50_ci95"], other_time["p50_ci95"]
    change = LatencyChange(
        other_time["p50"] / time["p50"],
        other_low / high,
        other_high / low,
        max(LEAST_SLOWDOWN, slowdown),
        _same(first, second, row, other),
    )
    return change, ""


def slowdown_of_the_same(
    first: Build, second: Build, rows: Mapping[str, Document], others: Mapping[str, Document]
) -> float:
    """By how much the machine seems to have become slower, a fraction: the median of the engines that are the same."""
    ratios: list[float] = [
        others[name]["latency_ms"]["p50"] / row["latency_ms"]["p50"]
        for name, row in rows.items()
        if name in others and row["latency_ms"] and others[name]["latency_ms"]
        if _same(first, second, row, others[name])
    ]
    return max(0.0, statistics.median(ratios) - 1) if ratios else 0.0


def _same(first: Build, second: Build, row: Document, other: Document) -> bool:
    """One file, and the library that runs it: an ONNX file is compiled by each version anew."""
    if row.get("sha256") is None or row.get("sha256") != other.get("sha256"):
        return False
    return first.versions(row["backend"]) == second.versions(row["backend"])


def _bits(build: Build, row: Document) -> Bits | None:
    """On which images the engine is right, or without labels agrees with its reference; None if nobody kept that."""
    if build.folder is None:
        return None
    answers = _array(build.folder / "logits" / _logits_file(row))
    truth = _array(build.folder / "logits" / ("labels.npy" if row["parity"]["labelled"] else "reference.npy"))
    if answers is None or truth is None or answers.ndim != 2 or not answers.size or len(answers) != len(truth):
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


@dataclass(frozen=True)
class _Estimate:
    """A share, a fraction, with its 95 % interval."""

    value: float
    low: float
    high: float


def _losses(row: Document, other: Document) -> tuple[_Estimate, _Estimate]:
    """Against each one's own reference."""
    first, second = (_Estimate(loss_of(each["parity"]), *each["parity"]["loss_ci95"]) for each in (row, other))
    return first, second


def _accuracies(row: Document, other: Document) -> tuple[_Estimate, _Estimate]:
    """The shares of wrong answers, with Wilson's intervals."""

    def wrong(parity: Document) -> _Estimate:
        count = round((1 - parity["top1"]) * parity["images"])
        return _Estimate(count / parity["images"], *wilson_interval(count, parity["images"]))

    return wrong(row["parity"]), wrong(other["parity"])


def _unpaired(first: _Estimate, second: _Estimate) -> AccuracyChange:
    """Square-and-add: the distances of the limits from the estimates, as if they were at right angles."""
    change = second.value - first.value
    return AccuracyChange(
        False,
        change,
        change - math.hypot(second.value - second.low, first.high - first.value),
        change + math.hypot(second.high - second.value, first.value - first.low),
    )
