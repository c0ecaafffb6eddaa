"""Repairs: shifted biases beside numpy, and that a Quantizer mends what is INT8 and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.optimize.edits import constant_tensor
from edgewright.optimize.repairs import Repairs, with_bias_shifts
from edgewright.optimize.segments import logits_of
from edgewright.optimize.simulate import signed_to_unsigned, simulate_fp16
from edgewright.runtime.parity import compare
from mixed_network import network, photographs, quantizer_of
from textual_graphs import graph, normal

Array = NDArray[Any]

SHIFT = np.asarray([0.5, -1.0, 2.0, 0.25], np.float32)
FLAT, ROWS = "float[N, 6] x", "float[N, 4] y"
X = normal("x", 5, 6)


def initializer(model: ir.Model, node: str, index: int) -> Array:
    (found,) = (other for other in model.graph if other.name == node)
    tensor = constant_tensor(found.inputs[index])
    assert tensor is not None
    return tensor.numpy()


def bytes_of(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


# --- Shifted biases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1,), (), (1, 1)], ids=str)
@pytest.mark.parametrize("attributes", ["", ", alpha = 0.5, beta = 2.0", ", beta = 0.0"])
def test_the_shift_is_added_to_what_a_gemm_gives(attributes: str, shape: tuple[int, ...]) -> None:
    body = f"[g] y = Gemm <transB = 1{attributes}> (x, w, b)"
    model = graph(body, FLAT, ROWS, w=(4, 6), b=np.asarray(normal("b", *shape)))
    before = bytes_of(model)
    shifted = with_bias_shifts(model, {"g": SHIFT})
    onnx.checker.check_model(ir.to_proto(shifted), full_check=True)
    np.testing.assert_allclose(logits_of(shifted, X), logits_of(model, X) + SHIFT, rtol=0, atol=2e-6)
    assert bytes_of(model) == before
    assert "b" not in shifted.graph.initializers  # nobody reads the old one


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ("[g] y = Conv (x, w)", (4, 3, 1, 1)),
        ("[g] y = Conv (x, w, b)", (4, 3, 1, 1)),
        ("[g] y = ConvTranspose (x, w, b)", (3, 4, 2, 2)),
    ],
    ids=["no bias", "bias", "transposed"],
)
def test_the_shift_is_added_to_each_channel_of_a_convolution(body: str, weight: tuple[int, ...]) -> None:
    arrays: dict[str, Any] = {"w": weight, "b": (4,)} if "b)" in body else {"w": weight}
    model = graph(body, **arrays)
    x = normal("image", 2, 3, 8, 8)
    found = logits_of(with_bias_shifts(model, {"g": SHIFT}), x)
    np.testing.assert_allclose(found, logits_of(model, x) + SHIFT.reshape(1, 4, 1, 1), rtol=0, atol=2e-6)


def test_a_shared_bias_stays_what_it_was_for_others() -> None:
    body = "[g] a = Gemm <transB = 1> (x, w, b) [h] c = Gemm <transB = 1> (x, w, b) [s] y = Concat <axis = 1> (a, c)"
    model = graph(body, FLAT, "float[N, 8] y", w=(4, 6), b=(4,))
    shifted = with_bias_shifts(model, {"g": SHIFT})
    expected = logits_of(model, X) + np.concatenate([SHIFT, np.zeros(4)])
    np.testing.assert_allclose(logits_of(shifted, X), expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(initializer(shifted, "h", 2), normal("b", 4))


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("[g] y = MatMul (x, w)", {"w": (6, 4)}),
        ("[r] c = Relu (b) [g] y = Gemm <transB = 1> (x, w, c)", {"w": (4, 6), "b": (4,)}),
        ("[h] y = Gemm <transB = 1> (x, w, b)", {"w": (4, 6), "b": (4,)}),
    ],
    ids=["MatMul", "computed bias", "another layer"],
)
def test_what_cannot_or_must_not_be_shifted_is_left_alone(body: str, arrays: dict[str, Any]) -> None:
    model = graph(body, FLAT, ROWS, **arrays)
    assert bytes_of(with_bias_shifts(model, {"g": SHIFT})) == bytes_of(model)


def test_a_second_shift_adds_to_the_first() -> None:
    model = graph("[g] y = Gemm <transB = 1> (x, w, b)", FLAT, ROWS, w=(4, 6), b=(4,))
    twice = with_bias_shifts(with_bias_shifts(model, {"g": SHIFT}), {"g": SHIFT})
    np.testing.assert_allclose(initializer(twice, "g", 2), normal("b", 4) + 2 * SHIFT, rtol=1e-6)
    assert len(twice.graph.initializers) == 2


# --- In a Quantizer ---------------------------------------------------------------------------------------------------

INTEGERS = {"expand": np.full((32, 16, 1, 1), 7, np.int8), "last": np.full((32, 16, 1, 1), -5, np.int8)}
REPAIRS = Repairs(
    {
        "expand": np.full(32, 0.5, np.float32),
        "last": np.full(32, 0.25, np.float32),
        "head": np.full(8, 2.0, np.float32),
    },
    INTEGERS,
)
LEFT_OUT = {"last": "it is slower"}


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_only_what_is_int8_is_mended(dialect: str) -> None:
    quantizer = quantizer_of(dialect).repaired(REPAIRS)
    nodes = {node.name: node for node in quantizer.runnable(LEFT_OUT).graph}
    weight = constant_tensor(nodes["last"].inputs[1])
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), initializer(network(), "last", 1))
    np.testing.assert_array_equal(
        initializer(quantizer.runnable(LEFT_OUT), "last", 2), initializer(network(), "last", 2)
    )
    producer = nodes["expand"].inputs[1].producer()  # type: ignore[union-attr]
    assert producer is not None
    integers = constant_tensor(producer.inputs[0])
    assert integers is not None
    np.testing.assert_array_equal(integers.numpy(), INTEGERS["expand"])
    np.testing.assert_array_equal(initializer(quantizer.runnable(LEFT_OUT), "expand", 2), np.full(32, 0.5, np.float32))


def test_with_all_left_out_the_repaired_network_is_the_network() -> None:
    quantizer = quantizer_of("cpu").repaired(REPAIRS)
    images = photographs(3)
    found = logits_of(quantizer.runnable(dict.fromkeys(quantizer.layers, "slower")), images, threads=1)
    np.testing.assert_array_equal(found, logits_of(network(), images, threads=1))


def test_repaired_keeps_the_ranges_and_leaves_the_quantizer_as_it_was() -> None:
    quantizer = quantizer_of("cpu")
    before = bytes_of(quantizer.quantized().model)
    repaired = quantizer.repaired(REPAIRS)
    assert repaired.ranges is quantizer.ranges
    assert quantizer.repairs == Repairs()
    assert bytes_of(quantizer.quantized().model) == before != bytes_of(repaired.quantized().model)
    assert bytes_of(repaired.repaired(Repairs()).quantized().model) == before


def test_another_graph_has_none_of_the_repairs() -> None:
    repaired = quantizer_of("tensorrt").repaired(REPAIRS)
    other = repaired.for_network(network(), repaired.table)
    assert (other.dialect, other.method, other.remainder) == ("tensorrt", repaired.method, repaired.remainder)
    assert other.repairs == Repairs()
    assert bytes_of(other.quantized().model) == bytes_of(quantizer_of("tensorrt").quantized().model)


# --- What is measured is what is shipped ------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [{}, LEFT_OUT], ids=["whole", "mixed"])
@pytest.mark.parametrize("dialect", ["cpu", "openvino"])
def test_on_a_cpu_the_measured_graph_gives_the_logits_of_the_shipped_one(
    dialect: str, left_out: dict[str, str]
) -> None:
    quantizer, images = quantizer_of(dialect).repaired(REPAIRS), photographs(5)
    shipped = logits_of(quantizer.quantized(left_out).model, images, threads=1)
    np.testing.assert_array_equal(logits_of(quantizer.runnable(left_out), images, threads=1), shipped)


@pytest.mark.parametrize("dialect", ["tensorrt", "rtx"])
def test_on_nvidias_targets_they_differ_by_the_rounding_of_fp16(dialect: str) -> None:
    quantizer, images = quantizer_of(dialect), photographs(24)
    shipped = signed_to_unsigned(simulate_fp16(quantizer.quantized(LEFT_OUT).model))
    measured = logits_of(quantizer.runnable(LEFT_OUT), images, threads=1)
    parity = compare(measured, logits_of(shipped, images, threads=1), None)
    assert parity.sqnr_db is not None
    assert 45 < parity.sqnr_db < 100
    assert parity.agreement == 1.0
