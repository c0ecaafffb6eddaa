"""What is read off two engines: which kernel counts for which layer, and what converting a tensor would take."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from edgewright.optimize.placement_choice import Crossing
from edgewright.optimize.placement_costs import (
    LayerTimes,
    conversions,
    layer_times,
    layers_in_int8,
    milliseconds_per_element,
)
from edgewright.optimize.plan import plan_for_cpu
from edgewright.runtime.backends import KernelTime
from edgewright.runtime.specs import Kernel
from textual_graphs import graph

W = (3, 3, 1, 1)
SIZE = 3 * 8 * 8
"""Elements of each tensor."""


def took(milliseconds: float, name: str, kind: str = "Other", layer: str = "") -> KernelTime:
    sources = (layer,) if layer else ()
    return KernelTime(Kernel(name, kind, sources, "fp32", computes=bool(layer)), milliseconds)


def network(body: str, outputs: str = "float[N, C, H, L] y") -> ir.Model:
    return graph(body, outputs=outputs, w=W, v=W, u=W)


# --- Which kernel counts for which layer -------------------------------------------------------------------------


def test_what_follows_a_layer_counts_for_it_and_a_quantization_for_the_next() -> None:
    in_float = [took(1, "reorder"), took(10, "c", "Conv", "c"), took(2, "silu"), took(20, "d", "Conv", "d")]
    in_int8 = [
        took(3, "x::quantize", "QuantizeLinear"),
        took(4, "c", "QLinearConv", "c"),
        took(5, "a::dequantize", "DequantizeLinear"),
        took(2, "silu"),
        took(6, "m::quantize", "QuantizeLinear"),
        took(7, "d", "QLinearConv", "d"),
        took(8, "y::dequantize", "DequantizeLinear"),
    ]
    times = layer_times(("c", "d"), in_float, in_int8)
    assert times == (LayerTimes("c", 1 + 10 + 2, 3 + 4 + 5 + 2), LayerTimes("d", 20, 6 + 7 + 8))
    assert [layer.gain_ms for layer in times] == [-1, -1]


def test_a_layer_that_is_never_int8_counts_for_the_one_before_it() -> None:
    kernels = [took(1, "c", "Conv", "c"), took(2, "gate", "Conv", "fc1"), took(4, "d", "Conv", "d")]
    assert layer_times(("c", "d"), kernels, kernels) == (LayerTimes("c", 3, 3), LayerTimes("d", 4, 4))


@pytest.mark.parametrize(("first", "second"), [(1, 0), (0, 1), (0, 0)])
def test_where_one_of_the_engines_is_not_timed_nothing_is_known(first: int, second: int) -> None:
    kernels = [took(1, "c", "Conv", "c")]
    assert layer_times(("c",), kernels * first, kernels * second) == ()


# --- What a conversion takes -------------------------------------------------------------------------------------


def test_a_quantization_that_has_a_kernel_gives_the_price_of_an_element() -> None:
    model = network("[c] a = Conv (x, w) [r] m = Relu (a) [d] y = Conv (m, v)")
    seen = [took(1.0 * SIZE, "x::quantize"), took(3.0 * SIZE, "m::quantize"), took(4.0 * SIZE, "y::quantize")]
    assert milliseconds_per_element(model, [*seen, took(99.0, "c", "QLinearConv", "c")]) == pytest.approx(3.0)
    assert milliseconds_per_element(model, [took(99.0, "c", "QLinearConv", "c")]) == 0


def crossings(model: ir.Model) -> list[Crossing]:
    return list(conversions(model, plan_for_cpu(model), 0.5))


def test_a_tensor_between_two_integer_layers_would_be_converted() -> None:
    price = 0.5 * SIZE
    model = network("[c] a = Conv (x, w) [r] m = Relu (a) [d] y = Conv (m, v)")
    assert crossings(model) == [Crossing("c", ("d",), price, price)]
    joined = "[c] a = Conv (x, w) [r] m = Relu (a) [d] b = Conv (m, v) [add] s = Add (m, b) [e] y = Conv (s, u)"
    assert crossings(network(joined)) == [
        Crossing("c", ("d", "add"), price, price),
        Crossing("d", ("add",), price, price),
        Crossing("add", ("e",), price, price),
    ]


def test_what_is_converted_in_any_case_costs_nothing_more() -> None:
    silu = "[c] a = Conv (x, w) [s] g = Sigmoid (a) [m] m = Mul (a, g) [d] y = Conv (m, v)"
    assert crossings(network(silu)) == []  # both sides are: the layers were timed with it
    both = network("[c] a = Conv (x, w) [d] b = Conv (a, v) [t] t = Tanh (a) [s] y = Add (b, t)")
    assert crossings(both) == [Crossing("c", ("d",), 0.5 * SIZE, 0.0)]
    given = network("[c] a = Conv (x, w) [d] y = Conv (a, v)", "float[N, 3, 8, 8] a, float[N, C, H, L] y")
    assert crossings(given) == [Crossing("c", ("d",), 0.5 * SIZE, 0.0)]


def test_the_choice_weighs_layers_against_conversions() -> None:
    model = network("[c] a = Conv (x, w) [d] b = Conv (a, v) [e] y = Conv (b, u)")
    times = {name: LayerTimes(name, 10, 10 - gain) for name, gain in (("c", 5.0), ("d", -1.0), ("e", 5.0))}
    plan = plan_for_cpu(model)
    assert layers_in_int8(model, plan, times, 0.0) == {"c", "e"}
    assert layers_in_int8(model, plan, times, 1.0 / SIZE) == {"c", "d", "e"}
