"""What all exported graphs have in common."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.export.conventions import OPSETS, check_opset, first_line, relative_difference
from edgewright.runtime.errors import ExportError


@pytest.mark.parametrize(
    ("expected", "found", "result"),
    [
        ([[1.0, -4.0]], [[1.0, -4.0]], 0.0),
        ([[1.0, -4.0]], [[1.0, -3.0]], 0.25),
        ([[0.0, 0.0]], [[0.0, 0.5]], 0.5),
        ([[1.0, -4.0]], [[1.0]], float("inf")),
        ([[1.0, 2.0]], [[1.0, float("nan")]], float("nan")),
        ([[float("nan"), 2.0]], [[1.0, 2.0]], float("nan")),
        ([[float("inf"), 2.0]], [[float("inf"), 2.0]], float("nan")),
    ],
)
def test_relative_difference(expected: list[list[float]], found: list[list[float]], result: float) -> None:
    measured = relative_difference(np.array(expected, np.float32), np.array(found, np.float32))
    assert measured == pytest.approx(result, nan_ok=True)


@pytest.mark.parametrize("opset", [0, 17, 21])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} is not supported; choose one of 18 … 20"):
        check_opset(opset)


def test_opsets() -> None:
    for opset in OPSETS:
        check_opset(opset)


def test_the_first_line_is_that_of_the_first_cause() -> None:
    error = RuntimeError("what")
    error.__cause__ = ValueError("\n  why\nand more")
    assert first_line(error) == "why"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 1000))) == 300
