"""How fast the candidates of mixed precision are: timed in turns on a CPU, modelled for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from edgewright.optimize.dialects import CPU, Quantizer
from edgewright.optimize.mixed_precision import Latency, MixedPoint
from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import Backend, BuildRequest
from edgewright.runtime.latency import interleaved_samples

__all__ = ["with_latencies"]

SECONDS = 3.0
MIN_RUNS, MAX_RUNS = 10, 200
INT8_SHARE_OF_FP16 = 0.5
"""Of the time of a multiply-accumulate: tensor cores do twice as many in INT8 (NVIDIA's data sheets, all since Turing).
What memory bounds gains less, so that this is the most that INT8 can bring.
"""


def with_latencies(
    points: Sequence[MixedPoint],
    quantizer: Quantizer,
    placed: Mapping[str, str],
    backend: Backend,
    *,
    threads: int,
) -> tuple[MixedPoint, ...]:
    """The same points with the latency of one image each; `placed` are left out of all of them.

    Without one where the backend of a CPU dialect is not installed. Raises `BuildError` if it refuses a candidate.
    """
    if quantizer.dialect not in CPU:
        share = INT8_SHARE_OF_FP16
        modelled = (Latency(1 - (1 - share) * point.int8_share, "of FP16", "modelled") for point in points)
        return tuple(replace(point, latency=latency) for point, latency in zip(points, modelled, strict=True))
    if backend.absence() is not None:
        return tuple(points)
    with ExitStack() as stack:
        runs: dict[int, Callable[[], object]] = {}
        for index, point in enumerate(points):
            left_out = {**placed, **dict.fromkeys(point.float_layers, "on the frontier")}
            model = quantizer.quantized(left_out).model
            request = BuildRequest(ir.to_proto(model).SerializeToString(), "int8", planned_layers(model))
            runner = stack.enter_context(backend.open(backend.build(request).compiled.engine, threads=threads))
            feeds = {spec.name: np.zeros([side or 1 for side in spec.shape], np.float32) for spec in runner.inputs}
            runs[index] = partial(runner.infer, feeds)
        samples = interleaved_samples(runs, budget_seconds=SECONDS, min_runs=MIN_RUNS, max_runs=MAX_RUNS)
    return tuple(
        replace(point, latency=Latency(float(np.median(samples[index])), "ms", "measured"))
        for index, point in enumerate(points)
    )
