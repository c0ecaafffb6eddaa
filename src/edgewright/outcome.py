"""What a run ends in: a row per engine, and the conclusion drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgewright.runtime.latency import Latency
from edgewright.runtime.parity import Parity, Verdict
from edgewright.runtime.specs import EngineInfo
from edgewright.workspace import StageRun

__all__ = ["EngineRow", "Outcome", "Reference", "conclusion"]


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


@dataclass(frozen=True)
class Reference:
    """The PyTorch model on the evaluation images; top1 and top5 are fractions, None without labels."""

    top1: float | None
    top5: float | None
    images: int
    labelled: bool


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
    notes: tuple[str, ...] = field(default=())


def conclusion(rows: Sequence[EngineRow]) -> tuple[str, EngineRow | None]:
    """The verdict of the best row, and the fastest row that passes."""

    def speed(row: EngineRow) -> float:
        return row.latency.p50 if row.latency is not None else float("inf")

    for status, verdict in (("verified", "pass"), ("undecided", "inconclusive")):
        fitting = [row for row in rows if row.status == status]
        if fitting:
            return verdict, min(fitting, key=speed) if verdict == "pass" else None
    return "fail", None
