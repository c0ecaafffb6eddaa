"""Errors of layers, in all and their own, against numpy on graphs that are spelled out; wrong scales by their price."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.calibration.ranges import METHODS, Histogram
from edgewright.optimize.channel_ranges import channel_magnitudes, constant_channels
from edgewright.optimize.dialects import DIALECTS, Quantizer
from edgewright.optimize.layer_errors import (
    activations_of,
    decibels,
    layer_errors,
    layer_outputs,
    own_errors,
    shared_tensors,
)
from edgewright.optimize.scale_faults import FAULT_DB, scale_faults
from textual_graphs import graph, normal

Array = NDArray[Any]
BODY = "a = Conv (x, w1, b1) r = Relu (a) c = Conv (r, w2) s = Sigmoid (c) m = Mul (c, s) y = Conv (m, w3)"
WEIGHTS: dict[str, Any] = {"w1": (16, 3, 1, 1), "b1": (16,), "w2": (16, 16, 1, 1), "w3": (4, 16, 1, 1)}
X = normal("x", 20, 3, 8, 8)


def network(**changed: Array) -> ir.Model:
    model = graph(BODY, outputs="float[N, 4, 8, 8] y", **{**WEIGHTS, **changed})
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.op_type}"
    return model


def conv(x: Array, w: Array, b: Array | float = 0.0) -> Array:
    bias = b.reshape(-1, 1, 1) if isinstance(b, np.ndarray) else b
    return np.asarray(np.einsum("nchw,oc->nohw", x, w[:, :, 0, 0]) + bias)


def by_numpy(**changed: Array) -> dict[str, Array]:
    w = {name: changed.get(name, normal(name, *shape)) for name, shape in WEIGHTS.items()}
    a = conv(X, w["w1"], w["b1"])
    r = np.maximum(a, 0)
    c = conv(r, w["w2"])
    s = 1 / (1 + np.exp(-c))
    return {"a": a, "r": r, "c": c, "s": s, "m": c * s, "y": conv(c * s, w["w3"])}


def sqnr(right: Array, other: Array) -> float:
    return float(10 * np.log10((right**2).sum() / ((right - other) ** 2).sum()))


BENT: dict[str, Array] = {
    "w1": normal("w1", *WEIGHTS["w1"]) * np.float32(1.01),
    "w3": normal("w3", *WEIGHTS["w3"]) * np.float32(0.9),
}


# Errors


def test_all_errors_and_own_errors_are_those_of_numpy() -> None:
    right, bent = by_numpy(), by_numpy(**BENT)
    errors = layer_errors(network(), network(**BENT), X, ["r", "c", "y"], threads=1)
    own = {
        "r": bent["r"],  # its own error is all there is
        "c": right["c"],
        "y": conv(right["m"], BENT["w3"]),
    }
    for name in ("r", "c", "y"):
        assert errors[name].sqnr_db == pytest.approx(sqnr(right[name], bent[name]), abs=0.01)
    assert errors["r"].own_sqnr_db == pytest.approx(sqnr(right["r"], own["r"]), abs=0.01)
    assert errors["y"].own_sqnr_db == pytest.approx(sqnr(right["y"], own["y"]), abs=0.01)
    assert errors["c"].own_sqnr_db > 120, "it inherits its error"


def test_own_errors_are_those_since_the_tensors_that_are_compared() -> None:
    """With `r` not among them what w1 does is seen at `c`."""
    right, bent = by_numpy(), by_numpy(**BENT)
    found = own_errors(activations_of(network(), ["c", "y"], threads=1), network(**BENT), X, ["c", "y"], threads=1)
    assert found["c"] == pytest.approx(sqnr(right["c"], bent["c"]), abs=0.01)
    assert found["y"] == pytest.approx(sqnr(right["y"], conv(right["m"], BENT["w3"])), abs=0.01)


def test_equal_graphs_have_no_errors_and_stay_as_they_were() -> None:
    model = network()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    told: list[int] = []
    errors = layer_errors(model, network(), X, ["a", "y"], threads=1, progress=told.append)
    assert {(error.sqnr_db, error.own_sqnr_db) for error in errors.values()} == {(300.0, 300.0)}
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert told == [8, 16, 20], "a few images at a time"


def test_an_infinite_activation_and_another_shape_are_as_bad_as_can_be() -> None:
    huge = network(w1=np.full(WEIGHTS["w1"], 3e38, np.float32))
    assert layer_errors(network(), huge, X, ["a"], threads=1)["a"].sqnr_db == -300

    def narrower(images: Array) -> dict[str, Array]:
        return {"y": by_numpy()["y"][: len(images), :2].astype(np.float32)}

    assert own_errors(narrower, network(), X[:8], ["y"], threads=1) == {"y": -300.0}


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(1.0, 0.01, 20.0), (1.0, 0.0, 300.0), (0.0, 0.0, 300.0), (0.0, 1.0, -300.0), (1.0, np.inf, -300.0),
     (1.0, np.nan, -300.0), (1e-320, 1e300, -300.0)],
)  # fmt: skip
def test_decibels(signal: float, noise: float, expected: float) -> None:
    assert decibels(signal, noise) == pytest.approx(expected)


def test_the_output_of_a_layer_is_behind_its_relu_but_not_behind_its_silu() -> None:
    assert layer_outputs(network()) == {"a/Conv": "r", "c/Conv": "c", "y/Conv": "y"}


def test_shared_are_computed_activations_of_both() -> None:
    other = graph("a = Conv (x, w1, b1) z = Relu (a) y = Conv (z, w2)", **{k: WEIGHTS[k] for k in ("w1", "b1", "w2")})
    assert shared_tensors(network(), other) == ("a", "y")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_in_a_quantized_graph_only_integer_layers_have_own_errors(dialect: str) -> None:
    model = network()
    quantizer = Quantizer(dialect, model, collect(model, [X], identity={}, threads=1), method="mse")
    outputs = layer_outputs(model)
    errors = layer_errors(model, quantizer.runnable(), X, list(outputs.values()), threads=1)
    for layer, tensor in outputs.items():
        low, high = (20, 60) if layer in quantizer.layers else (100, 300)
        assert low < errors[tensor].own_sqnr_db <= high, layer


# Scales


def quantized(dialect: str = "cpu", method: str = "mse") -> ir.Model:
    model = network()
    table = collect(model, [X], identity={}, threads=1)
    return Quantizer(dialect, model, table, method=method, remainder="fp32").quantized().model


def seen() -> Mapping[str, Histogram]:
    return collect(network(), [X], identity={}, threads=1).histograms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_right_scales_are_no_faults(dialect: str, method: str) -> None:
    faults = scale_faults(network(), quantized(dialect, method), seen())
    assert not any(fault.wastes_bits for fault in faults)
    assert faults == () or method in ("entropy", "percentile-99.9"), "these two saturate on purpose"


@pytest.mark.parametrize("factor", [4.0, 0.2])
@pytest.mark.parametrize(("tensor", "layer"), [("x", "a/Conv"), ("r", "c/Conv"), ("m", "y/Conv")])
def test_a_wrong_scale_of_an_activation_is_found_by_its_price(tensor: str, layer: str, factor: float) -> None:
    graph = quantized()
    scale = graph.graph.initializers[f"{tensor}::scale"]
    assert scale.const_value is not None
    scale.const_value = ir.tensor(np.asarray(scale.const_value.numpy() * np.float32(factor)), name=scale.name)
    (fault,) = scale_faults(network(), graph, seen())
    assert (fault.layer, fault.tensor) == (layer, tensor)
    assert fault.ratio == pytest.approx(factor, rel=0.5)
    assert fault.lost_db > FAULT_DB
    assert fault.wastes_bits == (factor > 1)
    assert not scale_faults(network(), graph, {name: values for name, values in seen().items() if name != tensor})


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_a_wrong_scale_of_a_weight_is_found(dialect: str) -> None:
    graph = quantized(dialect)
    scale = graph.graph.initializers["c/Conv::weight::scale"]
    assert scale.const_value is not None
    scale.const_value = ir.tensor(np.asarray(scale.const_value.numpy() * np.float32(4)), name=scale.name)
    (fault,) = scale_faults(network(), graph, seen())
    assert (fault.layer, fault.tensor) == ("c/Conv", "w2")
    assert fault.ratio == pytest.approx(4.0)


# Channels


def test_channel_magnitudes_are_those_of_the_output_channels() -> None:
    node = next(node for node in network().graph if node.name == "c/Conv")
    np.testing.assert_array_equal(channel_magnitudes(node), np.abs(normal("w2", 16, 16, 1, 1)).max(axis=(1, 2, 3)))


def test_dead_and_constant_channels_are_named_with_their_values() -> None:
    weight, bias = normal("w1", *WEIGHTS["w1"]), normal("b1", 16)
    weight[[2, 5]], bias[2], bias[5] = 0.0, -1.0, 0.5
    model = network(w1=weight, b1=bias)
    assert constant_channels(model, "r", X, threads=1) == {2: 0.0, 5: 0.5}
    assert constant_channels(network(), "r", X, threads=1) == {}
