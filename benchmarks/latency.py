"""CPU latency of the engine that would be recommended beside the fastest of the peers': batch 1, two threads, one run.

Ours are FP32 and INT8 where it pays, of onnxruntime and OpenVINO, and OpenVINO's BF16; the peers are FP32 of both,
BF16, the graph of onnxruntime's own quantizer and NNCF's in OpenVINO, where they are installed. All engines take
turns. A random network is as fast as a trained one, so calibration is on noise, and nothing is said of accuracy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure
from networks import NETWORKS, noise
from numpy.typing import NDArray
from peers import ON_CPU, openvino_request, peer_result
from quantizers import calibrated, serialized

from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.placement import placed
from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import BACKENDS, BuildRequest
from edgewright.runtime.latency import interleaved_samples, paired_ratio

THREADS = 2
BOUND = 1.0
CALIBRATION_IMAGES = 16
PLACEMENT_SECONDS, COMPARISON_SECONDS = 10.0, 40.0
PLAIN = "onnxruntime FP32"

Batch = NDArray[np.float32]
Runs = dict[str, Callable[[], object]]


def measure() -> Iterator[Figure]:
    """For each network all engines as a share of onnxruntime's FP32, then ours as a share of the fastest peer."""
    for name, network in NETWORKS.items():
        yield from _network(name, network())


def _network(name: str, model: ir.Model) -> Iterator[Figure]:
    images = noise(CALIBRATION_IMAGES)
    with ExitStack() as stack:
        both = _runs(stack, _in_float(model), images[:1])  # what a peer gives without any quantizer, and so do we
        ours = _runs(stack, _placed(model, images), images[:1])
        peers = _by_peers(stack, model, images)
        samples = interleaved_samples(both | ours | peers, budget_seconds=COMPARISON_SECONDS, min_runs=30, max_runs=400)
    for words, taken in samples.items():
        ratio = paired_ratio(taken, samples[PLAIN])
        note = f"95 % interval {ratio.low:.3f} … {ratio.high:.3f}, {np.median(taken):.2f} ms"
        yield Figure(f"{name}, {words}: latency, share of {PLAIN}", ratio.median, "", note=note)
    best, theirs = (
        min(names, key=lambda words: float(np.median(samples[words]))) for names in (both | ours, both | peers)
    )
    ratio = paired_ratio(samples[best], samples[theirs])
    note = f"{best} against {theirs}, 95 % interval {ratio.low:.3f} … {ratio.high:.3f}"
    yield Figure(f"{name}: ours, share of the fastest peer", ratio.median, "", BOUND, note=note)


def _in_float(model: ir.Model) -> Iterator[tuple[str, str, bytes]]:
    """Names, backends and engines."""
    for backend, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
        if BACKENDS[backend].absence() is None and BACKENDS[backend].unsupported(precision, None) is None:
            planned = tuple(replace(layer, precision=precision) for layer in planned_layers(model))
            built = BACKENDS[backend].build(BuildRequest(serialized(model), precision, planned))
            yield f"{backend} {precision.upper()}", backend, built.compiled.engine


def _placed(model: ir.Model, images: Batch) -> Iterator[tuple[str, str, bytes]]:
    table = calibrated(model, images)
    for backend in ("onnxruntime", "openvino"):
        if BACKENDS[backend].absence() is not None:
            print(f"  {backend} is not installed: not compared")
            continue
        quantizer = Quantizer(BACKENDS[backend].dialect, model, table, method="minmax")
        found = placed(quantizer, BACKENDS[backend], threads=THREADS, budget_seconds=PLACEMENT_SECONDS)
        quantized = quantizer.quantized(found.left_out)
        print(f"  {backend}: {found.chosen}, {quantized.int8_layers} layers in INT8, {len(found.left_out)} left out")
        if quantized.int8_layers:
            planned = tuple(
                replace(layer, precision=found.remainder) if layer.precision == "fp32" else layer
                for layer in planned_layers(quantized.model)
            )
            built = BACKENDS[backend].build(BuildRequest(serialized(quantized.model), "int8", planned))
            yield f"{backend} INT8 where it pays", backend, built.compiled.engine


def _by_peers(stack: ExitStack, model: ir.Model, images: Batch) -> Runs:
    """NNCF's rest runs in FP32 and, where the processor has it, in BF16, which is OpenVINO's default."""
    runs: Runs = {}
    for peer in ON_CPU:
        with tempfile.TemporaryDirectory() as folder:
            result = peer_result(peer, serialized(model), images, Path(folder))
            if result is None:
                continue
            if result.graph.suffix == ".onnx":
                runs |= _runs(stack, iter([(peer, "onnxruntime", result.graph.read_bytes())]), images[:1])
            elif BACKENDS["openvino"].absence() is None:
                runs |= {f"{peer} in OpenVINO, {rest}": run for rest, run in _in_openvino(result.graph, images[:1])}
    return runs


def _in_openvino(graph: Path, image: Batch) -> Iterator[tuple[str, Callable[[], object]]]:
    for rest in ("f32", "bf16"):
        if rest == "f32" or BACKENDS["openvino"].unsupported("bf16", None) is None:
            request = openvino_request(graph, 1, THREADS, rest)
            yield f"the rest in {rest}", partial(request.infer, [image])


def _runs(stack: ExitStack, engines: Iterator[tuple[str, str, bytes]], image: Batch) -> Runs:
    runs: Runs = {}
    for name, backend, engine in engines:
        runner = stack.enter_context(BACKENDS[backend].open(engine, threads=THREADS))
        feeds: Mapping[str, Batch] = {runner.inputs[0].name: image}
        runs[name] = partial(runner.infer, feeds)
    return runs
