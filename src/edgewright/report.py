"""What a person and a program read at the end: the JSON document of the contract, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgewright.outcome import EngineRow, Outcome, TargetChoice
from edgewright.runtime.audit import in_words, shares_of_work, traffic
from edgewright.runtime.specs import EngineInfo
from edgewright.workspace import StageRun

if TYPE_CHECKING:
    from rich.box import Box
    from rich.table import Table

__all__ = [
    "EXIT_CODES",
    "audit_document",
    "audit_line",
    "audit_table",
    "engine_document",
    "engine_table",
    "in_points",
    "in_short",
    "remarks",
    "stage_document",
]

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
            "source": outcome.reference.source,
        },
        "engines": [_engine(row) for row in outcome.rows],
        "targets": {choice.target: _target(choice) for choice in outcome.targets},
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
        "bytes": run.bytes,
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
        "sha256": row.info.engine_sha256 if row.info is not None else None,
        "status": row.status,
        "reason_code": row.reason_code,
        "reason": row.reason,
        "audit": _audit(row),
        "parity": row.parity.to_json() if row.parity is not None else None,
        "gates": [finding.to_json() for finding in row.verdict.findings] if row.verdict is not None else [],
        "figures": row.figures.to_json() if row.figures is not None else None,
        "latency_ms": row.latency.to_json() if row.latency is not None else None,
    }


def _audit(row: EngineRow) -> dict[str, Any] | None:
    """What was read back from the engine."""
    if row.info is None:
        return None
    planned, actual = shares_of_work(row.info.layers, row.precision)
    traffic = row.traffic
    return {
        "share_planned": planned,
        "share_actual": actual,
        "kernels": len(row.info.kernels),
        "bytes_read": None if traffic is None else traffic.bytes_read,
        "bytes_written": None if traffic is None else traffic.bytes_written,
    }


def _target(choice: TargetChoice) -> dict[str, Any]:
    row = choice.row
    return {"backend": row.backend, "precision": row.precision, "path": row.path, "reason": choice.reason}


def audit_document(info: EngineInfo, path: str) -> dict[str, Any]:
    """The document `edgewright.audit/1`: each planned layer, each kernel, and what they come to."""
    planned, actual = shares_of_work(info.layers, info.precision)
    moved = traffic(info.kernels)
    return {
        "schema": "edgewright.audit/1",
        "engine": path,
        "backend": info.backend,
        "precision": {"requested": info.precision, "actual": info.actual_precision},
        "target": info.target,
        "share_planned": planned,
        "share_actual": actual,
        "kernels": [asdict(kernel) for kernel in info.kernels],
        "layers": [asdict(layer) for layer in info.layers],
        "bytes_read": None if moved is None else moved.bytes_read,
        "bytes_written": None if moved is None else moved.bytes_written,
        "versions": dict(info.versions),
    }


def audit_table(info: EngineInfo) -> Table:
    """A row per kernel: what was fused into it, what it was planned for and runs in, what it reads and writes.

    Fits 80 columns.
    """
    from rich.table import Table

    table = Table(box=_head_rule(), show_edge=False, pad_edge=False, padding=0)
    table.add_column("fused", overflow="fold", ratio=1)
    table.add_column("kind", no_wrap=True, max_width=14, overflow="ellipsis")
    for heading in ("plan", "runs"):
        table.add_column(heading, no_wrap=True)
    for heading in ("work", "reads", "writes"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = sum(layer.macs for layer in info.layers) or 1
    for kernel in info.kernels:
        layers = [layer for layer in info.layers if layer.kernel == kernel.name]
        fused = [name for name in kernel.sources if "::" not in name]  # Q, DQ and Cast are seen in the precisions
        table.add_row(
            "\n".join(fused or kernel.sources or [kernel.name]),
            kernel.kind,
            "/".join(dict.fromkeys(layer.requested for layer in layers)),
            kernel.precision,
            f"{100 * sum(layer.macs for layer in layers) / total:.1f} %" if layers else "",
            _kilobytes(kernel.bytes_read),
            _kilobytes(kernel.bytes_written),
        )
    return table


def audit_line(info: EngineInfo) -> str:
    """What the kernels of an engine come to, in one sentence."""
    planned, actual = shares_of_work(info.layers, info.precision)
    moved = traffic(info.kernels)
    bytes_words = (
        "" if moved is None else f", {moved.bytes_read / 1e6:.1f} MB read, {moved.bytes_written / 1e6:.1f} written"
    )
    counts = ", ".join(f"{count} × {precision}" for precision, count in sorted(info.actual_precision.items()))
    return (
        f"{100 * actual:.1f} % of the work in {info.precision} (planned {100 * planned:.1f} %): {counts}; "
        f"{len(info.kernels)} kernels{bytes_words} at batch {info.listed_batch}"
    )


def engine_table(outcome: Outcome) -> Table:
    """A row for the reference and one per engine; fits 80 columns."""
    from rich.table import Table

    reference = outcome.reference
    kind = "" if reference.labelled else ", unlabelled"
    title = f"{outcome.model} on {reference.images:,} images{kind}"
    table = Table(title=title, box=_head_rule(), show_edge=False, title_justify="left", pad_edge=False, padding=0)
    table.add_column("backend", no_wrap=True)
    table.add_column("type", no_wrap=True)
    for heading in (
        "MB",
        "top-1" if reference.labelled else "agree",
        "loss, % [95 %]" if reference.labelled else "differs, % [95 %]",
        "ms",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_row(reference.source, "fp32", "", _percent(reference.top1), "", "", "reference")
    for row in outcome.rows:
        name = f"{row.backend} {row.target}" if row.target else row.backend
        table.add_row(name, _type(row), _size(row), _accuracy(row), _loss(row), _latency(row), row.status)
    return table


def _head_rule() -> Box:
    from rich.box import Box

    return Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one space between columns


def _type(row: EngineRow) -> str:
    """The precision, and how much of the work runs in it where that is not all."""
    if row.info is None:
        return row.precision
    _, actual = shares_of_work(row.info.layers, row.precision)
    return row.precision if actual > 0.995 else f"{row.precision} {100 * actual:.0f}%"


def remarks(outcome: Outcome) -> list[str]:
    """Sentences below the table: why a row is not verified, what is slower than it should be, what to take where."""
    lines = [f"note: {note}" for note in outcome.notes]
    lines += _reasons(outcome.rows)
    lines += _slower(outcome.rows)
    lines += [
        f"{choice.target}: take {choice.row.backend} {choice.row.precision} there, {choice.row.path} ({choice.reason})"
        for choice in outcome.targets
    ]
    return lines


def _reasons(rows: Sequence[EngineRow]) -> list[str]:
    """One line for all rows of a backend with the same reason and the same targets."""
    grouped: dict[tuple[str, str, str], list[EngineRow]] = {}
    for row in rows:
        if row.status != "verified" and row.reason:
            grouped.setdefault((row.backend, row.precision, row.reason), []).append(row)
    merged: dict[tuple[str, str, str], list[str]] = {}
    for (backend, precision, reason), group in grouped.items():
        merged.setdefault((backend, _targets_of(group), reason), []).append(precision)
    return [
        f"{backend} {', '.join(precisions)}{targets}: {reason}"
        for (backend, targets, reason), precisions in merged.items()
    ]


def _targets_of(rows: Sequence[EngineRow]) -> str:
    targets = dict.fromkeys(row.target for row in rows if row.target)
    return f" for {', '.join(targets)}" if targets else ""


def _slower(rows: Sequence[EngineRow]) -> list[str]:
    """Where a narrower type is slower than a wider one, or INT8 moves more bytes in more kernels than FP16."""
    lines = []
    by_name = {(row.backend, row.target, row.precision): row for row in rows}
    for row in rows:
        for wider in ("fp16", "fp32"):
            plain = by_name.get((row.backend, row.target, wider))
            if row.precision == wider or plain is None or row.latency is None or plain.latency is None:
                continue
            if row.precision != "fp32" and row.latency.p50 > SLOWER * plain.latency.p50:
                lines.append(
                    f"{row.backend} {row.precision} is slower than {wider} here: "
                    f"{row.latency.p50:.3g} against {plain.latency.p50:.3g} ms at batch 1"
                )
        half = by_name.get((row.backend, row.target, "fp16"))
        ours, theirs = row.traffic, half.traffic if half is not None else None
        if row.precision == "int8" and ours and theirs and not ours.at_most(theirs):
            lines.append(
                f"{row.backend} int8{_targets_of([row])} needs more than fp16 at batch 1: {in_words(ours)} against "
                f"{in_words(theirs)}"
            )
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _size(row: EngineRow) -> str:
    return "" if row.info is None else _short(row.info.bytes / 1e6, 1)


def _accuracy(row: EngineRow) -> str:
    if row.parity is None:
        return ""
    return _percent(row.parity.top1 if row.parity.labelled else row.parity.agreement)


def _loss(row: EngineRow) -> str:
    if row.parity is None:
        return ""
    low, high = row.parity.loss_ci95
    return f"{in_points(row.parity.loss)} [{in_points(low)}, {in_points(high)}]"


def in_points(share: float) -> str:
    """A difference of shares, 0.0027 as "0.27"."""
    return f"{round(100 * share, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def _latency(row: EngineRow) -> str:
    return "" if row.latency is None else _short(row.latency.p50, 2)


def _kilobytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e3:.0f} kB"


def _short(value: float, digits: int) -> str:
    """Digits behind the point only where they say something: the table has 80 columns."""
    return f"{value:.{digits}f}" if value < 100 else f"{value:.0f}"


def in_short(count: float, space: str = "") -> str:
    """Three digits and the SI prefix: 25.6M; nothing for 0 in a table."""
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if count >= 0.9995 * 10**power:
            scaled = count / 10**power
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{space}{prefix}"
    return f"{count:.0f}{space}" if count or space else ""
