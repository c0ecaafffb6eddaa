"""What a run is fed, and whether an engine takes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Runner
from ..device.memory import memory_here
from ..errors import EdgewrightError, EngineError, InputError
from ..latency import Clock
from ..preprocess import COLOURS
from ..specs import TensorSpec
from .candidates import Candidate
from .results import SetUp

__all__ = ["Run", "check_fits"]

SEED = 7
MOST_OF_MEMORY = 0.25  # what is between input and output is several times as large
Array = NDArray[Any]


def check_fits(candidate: Candidate, setup: SetUp) -> None:
    """Raises `InputError` unless the engine takes what the set-up says."""
    if not candidate.inputs or not candidate.inputs[0].shape:
        raise InputError(f"{candidate.path} takes no batch as its first input", "give a network that takes images")
    _check_batch(candidate, setup.batch)
    for spec in candidate.inputs:
        if None in spec.shape[1:]:
            sides = ", ".join("?" if side is None else str(side) for side in spec.shape)
            raise InputError(
                f"{candidate.path} leaves the size of its input {spec.name!r} open: [{sides}]",
                "fix all but the batch: python -m onnxruntime.tools.make_dynamic_shape_fixed",
            )
    if setup.image is not None and candidate.info is None:
        raise InputError(
            f"{candidate.path} does not say how its images are preprocessed",
            "leave out --preprocess, or give a build folder or a bundle",
        )

    _check_memory(candidate, setup)


def _check_memory(candidate: Candidate, setup: SetUp) -> None:
    """Linux ends a process that takes more than there is; what it is fed is the part that is known beforehand."""
    tensors = sum(prod(_sides(spec, setup.batch)) * np.dtype(spec.dtype).itemsize for spec in candidate.inputs)
    images = 0 if setup.image is None else setup.batch * setup.image[0] * setup.image[1] * 3
    memory = memory_here()
    if memory is not None and tensors + images > memory.available * MOST_OF_MEMORY:
        raise InputError(
            f"the input of {setup} is {(tensors + images) / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB are available",
            "choose a smaller --batch or --camera",
        )


def _check_batch(candidate: Candidate, batch: int) -> None:
    fixed = candidate.inputs[0].shape[0]
    profile = None if candidate.info is None else candidate.info.profile
    if fixed is not None:
        lowest, highest = fixed, fixed
    else:
        lowest, highest = (1, batch) if profile is None else (profile.minimum, profile.maximum)
    if not lowest <= batch <= highest:
        taken = f"batches of {lowest}" if lowest == highest else f"batches from {lowest} to {highest}"
        raise InputError(
            f"{candidate.words} of {candidate.path} takes {taken}, asked for was {batch}",
            f"give --batch {lowest}" if lowest == highest else "give one in between, or build it with another --batch",
        )


class Run:
    """One run of an engine in a set-up, to be called again and again with the same input.

    * preprocess_ms: median time of that part of the runs so far, None where there is none
    """

    def __init__(self, candidate: Candidate, runner: Runner, setup: SetUp, clock: Clock = time.perf_counter_ns) -> None:
        self._candidate, self._runner, self._setup, self._clock = candidate, runner, setup, clock
        self._preprocess_ns: list[int] = []
        self._run = self._of_tensors() if setup.image is None else self._of_images(*setup.image)

    def __call__(self) -> None:
        """Preprocessing, if the set-up has it, and the engine."""
        self._run()

    @property
    def preprocess_ms(self) -> float | None:
        """Median over all runs so far."""
        return median(self._preprocess_ns) / 1e6 if self._preprocess_ns else None

    def prove(self) -> None:
        """Runs once. Raises `EngineError` that names the engine and the set-up if it cannot."""
        try:
            self._run()
        except EdgewrightError as error:
            raise EngineError(f"{self._candidate.path}, {self._setup}: {error.message}", error.remedy) from error

    def _of_tensors(self) -> Callable[[], object]:
        random = np.random.default_rng(SEED)
        feeds = {spec.name: _tensor(spec, self._setup.batch, random) for spec in self._candidate.inputs}
        return lambda: self._runner.infer(feeds)

    def _of_images(self, width: int, height: int) -> Callable[[], object]:
        info, (spec,) = self._candidate.info, self._candidate.inputs
        assert info is not None  # as `check_fits` found
        random = np.random.default_rng(SEED)
        sides = (height, width, *([3] if COLOURS[info.preprocess.colour] == 3 else []))
        images = list(random.integers(0, 256, (self._setup.batch, *sides), np.uint8))

        def run() -> None:
            begun = self._clock()
            batch = info.preprocess.batch(images)
            self._preprocess_ns.append(self._clock() - begun)
            self._runner.infer({spec.name: batch})

        return run


def _tensor(spec: TensorSpec, batch: int, random: np.random.Generator) -> Array:
    """Normal numbers, as normalized images are; of integers 0 and 1, which are valid whatever they index."""
    sides = _sides(spec, batch)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return random.standard_normal(sides, np.float32).astype(dtype, copy=False)
    return random.integers(0, 2, sides).astype(dtype)


def _sides(spec: TensorSpec, batch: int) -> list[int]:
    """The shape of an input whose batch alone is open."""
    return [batch if side is None else side for side in spec.shape]
