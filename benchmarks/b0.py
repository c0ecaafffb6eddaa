"""mobilenet_effnet_b0 on the 10,000 test images: the loss of our INT8 beside that of the peers'."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure
from numpy.typing import NDArray
from peers import peer_result
from quantizers import calibrated, climbed, folded_model, serialized

from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.stream import batches
from edgewright.export.models import MODELS
from edgewright.optimize.dialects import half_graph
from edgewright.optimize.segments import logits_of
from edgewright.optimize.simulate import signed_to_unsigned, simulate_fp16
from edgewright.optimize.work import planned_layers
from edgewright.runtime.parity import Parity, compare

Batch = NDArray[np.float32]

PEERS = ("onnxruntime min-max", "onnxruntime entropy", "onnxruntime percentile", "onnxruntime S8 min-max", "ModelOpt")


def measure() -> Iterator[Figure]:
    """FP32 top-1, our INT8 loss with as much repair as it needs, those of the peers, and FP16."""
    preprocess = MODELS["mobilenet_effnet_b0"].task.preprocess
    calibration = np.concatenate(list(batches(fashion_mnist_calibration(), preprocess, 64)))
    test = fashion_mnist_test()
    images = np.concatenate(list(batches(test, preprocess, 64)))
    assert test.labels is not None
    folded = folded_model("mobilenet_effnet_b0")
    graph = serialized(folded)
    judged = _Judged(images, test.labels, logits_of(folded, images))
    yield Figure("B0 FP32 top-1 on 10,000 images", 100 * judged.top1, "%", bound=93.0, at_least=True)
    for dialect in ("cpu", "tensorrt", "rtx"):
        yield from _ours(dialect, folded, calibration, judged)
    half = half_graph(folded, calibrated(folded, calibration)).model
    yield Figure("B0 FP16 loss, simulated", 100 * judged.parity(simulate_fp16(half)).loss, "points", 0.05)
    for peer in PEERS:
        with tempfile.TemporaryDirectory() as scratch:
            result = peer_result(peer, graph, calibration, Path(scratch))
            if result is not None:
                yield Figure(f"B0 INT8 loss, {peer}", 100 * judged.parity(ir.load(result.graph)).loss, "points")


@dataclass(frozen=True)
class _Judged:
    """The test images, `[N, C, H, W]`, their labels, and what FP32 answers."""

    images: Batch
    labels: NDArray[np.int64]
    reference: Batch

    @property
    def top1(self) -> float:
        return float((self.reference.argmax(axis=1) == self.labels).mean())

    def parity(self, model: ir.Model) -> Parity:
        return compare(self.reference, logits_of(model, self.images), self.labels, source="simulation")


def _ours(dialect: str, folded: ir.Model, calibration: Batch, judged: _Judged) -> Iterator[Figure]:
    """TensorRT-RTX takes few layers in INT8 at all: its share of the work has no bound."""
    began = time.perf_counter()
    climb = climbed(folded, calibration, dialect)
    seconds = time.perf_counter() - began
    model = climb.quantized.model
    if dialect != "cpu":
        model = signed_to_unsigned(simulate_fp16(model))
    parity = judged.parity(model)
    layers = planned_layers(climb.quantized.model)
    share = sum(layer.macs for layer in layers if layer.precision == "int8") / sum(layer.macs for layer in layers)
    words, bounded = f"B0 INT8, {dialect} dialect", dialect != "rtx"
    yield Figure(f"{words}: loss", 100 * parity.loss, "points", 0.3, note=climb.words)
    yield Figure(f"{words}: upper bound of the loss", 100 * parity.loss_ci95[1], "points", 0.5)
    yield Figure(f"{words}: share of MACs in INT8", 100 * share, "%", 85.0 if bounded else None, at_least=True)
    yield Figure(f"{words}: the climb", seconds, "s")
