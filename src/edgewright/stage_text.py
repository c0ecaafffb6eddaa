"""What a stage says of itself: a line for everybody, and what it did in detail for those who ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgewright.runtime.parity import SQNR_LIMIT_DB
from edgewright.workspace import FIRST_TIME, StageRun

__all__ = ["stage_details", "stage_line"]

NAME_WIDTH, SECONDS_WIDTH, BYTES_WIDTH = 29, 7, 8  # columns
KILOBYTE, MEGABYTE = 1e3, 1e6


def stage_line(run: StageRun) -> str:
    """Its name, seconds, how much it wrote, and what came of it."""
    what = "reused" if run.cached else f"{run.seconds:.1f} s"
    size = _size(run.bytes) if run.bytes else ""
    why = "" if run.cached or run.changed == FIRST_TIME else f"changed: {', '.join(run.changed)}"
    columns = f"  {run.name:<{NAME_WIDTH}} {what:>{SECONDS_WIDTH}} {size:>{BYTES_WIDTH}}"
    return "  ".join(part for part in (columns.rstrip(), _summary(run), why) if part)


def stage_details(run: StageRun) -> Iterator[str]:
    """What the passes of a stage did, a sentence each."""
    facts = run.facts
    if run.name == "fold":
        for skip in facts["skipped"]:
            yield f"batch norm left: {skip['node']}: {skip['reason']}"
    if run.name == "cast fp16":
        for decision in facts["fp32"]:
            yield f"stays fp32: {decision['node']}: {decision['reason']}"
    if run.name.startswith("quantize"):
        for rung in facts["rungs"]:
            taken = "" if rung["taken"] else ", not taken"
            sqnr = "exact" if rung["sqnr_db"] >= SQNR_LIMIT_DB else f"{rung['sqnr_db']:.1f} dB"
            said = ", ".join(part for part in (rung["note"], sqnr, f"{rung['seconds']:.1f} s") if part)
            yield f"{rung['name']}{taken}: {said}"
        yield from facts.get("notes", ())[1:]  # the first says of the rungs what their own lines say
        return
    for name, reason in facts.get("left_out", {}).items():
        yield f"stays float: {name}: {reason}"
    yield from facts.get("notes", ())


def _size(count: int) -> str:
    return f"{count / MEGABYTE:.1f} MB" if count >= MEGABYTE / 10 else f"{count / KILOBYTE:.1f} kB"


def _summary(run: StageRun) -> str:
    """What came of a stage, in a few words."""
    facts: Mapping[str, Any] = run.facts
    if run.name == "fold":
        left = f", {len(facts['skipped'])} left" if facts["skipped"] else ""
        if not facts["folded"]:
            return f"no batch norm folded{left}"
        return f"{facts['folded']} batch norms{left}, error {facts['difference']:.0e}"
    if run.name == "calibrate":
        return f"{facts['images']} images, {facts['tensors']} activations"
    if run.name == "cast fp16":
        kept = f", {len(facts['fp32'])} of {facts['nodes']} nodes in fp32" if facts["fp32"] else ""
        return f"{facts['casts']} casts{kept}"
    if run.name == "gallery":
        return f"{facts['changed']:,} answers changed"
    if run.name == "report":
        return "report.html, report.md"
    if run.name.startswith("place"):
        if not facts["left_out"]:
            return ""
        return f"INT8 pays in {facts['layers'] - len(facts['left_out'])} of {facts['layers']} layers"
    if run.name.startswith("quantize"):
        taken = ", ".join(rung["name"] for rung in facts["rungs"] if rung["taken"])
        return f"{facts['int8_layers']} of {facts['layers']} layers INT8" + (
            f": {taken}" if facts["int8_layers"] else ""
        )
    if run.name.startswith("build"):
        counts = ", ".join(f"{count} × {precision}" for precision, count in facts["actual"].items())
        return counts if facts["share"] > 0.995 else f"{counts} ({100 * facts['share']:.0f} %)"
    return ""
