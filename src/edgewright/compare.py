"""Two builds side by side: what they were made of, what their engines are worth, and whether the second is worse.

`compare_engines.py` compares one engine with another. Here is which engines belong together, what could not be
compared, and what counts as worse: an engine that loses or takes more than its interval allows, one that passed and no
longer does, and a build of which none passes any more though as much was asked of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgewright.compare_engines import (
    LEAST_SLOWDOWN,
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
NONE_PASSES = "no engine of B passes, one of A does"


@dataclass(frozen=True)
class EnginePair:
    """The rows of one backend, precision and target in both builds; None where a build knows nothing of it.

    At least one of them was judged. `accuracy` and `latency` are None where they could not be compared.

    * broke: whether it passed in the first and fails in the second by the same gates
    * gaps: what could not be compared as it should, and why
    """

    name: str
    first: Document | None
    second: Document | None
    accuracy: AccuracyChange | None
    latency: LatencyChange | None
    broke: bool
    gaps: tuple[str, ...] = ()


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

    @property
    def none_passes(self) -> bool:
        """Whether an engine of A is recommended, and none of B."""
        return self.first.document["recommended"] is not None and self.second.document["recommended"] is None

    @property
    def asked_alike(self) -> bool:
        """Whether as much was asked of B: the same gates, on the same images.

        On other images a FAIL counts too; INCONCLUSIVE does not, as fewer images decide less.
        """
        same_images = self.first.images is not None and self.first.images == self.second.images
        return "gates" not in self.differences and (same_images or self.second.document["verdict"] == "fail")

    def _regressions(self) -> Iterator[str]:
        if self.none_passes and self.asked_alike:
            yield NONE_PASSES
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
    differences, timing = _differences(first, second), _timing_difference(first, second)
    slowdown = None if timing else slowdown_of_the_same(first, second, rows, others)
    pairs = tuple(
        _pair(name, first, second, rows.get(name), others.get(name), slowdown, same_gates="gates" not in differences)
        for name in dict.fromkeys([*rows, *others])
        if _judged(rows.get(name)) or _judged(others.get(name))
    )
    notes = (*_notes(first, second, timing), *_notes_on_clocks(slowdown), *_notes_on(pairs))
    found = Comparison(first, second, first.labelled and second.labelled, pairs, differences, notes)
    if found.none_passes and not found.asked_alike:
        found = replace(found, notes=(f"{NONE_PASSES}; gates or images are not the same", *notes))
    if not found.regressions and not any(pair.accuracy or pair.latency for pair in pairs):
        raise ParityError(
            "; ".join(["nothing of A and B can be compared", *notes, f"A has {_names(rows)}, B has {_names(others)}"]),
            "compare builds with the same backend, precision and target, judged on the same images",
        )
    return found


def _pair(
    name: str,
    first: Build,
    second: Build,
    row: Document | None,
    other: Document | None,
    slowdown: float | None,
    *,
    same_gates: bool,
) -> EnginePair:
    """`slowdown`: of the engines that are the same in both builds, None if their clocks are not to be compared."""
    broke = _broke(row, other, same_gates)
    if row is None or other is None or not (_judged(row) and _judged(other)):
        return EnginePair(name, row, other, None, None, broke)
    accuracy, unpaired = None, ""
    if first.labelled == second.labelled:
        accuracy, unpaired = accuracy_change(first, second, row, other)
    latency, untimed = (None, "") if slowdown is None else latency_change(first, second, row, other, slowdown)
    return EnginePair(name, row, other, accuracy, latency, broke, tuple(gap for gap in (unpaired, untimed) if gap))


def _by_name(build: Build) -> dict[str, Document]:
    return {engine_name(row): row for row in build.document["engines"]}


def _judged(row: Document | None) -> bool:
    return row is not None and row["parity"] is not None


def _names(rows: Mapping[str, Document]) -> str:
    return ", ".join(name for name, row in rows.items() if _judged(row)) or "none"


def _status(row: Document | None) -> str:
    return "" if row is None else str(row["status"])


def _told(row: Document | None) -> str:
    if row is None:
        return "not there"
    word = STATUS_WORDS.get(_status(row), _status(row))
    return f"{word} ({_simulated(row)})" if _simulated(row) else word


def _passes(row: Document | None) -> bool:
    """Whether it is within its gates, run here or simulated."""
    return _status(row) == "verified" or _simulated(row) == "pass"


def _simulated(row: Document | None) -> str:
    """What the simulation of an engine came to, "" if that is not how it was judged."""
    return str(row["reason_code"]) if row is not None and _status(row) == "simulated" else ""


def _broke(row: Document | None, other: Document | None, same_gates: bool) -> bool:
    over = _status(other) == "over_budget" or _simulated(other) == "fail"
    return _passes(row) and (_status(other) == "failed" or (over and same_gates))


def _notes_on(pairs: Sequence[EnginePair]) -> Iterator[str]:
    """What became of engines that passed, where that is not known to be worse; and the gaps, each once."""
    for pair in pairs:
        if _passes(pair.first) and not pair.broke and not _passes(pair.second):
            reason = "" if pair.second is None or not pair.second["reason"] else f": {pair.second['reason']}"
            yield f"{pair.name} is {_told(pair.first)} in A and {_told(pair.second)} in B{reason}"
    for gap in dict.fromkeys(gap for pair in pairs for gap in pair.gaps):
        yield f"{gap}: {_some([pair.name for pair in pairs if gap in pair.gaps])}"


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
    right, other_right = first.reference_top1, second.reference_top1
    if right is not None and other_right is not None and right != other_right:
        yield f"the reference itself is right on {100 * right:.2f} % in A and {100 * other_right:.2f} % in B"
    targets = second.document.get("targets") or {}
    lost = [target for target in first.document.get("targets") or {} if target not in targets]
    if lost:
        yield f"for {', '.join(lost)} A has an engine to take, and B none"


def _notes_on_clocks(slowdown: float | None) -> Iterator[str]:
    if slowdown is not None and slowdown > LEAST_SLOWDOWN:
        yield (
            f"engines that are the same in both take {1 + slowdown:.2f} times as long in B, so that the machine has "
            "become slower; only what is slower than that is judged"
        )


def _differences(first: Build, second: Build) -> dict[str, tuple[str, str]]:
    """What is not the same in what the builds were made of and by."""
    found = {name: (str(first.document.get(name)), str(second.document.get(name))) for name in ("model", "weights")}
    ours, theirs = first.provenance, second.provenance
    for name in ("machine", "python"):
        found[name] = str(ours.get(name, "unknown")), str(theirs.get(name, "unknown"))
    found["recommended"] = _recommended(first), _recommended(second)
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


def _recommended(build: Build) -> str:
    engine = build.document["recommended"]
    return "none" if engine is None else f"{engine['backend']} {engine['precision']}"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each is not None) or "none"
    return ", ".join(map(_in_words, value)) or "none" if isinstance(value, list) else str(value)


def _calibration(build: Build) -> str:
    return str((build.document.get("calibration") or {}).get("identity", "none"))
