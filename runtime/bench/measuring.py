"""Times engines in one set-up after the other, all engines of a set-up in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ..backends import Runner
from ..latency import Clock, interleaved_samples
from .candidates import Candidate
from .feeding import Run
from .results import Distribution, Result, SetUp

__all__ = ["Timed", "timed"]

LEAST_RUNS, MOST_RUNS = 10, 100_000
"""However long a run takes: no fewer than trtexec's --iterations asks for by default, no more than memory holds."""


@dataclass(frozen=True)
class Timed:
    """One engine in one set-up, with the time of each round in milliseconds, float64 `[rounds]`, for the pairs."""

    result: Result
    milliseconds: NDArray[np.float64]


def timed(
    candidates: Sequence[Candidate],
    setups: Sequence[SetUp],
    *,
    seconds: float,
    say: Callable[[str], None],
    clock: Clock = time.perf_counter_ns,
) -> Iterator[tuple[Timed, ...]]:
    """For each set-up all candidates, in their order, which share `seconds` for each of them.

    `say` hears what begins. Raises `EngineError` that names the engine if one does not load or run in a set-up.
    """
    for threads, group in groupby(setups, key=lambda setup: setup.threads):
        with ExitStack() as stack:
            runners = [stack.enter_context(candidate.open(threads)) for candidate in candidates]
            for setup in group:
                turns = ", in turns" if len(candidates) > 1 else ""
                say(f"{setup}: {', '.join(candidate.words for candidate in candidates)}{turns}")
                yield _in_turns(candidates, runners, setup, seconds, clock)


def _in_turns(
    candidates: Sequence[Candidate], runners: Sequence[Runner], setup: SetUp, seconds: float, clock: Clock
) -> tuple[Timed, ...]:
    runs = [Run(candidate, runner, setup, clock) for candidate, runner in zip(candidates, runners, strict=True)]
    for run in runs:
        run.prove()
    samples = interleaved_samples(
        dict(enumerate(runs)),
        budget_seconds=seconds * len(runs),
        min_runs=LEAST_RUNS,
        max_runs=MOST_RUNS,
        clock=clock,
    )
    return tuple(
        Timed(_result(candidate, setup, samples[index], runs[index].preprocess_ms), samples[index])
        for index, candidate in enumerate(candidates)
    )


def _result(
    candidate: Candidate, setup: SetUp, milliseconds: NDArray[np.float64], preprocess_ms: float | None
) -> Result:
    return Result(
        path=candidate.path,
        backend=candidate.backend.name,
        version=candidate.backend.version(),
        precision=candidate.precision,
        sha256=candidate.sha256,
        bytes=len(candidate.engine),
        shape=tuple(side or 0 for side in candidate.shape),  # `check_fits` has refused open sides
        why=candidate.why,
        setup=setup,
        latency=Distribution.of(milliseconds),
        preprocess_ms=preprocess_ms,
    )
