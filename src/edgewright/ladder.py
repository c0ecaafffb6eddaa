"""The rescue ladder: from plain ranges to as much repair as the budget needs, and no further.

    ranges → equalization, exact, then loose → bias correction → AdaRound → fine-tuning, if asked for → mixed precision

Every rung makes a candidate, a `Quantizer`; the candidate's graph is run on calibration images and its logits are held
against those of the folded FP32 graph. A rung is taken if the logit SQNR rises on the images that choose and does not
fall on the quarter that is held back. The climb ends at the first candidate that is within the aim (`Ladder.meets`).

No label and no evaluation image is seen here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.calib_cache import CalibCache
from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.division import held_back
from edgewright.calibration.ranges import AUTO
from edgewright.frontier import with_latencies
from edgewright.optimize.dialects import CPU, Quantized, Quantizer
from edgewright.optimize.expected_flips import ExpectedFlips, expected_flips
from edgewright.optimize.mixed_precision import MixedPlan, MixedPoint, smallest_float_set
from edgewright.optimize.plan import NOTHING_LEFT_OUT
from edgewright.optimize.segments import logits_of
from edgewright.optimize.sensitivity import sensitivities
from edgewright.rungs import (
    Attempted,
    Finetune,
    Ground,
    Progress,
    corrected,
    equalized,
    finetuned,
    loosely_equalized,
    rounded,
)
from edgewright.runtime.backends import backend_reading
from edgewright.runtime.gates import DEFAULT_BUDGET
from edgewright.runtime.parity import Parity, compare

__all__ = ["Aim", "CalibrationImages", "Climb", "Fidelity", "Ladder", "Rung"]

Batch = NDArray[np.float32]

SHARE_OF_BUDGET = 0.25
"""What of the budget may be expected to be lost on calibration images. These are mostly training images, on which a
network is surer of itself, and the verdict is one of the upper bound of an interval.
"""
FLIPS_OF_BUDGET = 2.0
"""As many times the budget may be answered otherwise than FP32 does: most of such answers are as good as the others."""
LEAST_INT8 = 0.1
"""Of the work that could be INT8: with less of it, INT8 is not worth its name, and the budget counts as missed."""
LOST_DB = -300.0
LONG_SECONDS = 10.0
NAMED_LAYERS = 4
"""As many a sentence names; the plan names all of them."""
RUNGS: tuple[tuple[str, Callable[[Ground, Quantizer, Mapping[str, str]], Attempted]], ...] = (
    ("equalization", equalized),
    ("loose equalization", loosely_equalized),
    ("bias correction", corrected),
    ("AdaRound", rounded),
    ("fine-tuning", finetuned),
)
SEED = 21
NOISE_DB = 0.05
"""Of logit SQNR: what rises by less has not risen, and what falls by less on the held-back images has not fallen."""


@dataclass(frozen=True)
class CalibrationImages:
    """Preprocessed images, float32 `[N, C, H, W]` each: those that choose, and the quarter that checks."""

    choosing: Batch
    held_back: Batch

    @classmethod
    def divided(cls, images: Batch) -> CalibrationImages:
        """Every fourth image held back; of fewer than four none can be, and all do both."""
        checks = held_back(len(images))
        return cls(images[~checks], images[checks]) if checks.any() else cls(images, images)


@dataclass(frozen=True)
class Fidelity:
    """How closely a quantized graph follows FP32 on the same images.

    * agreement: share of images with the same top-1; sqnr_db: of the logits
    * expected: what the errors of the logits do to the top-1
    """

    agreement: float
    sqnr_db: float
    expected: ExpectedFlips

    @classmethod
    def of(cls, reference: Batch, logits: Batch) -> Fidelity:
        """Of `logits` beside the `reference`'s, both `[N, classes]`."""
        parity = compare(reference, logits, None)
        return cls(parity.agreement, _decibels(parity), expected_flips(reference, logits))

    @classmethod
    def of_point(cls, point: MixedPoint) -> Fidelity:
        """Of a candidate that mixed precision has run."""
        return cls(point.parity.agreement, _decibels(point.parity), point.expected)

    @property
    def words(self) -> str:
        """For a person."""
        return f"SQNR {self.sqnr_db:.1f} dB, agrees on {100 * self.agreement:.1f} %"


def _decibels(parity: Parity) -> float:
    """Of the logits; of a graph that yields NaN or infinity somewhere, none are left."""
    return LOST_DB if parity.nonfinite or parity.sqnr_db is None else parity.sqnr_db


@dataclass(frozen=True)
class Rung:
    """One rung as it was tried.

    * taken: whether what follows stands on it; note: a sentence's end about what it did
    * choosing, held_back: what its candidate is worth on either part of the calibration images
    """

    name: str
    taken: bool
    note: str
    seconds: float
    choosing: Fidelity
    held_back: Fidelity

    @property
    def in_words(self) -> str:
        """Its name, and how long it took if that was long."""
        return self.name if self.seconds < LONG_SECONDS else f"{self.name} in {self.seconds:.0f} s"

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the time, so that the same climb gives the same file."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


@dataclass(frozen=True)
class Aim:
    """What a climb is asked for.

    * budget: loss of top-1, a fraction
    * method: of the ranges; remainder: what NVIDIA's targets run the rest in
    * cache: a `calib.cache` for NVIDIA's targets
    * rescue: whether to climb at all; without it the ranges have to do
    * finetune: trains the folded graph for a Quantizer; None unless it was asked for
    * threads: of onnxruntime, 0 for all cores; seed: of what is learned
    """

    budget: float = DEFAULT_BUDGET
    method: str = AUTO
    remainder: str = "fp16"
    cache: CalibCache | None = None
    rescue: bool = True
    finetune: Finetune | None = None
    threads: int = 0
    seed: int = SEED


@dataclass(frozen=True)
class Climb:
    """Where a climb ended.

    * quantized: the graph to ship; quantizer: what wrote it
    * left_out: all layers that stay float though they could be INT8, and why
    * rungs: as they were tried; met: whether what came of them is within the aim
    * mixed: the search for layers to leave in float, None if it was not needed
    """

    quantized: Quantized
    quantizer: Quantizer
    left_out: Mapping[str, str]
    rungs: tuple[Rung, ...]
    met: bool
    mixed: MixedPlan | None

    @property
    def words(self) -> str:
        """What was done and what came of it, in a sentence."""
        first, last = self.rungs[0], [rung for rung in self.rungs if rung.taken][-1]
        done = ", ".join(rung.in_words for rung in self.rungs if rung.taken)
        gain = f"{first.choosing.words} → {last.choosing.words}" if last is not first else first.choosing.words
        unmet = "" if self.met else "; the budget is not met on the calibration images, this is the best plan"
        return f"{done} ({gain}){unmet}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a person: what was done, and which layers stay in float to keep accuracy, and why.

        None where no layer could be INT8: then nothing was done.
        """
        if self.mixed is None and not self.quantized.int8_layers:
            return ()
        layers = (
            () if self.mixed is None else [name for name in self.mixed.chosen.float_layers if name in self.left_out]
        )
        if not layers:
            return (self.words,)
        remainder = "FP32" if self.quantizer.dialect in CPU else self.quantizer.remainder.upper()
        named = "; ".join(f"{name} ({self.left_out[name]})" for name in layers[:NAMED_LAYERS])
        others = f"; and {len(layers) - NAMED_LAYERS} more, named in the plan" if len(layers) > NAMED_LAYERS else ""
        count = len(self.quantizer.layers)
        return (
            self.words,
            f"{len(layers)} of {count} layers stay in {remainder} to keep accuracy: {named}{others}",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file that a person can read."""
        return {
            "rungs": [rung.to_json() for rung in self.rungs],
            "met": self.met,
            "left_out": dict(self.left_out),
            "mixed_precision": None if self.mixed is None else self.mixed.to_json(),
            "ranges": {name: asdict(interval) for name, interval in self.quantizer.ranges.items()},
        }


@dataclass(frozen=True)
class _Candidate:
    quantizer: Quantizer
    choosing: Fidelity
    held_back: Fidelity

    def better_than(self, other: _Candidate) -> bool:
        """More exact on the images that choose, and no less on those that are held back."""
        return (
            self.choosing.sqnr_db > other.choosing.sqnr_db + NOISE_DB
            and self.held_back.sqnr_db > other.held_back.sqnr_db - NOISE_DB
        )


class Ladder:
    """Climbs for one network, as often as there are dialects; what they share is made once.

    * model: folded FP32; table: measured on `images.choosing`
    * progress: is told (done, total, rung) while a rung takes its time
    """

    def __init__(
        self,
        model: ir.Model,
        table: CalibrationTable,
        images: CalibrationImages,
        aim: Aim,
        progress: Progress = lambda done, total, rung: None,
    ) -> None:
        self._images, self._aim = images, aim
        self._ground = Ground(model, table, images.choosing, aim.threads, aim.seed, progress, aim.finetune)
        self._choosing = self._answers(model, images.choosing)
        self._held_back = self._answers(model, images.held_back)

    def climb(self, dialect: str, placed: Mapping[str, str] = NOTHING_LEFT_OUT) -> Climb:
        """As far as the budget needs; `placed`: layers that stay float since INT8 does not pay there, and why.

        Raises `QuantizationError` if the graph cannot be quantized, or if its target could not read it.
        """
        plain = Quantizer(
            dialect,
            self._ground.model,
            self._ground.table,
            method=self._aim.method,
            remainder=self._aim.remainder,
            cache=self._aim.cache,
        )
        began = time.monotonic()
        best = self._candidate(plain, placed)
        rungs = [Rung("ranges", True, _methods(plain), time.monotonic() - began, best.choosing, best.held_back)]
        for name, make in RUNGS if self._aim.rescue else ():
            if self.meets(best.choosing):
                break
            began = time.monotonic()
            quantizer, note = make(self._ground, best.quantizer, placed)
            if quantizer is None:
                rungs.append(Rung(name, False, note, time.monotonic() - began, best.choosing, best.held_back))
                continue
            candidate = self._candidate(quantizer, placed)
            taken = candidate.better_than(best)
            seconds = time.monotonic() - began
            rungs.append(Rung(name, taken, note, seconds, candidate.choosing, candidate.held_back))
            best = candidate if taken else best
        mixed, left_out = None, placed
        if self._aim.rescue and not self.meets(best.choosing):
            began = time.monotonic()
            mixed = self._mixed(best, placed)
            candidate = self._candidate(best.quantizer, mixed.left_out)
            taken = candidate.better_than(best)
            seconds = time.monotonic() - began
            note = f"{len(mixed.chosen.float_layers)} layers left in float"
            rungs.append(Rung("mixed precision", taken, note, seconds, candidate.choosing, candidate.held_back))
            if taken:
                best, left_out = candidate, mixed.left_out
        met = self.meets(best.choosing)
        return Climb(best.quantizer.quantized(left_out), best.quantizer, left_out, tuple(rungs), met, mixed)

    def meets(self, fidelity: Fidelity) -> bool:
        """Whether no more is needed."""
        budget = self._aim.budget
        return (
            fidelity.expected.loss <= SHARE_OF_BUDGET * budget and fidelity.expected.share <= FLIPS_OF_BUDGET * budget
        )

    def _mixed(self, best: _Candidate, placed: Mapping[str, str]) -> MixedPlan:
        """The smallest set of layers in float that is enough, or that is best while some work is left in INT8.

        Enough is also to be more exact than without it. On a few hundred images some sets flip fewer near ties by
        chance, and what is less exact and flips fewer here will not do so elsewhere.
        """
        quantizer = best.quantizer

        def enough(point: MixedPoint) -> bool:
            fidelity = Fidelity.of_point(point)
            return self.meets(fidelity) and fidelity.sqnr_db > best.choosing.sqnr_db + NOISE_DB

        threads, told = self._aim.threads, self._ground.told
        measured = sensitivities(
            quantizer,
            self._choosing,
            self._images.choosing,
            left_out=placed,
            threads=threads,
            progress=told("sensitivity"),
        )
        mixed = smallest_float_set(
            quantizer,
            measured,
            self._choosing,
            self._images.choosing,
            enough,
            left_out=placed,
            least_int8=LEAST_INT8,
            threads=threads,
            progress=told("mixed precision"),
        )
        backend = backend_reading(quantizer.dialect)
        frontier = with_latencies(mixed.frontier, quantizer, placed, backend, threads=threads)
        return replace(mixed, frontier=frontier)

    def _candidate(self, quantizer: Quantizer, left_out: Mapping[str, str]) -> _Candidate:
        graph = quantizer.runnable(left_out)
        return _Candidate(
            quantizer,
            Fidelity.of(self._choosing, self._answers(graph, self._images.choosing)),
            Fidelity.of(self._held_back, self._answers(graph, self._images.held_back)),
        )

    def _answers(self, graph: ir.Model, images: Batch) -> Batch:
        """Logits `[N, classes]`; of maps of features `[N, C, H, W]` the means of the channels."""
        answers = logits_of(graph, images, threads=self._aim.threads)
        means: Batch = answers.reshape(*answers.shape[:2], -1).mean(axis=-1)
        return answers if answers.ndim == 2 else means


def _methods(quantizer: Quantizer) -> str:
    """How many ranges each method gave, such as "41 × mse, 9 × minmax"."""
    counts = Counter(interval.method for interval in quantizer.ranges.values())
    return ", ".join(f"{count} × {method}" for method, count in counts.most_common())
