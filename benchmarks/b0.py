"""mobilenet_effnet_b0 on the 10,000 test images: the loss of our INT8 beside that of onnxruntime's own quantizer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from figures import Figure
from numpy.typing import NDArray
from quantizers import SETTINGS, calibrated, folded_model, quantize_with_onnxruntime, serialized

from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.stream import batches
from edgewright.export.models import MODELS
from edgewright.optimize.dialects import half_graph, quantized_graph
from edgewright.optimize.simulate import signed_to_unsigned, simulate_fp16
from edgewright.runtime.backends import BACKENDS

Batch = NDArray[np.float32]


def measure() -> Iterator[Figure]:
    """FP32 top-1, our INT8 loss, that of the peer in four settings, and NVIDIA's graphs simulated, in points."""
    preprocess = MODELS["mobilenet_effnet_b0"].task.preprocess
    calibration = np.concatenate(list(batches(fashion_mnist_calibration(), preprocess, 64)))
    test = fashion_mnist_test()
    images = np.concatenate(list(batches(test, preprocess, 64)))
    assert test.labels is not None
    folded = folded_model("mobilenet_effnet_b0")
    graph = serialized(folded)
    plain = _top1(graph, images, test.labels)
    yield Figure("B0 FP32 top-1 on 10,000 images", 100 * plain, "%", bound=93.0, at_least=True)
    losses = dict(_peer_losses(graph, calibration, images, test.labels, plain))
    best = min(losses, key=losses.__getitem__)
    table = calibrated(folded, calibration)
    ours = plain - _top1(serialized(quantized_graph("cpu", folded, table).model), images, test.labels)
    note = f"onnxruntime's best is {best}"
    yield Figure("B0 INT8 loss, ours", 100 * ours, "points", bound=100 * losses[best], note=note)
    for setting, loss in losses.items():
        yield Figure(f"B0 INT8 loss, onnxruntime {setting}", 100 * loss, "points")
    nvidia = {
        "FP16": (half_graph(folded, table).model, 0.05),
        "INT8 for TensorRT": (quantized_graph("tensorrt", folded, table).model, None),
        "INT8 for TensorRT-RTX": (quantized_graph("rtx", folded, table).model, None),
    }
    for name, (model, bound) in nvidia.items():
        loss = plain - _top1(serialized(signed_to_unsigned(simulate_fp16(model))), images, test.labels)
        yield Figure(f"B0 {name} loss, simulated", 100 * loss, "points", bound=bound)


def _peer_losses(
    graph: bytes, calibration: Batch, images: Batch, labels: NDArray[np.int64], plain: float
) -> Iterator[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph)
        for name, setting in SETTINGS.items():
            quantize_with_onnxruntime(source, target, calibration, setting)
            yield name, plain - _top1(target.read_bytes(), images, labels)


def _top1(graph: bytes, images: Batch, labels: NDArray[np.int64]) -> float:
    with BACKENDS["onnxruntime"].open(graph) as runner:
        predicted = [
            runner.infer({"images": images[start : start + 64]})["logits"].argmax(axis=1)
            for start in range(0, len(images), 64)
        ]
    return float((np.concatenate(predicted) == labels).mean())
