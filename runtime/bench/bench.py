"""`edgewright bench`: engines in each set-up, compared with a baseline that is measured now or was measured before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..bundle.typed import check_types
from ..device.clocks import Clocks, clocks_here
from ..errors import EdgewrightError, ParityError
from ..files import read_json
from ..latency import Clock
from .candidates import Candidate
from .comparing import Comparison, check_alike, paired, settings_unlike, shapes_unlike, unpaired
from .feeding import check_fits
from .machine import machine_here
from .measuring import Timed, timed
from .results import Machine, Result, SetUp

__all__ = ["SCHEMA", "Bench", "bench", "read_bench"]

SCHEMA = "edgewright.bench/1"


@dataclass(frozen=True)
class Bench:
    """Everything that was measured.

    * seconds: for each engine in each set-up, as asked for
    * before, after: the clocks before the first run and after the last
    * notes: what was left out and why
    """

    machine: Machine
    before: Clocks
    after: Clocks
    seconds: float
    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of the contract."""
        return {
            "schema": SCHEMA,
            "machine": asdict(self.machine),
            "clocks": {"before": self.before.to_json(), "after": self.after.to_json()},
            "seconds": self.seconds,
            "results": [result.to_json() for result in self.results],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Bench:
        """What `to_json` gave, but for the comparisons, which nobody compares with; its values have their types.

        Raises KeyError, TypeError, ValueError or AttributeError if it is something else.
        """
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}")
        found = cls(
            machine=Machine(**{name: content["machine"][name] for name in Machine.__dataclass_fields__}),
            before=Clocks.from_json(content["clocks"]["before"]),
            after=Clocks.from_json(content["clocks"]["after"]),
            seconds=content["seconds"],
            results=tuple(Result.from_json(result) for result in content["results"]),
            comparisons=(),
            notes=tuple(content["notes"]),
        )
        check_types(found, Bench, "bench")
        for result in found.results:
            result.latency.check()
        return found


def read_bench(path: Path) -> Bench:
    """What an earlier measurement saved. Raises `ParityError` if the file is none."""
    remedy = "save one with edgewright bench … --json > FILE.json"
    try:
        return Bench.from_json(read_json(path))
    except EdgewrightError as error:
        raise ParityError(error.message, remedy) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        words = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ParityError(f"{path} is no saved result of edgewright bench ({words})", remedy) from error


def bench(
    candidates: Sequence[Candidate],
    setups: Sequence[SetUp],
    *,
    baseline: Candidate | Bench | None = None,
    seconds: float,
    force: bool = False,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    clock: Clock = time.perf_counter_ns,
) -> Bench:
    """Measures the candidates in every set-up, in turns, and compares each with the baseline.

    * baseline: an engine, which takes its turns too; or an earlier measurement, with which there are no pairs; None for
      the first of the candidates
    * seconds: for each engine in each set-up
    * force: compare what is not alike; notes: to stand in the result; say: hears what begins

    Raises `InputError` if an engine does not take a set-up, `ParityError` if what is to be compared is not alike and
    not `force`, both before anything is measured; `EngineError` if an engine does not load or run.
    """
    engines = (*candidates, baseline) if isinstance(baseline, Candidate) else tuple(candidates)
    for candidate in engines:
        for setup in setups:
            check_fits(candidate, setup)
    on_gpu = any(candidate.on_gpu for candidate in engines)
    machine, before = machine_here(gpu=on_gpu), clocks_here(gpu=on_gpu)
    compare = (
        _against_saved(candidates, setups, baseline, machine, before, force=force)
        if isinstance(baseline, Bench)
        else _against_engine(candidates, baseline, force=force)
    )
    groups = list(timed(engines, setups, seconds=seconds, say=say, clock=clock))
    return Bench(
        machine,
        before,
        clocks_here(gpu=on_gpu),
        seconds,
        tuple(each.result for each in chain.from_iterable(groups)),
        tuple(chain.from_iterable(compare(group) for group in groups)),
        tuple(notes),
    )


Compare = Callable[[Sequence[Timed]], list[Comparison]]


def _against_engine(candidates: Sequence[Candidate], baseline: Candidate | None, *, force: bool) -> Compare:
    """Compares those of a set-up with the baseline, which is the last of them, or else with the first."""
    reference = baseline or candidates[0]
    unlike = [check_alike([*shapes_unlike(candidate.shape, reference.shape)], force=force) for candidate in candidates]

    def compare(group: Sequence[Timed]) -> list[Comparison]:
        others = range(len(candidates)) if baseline else range(1, len(candidates))
        against = group[-1] if baseline else group[0]
        return [paired(group[index], against, unlike[index]) for index in others]

    return compare


def _against_saved(
    candidates: Sequence[Candidate],
    setups: Sequence[SetUp],
    saved: Bench,
    machine: Machine,
    clocks: Clocks,
    *,
    force: bool,
) -> Compare:
    """Compares each with what was measured of the same engine, or of the only one, in the same set-up before."""
    general = [*settings_unlike((machine, clocks), (saved.machine, saved.before))]
    found: dict[tuple[int, SetUp], tuple[Result, tuple[str, ...]]] = {}
    for index, candidate in enumerate(candidates):
        for setup in setups:
            result, unlike = _like(candidate, setup, saved.results)
            unlike = [*general, *unlike, *shapes_unlike(candidate.shape, result.shape)]
            found[index, setup] = result, check_alike(unlike, force=force)

    def compare(group: Sequence[Timed]) -> list[Comparison]:
        return [unpaired(each.result, *found[index, each.result.setup]) for index, each in enumerate(group)]

    return compare


def _like(candidate: Candidate, setup: SetUp, results: Sequence[Result]) -> tuple[Result, list[str]]:
    """What was measured before that is most like it, and in what the set-ups differ.

    Raises `ParityError` if several engines or set-ups come into question.
    """
    named = {(result.path, result.words) for result in results}
    same = [result for result in results if result.words == candidate.words]
    engines = same if len({result.path for result in same}) == 1 else list(results) if len(named) == 1 else []
    if not engines:
        words = ", ".join(dict.fromkeys(words for _, words in named))
        raise ParityError(
            f"what was saved has {words or 'nothing'}, and it is not clear which {candidate.words} is compared with",
            "save a measurement of one engine",
        )
    for result in engines:
        if result.setup == setup:
            return result, []
    measured = "; ".join(str(result.setup) for result in engines)
    if len(engines) > 1:
        raise ParityError(f"what was saved has {measured}, and not {setup}", "measure one of those")
    return engines[0], [f"here {setup}, there {measured}"]
