"""Placement by listings: on a fake compiler whose listing is known, and with real builds of TensorRT-RTX."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
import pytest

from edgewright.calibration.collect import collect
from edgewright.optimize import dialects
from edgewright.optimize.dialects import Quantizer, half_graph
from edgewright.optimize.placement_rtx import MOST_ROUNDS, ListedPlacement, placed_by_listing
from edgewright.optimize.plan_tensorrt import plan_for_tensorrt
from edgewright.optimize.work import planned_layers
from edgewright.runtime.audit import Traffic, traffic
from edgewright.runtime.backends import BACKENDS, Absence, Backend, BuildRequest, Compiled, Runner
from edgewright.runtime.specs import Kernel
from textual_graphs import graph, normal

RTX = BACKENDS["tensorrt-rtx"]
TARGET = "sm86"
LAYERS = ("c1", "c2", "c3")
WIDE = (32, 32, 3, 3)
BODY = """[c1] a1 = Conv <pads = [1, 1, 1, 1]> (x, w1) [r1] b1 = Relu (a1)
[c2] a2 = Conv <pads = [1, 1, 1, 1]> (b1, w2) [r2] b2 = Relu (a2)
[c3] y = Conv <pads = [1, 1, 1, 1]> (b2, w3)"""


@functools.cache
def model() -> ir.Model:
    return graph(BODY, "float[N, 32, 8, 8] x", w1=WIDE, w2=WIDE, w3=WIDE)


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> Quantizer:
    """Of three convolutions in a row that can all be INT8, as TensorRT's rules have it: RTX's would take the first."""
    monkeypatch.setitem(dialects.NVIDIA, "rtx", replace(dialects.NVIDIA["rtx"], plan=plan_for_tensorrt))
    quantizer = Quantizer("rtx", model(), collect(model(), [normal("x", 8, 32, 8, 8)], identity={}), method="minmax")
    assert quantizer.layers == LAYERS
    return quantizer


class FakeCompiler(Backend):
    """Lists one kernel of 100 bytes for a layer in FP16, and for one in INT8 as many bytes as a test says.

    `apart`: layers for which a kernel of its own quantizes the input; `as_half`: those that it does not run in INT8.
    """

    name, precisions, dialect, suffix = "fake", ("fp16", "int8"), "rtx", ".fake"
    targets = ("sm75", "sm86", "sm120")

    def __init__(self, int8: Mapping[str, int], apart: str = "", as_half: str = "") -> None:
        self._int8, self._apart, self._as_half = int8, apart.split(), as_half.split()
        self.compiled: list[tuple[str, frozenset[str]]] = []

    def absence(self) -> None:
        return None

    def unsupported(self, precision: str, target: str | None) -> Absence | None:
        return Absence("target_unsupported", "no", "") if (precision, target) == ("int8", "sm75") else None

    def version(self) -> str:
        return "0"

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        raise NotImplementedError

    def compile(self, request: BuildRequest) -> Compiled:
        kernels = []
        for layer in request.planned:
            int8 = layer.precision == "int8" and layer.name not in self._as_half
            if int8 and layer.name in self._apart:
                kernels.append(Kernel("q", "quantize", ("t::quantize",), "fp16", 1, 1))
            size = self._int8[layer.name] if int8 else 100
            kernels.append(Kernel(layer.name, "conv", (layer.name,), "int8" if int8 else "fp16", size, 0, True))
        integers = frozenset(layer.name for layer in request.planned if layer.precision == "int8")
        self.compiled.append((str(request.target), integers))
        return Compiled(b"", (), (), tuple(kernels))


def placement(compiler: FakeCompiler, quantizer: Quantizer, *targets: str) -> ListedPlacement:
    return placed_by_listing(quantizer, compiler, targets or (TARGET,))


def test_nothing_is_left_out_where_int8_always_lists_less(generous: Quantizer) -> None:
    compiler = FakeCompiler(dict.fromkeys(LAYERS, 60))
    found = placement(compiler, generous)
    assert found == ListedPlacement({}, {TARGET: Traffic(3, 300, 0)}, {TARGET: Traffic(3, 180, 0)}, 2)
    assert len(compiler.compiled) == found.builds
    assert (found.chosen, found.remainder) == ("all INT8", "fp16")


def test_everything_is_left_out_where_int8_never_does(generous: Quantizer) -> None:
    found = placement(FakeCompiler(dict.fromkeys(LAYERS, 120)), generous)
    assert set(found.left_out) == set(LAYERS)
    assert (found.int8, found.builds, found.chosen) == ({}, 2, "FP16")


def test_only_what_costs_more_is_left_out_with_what_it_costs(generous: Quantizer) -> None:
    found = placement(FakeCompiler({"c1": 60, "c2": 2_000_100, "c3": 90}), generous)
    assert found.left_out == {
        "c2": "INT8 costs more here for sm86: 1 kernels and 2.0 MB against 1 kernels and 0.0 MB up to the next layer "
        "that could be INT8"
    }
    assert found.int8 == {TARGET: Traffic(3, 60 + 100 + 90, 0)}
    assert found.chosen == "placed"


def test_a_kernel_more_is_charged_to_the_layer_that_reads_the_integers(generous: Quantizer) -> None:
    found = placement(FakeCompiler(dict.fromkeys(LAYERS, 10), apart="c3"), generous)
    assert set(found.left_out) == {"c3"}
    assert found.int8[TARGET] == Traffic(3, 120, 0)


def test_a_layer_that_costs_more_stays_int8_where_the_whole_engine_costs_less(generous: Quantizer) -> None:
    found = placement(FakeCompiler({"c1": 105, "c2": 50, "c3": 50}), generous)
    assert found.left_out == {}


def test_a_layer_that_is_silently_half_is_left_out(generous: Quantizer) -> None:
    found = placement(FakeCompiler(dict.fromkeys(LAYERS, 50), as_half="c1"), generous)
    assert found.left_out == {"c1": "the compiler runs it in fp16 for sm86"}


def test_the_graph_holds_for_all_targets_that_take_int8(generous: Quantizer) -> None:
    compiler = FakeCompiler({"c1": 60, "c2": 160, "c3": 90})
    found = placement(compiler, generous, "sm75", "sm86", "sm120")
    assert set(found.half) == set(found.int8) == {"sm86", "sm120"}
    assert found.builds == len(compiler.compiled) == 6
    assert {integers for _, integers in compiler.compiled} == {frozenset(), frozenset(LAYERS), frozenset({"c1", "c3"})}


def test_what_is_left_out_already_stays_so_and_keeps_its_reason(generous: Quantizer) -> None:
    found = placed_by_listing(
        generous, FakeCompiler({"c1": 60, "c2": 160, "c3": 90}), [TARGET], left_out={"c1": "its accuracy"}
    )
    assert list(found.left_out) == ["c1", "c2"]
    assert found.left_out["c1"] == "its accuracy"


def test_the_number_of_builds_is_bounded(generous: Quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "edgewright.optimize.placement_rtx"
    monkeypatch.setattr(f"{module}.MOST_ROUNDS", 1)
    found = placement(FakeCompiler({"c1": 60, "c2": 160, "c3": 90}), generous)
    assert set(found.left_out) == set(LAYERS)
    assert "left out 1 times" in found.left_out["c1"]
    assert (found.builds, MOST_ROUNDS) == (2, 6)


def test_it_tells_its_progress_and_its_document_is_plain(generous: Quantizer) -> None:
    steps: list[tuple[int, int]] = []
    compiler = FakeCompiler({"c1": 60, "c2": 160, "c3": 90})
    found = placed_by_listing(generous, compiler, [TARGET], progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 7), (2, 7), (3, 7)]
    assert json.loads(json.dumps(found.to_json()))["half"][TARGET]["kernels"] == 3


# --- Real builds -------------------------------------------------------------------------------------------------


needs_rtx = pytest.mark.skipif(RTX.absence() is not None, reason="the package tensorrt-rtx is not installed")


def built(graph_: ir.Model, precision: str) -> Traffic:
    """Through the audit."""
    request = BuildRequest(ir.to_proto(graph_).SerializeToString(), precision, planned_layers(graph_), TARGET)
    found = traffic(RTX.build(request).compiled.kernels)
    assert found is not None
    return found


@needs_rtx
def test_real_builds_keep_what_they_promise_and_find_the_same_again(generous: Quantizer) -> None:
    found = placed_by_listing(generous, RTX, [TARGET])
    half = built(half_graph(generous.model, generous.table).model, "fp16")
    assert found.half == {TARGET: half}
    assert not built(generous.quantized().model, "int8").at_most(half)  # all of them would cost more
    assert 0 < len(found.left_out) < len(LAYERS)
    int8 = built(generous.quantized(found.left_out).model, "int8")
    assert found.int8 == {TARGET: int8}
    assert int8.at_most(half)
    assert placed_by_listing(generous, RTX, [TARGET]) == found


@needs_rtx
def test_real_rules_need_no_second_round() -> None:
    quantizer = Quantizer("rtx", model(), collect(model(), [normal("x", 8, 32, 8, 8)], identity={}), method="minmax")
    found = placed_by_listing(quantizer, RTX, [TARGET, "sm120"])
    assert quantizer.layers
    assert (found.left_out, found.builds) == ({}, 4)
    assert all(found.int8[target].at_most(found.half[target]) for target in (TARGET, "sm120"))
