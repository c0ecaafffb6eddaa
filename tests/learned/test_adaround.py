"""Learned rounding: against all roundings there are, and in graphs, layer after layer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.calibration.collect import collect
from edgewright.learned import adaround
from edgewright.learned.adaround import AdaRoundSettings, learned_integers
from edgewright.learned.layer_rows import as_filters, as_weight, input_rows, output_rows, sampled_places
from edgewright.learned.rounding import RoundingProblem, learned_rounding
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.repairs import Repairs
from edgewright.optimize.segments import GraphRun, logits_of
from edgewright.runtime.errors import QuantizationError
from edgewright.runtime.parity import compare
from textual_graphs import graph, normal

Array = NDArray[Any]

NET = """
[stem] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
[relu] r = Relu (a)
[depthwise] d = Conv <pads = [1, 1, 1, 1], group = 16> (r, k)
[grouped] c = Conv <group = 4> (d, v)
[add] t = Add (r, c)
[gate] g = Sigmoid (t)
[silu] e = Mul (t, g)
[pool] p = GlobalAveragePool (e)
[flat] f = Flatten (p)
[matmul] m = MatMul (f, n)
[head] y = Gemm <transB = 1> (m, u, o)
"""
SHAPES: dict[str, Any] = {
    "w": (16, 3, 3, 3),
    "b": (16,),
    "k": (16, 1, 3, 3),
    "v": (16, 4, 1, 1),
    "n": (16, 12),
    "u": (5, 12),
    "o": (5,),
}
LAYERS = ("stem", "depthwise", "grouped", "matmul", "head")
QUICK = AdaRoundSettings(rows=512)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> Array:
    return normal("images", 64, 3, 8, 8)


@pytest.fixture(scope="module")
def quantizer(images: Array) -> Quantizer:
    model = graph(NET, outputs="float[N, 5] y", **SHAPES)
    return Quantizer("cpu", model, collect(model, [images[:48]], identity={}))


def learned(quantizer: Quantizer, images: Array, layers: Any = LAYERS, **changes: Any) -> dict[str, NDArray[np.int8]]:
    settings = replace(QUICK, **changes)
    return learned_integers(quantizer.model, quantizer.runnable(), layers, images[:48], settings=settings, threads=1)


def integers_of(model: ir.Model) -> dict[str, Array]:
    """The INT8 weights of a quantized graph, by the names of the layers."""
    found = {}
    for node in model.graph:
        if node.name in LAYERS and node.inputs[1] is not None:
            dequantize = node.inputs[1].producer()
            assert dequantize is not None
            assert dequantize.inputs[0] is not None
            assert dequantize.inputs[0].const_value is not None
            found[str(node.name)] = dequantize.inputs[0].const_value.numpy()
    return found


def sqnr(quantizer: Quantizer, repairs: Repairs, images: Array) -> float:
    reference = logits_of(quantizer.model, images, threads=1)
    found = compare(reference, logits_of(quantizer.repaired(repairs).runnable(), images, threads=1), None)
    assert found.sqnr_db is not None
    return found.sqnr_db


# --- One layer ---------------------------------------------------------------------------------------------------


def problem(seed: int, inputs: int = 10, *, rows: int = 400, activation: Any = nn.functional.relu) -> RoundingProblem:
    """Three outputs of coarse steps, whose inputs have much in common: nearest is far from the best."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x = mixed + 2 * mixed[:, :1]
    weights = 4 * torch.randn(3, inputs, generator=generator)
    scales = torch.rand(3, 1, generator=generator) + 0.5
    bias = torch.randn(1, 1, 3, generator=generator)
    y = x @ (weights * scales).mT + bias
    return RoundingProblem(x[None], y, weights[None], scales[None], bias, activation, rows // 4)


def errors(each: RoundingProblem, integers: Tensor) -> Tensor:
    """Mean squared error of each output over the rows that teach, by PyTorch's linear layer, `[O]`."""
    rows = slice(each.rows.shape[1] - each.held_back)
    linear = nn.functional.linear(each.rows[0, rows], (integers * each.scales)[0], each.bias[0, 0])
    return (linear - each.products[0, rows]).square().mean(0)


def best_errors(each: RoundingProblem) -> Tensor:
    """The least that any choice of up and down reaches, `[O]`."""
    floor = each.weights.floor()
    choices = itertools.product((0.0, 1.0), repeat=floor.shape[2])
    tried = [errors(each, floor + torch.tensor(choice)) for choice in choices]
    return torch.stack(tried).amin(0)


@pytest.mark.parametrize("activation", [nn.functional.relu, nn.functional.silu])
def test_the_best_of_all_roundings_is_nearly_reached(activation: Any) -> None:
    shares = []
    for seed in range(3):
        each = problem(seed, 8, activation=activation)
        found = learned_rounding(each)
        assert found.dtype == torch.int8
        assert bool(((found == each.weights.floor()) | (found == each.weights.ceil())).all())
        best, nearest = best_errors(each), errors(each, each.weights.round())
        assert bool((errors(each, found) <= nearest).all())
        shares.append((errors(each, found) / best).log().mean().exp().item())
        assert nearest.mean() > 2 * best.mean()  # there was something to gain
    assert np.mean(shares) < 1.3  # one flip at a time may end beside the very best


def test_weights_on_the_grid_have_no_choice() -> None:
    each = problem(7)
    whole = replace(each, weights=each.weights.round())
    # Even inputs of another kind, which would be served better by other integers, move nothing.
    shifted = replace(whole, products=whole.products + 3)
    assert torch.equal(learned_rounding(shifted).float(), whole.weights)
    weights = each.weights.clone()
    weights[..., ::2] = weights[..., ::2].round()
    found = learned_rounding(replace(each, weights=weights)).float()
    assert torch.equal(found[..., ::2], weights[..., ::2])


def test_a_rounding_that_does_not_help_on_the_other_rows_is_not_taken() -> None:
    each = problem(8)
    taught = each.rows.shape[1] - each.held_back
    noise = torch.randn(each.products.shape, generator=torch.Generator().manual_seed(0))
    misled = each.products.clone()
    misled[:, :taught] += 10 * noise[:, :taught] * each.rows[:, :taught, :1]
    found = learned_rounding(replace(each, products=misled))
    check = slice(taught, None)
    for channel in range(3):
        nearest = each.weights.round()[0, channel]
        chosen = found[0, channel].float()
        if not torch.equal(chosen, nearest):
            error = [
                (each.activation(each.rows[0, check] @ (w * each.scales[0, channel]) + each.bias[0, 0, channel])
                 - each.products[0, check, channel]).square().mean()
                for w in (chosen, nearest)
            ]  # fmt: skip
            assert error[0] < error[1]


# --- Rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("[layer] y = Conv <strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 1]> (x, w)", {"w": (5, 6, 3, 2)}),
        ('[layer] y = Conv <group = 3, auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)', {"w": (6, 2, 3, 3)}),
        ("[layer] y = Conv <group = 6> (x, w)", {"w": (12, 1, 2, 2)}),
    ],
)
def test_rows_times_filters_are_what_a_convolution_gives(body: str, arrays: dict[str, Any]) -> None:
    check_rows(graph(body, "float[N, 6, 9, 5] x", **arrays), normal("x", 4, 6, 9, 5), normal("w", *arrays["w"]))


@pytest.mark.parametrize(
    ("body", "shape", "sides"),
    [
        ("[layer] y = Gemm <alpha = 0.5> (x, w)", (7, 5), (4, 7)),
        ("[layer] y = Gemm <transB = 1> (x, w)", (5, 7), (4, 7)),
        ("[layer] y = MatMul (x, w)", (7, 5), (4, 7)),
        ("[layer] y = MatMul (x, w)", (7, 5), (4, 3, 7)),
    ],
)
def test_rows_times_filters_are_what_a_matrix_product_gives(
    body: str, shape: tuple[int, ...], sides: tuple[int, ...]
) -> None:
    declared = ", ".join(["N", *map(str, sides[1:])])
    result = ", ".join(["N", *map(str, sides[1:-1]), "5"])
    check_rows(
        graph(body, f"float[{declared}] x", f"float[{result}] y", w=shape), normal("x", *sides), normal("w", *shape)
    )


def check_rows(model: ir.Model, x: Array, weight: Array) -> None:
    (node,) = model.graph
    (y,) = GraphRun(model, threads=1)({"x": x}).values()
    filters = as_filters(node, weight)
    np.testing.assert_array_equal(as_weight(node, filters, weight.shape), weight)
    for per_image in (3, 10_000):
        places = sampled_places(node, y, per_image, np.random.default_rng(0))
        rows, outputs = input_rows(node, x, places), output_rows(node, y, places)
        assert len(places.images) <= per_image * len(x)
        np.testing.assert_allclose(rows @ filters.transpose(0, 2, 1), outputs, rtol=1e-4, atol=1e-5)
    assert outputs.size == y.size  # with places enough: all of them


# --- Graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_a_network_comes_closer_to_its_float_form(images: Array, dialect: str) -> None:
    body = NET.replace(", group = 16", "").replace("<group = 4>", "")
    shapes: dict[str, Any] = {
        **SHAPES,
        "w": (16, 16, 3, 3),
        "k": (16, 16, 3, 3),
        "v": (16, 16, 1, 1),
        "n": (16, 20),
        "u": (16, 20),
        "o": (16,),
    }
    model = graph(body, "float[N, 16, 8, 8] x", "float[N, 16] y", **shapes)
    x = normal("wide", 64, 16, 8, 8)
    each = Quantizer(dialect, model, collect(model, [x[:48]], identity={}))
    assert set(each.layers) == set(LAYERS)
    found = learned(each, x)
    assert set(found) == set(LAYERS)
    nearest = integers_of(each.runnable())
    for name, integers in found.items():
        assert integers.dtype == np.int8
        assert integers.shape == nearest[name].shape
        assert np.abs(integers.astype(int) - nearest[name]).max() <= 1
    before, after = (sqnr(each, repairs, x[48:]) for repairs in (Repairs(), Repairs(integers=found)))
    assert after > before + 0.5
    written = integers_of(each.repaired(Repairs(integers=found)).runnable())
    assert all(np.array_equal(written[name], integers) for name, integers in found.items())


def test_only_the_named_layers_are_rounded_anew(quantizer: Quantizer, images: Array) -> None:
    told: list[tuple[int, int]] = []
    before = ir.to_proto(quantizer.runnable()).SerializeToString(deterministic=True)
    quantized = quantizer.runnable()
    found = learned_integers(
        quantizer.model, quantized, ("head", "grouped"), images[:16], settings=QUICK, threads=1,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert list(found) == ["grouped", "head"]
    assert told == [(1, 2), (2, 2)]
    assert ir.to_proto(quantized).SerializeToString(deterministic=True) == before
    assert not learned_integers(quantizer.model, quantized, (), images[:16], settings=QUICK, threads=1)


def test_what_is_not_int8_is_refused(quantizer: Quantizer, images: Array) -> None:
    partly = quantizer.runnable({"grouped": "for the test"})
    with pytest.raises(QuantizationError, match="grouped is not INT8 in the quantized graph"):
        learned_integers(quantizer.model, partly, LAYERS, images[:16], settings=QUICK, threads=1)


def test_the_same_seed_gives_the_same_integers(quantizer: Quantizer, images: Array) -> None:
    first, second, other = (learned(quantizer, images, LAYERS[:2], seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_layers_behind_see_the_rounding_of_those_before(quantizer: Quantizer, images: Array) -> None:
    alone = learned(quantizer, images, ("depthwise",))
    after = learned(quantizer, images, ("stem", "depthwise"))
    assert not np.array_equal(alone["depthwise"], after["depthwise"])


def test_weights_on_the_grid_stay_in_a_graph_too(images: Array) -> None:
    steps = np.random.default_rng(0).integers(-126, 127, (16, 3, 3, 3))
    steps[:, 0, 0, 0] = 127
    weight = (steps / 128).astype(np.float32)
    model = graph(NET, outputs="float[N, 5] y", **{**SHAPES, "w": weight})
    each = Quantizer("cpu", model, collect(model, [images[:48]], identity={}))
    np.testing.assert_array_equal(learned(each, images, ("stem",))["stem"], steps)


def test_memory_is_bounded_by_what_was_asked_for(
    quantizer: Quantizer, images: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither borders that are too large are kept, nor more rows than fit; and it is learned all the same."""
    seen: list[int] = []
    kept: list[int] = []
    learn, passed = learned_rounding, adaround._Walk._passed

    def watched(each: RoundingProblem) -> Tensor:
        seen.append(each.rows.numel() + each.products.numel())
        return learn(each)

    def counted(self: Any, model: ir.Model, batch: Array, border: str) -> Array:
        result: Array = passed(self, model, batch, border)
        kept.append(result.nbytes)
        return result

    monkeypatch.setattr(adaround, "learned_rounding", watched)
    monkeypatch.setattr(adaround._Walk, "_passed", counted)
    learned(quantizer, images)
    assert max(kept) == 48 * 16 * 8 * 8 * 4
    largest = max(seen)
    seen.clear()
    kept.clear()
    memory = 400_000
    found = learned(quantizer, images, memory_bytes=memory)
    assert set(found) == set(LAYERS)
    assert kept
    assert max(kept) <= memory // 4
    assert 4 * max(seen) <= memory // 4 + 48 * 4 * max(16 * 27 + 16, 16 * 9 + 16)  # at least a row for each image
    assert max(seen) < largest
