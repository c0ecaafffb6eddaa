"""Who loses the accuracy, for a person and as the document `edgewright.blame/1`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgewright.blame import Blame, Step

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["blame_document", "blame_lines", "blame_table"]


def blame_document(found: Blame, model: str, dialect: str, notes: Sequence[str]) -> dict[str, Any]:
    """The hops in their order; `guilty` names those that lose more than they may, the most guilty first."""
    return {
        "schema": "edgewright.blame/1",
        "model": model,
        "dialect": dialect,
        "images": found.images,
        "guilty": [step.hop for step in found.guilty],
        "hops": [_hop(step) for step in found.steps],
        "notes": list(notes),
    }


def blame_table(found: Blame) -> Table:
    """A row per hop: what it loses against the hop that it was made from. Fits 80 columns."""
    from rich.box import Box
    from rich.table import Table

    table = Table(box=Box("    \n    \n ── \n    \n    \n    \n    \n    \n"), show_edge=False, pad_edge=False)
    table.add_column("hop", no_wrap=True)
    table.add_column("against", no_wrap=True)
    for heading in ("agreement", "logits, dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for step in found.steps:
        agreement = "" if step.parity is None else f"{100 * step.parity.agreement:.1f} %"
        word = "GUILTY" if step.guilty else "unknown" if step.parity is None else "fine"
        table.add_row(step.hop, step.before, agreement, _logits(step), word)
    return table


def blame_lines(found: Blame, notes: Sequence[str]) -> list[str]:
    """The guilty hops, the most guilty first, each with the layer at which it diverges; the verdict last."""
    lines = [f"note: {note}" for note in notes]
    lines += [f"{step.hop}: {step.note}" for step in found.steps if step.note and not step.guilty]
    lines += [f"{step.hop}: {_origin(step)}" for step in found.guilty]
    if found.guilty:
        return [*lines, f"{found.guilty[0].hop} loses the accuracy, on {found.images} calibration images"]
    return [*lines, f"nobody is to blame: no hop loses more than it may, on {found.images} calibration images"]


def _hop(step: Step) -> dict[str, Any]:
    parity = step.parity
    return {
        "name": step.hop,
        "kind": step.kind,
        "against": step.before,
        "agreement": None if parity is None else parity.agreement,
        "sqnr_db": None if parity is None else parity.sqnr_db,
        "nonfinite": None if parity is None else parity.nonfinite,
        "guilty": step.guilty,
        "origin": None if step.origin is None else asdict(step.origin),
        "note": step.note,
    }


def _logits(step: Step) -> str:
    if step.parity is None:
        return ""
    if step.parity.nonfinite:
        return f"{step.parity.nonfinite} × NaN"
    sqnr = step.parity.sqnr_db
    return "" if sqnr is None else "exact" if sqnr >= 300 else f"{sqnr:.1f}"


def _origin(step: Step) -> str:
    if step.origin is None:
        return step.note
    return f"diverges first at {step.origin.layer}: {step.origin.what}"
