"""TensorRT-RTX engines built ahead of time: seconds, and at batch 1 the kernels and bytes of each engine.

No GPU takes part: kernels and bytes are what the compiler lists. onnxruntime's quantizer and, where it is installed,
ModelOpt's quantize the same graph with the same photographs, and their graphs are built by the same builder.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure, photographs
from numpy.typing import NDArray
from quantizers import (
    FOR_TENSORRT,
    calibrated,
    folded_model,
    folded_resnet50,
    quantize_with_modelopt,
    quantize_with_onnxruntime,
    serialized,
)

from edgewright.optimize.dialects import half_graph, quantized_graph
from edgewright.optimize.work import planned_layers
from edgewright.runtime.audit import Traffic, traffic
from edgewright.runtime.backends import BACKENDS, BuildRequest

CALIBRATION_IMAGES = 64
BUILD_BOUND = 3.0  # seconds
SEED = 5
TARGET = "sm86"

Batch = NDArray[np.float32]


def measure() -> Iterator[Figure]:
    """Build seconds of three networks for all targets, then the traffic of EfficientNet-Lite0 beside the peers."""
    backend = BACKENDS["tensorrt-rtx"]
    absence = backend.absence()
    if absence is not None:
        print(f"  {absence.reason}")
        return
    networks: dict[str, Callable[[], ir.Model]] = {
        "B0": functools.partial(folded_model, "mobilenet_effnet_b0"),
        "Lite0": functools.partial(folded_model, "efficientnet_lite0"),
        "ResNet-50": folded_resnet50,
    }
    for name, network in networks.items():
        model = network()
        table = calibrated(model, _images(model))
        graphs = {
            "fp32": model,
            "fp16": half_graph(model, table).model,
            "int8": quantized_graph("rtx", model, table).model,
        }
        yield from _builds(name, graphs)
    yield from _lite0()


def _builds(name: str, graphs: dict[str, ir.Model]) -> Iterator[Figure]:
    backend = BACKENDS["tensorrt-rtx"]
    slowest, built, left = 0.0, 0, []
    moved: dict[str, Traffic | None] = {}
    for target in backend.targets:
        for precision, graph in graphs.items():
            unsupported = backend.unsupported(precision, target)
            if unsupported is not None:
                left.append(f"{precision} {target}")
                continue
            request = BuildRequest(serialized(graph), precision, planned_layers(graph), target)
            began = time.perf_counter()
            engine = backend.build(request)
            slowest, built = max(slowest, time.perf_counter() - began), built + 1
            if target == TARGET:
                moved[precision] = traffic(engine.compiled.kernels)
    note = f"{built} engines for {len(backend.targets)} targets; unsupported: {', '.join(left)}"
    yield Figure(f"RTX, slowest build of {name}", slowest, "s", bound=BUILD_BOUND, note=note)
    half, int8 = moved["fp16"], moved["int8"]
    assert half is not None
    assert int8 is not None
    note = f"{int8.bytes_moved / 1e6:.1f} MB moved, FP16 {half.bytes_moved / 1e6:.1f}"
    yield Figure(f"RTX {TARGET}, {name}: INT8 kernels", int8.kernels, "", bound=half.kernels, note=note)
    share = int8.bytes_moved / half.bytes_moved
    yield Figure(f"RTX {TARGET}, {name}: INT8 bytes as a share of FP16's", share, "", bound=1.0)


def _lite0() -> Iterator[Figure]:
    model = folded_model("efficientnet_lite0")
    images = _images(model)
    half = half_graph(model, calibrated(model, images)).model
    plain = _traffic(serialized(half))
    yield Figure(f"RTX {TARGET}, Lite0 FP16: kernels", plain.kernels, "", bound=52)
    note = f"and {plain.bytes_written / 1e6:.1f} MB written"
    yield Figure(
        f"RTX {TARGET}, Lite0 FP16: read (weights, activations)", plain.bytes_read / 1e6, "MB", 24.5, note=note
    )
    for name, module, quantizer in (
        ("onnxruntime", "onnxruntime.quantization", functools.partial(quantize_with_onnxruntime, setting=FOR_TENSORRT)),
        ("ModelOpt", "modelopt.onnx.quantization", quantize_with_modelopt),
    ):
        try:
            importlib.import_module(module)
        except ImportError:
            print(f"  {name} is not installed: not compared")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
            source.write_bytes(serialized(model))
            quantizer(source, target, images)
            theirs = _traffic(target.read_bytes())
        note = f"{theirs.bytes_read / 1e6:.1f} MB read, {theirs.bytes_written / 1e6:.1f} written"
        yield Figure(f"RTX {TARGET}, Lite0 INT8 by {name}: kernels", theirs.kernels, "", note=note)


def _traffic(graph: bytes) -> Traffic:
    """Of a graph by anybody: nothing is known of its plan, so nothing is audited."""
    compiled = BACKENDS["tensorrt-rtx"].compile(BuildRequest(graph, "int8", (), TARGET))
    moved = traffic(compiled.kernels)
    assert moved is not None
    return moved


def _images(model: ir.Model) -> Batch:
    """Photographs where they are and the network takes such; else noise, since builds do not depend on the values."""
    shape = model.graph.inputs[0].shape
    assert shape is not None
    sides = tuple(int(side) for side in shape[1:] if isinstance(side, int))
    found = photographs(CALIBRATION_IMAGES) if sides == (3, 224, 224) else None
    if found is not None:
        return found
    return np.random.default_rng(SEED).standard_normal((CALIBRATION_IMAGES, *sides), np.float32)
