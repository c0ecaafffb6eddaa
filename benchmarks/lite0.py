"""EfficientNet-Lite0 on photographs: time of calibrating and quantizing, latency and accuracy of INT8.

onnxruntime's own quantizer does the same work in the same run, and NNCF and ModelOpt do where they are installed.
"""

from __future__ import annotations

import csv
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure, sample_folder
from numpy.typing import NDArray
from quantizers import folded_model, quantize_ourselves, quantize_with_modelopt, quantize_with_onnxruntime

from edgewright.calibration.collect import LARGEST_BATCH
from edgewright.export.models import MODELS
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
    graph = ir.to_proto(folded).SerializeToString()
    began = time.perf_counter()
    quantized = quantize_ourselves(folded, images[:CALIBRATION_IMAGES])
    seconds = time.perf_counter() - began
    yield Figure("calibrate and quantize, 256 photographs", seconds, "s", bound=6.0)
    yield from _peers(graph, images[:CALIBRATION_IMAGES], seconds)
    yield from _latency(graph, quantized, images[:1])
    yield from _accuracy(folded, graph, images, labels)


def _batches(images: Batch) -> Iterator[Batch]:
    for start in range(0, len(images), LARGEST_BATCH):
        yield images[start : start + LARGEST_BATCH]


def _peers(graph: bytes, images: Batch, own_seconds: float) -> Iterator[Figure]:
    for name, module, quantizer in PEERS:
        try:
            importlib.import_module(module)  # loading a library is not part of the work
        except ImportError:
            print(f"  {name} is not installed: not compared")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "folded.onnx"
            source.write_bytes(graph)
            began = time.perf_counter()
            quantizer(source, Path(folder) / "int8.onnx", images)
            seconds = time.perf_counter() - began
        note = f"ours takes {own_seconds / seconds:.2f} of it"
        yield Figure(f"{name}'s quantizer, the same work", seconds, "s", note=note)


def _by_nncf(source: Path, target: Path, images: Batch) -> None:
    import nncf
    import openvino

    dataset = nncf.Dataset(images, lambda image: image[None])
    quantized = nncf.quantize(openvino.convert_model(source), dataset, subset_size=len(images))
    openvino.save_model(quantized, target.with_suffix(".xml"))


PEERS: tuple[tuple[str, str, Callable[[Path, Path, Batch], None]], ...] = (
    ("onnxruntime", "onnxruntime.quantization", quantize_with_onnxruntime),
    ("NNCF (OpenVINO)", "nncf", _by_nncf),
    ("ModelOpt", "modelopt.onnx.quantization", quantize_with_modelopt),
)


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


def _accuracy(folded: ir.Model, graph: bytes, images: Batch, labels: NDArray[np.int64]) -> Iterator[Figure]:
    reference = _logits(graph, images)
    expected: list[Batch] = []
    found: list[Batch] = []
    right: list[NDArray[np.int64]] = []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(images))
        chosen, judged = order[:CALIBRATION_IMAGES], order[CALIBRATION_IMAGES:]
        found.append(_logits(quantize_ourselves(folded, images[chosen]), images[judged]))
        expected.append(reference[judged])
        right.append(labels[judged])
    parity = compare(np.concatenate(expected), np.concatenate(found), np.concatenate(right))
    note = f"{parity.images} judged images in {SPLITS} splits"
    yield Figure("INT8 agreement with FP32", parity.agreement, "", bound=0.985, at_least=True, note=note)
    low, high = parity.loss_ci95
    yield Figure(
        "INT8 loss", 100 * parity.loss, "points", bound=0.5, note=f"95 % interval {100 * low:.2f} … {100 * high:.2f}"
    )


def _logits(graph: bytes, images: Batch) -> Batch:
    with BACKENDS["onnxruntime"].open(graph, threads=THREADS) as runner:
        return np.concatenate([runner.infer({"images": batch})["logits"] for batch in _batches(images)])
