"""A comparison of two builds for a person, and as the document `edgewright.compare/1`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgewright.compare import Comparison, EnginePair
from edgewright.compare_engines import Build
from edgewright.report_view import decibels, megabytes, milliseconds, per_cent, points

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["compare_document", "compare_lines", "compare_table"]

LONGEST_VALUE = 24  # characters of a value of which two stand in a line


def compare_document(found: Comparison) -> dict[str, Any]:
    """The document `edgewright.compare/1`."""
    return {
        "schema": "edgewright.compare/1",
        "regression": bool(found.regressions),
        "regressions": list(found.regressions),
        "a": _build(found.first),
        "b": _build(found.second),
        "differences": {name: {"a": value, "b": other} for name, (value, other) in found.differences.items()},
        "engines": [_pair(pair) for pair in found.engines],
        "notes": list(found.notes),
    }


def _build(build: Build) -> dict[str, Any]:
    document = build.document
    return {
        "path": str(build.path),
        **{name: document.get(name) for name in ("model", "weights", "verdict", "recommended", "reference")},
        "images": build.images,
    }


def _pair(pair: EnginePair) -> dict[str, Any]:
    accuracy, latency = pair.accuracy, pair.latency
    row = pair.first or pair.second or {}
    return {
        "backend": row["backend"],
        "precision": row["precision"]["requested"],
        "target": row["target"],
        "a": _numbers(pair.first),
        "b": _numbers(pair.second),
        "accuracy": None if accuracy is None else {**asdict(accuracy), "regression": accuracy.regression},
        "latency": None if latency is None else {**asdict(latency), "regression": latency.regression},
    }


def _numbers(row: Any) -> dict[str, Any] | None:
    if row is None:
        return None
    parity, latency = row["parity"] or {}, row["latency_ms"] or {}
    return {
        "status": row["status"],
        **{name: parity.get(name) for name in ("top1", "agreement", "loss_ci95", "sqnr_db")},
        "bytes": row["bytes"],
        "p50": latency.get("p50"),
    }


def compare_table(found: Comparison) -> Table:
    """A row per engine, with both values of a figure below each other where they differ; fits 80 columns."""
    from rich.box import Box
    from rich.table import Table

    head_rule = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one space between columns
    table = Table(box=head_rule, show_edge=False, pad_edge=False, padding=0)
    table.add_column("engine", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in ("top-1" if found.labelled else "agree", "SQNR dB", "ms", "MB", "loss of B [95 %]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in found.engines:
        cells = list(_cells(pair, "top1" if found.labelled else "agreement"))
        table.add_row(pair.name, "A\nB" if any("\n" in cell for cell in cells) else "", *cells)
    return table


def _cells(pair: EnginePair, share: str) -> Iterator[str]:
    first, second = _numbers(pair.first) or {}, _numbers(pair.second) or {}
    yield _both(per_cent(first.get(share)), per_cent(second.get(share)))
    yield _both(_decibels(first.get("sqnr_db")), _decibels(second.get("sqnr_db")))
    yield _both(milliseconds(first.get("p50")), milliseconds(second.get("p50")))
    yield _both(megabytes(first.get("bytes")), megabytes(second.get("bytes")))
    change = pair.accuracy
    yield "" if change is None else f"{points(change.loss)} [{points(change.low)}, {points(change.high)}]"


def _both(value: str, other: str) -> str:
    """One value where it is the same."""
    return value if value == other else f"{value or '–'}\n{other or '–'}"


def _decibels(value: float | None) -> str:
    return "" if value is None else decibels(value).removesuffix(" dB")


def compare_lines(found: Comparison) -> Iterator[str]:
    """What differs, what was not compared, and in the last line whether B is worse."""
    for name, (value, other) in found.differences.items():
        short, also_short = _short(value), _short(other)
        told = f"{short} → {also_short}" if short != also_short else f"{value} → {other}"
        yield f"differs: {name}: {told}"
    yield from (f"note: {note}" for note in found.notes)
    if found.regressions:
        yield f"REGRESSION: {'; '.join(found.regressions)}"
    else:
        compared = [pair.name for pair in found.engines if pair.accuracy or pair.latency]
        engines = "1 engine that was" if len(compared) == 1 else f"{len(compared)} engines that were"
        yield f"no regression: of the {engines} compared none is worse in B by more than its interval"


def _short(value: str) -> str:
    """A hash or a path cut short; what has words is told whole."""
    return value if len(value) <= LONGEST_VALUE or " " in value else f"{value[: LONGEST_VALUE - 1]}…"
