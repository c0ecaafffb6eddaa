"""Sensitivities from kept activations against whole graphs run without any optimization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.optimize import sensitivity as module
from edgewright.optimize.sensitivity import MOST_IMAGES, LayerSensitivity, noise_power, sensitivities
from edgewright.runtime.parity import Parity, compare
from mixed_network import LAYERS, network, photographs, quantizer_of

Array = NDArray[Any]

DENSE = tuple(name for name in LAYERS if name not in ("stem", "depthwise", "head"))
"""What NVIDIA's rules quantize: neither three input channels, nor groups, nor eight classes."""


def whole(model: ir.Model, x: Array) -> Array:
    """The slow way: all of the graph, from the images on, as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": x})
    assert isinstance(result, np.ndarray)
    return result


def measured(dialect: str, x: Array, **options: Any) -> dict[str, LayerSensitivity]:
    found = sensitivities(quantizer_of(dialect), whole(network(), x), x, threads=1, **options)
    return {layer.node: layer for layer in found}


def decibels(parity: Parity) -> float:
    assert parity.sqnr_db is not None
    return parity.sqnr_db


def assert_slowly_the_same(
    dialect: str, found: Mapping[str, LayerSensitivity], x: Array, left_out: Mapping[str, str]
) -> None:
    quantizer, reference = quantizer_of(dialect), whole(network(), x)
    for name, layer in found.items():
        others = {other: "not this one" for other in quantizer.layers if other != name}
        for parity, graph in (
            (layer.only_quantized, quantizer.runnable(others)),
            (layer.only_kept, quantizer.runnable({**left_out, name: "this one"})),
        ):
            expected = compare(reference, whole(graph, x), None)
            # rounding in float32 may move single values to the neighbouring integer
            assert decibels(parity) == pytest.approx(decibels(expected), abs=0.2), name
            assert parity.agreement == pytest.approx(expected.agreement, abs=1.1 / len(x))
            assert parity.source == "simulation"


@pytest.mark.parametrize(("dialect", "layers"), [("cpu", LAYERS), ("openvino", LAYERS), ("tensorrt", DENSE)])
def test_whole_graphs_give_the_same(dialect: str, layers: tuple[str, ...]) -> None:
    x = photographs(40)
    found = measured(dialect, x)
    assert tuple(found) == layers
    assert_slowly_the_same(dialect, found, x, {})


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_layers_left_out_are_float_throughout_and_not_measured(dialect: str) -> None:
    x, left_out = photographs(40), {"expand": "it was left out"}
    found = measured(dialect, x, left_out=left_out)
    assert "expand" not in found
    assert_slowly_the_same(dialect, found, x, left_out)


def test_where_only_the_images_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    x = photographs(40)
    assert_slowly_the_same("cpu", measured("cpu", x), x, {})


def test_activations_that_are_kept_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = photographs(40)
    kept: list[int] = []
    moved_to = module._Activation.moved_to

    def noticed(self: Any, *arguments: Any) -> Any:
        moved = moved_to(self, *arguments)
        kept.append(moved.values.nbytes)
        return moved

    monkeypatch.setattr(module._Activation, "moved_to", noticed)
    measured("cpu", x)
    widest = max(kept)
    kept.clear()
    monkeypatch.setattr(module, "KEPT_BYTES", widest - 1)
    measured("cpu", x)
    assert max(kept) == x.nbytes < widest


def test_the_layer_that_int8_ruins_is_found() -> None:
    """The channels of its activations are of very different size, and share one scale."""
    x = photographs(40)
    found = measured("cpu", x)
    noises = {name: noise_power(layer.only_quantized) for name, layer in found.items()}
    reference = whole(network(), x)
    everything = compare(reference, whole(quantizer_of("cpu").runnable(), x), None)
    # to first order they add up; an activation between two layers in INT8 counts for both
    assert 0.7 * noise_power(everything) < sum(noises.values()) < 3 * noise_power(everything)
    worst = max(noises, key=noises.__getitem__)
    best_to_keep = min(found, key=lambda name: noise_power(found[name].only_kept))
    assert noise_power(found[best_to_keep].only_kept) < noise_power(everything)
    assert noises[worst] > 3 * np.median(list(noises.values()))


def test_work_and_operator_of_each_layer() -> None:
    found = measured("cpu", photographs(4))
    assert {name: layer.operator for name, layer in found.items()} == {
        **dict.fromkeys(LAYERS, "Conv"),
        "head": "Gemm",
    }
    pixels = 12 * 12
    assert {name: layer.macs for name, layer in found.items()} == {
        "stem": pixels * 16 * 3 * 9,
        "expand": pixels * 32 * 16,
        "depthwise": pixels * 32 * 9,
        "project": pixels * 16 * 32,
        "last": pixels * 32 * 16,
        "head": 8 * 32,
    }


def test_some_layers_in_the_order_of_the_graph_and_progress() -> None:
    steps: list[tuple[int, int]] = []
    found = measured(
        "cpu", photographs(4), layers=("last", "stem"), progress=lambda done, total: steps.append((done, total))
    )
    assert list(found) == ["stem", "last"]
    assert steps == [(1, 2), (2, 2)]
    assert measured("cpu", photographs(4), layers=()) == {}


def test_of_many_images_evenly_spaced_ones_are_used() -> None:
    x = photographs(3 * MOST_IMAGES // 2)
    found = measured("cpu", x, layers=("stem",))["stem"]
    assert found.only_quantized.images == found.only_kept.images == MOST_IMAGES
    indices = module._evenly_spaced(len(x), MOST_IMAGES)
    assert indices[0] == 0
    assert set(np.diff(indices)) == {1, 2}
    assert found == measured("cpu", x[indices], layers=("stem",))["stem"]
    assert list(module._evenly_spaced(3, MOST_IMAGES)) == [0, 1, 2]


def test_noise_power_is_the_inverse_of_decibels() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 5.0]])
    parity = compare(reference, reference + np.diag([0.3, 0.4]), None)
    assert noise_power(parity) == pytest.approx((0.09 + 0.16) / 50)
    assert noise_power(compare(reference, np.full_like(reference, np.nan), None)) == math.inf
