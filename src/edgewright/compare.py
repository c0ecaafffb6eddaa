"""Two builds side by side: what they were made of, what their engines are worth, and whether the second is worse.

`compare_engines.py` compares one engine with another. Here is which engines belong together, what could not be
compared, and what counts as worse: an engine that loses or takes more than its interval allows, one that passed and no
longer does, and a build of which none passes any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgewright.compare_engines import (
    AccuracyChange,
    Build,
    LatencyChange,
    accuracy_change,
    latency_change,
    slowdown_of_the_same,
)
from edgewright.report_view import STATUS_WORDS, engine_name
from edgewright.runtime.errors import ParityError

__all__ = ["Comparison", "EnginePair", "compare_builds"]

Document = Mapping[str, Any]
UNTOLD = ("build dir", "budget")
"""Options that say where a build lies, and what the gates say already."""
NAMED = 3


@dataclass(frozen=True)
class EnginePair:
    """The rows of one backend, precision and target in both builds; None where a build knows nothing of it.

    At least one of them was judged. `accuracy` and `latency` are None where they could not be compared.

    * broke: whether it passed in the first and fails in the second by the same gates
    """

    name: str
    first: Document | None
    second: Document | None
    accuracy: AccuracyChange | None
    latency: LatencyChange | None
    broke: bool


@dataclass(frozen=True)
class Comparison:
    """All of it.

    * labelled: whether both judged accuracy; otherwise agreement is shown
    * differences: what is not the same, with both values; notes: what could not be compared, and why
    """

    first: Build
    second: Build
    labelled: bool
    engines: tuple[EnginePair, ...]
    differences: Mapping[str, tuple[str, str]]
    notes: tuple[str, ...]

    @property
    def regressions(self) -> tuple[str, ...]:
        """A sentence for each thing that is worse."""
        return tuple(self._regressions())

    def _regressions(self) -> Iterator[str]:
        if self.first.document["recommended"] is not None and self.second.document["recommended"] is None:
            yield "no engine of B passes, one of A does"
        for pair in self.engines:
            change, time = pair.accuracy, pair.latency
            if pair.broke:
                yield f"{pair.name} is {_told(pair.first)} in A and {_told(pair.second)} in B"
            if change is not None and change.regression:
                yield f"{pair.name} loses at least {100 * change.low:.2f} points against A (95 %)"
            if time is not None and time.regression:
                yield f"{pair.name} takes {time.ratio:.2f} times as long as in A"


def compare_builds(first: Build, second: Build) -> Comparison:
    """`second` held against `first`.

    Raises `ParityError` if nothing of the two can be compared and nothing is worse, or if a document's figures
    contradict each other.
    """
    rows, others = _by_name(first), _by_name(second)
    differences = _differences(first, second)
    timing = _timing_difference(first, second)
    slowdown = 0.0 if timing else slowdown_of_the_same(first, second, rows, others)
    pairs: list[EnginePair] = []
    notes = list(_notes(first, second, timing))
    unpaired: list[str] = []
    untimed: dict[str, str] = {}
    for name in dict.fromkeys([*rows, *others]):
        row, other = rows.get(name), others.get(name)
        if not (_judged(row) or _judged(other)):
            continue
        accuracy, latency = None, None
        if row is not None and other is not None and _judged(row) and _judged(other):
            if first.labelled == second.labelled:
                accuracy, missing = accuracy_change(first, second, row, other)
                unpaired += [name] if missing else []
            if not timing:
                latency, reason = latency_change(first, second, row, other, slowdown)
                untimed |= {name: reason} if reason else {}
        pairs.append(EnginePair(name, row, other, accuracy, latency, _broke(row, other, "gates" not in differences)))
        notes += _changed_status(pairs[-1])
    notes += _not_compared(unpaired, untimed)
    both = first.labelled and second.labelled
    found = Comparison(first, second, both, tuple(pairs), differences, tuple(notes))
    if not found.regressions and not any(pair.accuracy or pair.latency for pair in pairs):
        raise ParityError(
            "; ".join(["nothing of A and B can be compared", *notes, f"A has {_names(rows)}, B has {_names(others)}"]),
            "compare builds with the same backend, precision and target, judged on the same images",
        )
    return found


def _by_name(build: Build) -> dict[str, Document]:
    return {engine_name(row): row for row in build.document["engines"]}


def _judged(row: Document | None) -> bool:
    return row is not None and row["parity"] is not None


def _names(rows: Mapping[str, Document]) -> str:
    return ", ".join(name for name, row in rows.items() if _judged(row)) or "none"


def _status(row: Document | None) -> str:
    return "" if row is None else str(row["status"])


def _told(row: Document | None) -> str:
    return "not there" if row is None else STATUS_WORDS.get(_status(row), _status(row))


def _broke(row: Document | None, other: Document | None, same_gates: bool) -> bool:
    worse = ("failed", "over_budget") if same_gates else ("failed",)
    return _status(row) == "verified" and _status(other) in worse


def _changed_status(pair: EnginePair) -> Iterator[str]:
    """What became of an engine that passed, where that is not known to be worse."""
    if _status(pair.first) == "verified" and not pair.broke and _status(pair.second) != "verified":
        reason = "" if pair.second is None or not pair.second["reason"] else f": {pair.second['reason']}"
        yield f"{pair.name} is verified in A and {_told(pair.second)} in B{reason}"


def _not_compared(unpaired: list[str], untimed: Mapping[str, str]) -> Iterator[str]:
    if unpaired:
        yield f"logits are not there, so that losses are not paired: {_some(unpaired)}"
    for reason in dict.fromkeys(untimed.values()):
        names = [name for name, why in untimed.items() if why == reason]
        yield f"latencies are not compared, {reason}: {_some(names)}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _timing_difference(first: Build, second: Build) -> str:
    """Why the clocks of the two cannot be compared, or ""."""
    machine, other = first.provenance.get("machine"), second.provenance.get("machine")
    if machine is None or other is None:
        return "a report does not say on which machine it was made"
    return "" if machine == other else "they were made on different machines"


def _notes(first: Build, second: Build, timing: str) -> Iterator[str]:
    if timing:
        yield f"latencies are not compared: {timing}"
    if first.labelled != second.labelled:
        yield f"accuracy is not compared: {'B' if first.labelled else 'A'} was judged without labels"
    elif first.images is None or second.images is None:
        yield "a report does not say which images it was judged on; losses are compared as of independent samples"
    elif first.images != second.images:
        yield "they were judged on different images; losses are compared as of independent samples"


def _differences(first: Build, second: Build) -> dict[str, tuple[str, str]]:
    """What is not the same in what the builds were made of and by."""
    found = {name: (str(first.document.get(name)), str(second.document.get(name))) for name in ("model", "weights")}
    ours, theirs = first.provenance, second.provenance
    for name in ("machine", "python"):
        found[name] = str(ours.get(name, "unknown")), str(theirs.get(name, "unknown"))
    found["hash of the weights"] = str(ours.get("weights", "unknown")), str(theirs.get("weights", "unknown"))
    found["evaluation images"] = str(first.images), str(second.images)
    found["calibration images"] = _calibration(first), _calibration(second)
    for kind in ("versions", "options"):
        values, others = ours.get(kind), theirs.get(kind)
        if values is None or others is None:  # of an older version, which is said once
            continue
        for name in dict.fromkeys([*values, *others]):
            found[name.replace("_", " ")] = _in_words(values.get(name, "none")), _in_words(others.get(name, "none"))
    return {name: both for name, both in found.items() if both[0] != both[1] and name not in UNTOLD}


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each is not None) or "none"
    return ", ".join(map(_in_words, value)) or "none" if isinstance(value, list) else str(value)


def _calibration(build: Build) -> str:
    return str((build.document.get("calibration") or {}).get("identity", "none"))
