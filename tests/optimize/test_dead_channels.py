"""Dead, constant and all-zero channels: found, named, and no obstacle to any dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgewright.calibration.collect import CalibrationTable, collect
from edgewright.calibration.ranges import AUTO, METHODS
from edgewright.optimize.dead_channels import StillChannels, dead_channel_warning, still_channels
from edgewright.optimize.dialects import DIALECTS, Quantizer
from edgewright.optimize.segments import logits_of
from textual_graphs import graph, normal

BODY = """
[one] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [relu] p = Relu (a)
[two] e = Conv <pads = [1, 1, 1, 1]> (p, v, k) [relu2] q = Relu (e)
[mean] g = GlobalAveragePool (q) [flat] f = Flatten (g) [head] y = Gemm <transB = 1> (f, u, z)
"""
ALL = slice(None)


def network(**changes: Any) -> ir.Model:
    shapes = {"w": (16, 3, 3, 3), "b": (16,), "v": (16, 16, 3, 3), "k": (16,), "u": (4, 16), "z": (4,)}
    arrays = {name: normal(name, *shape) * np.float32(0.3) for name, shape in shapes.items()}
    for name, (index, value) in changes.items():
        arrays[name][index] = value
    return graph(BODY, "float[N, 3, 8, 8] x", "float[N, 4] y", **arrays)


def measured(model: ir.Model) -> CalibrationTable:
    return collect(model, [normal("images", 6, 3, 8, 8)], identity={}, threads=1)


PLANTED: dict[str, dict[str, Any]] = {
    "dead": {"w": (3, 0.0), "b": (3, -1.0)},
    "constant": {"w": (3, 0.0), "b": (3, 2.0)},
    "zero without a bias": {"w": ([3, 5], 0.0), "b": ([3, 5], 0.0)},
    "tiny weight, large bias": {"w": (3, 1e-38), "b": (3, 100.0)},
    "a whole layer dead": {"w": (ALL, 0.0), "b": (ALL, -1.0)},
    "a whole layer constant": {"v": (ALL, 0.0), "k": (ALL, 0.5)},
    "a whole layer zero": {"w": (ALL, 0.0), "b": (ALL, 0.0)},
    "a head of zeros": {"u": (ALL, 0.0), "z": (ALL, 0.0)},
    "a head of biases": {"u": (ALL, 0.0)},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("planted", PLANTED)
def test_no_planted_channel_breaks_a_dialect(planted: str, dialect: str) -> None:
    model = network(**PLANTED[planted])
    images = normal("images", 6, 3, 8, 8)
    quantizer = Quantizer(dialect, model, measured(model), method=AUTO)
    expected, found = logits_of(model, images, threads=1), logits_of(quantizer.runnable(), images, threads=1)
    scale = float(np.abs(expected).max()) or 1.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * scale)
    scales = [value for name, value in quantizer.quantized().model.graph.initializers.items() if "::scale" in str(name)]
    assert all((value.const_value.numpy() > 0).all() for value in scales if value.const_value is not None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method", [AUTO, *METHODS])
def test_constant_tensors_have_ranges_by_every_method(method: str, signed: bool) -> None:
    model = network(**PLANTED["a whole layer dead"])
    ranges = measured(model).ranges(method, signed=signed)
    assert (ranges["p"].low, ranges["p"].high) == (0.0, 0.0)
    assert ranges["a"].low <= -0.99  # holds the constant and 0
    assert all(np.isfinite([interval.low, interval.high]).all() for interval in ranges.values())


def test_dead_and_constant_channels_are_counted_by_layer() -> None:
    model = network(w=([2, 3, 7], 0.0), b=([2, 3, 7], [-1.0, -2.0, 3.0]), u=(1, 0.0))
    found = still_channels(model, measured(model))
    assert found == (StillChannels("one", 2, 1, 16), StillChannels("head", 0, 1, 4))
    assert dead_channel_warning(found, 24) == (
        "2 layers have dead or constant channels over 24 images: head (1 of 4), one (3 of 16); "
        "they cost time and do no harm"
    )


def test_a_sound_network_has_no_such_channels() -> None:
    model = network(b=(ALL, 0.1), k=(ALL, 0.1))
    assert still_channels(model, measured(model)) == ()
    assert dead_channel_warning((), 24) == ""


def test_three_layers_are_named_and_the_others_counted() -> None:
    layers = [StillChannels(f"layer{index}", index, 0, 64) for index in range(1, 6)]
    assert dead_channel_warning(layers, 24) == (
        "5 layers have dead channels over 24 images: layer5 (5 of 64), layer4 (4 of 64), layer3 (3 of 64), …; "
        "they cost time and do no harm"
    )


def test_on_few_images_channels_that_live_rest() -> None:
    assert dead_channel_warning([StillChannels("one", 3, 0, 64)], 15) == ""
    assert dead_channel_warning([StillChannels("one", 3, 0, 64)], 16) != ""
