"""What a person gets for five networks: PyTorch, torch.compile, onnxruntime, OpenVINO, NNCF and ours, in one run.

Writes docs/benchmarks.md. Accuracy is that of weights which were trained on the same classes; ResNet-50 and MobileNetV2
have random ones here, and are only timed. The network that NNCF and we quantize is the same folded graph, with the same
calibration images. All contestants of a network take turns at batch 1.
"""

from __future__ import annotations

import csv
import functools
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from figures import ROOT, Figure, sample_folder
from networks import NETWORKS, noise
from numpy.typing import NDArray
from peers import openvino_request, peer_result
from quantizers import calibrated, serialized

from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.stream import batches
from edgewright.export.models import MODELS
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.ladder import Aim, CalibrationImages, Ladder
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.placement import placed
from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import BACKENDS, BuildRequest
from edgewright.runtime.gates import MaxDrop, judge
from edgewright.runtime.latency import PairedRatio, interleaved_samples, paired_ratio
from edgewright.runtime.parity import Parity, compare
from edgewright.workspace import library_versions, machine

THREADS = 2
PAGE = ROOT / "docs" / "benchmarks.md"
PLACING_SECONDS, COMPARING_SECONDS = 10.0, 40.0
PLAIN = "PyTorch eager"
CALIBRATION_PHOTOGRAPHS = 256
NOISE_IMAGES = 16

Batch = NDArray[np.float32]
Milliseconds = NDArray[np.float64]
Answering = Callable[[Batch], Batch]


@dataclass(frozen=True)
class Subject:
    """A network with its images; `labels` None: its weights are random, and it is only timed."""

    name: str
    module: torch.nn.Module
    folded: ir.Model
    calibration: Batch
    judged: Batch
    labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Contestant:
    """Something that runs a network.

    * answers: logits `[N, classes]` of images `[N, C, H, W]`
    * megabytes: of its file or weights; seconds: of quantizing, None if nothing was quantized
    * by: a "peer"; a "library" that runs the float graph as it is, which `edgewright engine` may recommend; or "us"
    """

    name: str
    answers: Answering
    megabytes: float
    seconds: float | None = None
    by: Literal["peer", "library", "us"] = "peer"


def measure() -> Iterator[Figure]:
    """The latency of our recommendation as a share of PyTorch's and of the fastest other's, for each network."""
    sections = []
    for subject in _subjects():
        print(f"  {subject.name}", flush=True)
        with ExitStack() as stack:
            contestants = list(_contestants(subject, stack))
            samples = interleaved_samples(
                {one.name: functools.partial(one.answers, subject.judged[:1]) for one in contestants},
                budget_seconds=COMPARING_SECONDS,
                min_runs=30,
                max_runs=400,
            )
            parities = _parities(subject, contestants)
        medians = {name: float(np.median(taken)) for name, taken in samples.items()}
        best = _recommended(contestants, medians, parities)
        others = [one.name for one in contestants if one.by != "us" and one.name != best]
        fastest = min(others, key=lambda name: medians[name])
        ratios = {other: paired_ratio(samples[best], samples[other]) for other in (PLAIN, fastest)}
        for words, other in ((PLAIN, PLAIN), ("the fastest other", fastest)):
            note = f"{best} against {other}, 95 % interval {_interval(ratios[other])}"
            yield Figure(f"{subject.name}: ours, share of {words}", ratios[other].median, "", note=note)
        rows = [_row(one, samples, parities[one.name], best) for one in contestants]
        sections.append(_section(subject, rows, _conclusion(best, ratios)))
    PAGE.write_text(_page(sections))


def _subjects() -> Iterator[Subject]:
    calibration, test = fashion_mnist_calibration(), fashion_mnist_test()
    for name in ("lenet_bn", "mobilenet_effnet_b0"):
        source = resolve(name)
        assert source.input_shape is not None
        assert source.preprocess is not None
        images = [np.concatenate(list(batches(part, source.preprocess, 64))) for part in (calibration, test)]
        module = source.module()
        yield Subject(name, module, _folded(module, source.input_shape), images[0], images[1], test.labels)
    if (photographs := _photographs()) is not None:
        module = resolve("efficientnet_lite0").module()
        yield Subject("efficientnet_lite0", module, _folded(module, (3, 224, 224)), *photographs)
    from torchvision.models import mobilenet_v2, resnet50

    for name, builder in (("resnet50", resnet50), ("mobilenet_v2", mobilenet_v2)):
        torch.manual_seed(0)
        module = builder(weights=None).eval()
        key = {"resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}[name]
        yield Subject(name, module, NETWORKS[key](), noise(NOISE_IMAGES), noise(NOISE_IMAGES), None)


def _photographs() -> tuple[Batch, Batch, NDArray[np.int64]] | None:
    """Of the sample in its order: those that calibrate, those that judge, and their labels."""
    folder = sample_folder()
    if folder is None:
        print("  no photographs: set EDGEWRIGHT_SAMPLE to a folder with labels.csv")
        return None
    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    images = MODELS["efficientnet_lite0"].task.preprocess.batch([folder / row["file"] for row in rows])
    order = np.random.default_rng(0).permutation(len(images))
    chosen, judged = order[:CALIBRATION_PHOTOGRAPHS], order[CALIBRATION_PHOTOGRAPHS:]
    return images[chosen], images[judged], np.array([int(rows[index]["index"]) for index in judged])


def _folded(module: torch.nn.Module, shape: tuple[int, int, int]) -> ir.Model:
    return fold_batchnorm(ir.from_proto(onnx.load_from_string(export_onnx(module, shape)))).model


def _contestants(subject: Subject, stack: ExitStack) -> Iterator[Contestant]:
    torch.set_num_threads(THREADS)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in subject.module.state_dict().values()) / 1e6
    yield Contestant(PLAIN, _torch_answers(subject.module), weights)
    torch.compiler.reset()  # or the code of the network before, of another size, would be compiled for any size
    yield Contestant("torch.compile", _torch_answers(torch.compile(subject.module, dynamic=False)), weights)
    for backend, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
        if _runs_here(backend, precision):
            yield _engine(stack, backend, precision, subject.folded, by="library" if precision == "fp32" else "us")
    yield from _by_nncf(subject)
    table = calibrated(subject.folded, subject.calibration)
    for backend in ("onnxruntime", "openvino"):
        if _runs_here(backend, "int8"):
            yield from _ours(stack, backend, subject, table)


def _runs_here(backend: str, precision: str) -> bool:
    return BACKENDS[backend].absence() is None and BACKENDS[backend].unsupported(precision, None) is None


def _torch_answers(module: Any) -> Answering:
    def answers(images: Batch) -> Batch:
        with torch.inference_mode():
            logits: Batch = module(torch.from_numpy(images)).numpy()
        return logits

    return answers


def _engine(
    stack: ExitStack, backend: str, precision: str, model: ir.Model, *, remainder: str = "fp32", **more: Any
) -> Contestant:
    floats = remainder if precision == "int8" else precision
    planned = tuple(
        layer if layer.precision == "int8" else replace(layer, precision=floats) for layer in planned_layers(model)
    )
    engine = BACKENDS[backend].build(BuildRequest(serialized(model), precision, planned)).compiled.engine
    runner = stack.enter_context(BACKENDS[backend].open(engine, threads=THREADS))
    name, output = runner.inputs[0].name, runner.outputs[0].name
    return Contestant(
        f"{backend} {precision.upper()}",
        lambda images: runner.infer({name: images})[output],
        len(engine) / 1e6,
        **more,
    )


def _by_nncf(subject: Subject) -> Iterator[Contestant]:
    with tempfile.TemporaryDirectory() as folder:
        result = peer_result("NNCF", serialized(subject.folded), subject.calibration, Path(folder))
        if result is None or BACKENDS["openvino"].absence() is not None:
            return
        size = sum(file.stat().st_size for file in (result.graph, result.graph.with_suffix(".bin"))) / 1e6
        request = openvino_request(result.graph, 1, THREADS)

    def answers(images: Batch) -> Batch:
        logits: Batch = request.infer([images])[0].copy()
        return logits

    yield Contestant("NNCF in OpenVINO INT8", answers, size, result.seconds)


def _ours(stack: ExitStack, backend: str, subject: Subject, table: Any) -> Iterator[Contestant]:
    """As `edgewright engine` does it: placed by the clock, mended as far as the budget needs."""
    began = time.perf_counter()
    dialect = BACKENDS[backend].dialect
    quantizer = Quantizer(dialect, subject.folded, table, method="minmax")
    found = placed(quantizer, BACKENDS[backend], threads=THREADS, budget_seconds=PLACING_SECONDS)
    if len(found.left_out) >= len(quantizer.layers):
        return
    divided = CalibrationImages.divided(subject.calibration)
    choosing = calibrated(subject.folded, divided.choosing)
    aim = Aim(rescue=subject.labels is not None)
    climb = Ladder(subject.folded, choosing, divided, aim).climb(dialect, found.left_out)
    seconds = time.perf_counter() - began
    if climb.quantized.int8_layers:
        yield _engine(
            stack, backend, "int8", climb.quantized.model, remainder=found.remainder, seconds=seconds, by="us"
        )


def _parities(subject: Subject, contestants: list[Contestant]) -> dict[str, Parity | None]:
    """Each beside PyTorch on the images that judge, one at a time as they were timed; None without labels."""
    if subject.labels is None:
        return dict.fromkeys((one.name for one in contestants), None)
    logits = {one.name: np.concatenate([one.answers(image[None]) for image in subject.judged]) for one in contestants}
    return {name: compare(logits[PLAIN], found, subject.labels) for name, found in logits.items()}


def _recommended(contestants: list[Contestant], medians: dict[str, float], parities: dict[str, Parity | None]) -> str:
    """The fastest of those that `edgewright engine` offers and that does not fail."""

    def passes(name: str) -> bool:
        parity = parities[name]
        return parity is None or judge(parity, [MaxDrop(Aim().budget)]).word == "pass"

    ours = [one.name for one in contestants if one.by != "peer"]
    return min([name for name in ours if passes(name)] or ours, key=lambda name: medians[name])


def _row(one: Contestant, samples: dict[str, Milliseconds], parity: Parity | None, best: str) -> str:
    name = f"**{one.name}**, what `engine` recommends" if one.name == best else one.name
    top1, loss = "", ""
    if parity is not None and parity.top1 is not None:
        low, high = (100 * bound for bound in parity.loss_ci95)
        top1, loss = f"{100 * parity.top1:.2f}", f"{100 * parity.loss:.2f} ({low:.2f} … {high:.2f})"
    time = np.median(samples[one.name])
    share = paired_ratio(samples[one.name], samples[PLAIN]).median
    seconds = "" if one.seconds is None else f"{one.seconds:.0f}"
    return f"| {name} | {top1} | {loss} | {time:.2f} | {share:.2f} | {one.megabytes:.1f} | {seconds} |"


def _conclusion(best: str, ratios: dict[str, PairedRatio]) -> str:
    shares = (f"{ratio.median:.2f} ({_interval(ratio)}) of the time of {other}" for other, ratio in ratios.items())
    return f"{best} takes {', and '.join(shares)}.\n"


def _interval(ratio: PairedRatio) -> str:
    return f"{ratio.low:.3f} … {ratio.high:.3f}"


def _section(subject: Subject, rows: list[str], conclusion: str) -> str:
    shape = " × ".join(str(side) for side in subject.judged.shape[1:])
    what = "random weights, timed only" if subject.labels is None else f"judged on {len(subject.judged):,} images"
    heading = f"## {subject.name}\n\nInput {shape}, {what}, {len(subject.calibration):,} images to calibrate with.\n\n"
    columns = ("", "top-1, %", "loss, points (95 %)", "ms", "of PyTorch", "MB", "quantized in, s")
    table = "\n".join((f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows))
    return f"{heading}{table}\n\n{conclusion}"


def _page(sections: list[str]) -> str:
    versions = library_versions("torch", "onnxruntime", "openvino", "numpy")
    paragraphs = (
        "Written by `make bench` (`benchmarks/overview.py`); nothing is typed by hand. Engines of one network took "
        f"turns in one process at batch 1 with {THREADS} threads, and were judged as they were timed, one image at a "
        f"time. No GPU took part. Time, size and latency are this machine's: {machine()}; {versions}.",
        "`ms` is the median of the runs, `of PyTorch` the median of the ratios within the turns, and so is what is "
        "said below a table, with its 95 % interval. Loss is PyTorch's top-1 less the engine's, with its 95 % "
        "interval. onnxruntime and OpenVINO in FP32 run the folded graph; INT8 and BF16 are ours but for NNCF's. The "
        "time of our quantizing is mostly that of the clock that says where INT8 pays, and of what is mended.",
    )
    text = "\n\n".join(textwrap.fill(each, 120, break_on_hyphens=False) for each in paragraphs)
    return f"# Benchmarks\n\n{text}\n\n" + "\n".join(sections)
