"""What a measurement gives, plain data, and the same as JSON: `edgewright.bench/1`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..latency import Latency, median_interval

__all__ = ["UNSTABLE", "Distribution", "Machine", "Result", "SetUp", "engine_words"]

UNSTABLE = 0.025
"""Coefficient of variation above which the machine was not quiet."""
HALF_ALPHA = 0.025
"""Two medians' intervals hold together with 95 % if each of them holds with 97.5 % (Bonferroni)."""
SHORTEST_MS = 1e-6  # a nanosecond, which is what clocks count
BLOCKS = 20
"""Of consecutive runs: the medians of such blocks depend on each other far less than runs do, of which a slow spell
hits many (batch means: Law 2015, Simulation Modeling and Analysis, 9.5.3)."""


@dataclass(frozen=True)
class SetUp:
    """What a time depends on besides the engine and the machine.

    * batch: images per run; threads: of the processor
    * image: (width, height) in pixels of the decoded images that a run begins with; None if it begins with what
      preprocessing gives
    """

    batch: int
    threads: int
    image: tuple[int, int] | None = None

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        images = "" if self.image is None else f", from images of {self.image[0]}x{self.image[1]}"
        return f"batch {self.batch}, {threads}{images}"


@dataclass(frozen=True)
class Machine:
    """Where a time was taken.

    * processor: its model; cores: as many as this process may use
    * system: the operating system, its release and architecture
    * board: of a Jetson; gpu: its name, where an engine ran on one; "" where there is none
    """

    processor: str
    cores: int
    system: str
    board: str
    gpu: str


@dataclass(frozen=True)
class Distribution:
    """Of the times of the runs, in milliseconds.

    * runs: how many were timed; cv: coefficient of variation, standard deviation / mean
    * p50 … p99: quantiles, linear between order statistics
    * p50_low, p50_high: interval of the median, 97.5 %, from the order statistics of the medians of 20 blocks of runs
    """

    runs: int
    min: float
    max: float
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    cv: float
    p50_low: float
    p50_high: float

    @classmethod
    def of(cls, milliseconds: ArrayLike) -> Distribution:
        """Of timed runs, `[runs]` in milliseconds, one or more."""
        samples = np.asarray(milliseconds, np.float64)
        latency = Latency.of(samples, batch=0, threads=0)
        blocks = [np.median(block) for block in np.array_split(samples, min(BLOCKS, samples.size))]
        low, high, _ = median_interval(blocks, alpha=HALF_ALPHA)
        return cls(
            runs=latency.runs,
            min=float(samples.min()),
            max=float(samples.max()),
            mean=float(samples.mean()),
            p50=latency.p50,
            p90=latency.p90,
            p95=float(np.percentile(samples, 95)),
            p99=latency.p99,
            cv=latency.cv,
            p50_low=low,
            p50_high=high,
        )

    def check(self) -> None:
        """Raises `ValueError` unless the times are some that a clock can have measured."""
        times = (self.min, self.p50, self.p90, self.p95, self.p99, self.max, self.mean, self.p50_low, self.p50_high)
        if min(times) < SHORTEST_MS or self.p50_low > self.p50_high:
            raise ValueError(f"a median of {self.p50:g} ms, from {self.p50_low:g} to {self.p50_high:g}, is none")

    @property
    def stable(self) -> bool:
        """Whether the machine was quiet enough for figures that repeat."""
        return self.cv <= UNSTABLE


@dataclass(frozen=True)
class Result:
    """One engine in one set-up.

    * path: as it was given, or the file in the folder that was given; why: why it is this engine
    * precision: "" for an ONNX file that is run as it is; version: of the backend's library
    * sha256, bytes: of the engine
    * shape: of one image as the engine takes it, `[C, H, W]`
    * latency: of a whole run, preprocessing included where the set-up says so
    * preprocess_ms: median of that part of a run, None where there is none
    """

    path: str
    backend: str
    version: str
    precision: str
    sha256: str
    bytes: int
    shape: tuple[int, ...]
    why: str
    setup: SetUp
    latency: Distribution
    preprocess_ms: float | None

    @property
    def words(self) -> str:
        """The engine for a person."""
        return engine_words(self.backend, self.precision, self.path)

    @property
    def qps(self) -> float:
        """Runs per second, one after the other."""
        return 1e3 / self.latency.mean

    @property
    def images_per_second(self) -> float:
        """Images per second, one run after the other."""
        return self.setup.batch * self.qps

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        latency = {"batch": self.setup.batch, "threads": self.setup.threads, **asdict(self.latency)}
        return {
            "path": self.path,
            "backend": self.backend,
            "version": self.version,
            "precision": self.precision or None,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "input": list(self.shape),
            "why": self.why,
            "latency_ms": latency,
            "throughput": {"qps": self.qps, "images_per_second": self.images_per_second},
            "stable": self.latency.stable,
            "preprocessing": None
            if self.setup.image is None
            else {"image": list(self.setup.image), "p50_ms": self.preprocess_ms},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """The inverse of `to_json`; fields that a later version added are ignored."""
        latency, preprocessing = content["latency_ms"], content["preprocessing"]
        image = None if preprocessing is None else tuple(preprocessing["image"])
        return cls(
            path=content["path"],
            backend=content["backend"],
            version=content["version"],
            precision=content["precision"] or "",
            sha256=content["sha256"],
            bytes=content["bytes"],
            shape=tuple(content["input"]),
            why=content["why"],
            setup=SetUp(latency["batch"], latency["threads"], image),
            latency=Distribution(**{name: latency[name] for name in Distribution.__dataclass_fields__}),
            preprocess_ms=None if preprocessing is None else preprocessing["p50_ms"],
        )


def engine_words(backend: str, precision: str, path: str) -> str:
    """An engine for a person, such as "onnxruntime int8"; of an ONNX file "onnxruntime model.onnx"."""
    return f"{backend} {precision or Path(path).name}"
