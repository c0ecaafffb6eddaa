"""EfficientNet-Lite0 on photographs: time of calibrating, quantizing and repairing, latency and accuracy of INT8.

onnxruntime's own quantizer does the same work in the same run on the same images, and NNCF and ModelOpt do where they
are installed.
"""

from __future__ import annotations

import csv
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure, sample_folder
from numpy.typing import NDArray
from peers import ACCURATE, peer_result
from quantizers import calibrated, climbed, folded_model, quantize_ourselves, serialized

from edgewright.calibration.collect import LARGEST_BATCH
from edgewright.export.models import MODELS
from edgewright.optimize.absorb_bias import absorb_high_biases
from edgewright.optimize.correct_bias import bias_shifts
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.equalize import equalize
from edgewright.optimize.repairs import Repairs
from edgewright.optimize.segments import logits_of
from edgewright.optimize.sensitivity import sensitivities
from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.latency import interleaved_samples, paired_ratio
from edgewright.runtime.parity import compare

CALIBRATION_IMAGES = 256
SPLITS = 5
THREADS = 2

Batch = NDArray[np.float32]


def measure() -> Iterator[Figure]:
    """All figures; nothing without the photographs."""
    folder = sample_folder()
    if folder is None:
        print("  no photographs: set EDGEWRIGHT_SAMPLE to a folder with labels.csv")
        return
    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    began = time.perf_counter()
    images = MODELS["efficientnet_lite0"].task.preprocess.batch([folder / row["file"] for row in rows])
    yield Figure("decoding, one thread", 1e3 * (time.perf_counter() - began) / len(images), "ms an image")
    labels = np.array([int(row["index"]) for row in rows])
    folded = folded_model("efficientnet_lite0")
    graph = serialized(folded)
    chosen = images[:CALIBRATION_IMAGES]
    began = time.perf_counter()
    quantized = quantize_ourselves(folded, chosen)
    seconds = time.perf_counter() - began
    yield Figure("ranges and Q/DQ, 256 photographs", seconds, "s", bound=6.0)
    yield from _rungs(folded, chosen)
    yield from _sensitivity(folded, chosen)
    yield from _latency(graph, quantized, images[:1])
    yield from _accuracy(folded, graph, images, labels, seconds)


def _batches(images: Batch) -> Iterator[Batch]:
    for start in range(0, len(images), LARGEST_BATCH):
        yield images[start : start + LARGEST_BATCH]


def _rungs(folded: ir.Model, images: Batch) -> Iterator[Figure]:
    """Both ways of equalizing, though one of them is enough for a network without a plain ReLU."""
    began = time.perf_counter()
    model = absorb_high_biases(equalize(folded, inexact=True).model, images).model
    quantizer = Quantizer("cpu", model, calibrated(model, images))
    shifts = bias_shifts(model, quantizer.runnable(), quantizer.layers, images)
    quantizer.repaired(Repairs(bias_shifts=shifts)).quantized()
    seconds = time.perf_counter() - began
    yield Figure("the same with equalization and bias correction", seconds, "s", bound=15.0)


def _sensitivity(folded: ir.Model, images: Batch) -> Iterator[Figure]:
    quantizer, reference = Quantizer("cpu", folded, calibrated(folded, images)), logits_of(folded, images)
    began = time.perf_counter()
    measured = sensitivities(quantizer, reference, images)
    note = f"{len(measured)} layers, {measured[0].only_kept.images} of the images"
    yield Figure("sensitivity of all layers", time.perf_counter() - began, "s", bound=90.0, note=note)


def _latency(graph: bytes, quantized: bytes, image: Batch) -> Iterator[Figure]:
    backend = BACKENDS["onnxruntime"]
    with backend.open(graph, threads=THREADS) as plain, backend.open(quantized, threads=THREADS) as int8:
        runs: dict[str, Callable[[], object]] = {
            "fp32": lambda: plain.infer({"images": image}),
            "int8": lambda: int8.infer({"images": image}),
        }
        samples = interleaved_samples(runs, budget_seconds=20.0, min_runs=50, max_runs=400)
    ratio = paired_ratio(samples["int8"], samples["fp32"])
    note = f"95 % interval {ratio.low:.3f} … {ratio.high:.3f}, FP32 {np.median(samples['fp32']):.2f} ms"
    yield Figure("INT8 latency, batch 1, as a share of FP32's", ratio.median, "", bound=0.65, note=note)


@dataclass
class _Answers:
    """Of one quantizer, split after split."""

    logits: list[Batch] = field(default_factory=list)
    sqnr_db: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, expected: Batch, found: Batch, seconds: float) -> None:
        self.logits.append(found)
        self.sqnr_db.append(compare(expected, found, None).sqnr_db or -math.inf)
        self.seconds.append(seconds)


def _accuracy(
    folded: ir.Model, graph: bytes, images: Batch, labels: NDArray[np.int64], own_seconds: float
) -> Iterator[Figure]:
    reference = logits_of(folded, images)
    answers: defaultdict[str, _Answers] = defaultdict(_Answers)
    judged_in: list[NDArray[np.int64]] = []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(images))
        chosen, judged = images[order[:CALIBRATION_IMAGES]], images[order[CALIBRATION_IMAGES:]]
        expected = reference[order[CALIBRATION_IMAGES:]]
        judged_in.append(order[CALIBRATION_IMAGES:])
        began = time.perf_counter()
        climb = climbed(folded, chosen, "cpu")
        seconds = time.perf_counter() - began
        answers["ours"].add(expected, _logits(serialized(climb.quantized.model), judged), seconds)
        print(f"  split {seed}: {climb.words}", flush=True)
        for peer in ACCURATE:
            with tempfile.TemporaryDirectory() as scratch:
                result = peer_result(peer, graph, chosen, Path(scratch), judged)
            if result is not None and result.logits is not None:
                answers[peer].add(expected, result.logits, result.seconds)
    rows = np.concatenate(judged_in)
    best = max((float(np.mean(peer.sqnr_db)) for name, peer in answers.items() if name != "ours"), default=None)
    for name, found in answers.items():
        parity = compare(reference[rows], np.concatenate(found.logits), labels[rows])
        low, high = parity.loss_ci95
        ours = name == "ours"
        seconds = float(np.median(found.seconds))
        took = (
            f"{seconds:.1f} s with all its rungs" if ours else f"{seconds:.1f} s, our plain ranges {own_seconds:.1f} s"
        )
        yield Figure(
            f"INT8 logit SQNR, {name}", float(np.mean(found.sqnr_db)), "dB", best if ours else None, True, took
        )
        note = f"{parity.images} judged images in {SPLITS} splits"
        yield Figure(f"INT8 agreement with FP32, {name}", parity.agreement, "", 0.99 if ours else None, True, note)
        note = f"95 % interval {100 * low:.2f} … {100 * high:.2f}"
        yield Figure(f"INT8 loss, {name}", 100 * parity.loss, "points", 0.3 if ours else None, note=note)


def _logits(graph: bytes, images: Batch) -> Batch:
    with BACKENDS["onnxruntime"].open(graph, threads=THREADS) as runner:
        return np.concatenate([runner.infer({"images": batch})["logits"] for batch in _batches(images)])
