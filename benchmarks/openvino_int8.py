"""OpenVINO reading our Q/DQ graphs: latency at 224×224, batch 1, two threads, as a share of onnxruntime's FP32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
from figures import Figure, photographs
from numpy.typing import NDArray
from quantizers import calibrated, folded_model, folded_resnet50, serialized

from edgewright.optimize.dialects import quantized_graph
from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import BACKENDS, BuildRequest
from edgewright.runtime.latency import interleaved_samples, paired_ratio

CALIBRATION_IMAGES = 64
THREADS = 2
SEED = 6
BOUND = 0.20
"""For machines with AMX. With VNNI alone NNCF's graph took 0.30 where ours took 0.30, side by side."""


def measure() -> Iterator[Figure]:
    """ResNet-50 with random weights, and EfficientNet-Lite0."""
    absence = BACKENDS["openvino"].absence()
    if absence is not None:
        print(f"  {absence.reason}")
        return
    images = photographs(CALIBRATION_IMAGES)
    if images is None:
        images = np.random.default_rng(SEED).standard_normal((CALIBRATION_IMAGES, 3, 224, 224), np.float32)
    for name, model, bound in (
        ("ResNet-50", folded_resnet50(), BOUND),
        ("Lite0", folded_model("efficientnet_lite0"), None),
    ):
        yield from _network(name, model, images, bound)


def _network(name: str, model: ir.Model, images: NDArray[np.float32], bound: float | None) -> Iterator[Figure]:
    table = calibrated(model, images)
    engines = {("onnxruntime", "fp32"): model, ("openvino", "fp32"): model, ("openvino", "bf16"): model}
    engines["onnxruntime", "int8"] = quantized_graph("cpu", model, table).model
    engines["openvino", "int8"] = quantized_graph("openvino", model, table).model
    with ExitStack() as stack:
        runs: dict[str, Callable[[], object]] = {}
        for (backend, precision), graph in engines.items():
            if BACKENDS[backend].unsupported(precision, None) is None:
                engine = _built(backend, precision, graph)
                runner = stack.enter_context(BACKENDS[backend].open(engine, threads=THREADS))
                runs[f"{backend} {precision}"] = partial(runner.infer, {"images": images[:1]})
        samples = interleaved_samples(runs, budget_seconds=40.0, min_runs=30, max_runs=200)
    plain = samples["onnxruntime fp32"]
    for words, taken in samples.items():
        if words != "onnxruntime fp32":
            ratio = paired_ratio(taken, plain)
            note = f"95 % interval {ratio.low:.3f} … {ratio.high:.3f}, onnxruntime FP32 {np.median(plain):.2f} ms"
            limit = bound if words == "openvino int8" else None
            yield Figure(f"{name}, {words}: latency, share of onnxruntime FP32", ratio.median, "", limit, note=note)


def _built(backend: str, precision: str, graph: ir.Model) -> bytes:
    planned = planned_layers(graph)
    if precision == "bf16":
        planned = tuple(replace(layer, precision="bf16") for layer in planned)
    return BACKENDS[backend].build(BuildRequest(serialized(graph), precision, planned)).compiled.engine
