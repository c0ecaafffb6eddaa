"""Bias correction: the shifts are those of numpy and of running the whole graph again for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.optimize import correct_bias as module
from edgewright.optimize.correct_bias import bias_shifts
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.repairs import Repairs, with_bias_shifts
from edgewright.optimize.segments import GraphRun
from textual_graphs import graph, normal

Array = NDArray[Any]

IMAGE = "float[N, 3, 8, 8] x"
MAPS = "float[N, C, H, L] y"
LOGITS = "float[N, M] y"

TWO_LAYERS = "[c] a = Conv (x, w, b) [r] r = Relu (a) [d] y = Conv (r, v, e)"
TWO_WEIGHTS: dict[str, Any] = {"w": (6, 3, 1, 1), "b": (6,), "v": (5, 6, 1, 1), "e": (5,)}

BRANCHES = (
    "[c] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [r] r = Relu (a) "
    "[d] d0 = Conv <pads = [1, 1, 1, 1], group = 8> (r, w1, b1) [dr] d1 = Relu (d0) "
    "[gp] g0 = GlobalAveragePool (d1) [g1] g1 = Conv (g0, w2, b2) [gr] g2 = Relu (g1) [g3] g3 = Conv (g2, w3, b3) "
    "[gs] g4 = Sigmoid (g3) [gm] d2 = Mul (d1, g4) [p] p = Conv (d2, w4) [s] s = Add (p, r) "
    "[l] l = Conv (s, w5) [k] k = Conv <strides = [2, 2]> (s, w6) [j] j = Concat <axis = 1> (l, l) "
    "[jm] m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (j) [t] t = Add (k, m) "
    "[q] q = GlobalAveragePool (t) [f] f = Flatten (q) [z] y = Gemm (f, w7, b7)"
)
BRANCH_LAYERS = ("c", "d", "g1", "g3", "p", "l", "k", "z")
BRANCH_WEIGHTS: dict[str, Any] = {
    **{"w": (8, 3, 3, 3), "b": (8,), "w1": (8, 1, 3, 3), "b1": (8,), "w2": (2, 8, 1, 1), "b2": (2,)},
    **{"w3": (8, 2, 1, 1), "b3": (8,), "w4": (8, 8, 1, 1), "w5": (6, 8, 1, 1), "w6": (12, 8, 1, 1)},
    **{"w7": (12, 5), "b7": (5,)},
}


def images(count: int = 20) -> Array:
    return normal("x", count, 3, 8, 8)


def coarse(model: ir.Model) -> ir.Model:
    """A copy in which each weight has steps of a half: a quantization that is easily followed."""
    copy = ir.from_proto(ir.to_proto(model))
    for name, value in copy.graph.initializers.items():
        if value.const_value is not None and value.const_value.numpy().ndim > 1:
            value.const_value = ir.tensor(np.floor(2 * value.const_value.numpy()) / 2, name=name)
    return copy


def output_of(model: ir.Model, name: str, x: Array) -> Array:
    run = GraphRun(model, outputs=[name], threads=1)
    return run.all({"x": x})[name]


def results_of(model: ir.Model) -> dict[str, str]:
    return {str(node.name): str(node.outputs[0].name) for node in model.graph}


def channel_means(array: Array) -> Array:
    means: Array = array.astype(np.float64).mean(axis=(0, *range(2, array.ndim)))
    return means


def by_running_all_again(reference: ir.Model, quantized: ir.Model, layers: Sequence[str], x: Array) -> dict[str, Array]:
    """The same shifts, slowly: the biases of the whole graph are changed one after the other."""
    shifts: dict[str, Array] = {}
    for layer in layers:
        corrected = with_bias_shifts(quantized, shifts)
        means = [channel_means(output_of(model, results_of(reference)[layer], x)) for model in (reference, corrected)]
        shifts[layer] = (means[0] - means[1]).astype(np.float32)
    return shifts


# --- The shifts --------------------------------------------------------------------------------------------------


def test_two_layers_against_numpy() -> None:
    reference = graph(TWO_LAYERS, IMAGE, MAPS, **TWO_WEIGHTS)
    quantized = coarse(reference)
    x = images()
    shifts = bias_shifts(reference, quantized, ["c", "d"], x, threads=1)

    arrays = {name: normal(name, *shape).astype(np.float64) for name, shape in TWO_WEIGHTS.items()}
    steps = {key: np.floor(2 * arrays[key]) / 2 for key in "wv"}

    def layer(weight: Array, bias: Array, values: Array) -> Array:
        result: Array = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], values) + bias[:, None, None]
        return result

    a, quantized_a = layer(arrays["w"], arrays["b"], x), layer(steps["w"], arrays["b"], x)
    first = (a - quantized_a).mean(axis=(0, 2, 3))
    corrected = quantized_a + first[:, None, None]
    y = layer(arrays["v"], arrays["e"], np.maximum(a, 0))
    quantized_y = layer(steps["v"], arrays["e"], np.maximum(corrected, 0))
    second = (y - quantized_y).mean(axis=(0, 2, 3))

    assert list(shifts) == ["c", "d"]
    assert all(shift.dtype == np.float32 for shift in shifts.values())
    np.testing.assert_allclose(shifts["c"], first, atol=1e-5)
    np.testing.assert_allclose(shifts["d"], second, atol=1e-5)
    assert np.abs(second).max() > 0.1


def test_a_graph_with_branches_and_gates_as_if_it_were_run_again_for_each_layer() -> None:
    reference = graph(BRANCHES, IMAGE, LOGITS, **BRANCH_WEIGHTS)
    quantized = coarse(reference)
    x = images()
    shifts = bias_shifts(reference, quantized, BRANCH_LAYERS, x, threads=1)
    expected = by_running_all_again(reference, quantized, BRANCH_LAYERS, x)
    assert list(shifts) == list(BRANCH_LAYERS)
    for layer in BRANCH_LAYERS:
        np.testing.assert_allclose(shifts[layer], expected[layer], rtol=1e-4, atol=1e-4 * np.abs(expected[layer]).max())


@pytest.mark.parametrize("dialect", ["cpu", "openvino", "tensorrt", "rtx"])
def test_what_is_quantized_has_its_means_back(dialect: str) -> None:
    widths: dict[str, Any] = {"w": (16, 3, 3, 3), "b": (16,), "v": (16, 16, 3, 3), "u": (16, 20), "e": (20,)}
    body = (
        "[c] a = Conv (x, w, b) [r] r = Relu (a) [d] d = Conv (r, v) [s] s = Relu (d) "
        "[p] p = GlobalAveragePool (s) [f] f = Flatten (p) [z] y = Gemm (f, u, e)"
    )
    reference = graph(body, IMAGE, LOGITS, **widths)
    x = images(32)
    quantizer = Quantizer(dialect, reference, collect(reference, [x], identity={}, threads=1))
    assert quantizer.layers
    shifts = bias_shifts(reference, quantizer.runnable(), quantizer.layers, x, threads=1)
    assert tuple(shifts) == quantizer.layers
    corrected = quantizer.repaired(Repairs(bias_shifts=shifts)).runnable()
    for layer in quantizer.layers:
        name = results_of(reference)[layer]
        expected, before, after = (
            channel_means(output_of(model, name, x)) for model in (reference, quantizer.runnable(), corrected)
        )
        assert np.abs(expected - after).max() < max(
            0.2 * np.abs(expected - before).max(), 2e-4 * np.abs(expected).max()
        )


def test_without_a_quantization_error_there_is_nothing_to_shift() -> None:
    reference = graph(BRANCHES, IMAGE, LOGITS, **BRANCH_WEIGHTS)
    shifts = bias_shifts(reference, reference, BRANCH_LAYERS, images(), threads=1)
    for layer, shift in shifts.items():
        largest = np.abs(output_of(reference, results_of(reference)[layer], images())).max()
        np.testing.assert_allclose(shift, 0.0, atol=1e-5 * largest)


# --- Whose shifts ------------------------------------------------------------------------------------------------


def test_other_layers_are_taken_as_they_are() -> None:
    reference = graph(BRANCHES, IMAGE, LOGITS, **BRANCH_WEIGHTS)
    quantized = coarse(reference)
    layers = ("d", "p", "z")
    shifts = bias_shifts(reference, quantized, layers, images(), threads=1)
    expected = by_running_all_again(reference, quantized, layers, images())
    assert tuple(shifts) == layers
    for layer in layers:
        np.testing.assert_allclose(shifts[layer], expected[layer], rtol=1e-4, atol=1e-4 * np.abs(expected[layer]).max())
    all_shifted = bias_shifts(reference, quantized, BRANCH_LAYERS, images(), threads=1)
    assert not np.allclose(shifts["d"], all_shifted["d"], rtol=1e-2)


def test_without_layers_there_are_no_shifts() -> None:
    reference = graph(TWO_LAYERS, IMAGE, MAPS, **TWO_WEIGHTS)
    assert bias_shifts(reference, coarse(reference), [], images(), threads=1) == {}
    assert bias_shifts(reference, coarse(reference), ["r", "somebody else"], images(), threads=1) == {}


def test_what_has_no_constant_bias_has_no_shift() -> None:
    body = (
        "[c] a = Conv (x, w) [p] p = GlobalAveragePool (a) [f] f = Flatten (p) [m] m = MatMul (f, u) "
        "[g] y = Gemm (f, v, m)"
    )
    reference = graph(body, IMAGE, LOGITS, w=(6, 3, 1, 1), u=(6, 5), v=(6, 5))
    assert list(bias_shifts(reference, coarse(reference), ["c", "m", "g"], images(), threads=1)) == ["c"]


def test_behind_a_layer_where_the_graph_cannot_be_cut_there_is_no_shift() -> None:
    body = (
        "[c] a = Conv (x, w) [h] h = Shape (a) [r] r = Reshape (a, h) [d] d = Conv (r, v) [k] k = Reshape (d, h) "
        "[g] y = Conv (k, u)"
    )
    reference = graph(body, IMAGE, MAPS, w=(6, 3, 1, 1), v=(6, 6, 1, 1), u=(5, 6, 1, 1))
    for node in reference.graph:
        if node.op_type == "Reshape":
            node.outputs[0].shape = ir.Shape(["N", 6, 8, 8])
        elif node.name in ("d", "g"):
            node.outputs[0].shape = ir.Shape(["N", 6 if node.name == "d" else 5, 8, 8])
    quantized = coarse(reference)
    shifts = bias_shifts(reference, quantized, ["c", "d", "g"], images(), threads=1)
    expected = by_running_all_again(reference, quantized, ["c", "g"], images())
    assert list(shifts) == ["c", "g"]
    np.testing.assert_allclose(shifts["g"], expected["g"], rtol=1e-4, atol=1e-5)


# --- Images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "value", "chosen"), [("MOST_IMAGES", 4, [0, 6, 13, 19]), ("MOST_BYTES", 4000, [0, 19])]
)
def test_of_many_images_evenly_chosen_ones_are_used(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, chosen: list[int]
) -> None:
    reference = graph(TWO_LAYERS, IMAGE, MAPS, **TWO_WEIGHTS)  # 6 · 8 · 8 floats at the cut between the two: 1536 bytes
    quantized = coarse(reference)
    expected = bias_shifts(reference, quantized, ["c", "d"], images()[chosen], threads=1)
    monkeypatch.setattr(module, limit, value)
    shifts = bias_shifts(reference, quantized, ["c", "d"], images(), threads=1)
    for layer in ("c", "d"):
        np.testing.assert_array_equal(shifts[layer], expected[layer])


def test_neither_model_nor_images_change_and_progress_is_told() -> None:
    reference = graph(TWO_LAYERS, IMAGE, MAPS, **TWO_WEIGHTS)
    quantized = coarse(reference)
    x = images()
    before = [ir.to_proto(model).SerializeToString(deterministic=True) for model in (reference, quantized)]
    told: list[tuple[int, int]] = []
    bias_shifts(reference, quantized, ["c", "d"], x, threads=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert [ir.to_proto(model).SerializeToString(deterministic=True) for model in (reference, quantized)] == before
    np.testing.assert_array_equal(x, images())
