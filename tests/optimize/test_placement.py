"""Placement: on a fake backend with times that are known, and once with a real one."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest

from edgewright.calibration.collect import collect
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.placement import Placement, fastest, placed
from edgewright.runtime.backends import BACKENDS, Absence
from edgewright.runtime.errors import BuildError
from fake_timing import FakeBackend, Milliseconds
from textual_graphs import graph, normal

LAYERS = ("c1", "c2", "c3", "c4")
ROW = """[c1] a1 = Conv <pads = [1, 1, 1, 1]> (x, w1) [r1] b1 = Relu (a1)
[c2] a2 = Conv <pads = [1, 1, 1, 1]> (b1, w2) [r2] b2 = Relu (a2)
[c3] a3 = Conv <pads = [1, 1, 1, 1]> (b2, w3) [r3] b3 = Relu (a3)
[c4] y = Conv <pads = [1, 1, 1, 1]> (b3, w4)"""
SHAPE = (32, 32, 3, 3)
FAST, SLOW = Milliseconds(2.0, 1.0), Milliseconds(1.0, 2.0)
"""In INT8."""


@functools.cache
def quantizer(dialect: str = "cpu") -> Quantizer:
    """Of four convolutions in a row, each with as many elements."""
    model = graph(ROW, "float[N, 32, 8, 8] x", w1=SHAPE, w2=SHAPE, w3=SHAPE, w4=SHAPE)
    return Quantizer(dialect, model, collect(model, [normal("x", 8, 32, 8, 8)], identity={}), method="minmax")


def placement(backend: FakeBackend, **options: Any) -> Placement:
    return placed(quantizer(), backend, budget_seconds=0.0, clock=backend.clock, **options)


def row(*layers: Milliseconds) -> dict[str, Milliseconds]:
    return dict(zip(LAYERS, layers, strict=True))


# --- What is chosen ----------------------------------------------------------------------------------------------


def test_nothing_is_left_out_where_int8_is_always_faster() -> None:
    found = placement(FakeBackend(row(FAST, FAST, FAST, FAST), conversion=0.5))
    assert (found.left_out, found.chosen) == ({}, "all INT8")
    assert [trial.name for trial in found.trials] == ["FP32", "all INT8"]
    assert found.trials[1].share.median == pytest.approx((4 * 1.0 + 0.5) / 8)


def test_everything_is_left_out_where_int8_is_never_faster() -> None:
    found = placement(FakeBackend(row(SLOW, SLOW, SLOW, SLOW)))
    assert set(found.left_out) == set(LAYERS)
    assert found.chosen == "FP32"
    assert found.left_out["c1"] == (
        "INT8 does not pay in this network: the fastest plan takes 2.00 of the time of FP32 (95 % interval 2.00 … 2.00)"
    )


def test_a_slow_layer_is_left_out_with_what_it_took() -> None:
    found = placement(FakeBackend(row(FAST, FAST, Milliseconds(1.0, 5.0), FAST), conversion=0.1))
    assert found.left_out == {"c3": "INT8 is slower here: 5.000 against 1.000 ms with its conversions"}
    assert found.chosen == "placed"
    assert quantizer().quantized(found.left_out).int8_layers == 3
    shares = {trial.name: trial.share.median for trial in found.trials}
    assert shares["placed"] == pytest.approx((3 * 1.0 + 1.0 + 3 * 0.1) / 7)
    assert shares["all INT8"] == pytest.approx(8.1 / 7)


def test_a_layer_that_gains_less_than_its_conversions_is_left_out() -> None:
    bad = Milliseconds(1.0, 9.0)
    found = placement(FakeBackend(row(bad, Milliseconds(2.0, 1.9), bad, Milliseconds(3.0, 1.0)), conversion=0.3))
    assert set(found.left_out) == {"c1", "c2", "c3"}


def test_a_layer_that_loses_less_than_its_conversions_is_taken_along() -> None:
    found = placement(FakeBackend(row(FAST, Milliseconds(1.0, 1.2), FAST, FAST), conversion=0.3))
    assert found.left_out == {}


def test_what_is_left_out_already_stays_so_and_keeps_its_reason() -> None:
    layers = row(FAST, FAST, Milliseconds(1.0, 5.0), FAST)
    found = placement(FakeBackend(layers, conversion=0.01), left_out={"c1": "its accuracy"})
    assert set(found.left_out) == {"c1", "c3"}
    assert found.left_out["c1"] == "its accuracy"
    assert {layer.node for layer in found.layers} == {"c2", "c3", "c4"}


def test_bf16_runs_the_rest_where_it_is_faster() -> None:
    fast, mixed = Milliseconds(2.0, 1.0, bf16=1.5), Milliseconds(2.0, 3.0, bf16=1.0)
    found = placement(FakeBackend(row(fast, mixed, mixed, fast), bf16=True))
    assert (found.remainder, set(found.left_out)) == ("bf16", {"c2", "c3"})
    assert found.chosen == "placed, the rest in BF16"


def test_bf16_that_is_slower_is_not_mixed_in() -> None:
    backend = FakeBackend(row(FAST, SLOW, SLOW, FAST), bf16=True)
    assert placement(backend).remainder == "fp32"
    assert not any({"int8", "bf16"} <= set(built.values()) for built in backend.built)


def test_int8_has_to_beat_bf16_too() -> None:
    layer = Milliseconds(2.0, 1.0, bf16=0.5)
    found = placement(FakeBackend(row(layer, layer, layer, layer), bf16=True))
    assert set(found.left_out) == set(LAYERS)
    assert "of the time of BF16" in found.left_out["c1"]


def test_a_backend_that_times_no_kernels_has_all_or_nothing() -> None:
    layers = row(FAST, FAST, Milliseconds(1.0, 1.5), FAST)
    found = placement(FakeBackend(layers, lists=False))
    assert (found.left_out, found.layers) == ({}, ())


def test_a_plan_that_the_backend_refuses_is_not_taken() -> None:
    backend = FakeBackend(row(FAST, FAST, Milliseconds(1.0, 1.5), FAST))
    backend.refused = {frozenset({"c1", "c2", "c4"})}
    assert placement(backend).chosen == "all INT8"
    backend.refused = {frozenset(LAYERS)}
    with pytest.raises(BuildError, match="the fake refuses"):
        placement(backend)


def test_it_tells_its_progress_and_its_document_is_plain() -> None:
    steps: list[tuple[int, int]] = []
    found = placement(
        FakeBackend(row(FAST, SLOW, FAST, FAST)), progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    everywhere = placement(FakeBackend(row(FAST, FAST, FAST, FAST)))
    assert json.loads(json.dumps(everywhere.to_json(), allow_nan=False))["left_out"] == {}
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["left_out"] == dict(found.left_out)
    assert document["layers"][1] == {"node": "c2", "float_ms": 1.0, "int8_ms": 2.0}


def test_where_nothing_can_be_timed_nothing_is_built_or_left_out() -> None:
    here, named = (FakeBackend(row(SLOW, SLOW, SLOW, SLOW)) for _ in range(2))
    here.absence = lambda: Absence("device_missing", "no device", "")  # type: ignore[method-assign]
    named.targets = ("sm86",)  # type: ignore[misc]  # of this fake alone
    for backend in (here, named):
        found = placement(backend)
        assert (found.left_out, found.trials, found.chosen, backend.built) == ({}, (), "", [])


def test_without_a_layer_that_can_be_int8_nothing_is_built() -> None:
    backend = FakeBackend(row(FAST, FAST, FAST, FAST))
    found = placement(backend, left_out=dict.fromkeys(LAYERS, "its accuracy"))
    assert found.left_out == dict.fromkeys(LAYERS, "its accuracy")
    assert (found.trials, backend.built) == ((), [])


@pytest.mark.parametrize(("half", "chosen"), [(2.0, "all INT8"), (0.5, "FP16")])
def test_tensorrt_is_int8_or_fp16_as_a_whole(half: float, chosen: str) -> None:
    layer = Milliseconds(half, 1.0, fp16=half)  # the last one stays in FP32: its values are too large
    backend = FakeBackend(row(layer, layer, layer, layer), lists=False)
    backend.dialect = "tensorrt"  # type: ignore[misc]  # of this fake alone
    found = placed(quantizer("tensorrt"), backend, budget_seconds=0.0, clock=backend.clock)
    assert (found.chosen, found.remainder) == (chosen, "fp16")
    assert [trial.name for trial in found.trials] == ["FP16", "all INT8"]
    assert len(found.left_out) == (0 if chosen == "all INT8" else len(LAYERS))


# --- What counts as faster ---------------------------------------------------------------------------------------


def times(*values: float) -> Any:
    return np.array(values * 10)


def test_in_a_tie_with_floating_point_that_is_taken() -> None:
    samples = {"FP32": times(1.0, 1.0), "all INT8": times(0.9, 1.1)}
    assert fastest(samples, {"FP32": 0, "all INT8": 9}) == "FP32"
    assert fastest({**samples, "all INT8": times(0.9, 0.95)}, {"FP32": 0, "all INT8": 9}) == "all INT8"


def test_of_plans_that_tie_the_one_with_the_most_int8_is_taken() -> None:
    samples = {"FP32": times(2.0, 2.0), "some": times(0.99, 1.0), "all INT8": times(1.03, 0.98)}
    assert fastest(samples, {"FP32": 0, "some": 5, "all INT8": 9}) == "all INT8"
    samples["all INT8"] = times(1.03, 1.02)
    assert fastest(samples, {"FP32": 0, "some": 5, "all INT8": 9}) == "some"


def test_a_plan_that_ties_with_the_fastest_but_not_with_floating_point_gives_way_to_it() -> None:
    samples = {"FP32": times(1.0, 1.0), "some": times(0.8, 0.9), "all INT8": times(0.75, 1.2)}
    assert fastest(samples, {"FP32": 0, "some": 5, "all INT8": 9}) == "some"


def test_without_int8_the_fastest_floating_point_is_taken() -> None:
    assert fastest({"FP32": times(1.0), "BF16": times(0.5)}, {"FP32": 0, "BF16": 0}) == "BF16"


# --- Real engines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dialect"), [("onnxruntime", "cpu"), ("openvino", "openvino")])
def test_with_a_real_backend_what_is_chosen_was_built_and_what_is_left_out_has_a_reason(
    backend: str, dialect: str
) -> None:
    if BACKENDS[backend].absence() is not None:
        pytest.skip(f"{backend} is not installed")
    found = placed(quantizer(dialect), BACKENDS[backend], threads=1, budget_seconds=0.1)
    (chosen,) = (trial for trial in found.trials if trial.name == found.chosen)
    assert quantizer(dialect).quantized(found.left_out).int8_layers == chosen.int8_layers
    assert len(found.left_out) == len(LAYERS) - chosen.int8_layers
    assert all(reason.startswith(("INT8 is slower", "INT8 would", "INT8 does")) for reason in found.left_out.values())
    assert {layer.node for layer in found.layers} == set(LAYERS)
    assert all(layer.float_ms > 0 and layer.int8_ms > 0 for layer in found.layers)
    assert all(trial.milliseconds > 0 for trial in found.trials)


@pytest.mark.gpu
def test_tensorrt_on_a_gpu_takes_what_it_measured() -> None:
    backend = BACKENDS["tensorrt"]
    absence = backend.absence() or backend.cannot_run()
    if absence is not None:
        pytest.skip(absence.reason)
    found = placed(quantizer("tensorrt"), backend, budget_seconds=1.0)
    assert found.chosen in ("FP16", "all INT8")
    assert [trial.name for trial in found.trials] == ["FP16", "all INT8"]
    assert all(trial.milliseconds > 0 for trial in found.trials)
