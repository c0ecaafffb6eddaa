"""PASS, FAIL or INCONCLUSIVE in words and numbers: what each gate found, and what all of them come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["STATUS_OF_VERDICT", "Finding", "Verdict", "Word", "about", "outward"]

Word = Literal["pass", "fail", "inconclusive"]

STATUS_OF_VERDICT: Mapping[Word, str] = {"pass": "verified", "fail": "over_budget", "inconclusive": "undecided"}
FROM_BEST_TO_WORST: tuple[Word, ...] = ("pass", "inconclusive", "fail")


@dataclass(frozen=True)
class Finding:
    """What one gate says of an engine.

    * gate: its name, such as "max_drop"; limit, value: shares as fractions, decibels for "min_sqnr"; value is None
      where there is none
    * ci95: 95 % interval of the value, None for "min_sqnr"; its upper bound is None where it is infinite
    * claim: a clause that is true: bounds are rounded outwards
    * images_needed: in total, to decide, if the proportions stay as they are; None where it is decided, or where no
      realistic number (at most ten million) decides
    """

    gate: str
    limit: float
    value: float | None
    ci95: tuple[float, float | None] | None
    word: Word
    claim: str
    images_needed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract's entry of "gates"."""
        return {
            "gate": self.gate,
            "limit": self.limit,
            "value": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "verdict": self.word,
            "claim": self.claim,
            "images_needed": self.images_needed,
        }


@dataclass(frozen=True)
class Verdict:
    """What all gates together say of an engine; there is at least one finding."""

    findings: tuple[Finding, ...]

    @property
    def word(self) -> Word:
        """That of the worst finding: FAIL before INCONCLUSIVE before PASS."""
        return max((finding.word for finding in self.findings), key=FROM_BEST_TO_WORST.index)

    @property
    def deciding(self) -> tuple[Finding, ...]:
        """The findings that made it what it is: all of those that pass, or those that are the worst."""
        return tuple(finding for finding in self.findings if finding.word == self.word)

    @property
    def claim(self) -> str:
        """What the gates that decided say."""
        return "; ".join(finding.claim for finding in self.deciding)

    @property
    def sentence(self) -> str:
        """The verdict in words, with the gates that decided."""
        return f"{self.word.upper()}: {self.claim}"


def about(images: int) -> str:
    """Rounded up to two digits, such as "38,000": so many do decide."""
    unit = 10 ** max(0, len(str(images)) - 2)
    return f"{-(-images // unit) * unit:,}"


def outward(value: float, holds: Callable[[float], bool], *, up: bool) -> str:
    """A bound rounded outwards to two decimals, or to as many more as keep it on its side of the limit."""
    for digits in range(2, 9):
        scaled = value * 10**digits
        rounded = (math.ceil(scaled - 1e-6) if up else math.floor(scaled + 1e-6)) / 10**digits
        if holds(rounded):
            break
    return f"{rounded + 0.0:.{digits}f}"  # + 0.0: no "-0.00"
