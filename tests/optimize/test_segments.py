"""Cuts of graphs against brute force on paths, and parts run one after the other against the whole."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.optimize.segments import LARGEST_BATCH, GraphRun, borders, logits_of, segment, values_by_name
from mixed_network import LOGITS, SIDE, network, photographs, quantizer_of
from textual_graphs import IMAGE, MAPS, graph

Array = NDArray[Any]

SHAPES: dict[str, Any] = {"w": (3, 3, 1, 1), "v": (3, 3, 1, 1), "b": (3,)}


def images(count: int = 5, side: int = 8) -> Array:
    return np.random.default_rng(0).normal(size=(count, 3, side, side)).astype(np.float32)


def unoptimized(model: ir.Model, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {session.get_inputs()[0].name: x})
    assert isinstance(result, np.ndarray)
    return result


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param("a = Conv (x, w) r = Relu (a) y = Conv (r, v)", "x a r y", id="chain"),
        pytest.param(
            "a = Conv (x, w) r = Relu (a) c = Conv (r, v) s = Add (c, x) y = Relu (s)", "x s y", id="residual"
        ),
        pytest.param("a = Conv (x, w) c = Conv (a, v) y = Add (x, c)", "x y", id="the input is read at the end"),
        pytest.param(
            "a = Conv (x, w) p = GlobalAveragePool (a) c = Conv (p, v) g = Sigmoid (c) m = Mul (a, g) y = Relu (m)",
            "x a m y",
            id="squeeze and excitation",
        ),
        pytest.param("a = Conv (x, w) s = Sigmoid (a) m = Mul (a, s) y = Relu (m)", "x a m y", id="SiLU"),
        pytest.param("a = Conv (x, w) c = Conv (a, v) d = Conv (a, w) y = Add (c, d)", "x a y", id="two branches"),
        pytest.param("a = Add (x, x) y = Mul (a, a)", "x a y", id="one tensor read twice"),
        pytest.param("k = Relu (b) a = Add (x, x) s = Shape (w) y = Conv (a, w, k)", "x a y", id="computed constants"),
        pytest.param("y = Conv (x, w, b)", "x y", id="one node"),
    ],
)
def test_borders(body: str, expected: str) -> None:
    model = graph(body, **{name: shape for name, shape in SHAPES.items() if f" {name}" in body or f"({name}" in body})
    assert borders(model) == tuple(expected.split())


@pytest.mark.parametrize("seed", range(12))
def test_borders_are_the_tensors_without_which_no_path_leads_to_the_output(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["x"]
    lines = []
    for index in range(9):  # each tensor is read: by the next one, and by a later one now and then
        reads = [names[-1], *(str(rng.choice(names[-3:])) for _ in range(rng.integers(0, 2)))]
        names.append(f"t{index}" if index < 8 else "y")
        lines.append(f"{names[-1]} = Sum ({', '.join(reads)})")
    model = graph(" ".join(lines))
    assert borders(model) == tuple(name for name in names if name in {"x", "y"} or not _reaches(model, without=name))


def _reaches(model: ir.Model, *, without: str) -> bool:
    """Whether any path leads from the input to the output past tensor `without`."""
    reached = {"x"}
    for node in model.graph:
        if any(value is not None and value.name in reached for value in node.inputs):
            reached |= {str(value.name) for value in node.outputs} - {without}
    return "y" in reached


def test_parts_one_after_the_other_are_the_whole() -> None:
    model = network()
    x = photographs(6)
    values = x
    found = borders(model)
    assert len(found) > 8
    for first, last in itertools.pairwise(found):
        values = GraphRun(segment(model, [first], [last]), threads=1).all({first: values})[last]
    np.testing.assert_allclose(values, unoptimized(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", ["cpu", "openvino", "tensorrt"])
def test_a_border_of_the_fp32_graph_is_one_of_the_quantized_graph(dialect: str) -> None:
    quantizer = quantizer_of(dialect)
    quantized = quantizer.runnable()
    x = photographs(6)
    expected = unoptimized(quantized, x)
    for border in borders(quantizer.model)[1:-1]:
        assert values_by_name(quantized)[border].dtype == ir.DataType.FLOAT
        kept = GraphRun(segment(quantized, ["x"], [border]), threads=1).all({"x": x})
        found = logits_of(segment(quantized, [border], [LOGITS]), kept[border], threads=1)
        # rounding in float32 may move single values to the neighbouring integer
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_parts_that_share_an_initializer_each_have_it_and_the_graph_keeps_its_own() -> None:
    model = graph("a = Conv (x, w) r = Relu (a) y = Conv (r, w)", w=(3, 3, 1, 1))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    first, second = segment(model, ["x"], ["r"]), segment(model, ["r"], ["y"])
    assert [list(part.graph.initializers) for part in (first, second)] == [["w"], ["w"]]
    first.graph.initializers["w"].const_value = ir.tensor(np.zeros((3, 3, 1, 1), np.float32), name="w")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_part_that_needs_what_it_is_not_given_is_refused() -> None:
    model = graph("a = Conv (x, w) r = Relu (a) c = Conv (r, v) y = Add (c, x)", w=(3, 3, 1, 1), v=(3, 3, 1, 1))
    with pytest.raises(ValueError, match="x"):
        segment(model, ["r"], ["y"])
    part = GraphRun(segment(model, ["r", "x"], ["y"]), threads=1)
    assert part.inputs == ("r", "x")


def test_inner_tensors_can_be_asked_for() -> None:
    model = graph("a = Conv (x, w) r = Relu (a) y = Conv (r, v)", w=(3, 3, 1, 1), v=(3, 3, 1, 1))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = GraphRun(model, outputs=("r", "a"), threads=1)({"x": images()})
    assert list(found) == ["r", "a"]
    np.testing.assert_array_equal(found["r"], np.maximum(found["a"], 0))
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    expected = np.einsum("nihw,oi->nohw", images(), weight.numpy()[:, :, 0, 0])
    np.testing.assert_allclose(found["a"], expected, rtol=1e-4, atol=1e-5)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("count", [1, LARGEST_BATCH, 2 * LARGEST_BATCH + 3])
def test_all_joins_the_batches_in_their_order(count: int) -> None:
    model = graph("y = Add (x, x)")
    x = images(count)
    run = GraphRun(model, threads=1)
    assert [len(part["y"]) for part in run.batches({"x": x})] == [
        min(LARGEST_BATCH, count - start) for start in range(0, count, LARGEST_BATCH)
    ]
    np.testing.assert_array_equal(run.all({"x": x})["y"], 2 * x)


def test_joined_outputs_are_in_memory_once() -> None:
    run = GraphRun(graph("y = Relu (x)", "float[N, 3, 64, 64] x", MAPS), threads=1)
    x = images(20 * LARGEST_BATCH, side=64)
    tracemalloc.start()
    result = run.all({"x": x})["y"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * result.nbytes


def test_values_are_found_by_their_names() -> None:
    model = graph("a = Conv (x, w) y = Relu (a)", IMAGE, w=(3, 3, 1, 1))
    assert set(values_by_name(model)) == {"x", "a", "y"}
    assert photographs(1).shape == (1, 3, SIDE, SIDE)
