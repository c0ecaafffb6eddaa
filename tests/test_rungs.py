"""Single rungs on a small network: what they stand on, and when they have nothing to do."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgewright import rungs
from edgewright.calibration.calib_cache import CalibCache
from edgewright.calibration.collect import collect
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.repairs import Repairs
from edgewright.optimize.segments import logits_of
from edgewright.rungs import Ground, corrected, equalized, finetuned, loosely_equalized
from edgewright.runtime.errors import QuantizationError
from mixed_network import network, photographs, quantizer_of
from textual_graphs import graph, normal

NOTHING: Mapping[str, str] = {}
IMAGES = photographs(24, seed=1)


@functools.cache
def ground() -> Ground:
    return Ground(network(), quantizer_of("cpu").table, IMAGES, threads=1, seed=1, progress=lambda *_: None)


def test_equalization_is_made_once_for_all_dialects() -> None:
    cpu, _ = equalized(ground(), quantizer_of("cpu"), NOTHING)
    nvidia, note = equalized(ground(), quantizer_of("tensorrt"), NOTHING)
    assert cpu is not None
    assert nvidia is not None
    assert cpu.model is nvidia.model is not network()
    assert cpu.table is nvidia.table
    assert (cpu.dialect, nvidia.dialect) == ("cpu", "tensorrt")
    assert "pairs of layers equalized" in note


def test_what_is_equalized_is_the_same_function_with_ranges_of_its_own() -> None:
    quantizer, _ = equalized(ground(), quantizer_of("cpu"), NOTHING)
    assert quantizer is not None
    expected, found = (logits_of(model, IMAGES, threads=1) for model in (network(), quantizer.model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))
    before, after = (made.table.histograms["d"].maximum for made in (quantizer_of("cpu"), quantizer))
    assert before != pytest.approx(after, rel=0.01)


CLIPPED = """[first] a = Conv (x, v) [clip] c = Clip (a, zero, six) [second] b = Conv (c, w)
[pool] p = GlobalAveragePool (b) [flat] y = Flatten (p)"""


def clipped() -> tuple[Ground, Quantizer]:
    """Two layers with ReLU6 between them, through which channels cannot be scaled without a change."""
    limits: dict[str, Any] = {"zero": np.asarray(0, np.float32), "six": np.asarray(6, np.float32)}
    sizes = np.geomspace(0.1, 10.0, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    arrays: dict[str, Any] = {"v": normal("v", 8, 3, 1, 1) * sizes, "w": normal("w", 4, 8, 1, 1)}
    model = graph(CLIPPED, "float[N, 3, 12, 12] x", "float[N, 4] y", **arrays, **limits)
    table = collect(model, [IMAGES], identity={}, threads=1)
    quantizer = Quantizer("cpu", model, table, method="minmax")
    return Ground(model, table, IMAGES, threads=1, seed=1, progress=lambda *_: None), quantizer


@pytest.mark.parametrize("rung", [equalized, loosely_equalized])
def test_a_cache_switches_equalization_off(rung: Any) -> None:
    cache = CalibCache("TRT-8501-EntropyCalibration2", {"a": np.float32(0.125)})
    plain = quantizer_of("tensorrt")
    quantizer = Quantizer("tensorrt", plain.model, plain.table, method="minmax", cache=cache)
    found, note = rung(ground(), quantizer, NOTHING)
    assert found is None
    assert "calibration cache" in note


def test_a_cache_means_nothing_on_a_cpu() -> None:
    cache = CalibCache("TRT-8501-EntropyCalibration2", {"a": np.float32(0.125)})
    plain = quantizer_of("cpu")
    quantizer = Quantizer("cpu", plain.model, plain.table, method="minmax", cache=cache)
    assert equalized(ground(), quantizer, NOTHING)[0] is not None


def test_relu6_is_no_way_for_exact_equalization() -> None:
    of_clipped, quantizer = clipped()
    assert equalized(of_clipped, quantizer, NOTHING) == (None, "there is no pair of layers to equalize")


@pytest.mark.parametrize(("least", "made"), [(-300.0, True), (300.0, False)])
def test_a_loose_equalization_that_ruins_the_network_itself_is_not_made(
    monkeypatch: pytest.MonkeyPatch, least: float, made: bool
) -> None:
    of_clipped, quantizer = clipped()
    monkeypatch.setattr(rungs, "LEAST_KEPT_DB", least)
    found, note = loosely_equalized(of_clipped, quantizer, NOTHING)
    assert (found is not None) is made
    assert ("also through ReLU6 and SiLU" in note) is made
    assert ("it changes the network itself: SQNR" in note) is not made


def test_biases_of_layers_that_stay_float_are_not_corrected() -> None:
    left_out = {"last": "slower"}
    found, _ = corrected(ground(), quantizer_of("cpu"), left_out)
    assert found is not None
    assert set(found.repairs.bias_shifts) == {"stem", "expand", "depthwise", "project", "head"}


def test_biases_are_measured_without_an_earlier_correction_and_with_the_learned_rounding() -> None:
    rng = np.random.default_rng(3)
    integers = {"expand": rng.integers(-90, 90, (32, 16, 1, 1), np.int8)}
    spoiled = quantizer_of("cpu").repaired(Repairs({"head": np.full(8, 9.0, np.float32)}, integers))
    clean = quantizer_of("cpu").repaired(Repairs(integers=integers))
    (first, _), (second, _) = (corrected(ground(), quantizer, NOTHING) for quantizer in (spoiled, clean))
    assert first is not None
    assert second is not None
    assert first.repairs.integers is second.repairs.integers is integers
    for name, shift in second.repairs.bias_shifts.items():
        np.testing.assert_array_equal(first.repairs.bias_shifts[name], shift)


def test_a_trained_graph_keeps_the_ranges_and_loses_the_repairs() -> None:
    given: list[tuple[Quantizer, Mapping[str, str]]] = []
    trained = network().clone()

    def train(quantizer: Quantizer, left_out: Mapping[str, str], progress: rungs.Progress) -> ir.Model:
        given.append((quantizer, left_out))
        return trained

    repaired = quantizer_of("cpu").repaired(Repairs({"head": np.ones(8, np.float32)}))
    found, _ = finetuned(replace(ground(), finetune=train), repaired, {"last": "slower"})
    assert given == [(repaired, {"last": "slower"})]
    assert found is not None
    assert (found.model, found.repairs, found.ranges) == (trained, Repairs(), repaired.ranges)


def test_nobody_is_trained_who_did_not_ask_for_it() -> None:
    assert finetuned(ground(), quantizer_of("cpu"), NOTHING) == (None, "not asked for")


def test_a_training_that_fails_leaves_the_rungs_behind_it() -> None:
    def train(quantizer: Quantizer, left_out: Mapping[str, str], progress: rungs.Progress) -> ir.Model:
        raise QuantizationError("the training diverged", "remedy")

    assert finetuned(replace(ground(), finetune=train), quantizer_of("cpu"), NOTHING) == (None, "the training diverged")
