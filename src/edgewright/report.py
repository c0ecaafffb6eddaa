"""What a person and a program read at the end: the JSON document of the contract, and the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgewright.outcome import EngineRow, Outcome
from edgewright.workspace import FIRST_TIME, StageRun

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EXIT_CODES", "engine_document", "engine_table", "remarks", "stage_document", "stage_line", "verdict_line"]

EXIT_CODES = {"pass": 0, "fail": 3, "inconclusive": 4}
SLOWER = 1.02  # below two per cent, batch-1 medians of one machine do not tell engines apart


def engine_document(outcome: Outcome) -> dict[str, Any]:
    """The document `edgewright.engine/1` of the contract."""
    best = outcome.recommended
    return {
        "schema": "edgewright.engine/1",
        "model": outcome.model,
        "weights": outcome.weights,
        "verdict": outcome.verdict,
        "recommended": None
        if best is None
        else {"backend": best.backend, "precision": best.precision, "path": best.path},
        "stages": [stage_document(run) for run in outcome.stages],
        "reference": {
            "top1": outcome.reference.top1,
            "top5": outcome.reference.top5,
            "images": outcome.reference.images,
            "labelled": outcome.reference.labelled,
        },
        "engines": [_engine(row) for row in outcome.rows],
        "notes": list(outcome.notes),
    }


def stage_document(run: StageRun) -> dict[str, Any]:
    """One stage as the contract writes it."""
    return {
        "name": run.name,
        "seconds": run.seconds,
        "cached": run.cached,
        "key": run.key,
        "changed": list(run.changed),
    }


def _engine(row: EngineRow) -> dict[str, Any]:
    return {
        "backend": row.backend,
        "precision": {
            "requested": row.precision,
            "actual": row.info.actual_precision if row.info is not None else {},
        },
        "target": row.target,
        "path": row.path,
        "bytes": row.info.bytes if row.info is not None else None,
        "status": row.status,
        "reason_code": row.reason_code,
        "reason": row.reason,
        "parity": row.parity.to_json() if row.parity is not None else None,
        "latency_ms": row.latency.to_json() if row.latency is not None else None,
    }


def engine_table(outcome: Outcome) -> Table:
    """A row for the PyTorch reference and one per engine; fits 80 columns."""
    from rich.box import Box
    from rich.table import Table

    head_rule = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one space between columns
    reference = outcome.reference
    kind = "" if reference.labelled else ", unlabelled"
    title = f"{outcome.model} on {reference.images:,} images{kind}"
    table = Table(title=title, box=head_rule, show_edge=False, title_justify="left", pad_edge=False, padding=0)
    table.add_column("backend", no_wrap=True)
    table.add_column("type", no_wrap=True)
    for heading in (
        "size",
        "top-1 %" if reference.labelled else "agree %",
        "loss, points [95 %]" if reference.labelled else "differs, % [95 %]",
        "latency",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_row("PyTorch", "fp32", "", _percent(reference.top1), "", "", "reference")
    for row in outcome.rows:
        table.add_row(row.backend, row.precision, _size(row), _accuracy(row), _loss(row), _latency(row), row.status)
    return table


def remarks(outcome: Outcome) -> list[str]:
    """Sentences below the table: why a row is not verified, and what is slower than it should be."""
    lines = [f"note: {note}" for note in outcome.notes]
    lines += [
        f"{row.backend} {row.precision}: {row.reason}"
        for row in outcome.rows
        if row.status != "verified" and row.reason
    ]
    measured = {(row.backend, row.precision): row.latency for row in outcome.rows if row.latency is not None}
    for (backend, precision), latency in measured.items():
        plain = measured.get((backend, "fp32"))
        if precision != "fp32" and plain is not None and latency.p50 > SLOWER * plain.p50:
            lines.append(
                f"{backend} {precision} is slower than fp32 here: "
                f"{latency.p50:.2f} against {plain.p50:.2f} ms at batch 1"
            )
    return lines


def verdict_line(outcome: Outcome, folder: str) -> str:
    """The last line: the verdict of the best row, and the engine to take."""
    best = outcome.recommended
    if best is not None and best.verdict is not None:
        return f"{best.verdict.sentence}; take {best.backend} {best.precision}: {folder}/{best.path}"
    undecided = next((row.verdict for row in outcome.rows if row.status == "undecided" and row.verdict), None)
    if outcome.verdict == "inconclusive" and undecided is not None:
        return f"{undecided.sentence}; no engine is recommended"
    return "FAIL: no engine stays within the budget; none is recommended"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _size(row: EngineRow) -> str:
    return "" if row.info is None else f"{_short(row.info.bytes / 1e6, 1)} MB"


def _accuracy(row: EngineRow) -> str:
    if row.parity is None:
        return ""
    return _percent(row.parity.top1 if row.parity.labelled else row.parity.agreement)


def _loss(row: EngineRow) -> str:
    if row.parity is None:
        return ""
    low, high = row.parity.loss_ci95
    return f"{100 * row.parity.loss:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _latency(row: EngineRow) -> str:
    return "" if row.latency is None else f"{_short(row.latency.p50, 2)} ms"


def _short(value: float, digits: int) -> str:
    """Digits behind the point only where they say something: the table has 80 columns."""
    return f"{value:.{digits}f}" if value < 100 else f"{value:.0f}"


def stage_line(run: StageRun, note: str) -> str:
    """One line for a stage that was made or reused; `note` is what it has to say."""
    what = "reused" if run.cached else f"{run.seconds:.1f} s"
    why = "" if run.cached or run.changed == FIRST_TIME else f"changed: {', '.join(run.changed)}"
    return "  ".join(part for part in (f"  {run.name:<24} {what:>7}", note, why) if part)
