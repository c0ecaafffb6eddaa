"""What a run ends in: a row per engine, and the conclusion drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgewright.runtime.audit import Traffic, in_words, traffic
from edgewright.runtime.choice import REPORT_FILE
from edgewright.runtime.figures import Figures
from edgewright.runtime.latency import Latency
from edgewright.runtime.parity import Parity
from edgewright.runtime.specs import EngineInfo
from edgewright.runtime.verdict import STATUS_OF_VERDICT, Verdict
from edgewright.workspace import StageRun

__all__ = [
    "HTML_FILE",
    "MARKDOWN_FILE",
    "REPORT_FILES",
    "EngineRow",
    "Outcome",
    "Reference",
    "TargetChoice",
    "conclusion",
    "target_choices",
]

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
REPORT_FILES = (REPORT_FILE, HTML_FILE, MARKDOWN_FILE)
"""What is written of an outcome. It recommends engines, and goes when one of them does."""

WORTH_IT = 0.97
"""INT8 is taken for a target only if it moves at most this share of FP16's bytes: less is not worth any loss."""


@dataclass(frozen=True)
class EngineRow:
    """One engine of the table; the words of `status` are those of the contract."""

    backend: str
    precision: str
    target: str | None
    status: str
    reason_code: str
    reason: str
    path: str | None = None
    info: EngineInfo | None = None
    parity: Parity | None = None
    verdict: Verdict | None = None
    latency: Latency | None = None
    figures: Figures | None = None

    @property
    def name(self) -> str:
        """Such as "tensorrt-rtx int8 sm86"."""
        return " ".join(word for word in (self.backend, self.precision, self.target) if word)

    @property
    def ran(self) -> bool:
        """Whether the engine itself was run here, not only a simulation of it."""
        return self.parity is not None and self.parity.source == "engine"

    @property
    def traffic(self) -> Traffic | None:
        """Launches and bytes of one run at batch 1, as far as the backend lists them."""
        return None if self.info is None else traffic(self.info.kernels)


@dataclass(frozen=True)
class TargetChoice:
    """Which of the engines for a GPU that is not here to take there, and why."""

    target: str
    row: EngineRow
    reason: str


@dataclass(frozen=True)
class Reference:
    """The source on the evaluation images.

    * top1, top5: fractions, None without labels
    * source: "PyTorch", or "ONNX file" for one that a person gave
    """

    top1: float | None
    top5: float | None
    images: int
    labelled: bool
    source: str = "PyTorch"


@dataclass(frozen=True)
class Outcome:
    """Everything that `edgewright engine` says. verdict: "pass", "fail" or "inconclusive", of the best row."""

    model: str
    weights: str
    verdict: str
    recommended: EngineRow | None
    stages: tuple[StageRun, ...]
    reference: Reference
    rows: tuple[EngineRow, ...]
    targets: tuple[TargetChoice, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def decisive(self) -> EngineRow | None:
        """The row that speaks for the run: the recommended one, else of those with its verdict what lost least."""
        if self.recommended is not None:
            return self.recommended
        status = STATUS_OF_VERDICT["fail" if self.verdict == "fail" else "inconclusive"]
        rows = [row for row in self.rows if row.status == status and row.parity is not None]
        return min(rows, key=_lost, default=None)


def conclusion(rows: Sequence[EngineRow]) -> tuple[str, EngineRow | None]:
    """The verdict of the best row, and the fastest row that passes.

    Where nothing could be run, but something was built that its simulation does not rule out, nothing is decided.
    """

    def speed(row: EngineRow) -> float:
        return row.latency.p50 if row.latency is not None else float("inf")

    verified = [row for row in rows if row.status == "verified"]
    if verified:
        return "pass", min(verified, key=speed)
    if any(row.status == "undecided" for row in rows):
        return "inconclusive", None
    ran = any(row.status == "over_budget" for row in rows)
    built = any(row.status in ("simulated", "built_not_run") and row.reason_code != "fail" for row in rows)
    return ("inconclusive" if built and not ran else "fail"), None


def _lost(row: EngineRow) -> float:
    return 1.0 if row.parity is None else row.parity.loss


def target_choices(rows: Sequence[EngineRow]) -> tuple[TargetChoice, ...]:
    """For each target whose engines could not be run here, the one to take, by what its kernels move and by simulation.

    INT8 if it passes and needs neither more kernels nor more bytes than FP16, and markedly fewer bytes; else FP16 if
    it passes.
    """
    choices = []
    for target in dict.fromkeys(row.target for row in rows if row.target is not None and not row.ran):
        built = {row.precision: row for row in rows if row.target == target and row.parity is not None and not row.ran}
        choice = _choice(target, built.get("fp16"), built.get("int8"))
        if choice is not None:
            choices.append(choice)
    return tuple(choices)


def _choice(target: str, half: EngineRow | None, int8: EngineRow | None) -> TargetChoice | None:
    """Without an FP16 engine there is nothing to hold INT8 against, and no choice."""
    if half is None:
        return None
    fallback = half.reason_code == "pass"
    if int8 is None or int8.reason_code != "pass":
        return TargetChoice(target, half, "the only one that passes") if fallback else None
    ours, theirs = int8.traffic, half.traffic
    if ours is None or theirs is None:
        return TargetChoice(target, half, "what INT8 moves is not known") if fallback else None
    comparison = f"int8 {in_words(ours)}, fp16 {in_words(theirs)}"
    if ours.at_most(theirs) and ours.bytes_moved <= WORTH_IT * theirs.bytes_moved:
        return TargetChoice(target, int8, comparison)
    return TargetChoice(target, half, comparison) if fallback else None
