"""Placement by evidence: where INT8 pays on this machine, found by timing engines.

INT8 everywhere can be slower than floating point: where an integer kernel is no faster, or where converting to and from
it takes longer than it saves. So all layers are timed in the network in floating point and in INT8 (`placement_costs`),
the choice that should be fastest is computed (`placement_choice`), and then it has to prove itself: whole networks take
turns, and a plan is only called faster if the interval of the paired ratios says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.dialects import NVIDIA, Quantizer, half_graph
from edgewright.optimize.placement_costs import (
    LayerTimes,
    layer_times,
    layers_in_int8,
    milliseconds_per_element,
)
from edgewright.optimize.plan import NOTHING_LEFT_OUT
from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import Backend, BuildRequest, KernelTime
from edgewright.runtime.errors import BuildError
from edgewright.runtime.latency import Clock, PairedRatio, interleaved_samples, paired_ratio
from edgewright.runtime.specs import PlannedLayer

__all__ = ["Placement", "Trial", "fastest", "placed"]

Samples = Mapping[str, NDArray[np.float64]]
Progress = Callable[[int, int], None]

PRICES = {"placed": 1.0, "placed as if conversions were free": 0.0, "placed as if they took three times as long": 3.0}
"""Of a conversion, as a share of what it was seen to take: that is an estimate, so others are tried as well."""
PROFILED_RUNS = 20
MIN_RUNS, MAX_RUNS = 30, 400
ALL_INT8 = "all INT8"


@dataclass(frozen=True)
class Trial:
    """A whole network that was built and timed.

    * name: such as "FP32", "all INT8", "placed"
    * int8_layers, int8_macs: how many layers are INT8, and the multiply-accumulates in them
    * milliseconds: median of one image
    * share: of the time of the fastest network in floating point, within the same rounds
    """

    name: str
    int8_layers: int
    int8_macs: int
    milliseconds: float
    share: PairedRatio


@dataclass(frozen=True)
class Placement:
    """Where INT8 pays.

    * left_out: layers that are to stay in floating point, and why
    * remainder: what they run in, "fp32" or "bf16" on a CPU, "fp16" on NVIDIA's targets
    * layers: what each layer took; empty where the backend times no kernels
    * trials: the networks that were timed, none if no layer can be INT8 or nothing can be timed
    * chosen: the name of the one that was taken, "" if there are none
    """

    left_out: Mapping[str, str]
    remainder: str
    layers: tuple[LayerTimes, ...]
    trials: tuple[Trial, ...]
    chosen: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file that a person can read."""
        return {"schema": "edgewright.placement/1", **asdict(self)}


@dataclass(frozen=True)
class _Candidate:
    """A network to be timed; without `left_out` it has no INT8 at all."""

    name: str
    engine: bytes
    planned: tuple[PlannedLayer, ...]
    remainder: str
    left_out: Mapping[str, str] | None = None

    @property
    def int8(self) -> tuple[PlannedLayer, ...]:
        return tuple(layer for layer in self.planned if layer.precision == "int8")

    @property
    def int8_macs(self) -> int:
        return sum(layer.macs for layer in self.int8)


def placed(
    quantizer: Quantizer,
    backend: Backend,
    *,
    left_out: Mapping[str, str] = NOTHING_LEFT_OUT,
    threads: int = 0,
    budget_seconds: float = 20.0,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    clock: Clock = time.perf_counter_ns,
) -> Placement:
    """Which layers should stay in floating point for `backend`, which reads the quantizer's dialect, on this machine.

    `left_out` stay there in any case. Latency is that of one image on `threads` CPU threads, 0 for all cores, and the
    timing of whole networks takes `budget_seconds` of `clock`; `seed` is of the image of noise. `progress` is told the
    steps done and their number. Where nothing can be timed, since no device is here or the backend builds for targets
    that are named (see `placement_rtx.py`), nothing more is left out. Raises `BuildError` if FP32 or all INT8 cannot be
    built.
    """
    left_out = dict(left_out)
    if backend.targets or backend.cannot_run() is not None:
        return Placement(left_out, "fp16" if backend.dialect in NVIDIA else "fp32", (), (), "")
    bench = _Bench(quantizer, backend, left_out, threads)
    precisions = _float_precisions(backend)
    if not bench.layers:
        return Placement(left_out, precisions[0], (), (), "")
    floats = [bench.in_float(precision) for precision in precisions]
    whole = bench.in_int8(precisions[0])
    progress(1, steps := len(floats) + 2)
    in_int8 = bench.kernel_times(whole)
    per_element = milliseconds_per_element(quantizer.model, in_int8)
    times: dict[str, tuple[LayerTimes, ...]] = {}
    candidates = [whole]
    for index, plain in enumerate(floats):
        taken = layer_times(bench.layers, bench.kernel_times(plain), in_int8)
        if _total(taken) <= _total(next(iter(times.values()), taken)):  # BF16 may be emulated, and slow
            candidates += bench.placements(taken, plain.remainder, per_element)
        times[plain.remainder] = taken
        progress(2 + index, steps)
    samples = _timed([*floats, *candidates], backend, threads, budget_seconds, seed, clock)
    progress(steps, steps)
    return _chosen(bench, floats, candidates, samples, times)


def fastest(samples: Samples, int8_macs: Mapping[str, int]) -> str:
    """The name of the network to take, of times `[rounds]` in the same rounds; `int8_macs`: how much of each is INT8.

    It is the fastest with INT8 in it or, where others are not shown to be slower, the one of them with the most INT8;
    but without a doubt faster than all without INT8, or else the fastest of these.
    """
    by_median = sorted(samples, key=lambda name: float(np.median(samples[name])))
    plain = next(name for name in by_median if not int8_macs[name])
    mixed = [name for name in by_median if int8_macs[name]]
    if not mixed:
        return plain
    best = mixed[0]
    as_fast = [name for name in mixed if paired_ratio(samples[name], samples[best]).low <= 1]
    wanted = (max(as_fast, key=lambda name: int8_macs[name]), best)
    return next((name for name in wanted if paired_ratio(samples[name], samples[plain]).high < 1), plain)


class _Bench:
    """Builds and times the networks of one quantizer for one backend."""

    def __init__(self, quantizer: Quantizer, backend: Backend, left_out: Mapping[str, str], threads: int) -> None:
        self._quantizer, self._backend, self._threads = quantizer, backend, threads
        self._whole = quantizer.quantized(left_out)
        self.left_out = left_out
        self.layers = tuple(layer for layer in quantizer.layers if layer not in left_out)

    def in_float(self, precision: str) -> _Candidate:
        model = self._quantizer.model
        graph = half_graph(model, self._quantizer.table).model if precision == "fp16" else model
        return self._built(precision.upper(), graph, precision, precision)

    def in_int8(self, remainder: str) -> _Candidate:
        return replace(self._built(ALL_INT8, self._whole.model, "int8", remainder), left_out=self.left_out)

    def _built(self, name: str, graph: ir.Model, precision: str, remainder: str) -> _Candidate:
        planned = planned_layers(graph)
        if remainder == "bf16":  # no matter of the graph, but of the backend's options
            planned = tuple(
                replace(layer, precision="bf16") if layer.precision == "fp32" else layer for layer in planned
            )
        built = self._backend.build(BuildRequest(ir.to_proto(graph).SerializeToString(), precision, planned))
        return _Candidate(name, built.compiled.engine, planned, remainder)

    def kernel_times(self, candidate: _Candidate) -> tuple[KernelTime, ...]:
        return self._backend.kernel_times(
            candidate.engine, candidate.planned, threads=self._threads, runs=PROFILED_RUNS
        )

    def placements(self, times: Sequence[LayerTimes], remainder: str, per_element: float) -> Iterator[_Candidate]:
        """The plans that should be fastest, for several prices of a conversion; a plan comes once."""
        by_layer = {layer.node: layer for layer in times}
        seen = {frozenset(self.layers), frozenset()} if remainder != "bf16" else {frozenset()}
        for name, price in PRICES.items() if times else ():
            chosen = layers_in_int8(self._quantizer.model, self._whole.plan, by_layer, price * per_element)
            if chosen in seen:
                continue
            seen.add(chosen)
            reasons = {layer.node: _reason(layer) for layer in times if layer.node not in chosen}
            left_out = {**self.left_out, **reasons}
            suffix = ", the rest in BF16" if remainder == "bf16" else ""
            try:
                built = self._built(name + suffix, self._quantizer.quantized(left_out).model, "int8", remainder)
            except BuildError:  # the backend takes these layers in INT8 only together with others
                continue
            yield replace(built, left_out=left_out)


def _total(times: Sequence[LayerTimes]) -> float:
    return sum(layer.float_ms for layer in times)


def _float_precisions(backend: Backend) -> tuple[str, ...]:
    """What the rest of a network with INT8 in it can run in."""
    if backend.dialect in NVIDIA:
        return ("fp16",)
    usable = (word for word in ("fp32", "bf16") if word in backend.precisions)
    return tuple(word for word in usable if backend.unsupported(word, None) is None)


def _timed(
    candidates: Sequence[_Candidate], backend: Backend, threads: int, budget_seconds: float, seed: int, clock: Clock
) -> Samples:
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        runs: dict[str, Callable[[], object]] = {}
        for candidate in candidates:
            runner = stack.enter_context(backend.open(candidate.engine, threads=threads))
            shapes = {spec.name: [side or 1 for side in spec.shape] for spec in runner.inputs}
            feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
            runs[candidate.name] = partial(runner.infer, feeds)
        return interleaved_samples(
            runs, budget_seconds=budget_seconds, min_runs=MIN_RUNS, max_runs=MAX_RUNS, clock=clock
        )


def _chosen(
    bench: _Bench,
    floats: Sequence[_Candidate],
    candidates: Sequence[_Candidate],
    samples: Samples,
    times: Mapping[str, tuple[LayerTimes, ...]],
) -> Placement:
    everything = {candidate.name: candidate for candidate in (*floats, *candidates)}
    plain = min((candidate.name for candidate in floats), key=lambda name: float(np.median(samples[name])))
    shares = {name: paired_ratio(taken, samples[plain]) for name, taken in samples.items()}
    trials = tuple(
        Trial(name, len(one.int8), one.int8_macs, float(np.median(samples[name])), shares[name])
        for name, one in everything.items()
    )
    chosen = everything[fastest(samples, {name: one.int8_macs for name, one in everything.items()})]
    left_out = chosen.left_out
    if left_out is None:
        best = min((trial for trial in trials if trial.int8_macs), key=lambda trial: trial.share.median)
        reason = f"INT8 does not pay in this network: {_in_words(best, plain)}"
        left_out = {**bench.left_out, **dict.fromkeys(bench.layers, reason)}
    return Placement(left_out, chosen.remainder, times[chosen.remainder], trials, chosen.name)


def _in_words(trial: Trial, plain: str) -> str:
    share = trial.share
    return (
        f"the fastest plan takes {share.median:.2f} of the time of {plain} "
        f"(95 % interval {share.low:.2f} … {share.high:.2f})"
    )


def _reason(layer: LayerTimes) -> str:
    if layer.gain_ms <= 0:
        return f"INT8 is slower here: {layer.int8_ms:.3f} against {layer.float_ms:.3f} ms with its conversions"
    return f"INT8 would save {layer.gain_ms:.3f} ms here, less than to convert what its neighbours give or read"
