"""Composition of passes."""

from __future__ import annotations

import dataclasses

import onnx
import onnx_ir as ir
import pytest

from edgewright.optimize.passes import PassResult, Skip, run_passes

MODEL = """<ir_version: 10, opset_import: ["": 18]>
agraph (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }"""


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(MODEL))


def test_passes_run_in_order_and_add_up(model: ir.Model) -> None:
    seen: list[ir.Model] = []
    models = [model.clone(), model.clone()]

    def first(given: ir.Model) -> PassResult:
        seen.append(given)
        return PassResult(models[0], 2, (Skip("a", "one"),))

    def second(given: ir.Model) -> PassResult:
        seen.append(given)
        return PassResult(models[1], 3, (Skip("b", "two"), Skip("c", "three")))

    result = run_passes(model, (first, second))

    assert [id(given) for given in seen] == [id(model), id(models[0])]
    assert result == PassResult(models[1], 5, (Skip("a", "one"), Skip("b", "two"), Skip("c", "three")))


def test_no_passes_change_nothing(model: ir.Model) -> None:
    assert run_passes(model, []) == PassResult(model, 0, ())


def test_results_are_immutable(model: ir.Model) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run_passes(model, ()).changed = 1  # type: ignore[misc]
