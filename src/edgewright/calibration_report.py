"""What was found out about calibration images: for a person, and as the document."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from edgewright.calibration.findings import OK, PROBLEM, WARNING, Finding
from edgewright.calibration_check import CalibrationCheck

__all__ = ["check_document", "check_lines"]

WIDTH = 80  # columns
VERDICT_WIDTH, CHECK_WIDTH = 9, 15  # columns
CONCLUSIONS = {
    OK: "the images are good to calibrate with",
    WARNING: "the images can be used; look at the warnings first",
    PROBLEM: "do not calibrate with these images as they are",
}


def check_document(found: CalibrationCheck, model: str) -> dict[str, Any]:
    """The document `edgewright.calibration-check/1`."""
    return {"schema": "edgewright.calibration-check/1", "model": model, **found.to_json()}


def check_lines(found: CalibrationCheck, model: str) -> list[str]:
    """A paragraph per check, its verdict in front, and a conclusion; at most 80 columns but for longer names."""
    judged = "" if found.evaluation is None else f", {found.evaluation:,} for evaluation"
    lines = [f"{found.images:,} calibration images for {model}{judged}", ""]
    for finding in found.findings:
        lines += _finding_lines(finding)
    return [*lines, "", _conclusion(found)]


def _finding_lines(finding: Finding) -> Iterator[str]:
    front = f"{finding.verdict:<{VERDICT_WIDTH}}{finding.check:<{CHECK_WIDTH}}"
    for sentence in finding.evidence:
        yield from _wrapped(sentence, front)
        front = " " * len(front)
    if finding.remedy:
        yield from _wrapped(f"→ {finding.remedy}", front)


def _wrapped(text: str, front: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=front,
        subsequent_indent=" " * len(front),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _conclusion(found: CalibrationCheck) -> str:
    counts = Counter(finding.verdict for finding in found.findings)
    counted = [
        f"{counts[verdict]} {verdict}{'s' if counts[verdict] > 1 else ''}"
        for verdict in (PROBLEM, WARNING)
        if counts[verdict]
    ]
    return f"{', '.join(counted) or 'no warnings'}: {CONCLUSIONS[found.verdict]}"
