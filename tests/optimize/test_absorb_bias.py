"""High-bias absorption: what always is there moves on, nothing else is computed, and zeros at borders are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import conv2d

from edgewright.optimize.absorb_bias import absorb_high_biases
from edgewright.optimize.segments import GraphRun
from edgewright.optimize.verify import max_relative_difference
from textual_graphs import graph, normal

Array = NDArray[Any]

IMAGE = "float[N, 3, 8, 8] x"
MAPS = "float[N, C, H, L] y"
LOGITS = "float[N, M] y"

C = "[c] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [r] r = Relu (a)"
HIGH = np.array([60, 0, 45, -3, 80, 1], np.float32)
"""Biases: three channels of `w` are always far above 0."""
GIVEN: dict[str, Any] = {"w": (6, 3, 3, 3), "b": HIGH}


def images() -> Array:
    return normal("x", 12, 3, 8, 8)


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def output_of(model: ir.Model, name: str, x: Array) -> Array:
    return GraphRun(model, outputs=[name], threads=1).all({"x": x})[name]


def lowest(model: ir.Model) -> Array:
    values: Array = output_of(model, "a", images()).min(axis=(0, 2, 3))
    return values


PLACES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "convolution": (f"{C} [d] y = Conv (r, v, e)", MAPS, {"v": (5, 6, 3, 3), "e": (5,)}),
    "convolution without a bias": (f"{C} [d] y = Conv <strides = [2, 2]> (r, v)", MAPS, {"v": (5, 6, 3, 3)}),
    "depthwise": (f"{C} [d] y = Conv <group = 6> (r, v, e)", MAPS, {"v": (6, 1, 3, 3), "e": (6,)}),
    "groups": (f"{C} [d] y = Conv <group = 2> (r, v, e)", MAPS, {"v": (4, 3, 3, 3), "e": (4,)}),
    "pooling": (
        f"{C} [m] m = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (r) "
        "[n] n = AveragePool <kernel_shape = [2, 2]> (m) [d] y = Conv (n, v, e)",
        MAPS,
        {"v": (5, 6, 1, 1), "e": (5,)},
    ),
    "mean of what is there": (
        f"{C} [m] m = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r) [d] y = Conv (m, v, e)",
        MAPS,
        {"v": (5, 6, 1, 1), "e": (5,)},
    ),
    "head": (
        f"{C} [p] p = GlobalAveragePool (r) [f] f = Flatten (p) [d] y = Gemm <alpha = 0.5, beta = 2.0> (f, v, e)",
        LOGITS,
        {"v": (6, 5), "e": (5,)},
    ),
    "columns of a map": (
        f"{C} [f] f = Flatten (r) [d] y = Gemm <transB = 1> (f, v, e)",
        LOGITS,
        {"v": (5, 384), "e": (5,)},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_a_channel_always_gives_moves_into_the_next_bias(place: str) -> None:
    body, outputs, arrays = PLACES[place]
    model = graph(body, IMAGE, outputs, **GIVEN, **arrays)
    before = serialized(model)
    result = absorb_high_biases(model, images(), threads=1)
    assert serialized(model) == before, "it works on a copy"
    assert result.changed == 1
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("d", "its result is an output of the graph")]
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert max_relative_difference(ir.to_proto(model), ir.to_proto(result.model), {"x": images()}) < 1e-5
    old, new = lowest(model), lowest(result.model)
    assert (old > 10).sum() == 3
    np.testing.assert_allclose(new, np.minimum(old, 0), atol=1e-4)


def test_against_pytorch() -> None:
    model = graph(PLACES["convolution"][0], IMAGE, MAPS, **GIVEN, v=(5, 6, 3, 3), e=(5,))
    x, w, v, e = (
        torch.from_numpy(array)
        for array in (images(), normal("w", 6, 3, 3, 3), normal("v", 5, 6, 3, 3), normal("e", 5))
    )
    before = conv2d(x, w, torch.from_numpy(HIGH), padding=1)
    constant = before.amin((0, 2, 3)).clamp(min=0)
    expected = conv2d((before - constant[:, None, None]).relu(), v, e + torch.einsum("oihw,i->o", v, constant))
    absorbed = absorb_high_biases(model, images(), threads=1).model
    np.testing.assert_allclose(
        output_of(absorbed, "y", images()), expected.numpy(), rtol=0, atol=1e-4 * float(expected.abs().max())
    )
    np.testing.assert_allclose(
        output_of(absorbed, "r", images()), (before - constant[:, None, None]).relu().numpy(), atol=1e-4
    )


def test_two_in_a_row() -> None:
    body = f"{C} [d] d = Conv (r, v, e) [s] s = Relu (d) [g] y = Conv (s, u)"
    model = graph(body, IMAGE, MAPS, **GIVEN, v=(5, 6, 1, 1), e=np.full(5, 500, np.float32), u=(4, 5, 1, 1))
    result = absorb_high_biases(model, images(), threads=1)
    assert result.changed == 2
    assert max_relative_difference(ir.to_proto(model), ir.to_proto(result.model), {"x": images()}) < 1e-5
    assert np.abs(output_of(result.model, "d", images()).min(axis=(0, 2, 3))).max() < 1e-3


def test_on_other_images_a_channel_may_fall_below() -> None:
    model = graph(PLACES["convolution"][0], IMAGE, MAPS, **GIVEN, v=(5, 6, 3, 3), e=(5,))
    absorbed = absorb_high_biases(model, images(), threads=1).model
    far = {"x": 30 * images()}
    assert max_relative_difference(ir.to_proto(model), ir.to_proto(absorbed), far) > 1e-3


# --- Left alone --------------------------------------------------------------------------------------------------

LEFT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "padded convolution": (
        f"{C} [d] y = Conv <pads = [1, 1, 1, 1]> (r, v, e)",
        MAPS,
        {"v": (5, 6, 3, 3), "e": (5,)},
        "d pads with zeros, which are not shifted",
    ),
    "padded by itself": (
        f'{C} [d] y = Conv <auto_pad = "SAME_UPPER"> (r, v, e)',
        MAPS,
        {"v": (5, 6, 3, 3), "e": (5,)},
        "d pads with zeros, which are not shifted",
    ),
    "transposed convolution": (
        f"{C} [d] y = ConvTranspose (r, v, e)",
        MAPS,
        {"v": (6, 5, 3, 3), "e": (5,)},
        "d pads with zeros, which are not shifted",
    ),
    "mean of zeros too": (
        f"{C} [m] m = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (r) "
        "[d] y = Conv (m, v, e)",
        MAPS,
        {"v": (5, 6, 1, 1), "e": (5,)},
        "m averages over zeros too, which are not shifted",
    ),
    "no ReLU": (
        "[c] a = Conv (x, w, b) [d] y = Conv (a, v, e)",
        MAPS,
        {"v": (5, 6, 3, 3), "e": (5,)},
        "no ReLU is behind it",
    ),
    "LeakyReLU": (
        "[c] a = Conv (x, w, b) [r] r = LeakyRelu (a) [d] y = Conv (r, v, e)",
        MAPS,
        {"v": (5, 6, 3, 3), "e": (5,)},
        "LeakyRelu behind it does not pass a channel on as it is",
    ),
    "MatMul": (
        f"{C} [p] p = GlobalAveragePool (r) [f] f = Flatten (p) [d] y = MatMul (f, v)",
        LOGITS,
        {"v": (6, 5)},
        "MatMul has no bias",
    ),
    "computed bias": (
        f"{C} [p] p = GlobalAveragePool (r) [f] f = Flatten (p) [q] q = ReduceMean <keepdims = 0> (x, axes) "
        "[d] y = Gemm (f, v, q)",
        LOGITS,
        {"v": (6, 5), "axes": np.array([0, 1, 2, 3])},
        "its bias is computed at run time",
    ),
    "two readers": (
        f"{C} [d] d = Conv (r, v, e) [s] s = Conv (r, v, e) [t] y = Add (d, s)",
        MAPS,
        {"v": (5, 6, 3, 3), "e": (5,)},
        "2 nodes read its result",
    ),
}


@pytest.mark.parametrize("place", LEFT)
def test_elsewhere_a_layer_stays_and_the_reason_is_given(place: str) -> None:
    body, outputs, arrays, reason = LEFT[place]
    model = graph(body, IMAGE, outputs, **GIVEN, **arrays)
    result = absorb_high_biases(model, images(), threads=1)
    assert result.changed == 0
    assert {skip.node: skip.reason for skip in result.skipped}["c"] == reason
    assert serialized(result.model) == serialized(model)


def test_channels_that_fall_to_zero_are_left_alone() -> None:
    model = graph(PLACES["convolution"][0], IMAGE, MAPS, **{**GIVEN, "b": (6,)}, v=(5, 6, 3, 3), e=(5,))
    result = absorb_high_biases(model, images(), threads=1)
    assert result.changed == 0
    assert serialized(result.model) == serialized(model)
