"""TensorRT-RTX engines built ahead of time: seconds, and at batch 1 the kernels and bytes of each engine.

No GPU takes part: kernels and bytes are what the compiler lists. onnxruntime's quantizer and, where it is installed,
ModelOpt's quantize the same graph with the same images, and their graphs are built by the same builder. The images are
noise, since a listing does not depend on the values.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import Figure
from networks import NETWORKS, noise
from numpy.typing import NDArray
from peers import ON_TENSORRT, peer_result
from quantizers import calibrated, serialized

from edgewright.optimize.dialects import Quantizer, half_graph
from edgewright.optimize.placement_rtx import ListedPlacement, placed_by_listing
from edgewright.optimize.work import planned_layers
from edgewright.runtime.audit import Traffic, in_words, traffic
from edgewright.runtime.backends import BACKENDS, BuildRequest
from edgewright.runtime.errors import BuildError

CALIBRATION_IMAGES = 16
BUILD_BOUND = 3.0  # seconds
TARGETS = ("sm86", "sm89", "sm120")
COMPARED = "sm86"

LITE0_KERNELS, LITE0_MEGABYTES_READ = 52, 24.5
"""What FP16 needed when it was first built."""

Batch = NDArray[np.float32]


def measure() -> Iterator[Figure]:
    """For each network the build seconds for all targets, and INT8 beside plain FP16 and beside the peers' graphs."""
    absence = BACKENDS["tensorrt-rtx"].absence()
    if absence is not None:
        print(f"  {absence.reason}")
        return
    for name, network in NETWORKS.items():
        model, images = network(), noise(CALIBRATION_IMAGES)
        table = calibrated(model, images)
        quantizer = Quantizer("rtx", model, table)
        found = placed_by_listing(quantizer, BACKENDS["tensorrt-rtx"], TARGETS)
        int8 = quantizer.quantized(found.left_out)
        yield from _builds(
            name, {"fp32": model, "fp16": half_graph(model, table).model, "int8": int8.model}, int8.int8_layers
        )
        yield from _beside_half(name, found)
        if name == "Lite0":
            yield from _lite0_in_half(found.half[COMPARED])
        ours = found.int8[COMPARED] if found.int8 else found.half[COMPARED]
        yield from _beside_peers(name, serialized(model), images, ours)


def _builds(name: str, graphs: dict[str, ir.Model], int8_layers: int) -> Iterator[Figure]:
    backend = BACKENDS["tensorrt-rtx"]
    slowest, built, left = 0.0, 0, []
    for target in backend.targets:
        for precision, graph in graphs.items():
            if backend.unsupported(precision, target) is not None or (precision == "int8" and not int8_layers):
                left.append(f"{precision} {target}")
                continue
            request = BuildRequest(serialized(graph), precision, planned_layers(graph), target)
            began = time.perf_counter()
            try:
                backend.build(request)
            except BuildError as error:  # such as a layer that overflows FP16 and stays in FP32, which Turing lacks
                left.append(f"{precision} {target} ({error.message[:60]}…)")
                continue
            slowest, built = max(slowest, time.perf_counter() - began), built + 1
    note = f"{built} engines for {len(backend.targets)} targets; not built: {', '.join(left)}"
    yield Figure(f"RTX, slowest build of {name}", slowest, "s", bound=BUILD_BOUND, note=note)


def _beside_half(name: str, found: ListedPlacement) -> Iterator[Figure]:
    for target, half in found.half.items():
        int8 = found.int8.get(target, half)
        note = f"{in_words(int8)}, FP16 {in_words(half)}; {len(found.left_out)} layers left out by the listings"
        yield Figure(f"RTX {target}, {name}: INT8 kernels", int8.kernels, "", bound=half.kernels, note=note)
        share = int8.bytes_moved / half.bytes_moved
        yield Figure(f"RTX {target}, {name}: INT8 bytes as a share of FP16's", share, "", bound=1.0)


def _lite0_in_half(half: Traffic) -> Iterator[Figure]:
    yield Figure(f"RTX {COMPARED}, Lite0 FP16: kernels", half.kernels, "", bound=LITE0_KERNELS)
    note = f"weights and activations; and {half.bytes_written / 1e6:.1f} MB written"
    yield Figure(f"RTX {COMPARED}, Lite0 FP16: read", half.bytes_read / 1e6, "MB", LITE0_MEGABYTES_READ, note=note)


def _beside_peers(name: str, graph: bytes, images: Batch, ours: Traffic) -> Iterator[Figure]:
    for peer in ON_TENSORRT:
        with tempfile.TemporaryDirectory() as folder:
            result = peer_result(peer, graph, images, Path(folder))
            if result is None:
                continue
            theirs = _traffic(result.graph.read_bytes())
        note = f"{in_words(ours)}, {peer} {in_words(theirs)}"
        yield Figure(f"RTX {COMPARED}, {name}: INT8 kernels", ours.kernels, "", bound=theirs.kernels - 1, note=note)
        share = ours.bytes_moved / theirs.bytes_moved
        yield Figure(f"RTX {COMPARED}, {name}: INT8 bytes as a share of {peer}'s", share, "", bound=0.999)


def _traffic(graph: bytes) -> Traffic:
    """Of a graph by anybody: nothing is known of its plan, so nothing is audited."""
    compiled = BACKENDS["tensorrt-rtx"].compile(BuildRequest(graph, "int8", (), COMPARED))
    moved = traffic(compiled.kernels)
    assert moved is not None
    return moved
