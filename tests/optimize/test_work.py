"""Multiply-accumulates against a count of every product, precisions of graphs, and the other names of layers."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgewright.optimize.work import macs, planned_layers, precision_of
from edgewright.outcome import Outcome
from tiny_modules import TinyNetwork

Array = NDArray[Any]


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def graph(body: str, inputs: str, outputs: str = "float[A, B, C, D] y", **arrays: Any) -> ir.Model:
    """A model with its shapes inferred; `arrays` become initializers, seeded where only a shape is given."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in arrays.items():
        values = array if isinstance(array, np.ndarray) else normal(name, *array)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def only(model: ir.Model, operator: str) -> ir.Node:
    (node,) = (node for node in model.graph if node.op_type == operator)
    return node


def products(model: ir.Model, layer: torch.nn.Module, image: torch.Tensor) -> tuple[int, int]:
    """What `macs` says, and how many products a layer of ones sums up over an image of ones.

    Without padding every sum counts its products; with it the padding's zeros are products too, so the image is padded
    beforehand by whoever calls.
    """
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        total = int(layer(image).double().sum())
    (node,) = (node for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"))
    return macs(node), total


# --- Multiply-accumulates ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(6, 9), st.integers(6, 9)),
)
def test_convolution_counts_every_product(
    groups: int, per_group: tuple[int, int], kernel: tuple[int, int], stride: int, dilation: int, size: tuple[int, int]
) -> None:
    inputs, outputs = groups * per_group[0], groups * per_group[1]
    attributes = f"group = {groups}, strides = [{stride}, {stride}], dilations = [{dilation}, {dilation}]"
    model = graph(
        f"y = Conv <{attributes}> (x, w)",
        f"float[N, {inputs}, {size[0]}, {size[1]}] x",
        w=(outputs, per_group[0], *kernel),
    )
    layer = torch.nn.Conv2d(inputs, outputs, kernel, stride, 0, dilation, groups, bias=False)
    found, expected = products(model, layer, torch.ones(1, inputs, *size))
    assert found == expected


def test_padding_counts_as_what_it_is_computed_with() -> None:
    model = graph("y = Conv <pads = [1, 2, 1, 2]> (x, w)", "float[N, 2, 5, 6] x", w=(3, 2, 3, 3))
    layer = torch.nn.Conv2d(2, 3, 3, bias=False)
    found, expected = products(model, layer, torch.ones(1, 2, 5 + 2, 6 + 4))
    assert found == expected


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_transposed_convolution_counts_every_product(
    groups: int, per_group: tuple[int, int], kernel: tuple[int, int], stride: int, size: tuple[int, int]
) -> None:
    inputs, outputs = groups * per_group[0], groups * per_group[1]
    model = graph(
        f"y = ConvTranspose <group = {groups}, strides = [{stride}, {stride}]> (x, w)",
        f"float[N, {inputs}, {size[0]}, {size[1]}] x",
        w=(inputs, per_group[1], *kernel),
    )
    layer = torch.nn.ConvTranspose2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    found, expected = products(model, layer, torch.ones(1, inputs, *size))
    assert found == expected


def test_one_and_three_dimensions() -> None:
    line = graph("y = Conv (x, w)", "float[N, 3, 9] x", "float[A, B, C] y", w=(5, 3, 4))
    assert macs(only(line, "Conv")) == 5 * 6 * 3 * 4
    cube = graph("y = Conv (x, w)", "float[N, 2, 4, 5, 6] x", "float[A, B, C, D, E] y", w=(3, 2, 2, 2, 2))
    assert macs(only(cube, "Conv")) == 3 * (3 * 4 * 5) * 2 * 8


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_counts_every_product(trans_a: int, trans_b: int) -> None:
    rows, inner, columns = 2, 3, 5
    a, b = ((inner, rows) if trans_a else (rows, inner)), ((columns, inner) if trans_b else (inner, columns))
    model = graph(
        f"y = Gemm <transA = {trans_a}, transB = {trans_b}> (x, w)",
        f"float[{a[0]}, {a[1]}] x",
        "float[A, B] y",
        w=b,
    )
    ones = [np.ones(shape) for shape in (a, b)]
    expected = int(((ones[0].T if trans_a else ones[0]) @ (ones[1].T if trans_b else ones[1])).sum())
    assert macs(only(model, "Gemm")) == expected == 30


def test_a_dynamic_batch_counts_as_one_image() -> None:
    assert macs(only(graph("y = Gemm <transB = 1> (x, w)", "float[N, 7] x", "float[A, B] y", w=(5, 7)), "Gemm")) == 35
    fixed = graph("y = Gemm <transB = 1> (x, w)", "float[4, 7] x", "float[A, B] y", w=(5, 7))
    assert macs(only(fixed, "Gemm")) == 4 * 35, "a fixed batch is all in the graph"


@pytest.mark.parametrize(
    ("x", "w"),
    [((7, 6), (6, 5)), ((2, 7, 6), (6, 5)), ((4, 7, 6), (4, 6, 5)), ((3, 4, 7, 6), (4, 6, 5)), ((6,), (6, 5))],
)
def test_matmul_counts_every_product(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    result = np.ones(x) @ np.ones(w)
    sides = ", ".join("ABCD"[: result.ndim])
    model = graph("y = MatMul (x, w)", f"float[{', '.join(map(str, x))}] x", f"float[{sides}] y", w=w)
    assert macs(only(model, "MatMul")) == int(result.sum())


SCALED = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8), "ws": np.array(0.1, np.float32),
          "wz": np.array(0, np.int8)}  # fmt: skip


@pytest.mark.parametrize("body", ["y = QLinearConv <{}> (x, s, z, w, ws, wz, s, z)", "y = ConvInteger <{}> (x, w)"])
def test_integer_convolutions(body: str) -> None:
    used = SCALED if "QLinear" in body else {}
    result = "uint8[N, C, H, L] y" if used else "int32[N, C, H, L] y"
    weight = np.ones((4, 3, 3, 3), np.int8)
    model = graph(body.format("pads = [1, 1, 1, 1]"), "uint8[N, 3, 8, 8] x", result, w=weight, **used)
    (node,), (layer,) = model.graph, planned_layers(model)
    assert macs(node) == layer.macs == 4 * 8 * 8 * 3 * 9 == 6_912
    assert (layer.operator, layer.precision) == (node.op_type, "int8")


@pytest.mark.parametrize("body", ["y = QLinearMatMul (x, s, z, w, ws, wz, s, z)", "y = MatMulInteger (x, w)"])
def test_integer_matrix_products(body: str) -> None:
    used = SCALED if "QLinear" in body else {}
    model = graph(
        body, "uint8[N, 7, 6] x", "uint8[A, B, C] y" if used else "int32[A, B, C] y", w=np.ones((6, 5), np.int8), **used
    )
    (node,), (layer,) = model.graph, planned_layers(model)
    assert macs(node) == layer.macs == 7 * 5 * 6
    assert (layer.operator, layer.precision) == (node.op_type, "int8")


def test_a_bias_does_not_count() -> None:
    with_bias = graph("y = Conv (x, w, b)", "float[N, 2, 5, 5] x", w=(3, 2, 3, 3), b=(3,))
    without = graph("y = Conv (x, w)", "float[N, 2, 5, 5] x", w=(3, 2, 3, 3))
    assert macs(only(with_bias, "Conv")) == macs(only(without, "Conv"))


def test_work_of_a_network_is_that_of_its_layers_in_torch(finished: tuple[Path, Outcome]) -> None:
    """The exported and folded graph against hooks on the PyTorch model, squeeze-and-excitation included."""
    module = TinyNetwork(3, 4).eval()
    counted: list[int] = []

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
        counted.append(output.numel() * layer.weight[0].numel())

    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        module(torch.zeros(1, 3, 16, 16))
    folded = ir.load(finished[0] / "tiny" / "folded.onnx")
    assert [layer.macs for layer in planned_layers(folded)] == counted
    assert len(counted) == 6


# --- Precisions --------------------------------------------------------------------------------------------------

Q = "[q] i = QuantizeLinear (x, s, z) [d] h = DequantizeLinear (i, s, z)"
W = "[dw] v = DequantizeLinear <axis = 0> (w, ws, wz)"
INTEGERS: dict[str, Any] = {
    "s": np.array(0.1, np.float32),
    "z": np.array(0, np.int8),
    "w": np.ones((4, 3, 1, 1), np.int8),
    "ws": np.ones(4, np.float32),
    "wz": np.zeros(4, np.int8),
}
IMAGE = "float[N, 3, 8, 8] x"


@pytest.mark.parametrize(
    ("body", "arrays", "precision"),
    [
        ("y = Conv (x, w)", {"w": (4, 3, 1, 1)}, "fp32"),
        (f"{Q} {W} y = Conv (h, v)", INTEGERS, "int8"),
        (f"{Q} y = Conv (h, k)", INTEGERS | {"k": (4, 3, 1, 1)}, "fp32"),  # only the input is dequantized
        (f"{W} y = Conv (x, v)", INTEGERS, "fp32"),  # only the weight is: it is stored so
        (f"{Q} {W} r = Relu (h) y = Conv (r, v)", INTEGERS, "fp32"),  # something stands between
    ],
)
def test_a_layer_is_int8_if_it_multiplies_dequantized_integers(
    body: str, arrays: dict[str, Any], precision: str
) -> None:
    assert precision_of(only(graph(body, IMAGE, **arrays), "Conv")) == precision


@pytest.mark.parametrize(("word", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float", "fp32")])
def test_a_float_layer_has_the_type_of_its_input(word: str, precision: str) -> None:
    model = graph("y = MatMul (x, w)", f"{word}[N, 3] x, {word}[3, 2] w", f"{word}[A, B] y")
    assert precision_of(only(model, "MatMul")) == precision


def test_without_a_type_it_is_the_usual_one() -> None:
    node = ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")])
    assert precision_of(node) == "fp32"


def test_layers_are_listed_in_the_order_of_the_graph() -> None:
    body = (
        "[one] a = Conv (x, w) [act] r = Relu (a) [two] b = Conv <group = 4> (r, v) "
        "[gap] p = GlobalAveragePool (b) [flat] f = Flatten (p) [head] y = Gemm <transB = 1> (f, u)"
    )
    arrays: dict[str, Any] = {"w": (4, 3, 3, 3), "v": (4, 1, 3, 3), "u": (5, 4)}
    layers = planned_layers(graph(body, IMAGE, "float[A, B] y", **arrays))
    assert [(layer.name, layer.operator, layer.precision, layer.macs) for layer in layers] == [
        ("one", "Conv", "fp32", 36 * 4 * 27),
        ("two", "Conv", "fp32", 16 * 4 * 9),
        ("head", "Gemm", "fp32", 20),
    ]


# --- Other names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "aliases"),
    [
        ("[c] a = Conv (x, w) [r] y = Relu (a)", ("a", "r", "y")),
        ("[c] a = Conv (x, w) [s] y = Sigmoid (a)", ("a", "s", "y")),
        ("[c] a = Conv (x, w) [m] y = MaxPool <kernel_shape = [2, 2]> (a)", ("a",)),  # not an activation
        ("[c] a = Conv (x, w) [r] b = Relu (a) [m] y = Add (a, b)", ("a",)),  # two read it: not fused
        ("[c] a = Conv (x, w) [s] b = Sigmoid (a) [m] y = Mul (a, b)", ("a",)),
        ("[c] y = Conv (x, w)", ("y",)),
    ],
)
def test_a_layer_may_be_called_after_its_output_or_its_activation(body: str, aliases: tuple[str, ...]) -> None:
    (layer,) = planned_layers(graph(body, IMAGE, w=(4, 3, 3, 3)))
    assert layer.aliases == aliases


def test_aliases_follow_what_may_be_fused() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 19]> agraph (float[N, 4] x) => (float[N, 3] y, float[N, 3] z) {'
        "[fc] a = MatMul (x, w) [bias] b = Add (a, c) [act] y = Relu (b) [last] z = Sigmoid (y) }"
    )
    arrays = {"w": np.ones((4, 3), np.float32), "c": np.ones(3, np.float32)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    (layer,) = planned_layers(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    assert layer.aliases == ("a", "bias", "b", "act", "y", "last", "z")
