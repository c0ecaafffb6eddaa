"""Neighbouring layers: what stands between them, how the channels of both correspond, and why many are no pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgewright.optimize.layer_pairs import POSITIVELY_HOMOGENEOUS, Pair, layout_of, pair_behind
from textual_graphs import graph

IMAGE = "float[N, 3, 8, 8] x"
LOGITS = "float[N, M] y"
MAPS = "float[N, C, H, L] y"
LIMITS: dict[str, Any] = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
SHAPES: dict[str, Any] = {"w": (6, 3, 3, 3), "b": (6,)}
C = "[c] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)"


def found(model: ir.Model, *more: str) -> Pair | str:
    """What `pair_behind` says of the layer called c."""
    (node,) = (node for node in model.graph if node.name == "c")
    return pair_behind(node, (*POSITIVELY_HOMOGENEOUS, *more))


# --- Pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "arrays", "between", "repeats"),
    [
        ("[r] r = Relu (a) [d] y = Conv (r, v)", {"v": (5, 6, 3, 3)}, "r", 1),
        ("[d] y = Conv (a, v)", {"v": (5, 6, 3, 3)}, "", 1),
        (
            "[r] r = Relu (a) [p] p = GlobalAveragePool (r) [f] f = Flatten (p) [d] y = Gemm (f, v)",
            {"v": (6, 5)},
            "rpf",
            1,
        ),
        ("[r] r = Relu (a) [f] f = Flatten (r) [d] y = Gemm (f, v)", {"v": (384, 5)}, "rf", 64),
    ],
    ids=["ReLU", "nothing", "head", "columns of a map"],
)
def test_a_pair_names_what_stands_between(body: str, arrays: dict[str, Any], between: str, repeats: int) -> None:
    model = graph(f"{C} {body}", IMAGE, LOGITS if "Gemm" in body else MAPS, **SHAPES, **arrays)
    pair = found(model)
    assert isinstance(pair, Pair)
    assert (pair.first.name, pair.second.name, pair.channels, pair.repeats) == ("c", "d", 6, repeats)
    assert "".join(str(node.name) for node in pair.between) == between


@pytest.mark.parametrize("product", ["Mul (a, t)", "Mul (t, a)"])
def test_a_silu_may_be_passed_on_request(product: str) -> None:
    model = graph(
        f"{C} [t] t = Sigmoid (a) [r] r = {product} [d] y = Conv (r, v)", IMAGE, MAPS, **SHAPES, v=(5, 6, 1, 1)
    )
    pair = found(model, "SiLU")
    assert isinstance(pair, Pair)
    assert [node.name for node in pair.between] == ["r"]


@pytest.mark.parametrize(
    ("node", "shape", "repeats", "outputs", "inputs"),
    [
        (ir.node("Conv", [], {"group": 2}), (4, 3, 5, 5), 1, 4, 6),
        (ir.node("ConvTranspose", [], {"group": 2}), (6, 2, 5, 5), 1, 4, 6),
        (ir.node("Gemm", []), (12, 5), 3, 5, 4),
        (ir.node("Gemm", [], {"transB": 1}), (5, 12), 3, 5, 4),
        (ir.node("MatMul", []), (12, 5), 1, 5, 12),
    ],
    ids=["Conv", "ConvTranspose", "Gemm", "Gemm transB", "MatMul"],
)
def test_layouts(node: ir.Node, shape: tuple[int, ...], repeats: int, outputs: int, inputs: int) -> None:
    layout = layout_of(node, shape, repeats)
    assert np.prod(layout.shape) == np.prod(shape)
    assert (layout.channels(layout.outputs), layout.channels(layout.inputs)) == (outputs, inputs)


# --- No pairs ----------------------------------------------------------------------------------------------------

ELSEWHERE = "does not pass a channel on as it is"
LEFT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "shared weight": (
        f"{C} [r] r = Relu (a) [d] y = Conv <pads = [1, 1, 1, 1]> (r, v, b) [o] z = Conv (x, w)",
        "float[N, 6, H, L] y, float[N, 6, H, L] z",
        {"v": (6, 6, 3, 3)},
        "weight w is shared with o",
    ),
    "second's weight is shared": (
        f"{C} [r] r = Relu (a) [d] e = Conv (r, v) [g] y = Conv (e, v)",
        MAPS,
        {"v": (6, 6, 1, 1)},
        "d behind it cannot take it up: weight v is shared with g",
    ),
    "two readers": (
        f"{C} [r] r = Relu (a) [d] e = Conv (r, v) [g] g = Conv (r, u) [s] y = Add (e, g)",
        MAPS,
        {"v": (6, 6, 1, 1), "u": (6, 6, 1, 1)},
        "2 nodes read its result",
    ),
    "graph output": (
        f"{C} [r] r = Relu (a) [d] y = Conv (r, v)",
        "float[N, 6, H, L] y, float[N, 6, H, L] a",
        {"v": (6, 6, 1, 1)},
        "its result is an output of the graph",
    ),
    "sigmoid": (
        f"{C} [r] r = Sigmoid (a) [d] y = Conv (r, v)",
        MAPS,
        {"v": (6, 6, 1, 1)},
        f"Sigmoid behind it {ELSEWHERE}",
    ),
    "ReLU6": (
        f"{C} [r] r = Clip (a, zero, six) [d] y = Conv (r, v)",
        MAPS,
        {"v": (6, 6, 1, 1), **LIMITS},
        f"Clip behind it {ELSEWHERE}",
    ),
    "SiLU": (
        f"{C} [t] t = Sigmoid (a) [r] r = Mul (a, t) [d] y = Conv (r, v)",
        MAPS,
        {"v": (6, 6, 1, 1)},
        f"SiLU behind it {ELSEWHERE}",
    ),
    "addition": (
        f"{C} [r] r = Add (a, k) [d] y = Conv (r, v)",
        MAPS,
        {"v": (6, 6, 1, 1), "k": (1,)},
        f"Add behind it {ELSEWHERE}",
    ),
    "slope": (
        f"{C} [q] q = Conv <pads = [1, 1, 1, 1]> (x, u) [k] k = Sigmoid (q) [r] r = PRelu (k, a) [d] y = Conv (r, v)",
        MAPS,
        {"v": (6, 6, 1, 1), "u": (6, 3, 3, 3)},
        f"PRelu behind it {ELSEWHERE}",
    ),
    "mean over channels": (
        f"{C} [m] m = ReduceMean (a, axes) [d] y = Conv (m, v)",
        MAPS,
        {"v": (6, 1, 1, 1), "axes": np.array([1])},
        "m takes more than the map together",
    ),
    "mixed channels": (
        f"{C} [m] m = Reshape (a, to) [d] y = Conv (m, v)",
        MAPS,
        {"v": (6, 3, 1, 1), "to": np.array([0, 3, 16, 8])},
        "m does not keep the channels together",
    ),
    "columns from the batch": (
        f"{C} [m] m = Flatten <axis = 2> (a) [d] y = MatMul (m, v)",
        "float[A, B] y",
        {"v": (64, 5)},
        "m does not keep the channels together",
    ),
    "pooled channels": (
        "[c] a = MatMul (x, k) [m] m = GlobalAveragePool (a) [d] y = MatMul (m, v)",
        MAPS,
        {"k": (8, 6), "v": (1, 5)},
        "m takes more than the map together",
    ),
    "columns in several groups": (
        f"{C} [m] m = Reshape (a, to) [d] y = Conv <group = 2> (m, v)",
        MAPS,
        {"v": (4, 192, 1, 1), "to": np.array([0, 384, 1, 1])},
        "m does not keep the channels together",
    ),
    "columns of a map in several groups": (
        f"{C} [f] f = Flatten (a) [m] m = Reshape (f, to) [d] y = Conv <group = 2> (m, v)",
        MAPS,
        {"v": (4, 192, 1, 1), "to": np.array([0, 384, 1, 1])},
        "d behind it has columns of one channel in several groups",
    ),
    "computed weight": ("[k] k = Relu (x) [c] y = Conv (x, k)", MAPS, {}, "its weight is computed at run time"),
    "weight on the left": (
        "[c] a = MatMul (x, w) [d] y = MatMul (v, a)",
        MAPS,
        {"w": (8, 8), "v": (8, 8)},
        "d behind it cannot take it up: its weight is computed at run time",
    ),
    "columns of another axis": (
        f"{C} [d] y = MatMul (a, v)",
        MAPS,
        {"v": (8, 5)},
        "d behind it reads the channels along another axis",
    ),
    "NaN": (
        f"{C} [r] r = Relu (a) [d] y = Conv (r, v)",
        MAPS,
        {"w": np.full((6, 3, 3, 3), np.nan, np.float32), "v": (6, 6, 1, 1)},
        "its weight is not finite",
    ),
    "one bias for all channels": (
        "[m] m = Flatten (x) [c] a = Gemm (m, k, b) [r] r = Relu (a) [d] y = Gemm (r, v)",
        LOGITS,
        {"k": (192, 6), "v": (6, 5), "b": (1,)},
        "its bias has 1 values for 6 channels",
    ),
}


@pytest.mark.parametrize("place", LEFT)
def test_elsewhere_a_layer_begins_none_and_the_reason_is_given(place: str) -> None:
    body, outputs, arrays, reason = LEFT[place]
    given = {name: shape for name, shape in SHAPES.items() if f"{name})" in body or f"{name}," in body}
    model = graph(body, IMAGE, outputs, **{**given, **arrays})
    assert found(model) == reason


def test_a_weight_that_callers_may_override_stays() -> None:
    model = graph(
        f"{C} [r] r = Relu (a) [d] y = Conv (r, v)", f"{IMAGE}, float[6, 3, 3, 3] w", **SHAPES, v=(5, 6, 3, 3)
    )
    assert found(model) == "its weight is computed at run time"
