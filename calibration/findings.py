"""What a check of calibration images found: a verdict, the evidence for it, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["NAMED", "OK", "PROBLEM", "VERDICTS", "WARNING", "Finding", "named", "worst"]

OK, WARNING, PROBLEM = VERDICTS = ("ok", "warning", "problem")
"""From best to worst. A problem makes what is calibrated or judged with these images wrong; a warning may."""
NAMED = 3
"""So many images are named in a sentence; `figures` name them all."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    * check: its name, a fixed word; verdict: one of `VERDICTS`
    * evidence: sentences with the numbers, at least one; remedy: what to do, "" if nothing
    * figures: the numbers themselves and the names of all images that are meant, as plain values
    """

    check: str
    verdict: str
    evidence: tuple[str, ...]
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def worst(verdicts: Iterable[str]) -> str:
    """The worst of `verdicts`, OK if there are none."""
    return max(verdicts, key=VERDICTS.index, default=OK)


def named(names: Sequence[str], most: int = NAMED) -> str:
    """The first of `names` with commas between them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
