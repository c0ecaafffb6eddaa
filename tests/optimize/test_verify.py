"""The comparison of two graphs: what it measures, and that it cannot be satisfied by a broken one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgewright.optimize.verify import check_equivalent, max_relative_difference
from edgewright.runtime.errors import QuantizationError

FEEDS = {"x": np.array([[1.0, -4.0], [0.5, 2.0]], dtype=np.float32)}  # the largest magnitude is 4


def computing(body: str, outputs: str = "float[2, 2] y") -> onnx.ModelProto:
    """A model with the input x [2, 2]."""
    header = '<ir_version: 10, opset_import: ["": 18]>'
    return onnx.parser.parse_model(f"{header} agraph (float[2, 2] x) => ({outputs}) {{ {body} }}")


def adding(constant: str) -> onnx.ModelProto:
    return computing(f"c = Constant <value = float {{{constant}}}> () y = Add (x, c)")


IDENTITY = computing("y = Identity (x)")


def test_same_graph_does_not_differ() -> None:
    assert max_relative_difference(IDENTITY, IDENTITY.SerializeToString(), FEEDS) == 0.0


def test_difference_is_relative_to_the_largest_reference_output() -> None:
    assert max_relative_difference(IDENTITY, adding("0.5"), FEEDS) == 0.5 / 4
    assert max_relative_difference(adding("-2"), IDENTITY, FEEDS) == 2 / 6  # −4 − 2 is the largest now


def test_difference_is_that_of_the_worst_output() -> None:
    outputs = "float[2, 2] y, float[2, 2] z"
    before = computing("y = Identity (x) z = Identity (x)", outputs)
    after = computing("y = Identity (x) z = Neg (x)", outputs)
    assert max_relative_difference(before, after, FEEDS) == 2.0


def test_check_returns_the_difference_up_to_the_tolerance_and_raises_above() -> None:
    assert check_equivalent(IDENTITY, adding("0.5"), feeds=FEEDS, tolerance=0.125) == 0.125
    with pytest.raises(QuantizationError, match=r"differs .* by 0\.125 .* at most 0\.124"):
        check_equivalent(IDENTITY, adding("0.5"), feeds=FEEDS, tolerance=0.124)


def test_the_default_tolerance_is_tight() -> None:
    with pytest.raises(QuantizationError):
        check_equivalent(IDENTITY, adding("0.0005"), feeds=FEEDS)


@pytest.mark.parametrize("function", ["Sqrt", "Log"])  # NaN where x is negative
@pytest.mark.parametrize("broken_is_first", [True, False])
def test_nan_in_either_fails(function: str, broken_is_first: bool) -> None:
    broken = computing(f"y = {function} (x)")
    before, after = (broken, IDENTITY) if broken_is_first else (IDENTITY, broken)
    with pytest.raises(QuantizationError):
        check_equivalent(before, after, feeds=FEEDS, tolerance=1e9)


def test_nan_in_both_fails() -> None:
    broken = computing("y = Sqrt (x)")
    with pytest.raises(QuantizationError):
        check_equivalent(broken, broken, feeds=FEEDS, tolerance=1e9)


def test_infinity_fails() -> None:
    broken = computing("zero = Sub (x, x) y = Div (x, zero)")
    assert max_relative_difference(IDENTITY, broken, FEEDS) == np.inf
    assert max_relative_difference(broken, IDENTITY, FEEDS) == np.inf


def test_zero_reference_only_matches_zero() -> None:
    zeros = computing("y = Sub (x, x)")
    assert max_relative_difference(zeros, zeros, FEEDS) == 0.0
    assert max_relative_difference(zeros, IDENTITY, FEEDS) == np.inf


def test_shapes_are_not_broadcast() -> None:
    ones = {"x": np.ones((2, 2), dtype=np.float32)}
    with pytest.raises(QuantizationError, match="outputs changed"):
        check_equivalent(IDENTITY, computing("y = ReduceMean <keepdims = 1> (x)", "float[1, 1] y"), feeds=ones)


def test_names_of_outputs_must_not_change() -> None:
    with pytest.raises(QuantizationError, match="outputs changed"):
        check_equivalent(IDENTITY, computing("z = Identity (x)", "float[2, 2] z"), feeds=FEEDS)
