"""Whether two measurements may be compared, and how much longer one takes than the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..device.clocks import Clocks
from ..errors import ParityError
from ..latency import paired_ratio
from .measuring import Timed
from .results import Machine, Result

__all__ = ["Comparison", "check_alike", "paired", "settings_unlike", "shapes_unlike", "unpaired"]

FEWEST_RUNS = 7
"""From there on the whole range holds the median with 97.5 %: 1 − 2 / 2⁷ = 0.984."""
NEGLIGIBLE = 0.01  # docs/bench.md, "How it measures"


@dataclass(frozen=True)
class Comparison:
    """Time of an engine / time of the baseline in the same set-up; below 1 if the engine is faster.

    * low, high: interval of `ratio` that holds with 95 %, or with `confidence` where the rounds are too few for that
    * paired: `ratio` is the median of the ratios within `rounds` rounds; else it is the ratio of the medians of two
      measurements at different times, and says nothing of what changed on the machine between them
    * unlike: in what the two differ, where that was to be ignored
    """

    engine: Result
    baseline: Result
    ratio: float
    low: float
    high: float
    confidence: float
    paired: bool
    rounds: int | None
    unlike: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether they differ by no more than two loads of one engine may."""
        return max(1 - self.low, self.high - 1) <= NEGLIGIBLE

    @property
    def decided(self) -> bool:
        """Whether one of the two is the faster one."""
        return not self.low <= 1 <= self.high

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "engine": _reference(self.engine),
            "baseline": _reference(self.baseline),
            "ratio": self.ratio,
            "interval": [self.low, self.high],
            "confidence": self.confidence,
            "paired": self.paired,
            "rounds": self.rounds,
            "unlike": list(self.unlike),
        }


def paired(engine: Timed, baseline: Timed, unlike: tuple[str, ...] = ()) -> Comparison:
    """Of two that were measured in turns."""
    ratio = paired_ratio(engine.milliseconds, baseline.milliseconds)
    return Comparison(
        engine.result,
        baseline.result,
        ratio.median,
        ratio.low,
        ratio.high,
        ratio.confidence,
        True,
        ratio.rounds,
        unlike,
    )


def unpaired(engine: Result, baseline: Result, unlike: tuple[str, ...] = ()) -> Comparison:
    """Of two that were measured at different times.

    Each median lies within its interval with 97.5 %, so both do with at least 95 % (Bonferroni), and then their ratio
    lies between the smallest and the largest quotient. Where runs were too few for that, the confidence is 0.
    """
    now, then = engine.latency, baseline.latency
    return Comparison(
        engine,
        baseline,
        now.p50 / then.p50,
        now.p50_low / then.p50_high,
        now.p50_high / then.p50_low,
        0.95 if min(now.runs, then.runs) >= FEWEST_RUNS else 0.0,
        False,
        None,
        unlike,
    )


def check_alike(unlike: Sequence[str], *, force: bool) -> tuple[str, ...]:
    """What differs, if that is to be ignored. Raises `ParityError` if it is not."""
    if unlike and not force:
        raise ParityError(f"not to be compared: {'; '.join(unlike)}", "measure both alike, or give --force")
    return tuple(unlike)


def shapes_unlike(shape: Sequence[int | None], other: Sequence[int | None]) -> Iterator[str]:
    """A sentence if the images are not of the same shape."""
    if tuple(shape) != tuple(other):
        yield f"the images are {_sides(shape)} and {_sides(other)}"


def settings_unlike(now: tuple[Machine, Clocks], then: tuple[Machine, Clocks]) -> Iterator[str]:
    """A sentence for each way in which the machine is another one or set to another speed."""
    for name, value in asdict(now[0]).items():
        before = getattr(then[0], name)
        if value != before:
            yield f"{name} is {value or 'none'} here and {before or 'none'} there"
    for name, value in now[1].settings.items():
        before = getattr(then[1], name)
        if value != before:
            yield f"{name} is {_shown(value)} here and {_shown(before)} there"


def _reference(result: Result) -> dict[str, Any]:
    return {
        "path": result.path,
        "backend": result.backend,
        "precision": result.precision or None,
        "batch": result.setup.batch,
        "threads": result.setup.threads,
        "p50": result.latency.p50,
    }


def _sides(shape: Sequence[int | None]) -> str:
    return "x".join("?" if side is None else str(side) for side in shape)


def _shown(value: Any) -> str:
    return "not known" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
