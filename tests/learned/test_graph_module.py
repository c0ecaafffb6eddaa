"""Graphs in PyTorch: each operator and each family of networks against onnxruntime, and gradients through Q/DQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.calibration.collect import collect
from edgewright.export.random_weights import disturb_statistics
from edgewright.export.to_onnx import export_onnx
from edgewright.learned.fake_quantization import fake_quantized
from edgewright.learned.graph_module import GraphModule
from edgewright.optimize.dialects import DIALECTS, Quantizer
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.runtime.errors import QuantizationError
from textual_graphs import graph, normal
from tiny_modules import TinyNetwork, randomize

Array = NDArray[Any]


def by_onnxruntime(model: ir.Model, x: Array) -> Array:
    """Node by node, as the graph is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {session.get_inputs()[0].name: x})[0]
    return result


def by_torch(model: ir.Model, x: Array) -> Array:
    with torch.no_grad():
        result: Array = GraphModule(model)(torch.from_numpy(x)).numpy()
    return result


def assert_same(model: ir.Model, x: Array, tolerance: float = 2e-6) -> None:
    expected, found = by_onnxruntime(model, x), by_torch(model, x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert expected.any()


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "convolution": ("y = Conv <pads = [1, 0, 2, 1], strides = [2, 1]> (x, w, b)", {"w": (4, 6, 3, 3), "b": (4,)}),
    "grouped": ("y = Conv <group = 3, dilations = [2, 1], pads = [1, 1, 1, 1]> (x, w)", {"w": (6, 2, 3, 3)}),
    "upper": ("y = Conv <auto_pad = \"SAME_UPPER\", strides = [2, 2]> (x, w)", {"w": (4, 6, 4, 3)}),
    "lower": ("y = Conv <auto_pad = \"SAME_LOWER\", strides = [2, 2]> (x, w)", {"w": (4, 6, 4, 3)}),
    "valid": ("y = Conv <auto_pad = \"VALID\", strides = [3, 2]> (x, w)", {"w": (4, 6, 4, 3)}),
    "transposed": (
        "y = ConvTranspose <strides = [2, 3], pads = [1, 0, 0, 2], output_padding = [1, 0], group = 2> (x, w, b)",
        {"w": (6, 2, 3, 4), "b": (4,)},
    ),
    "gemm": ("f = Flatten (x) y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (f, w, b)", {"w": (5, 270), "b": (5,)}),
    "gemm_plain": ("f = Flatten (x) y = Gemm (f, w)", {"w": (270, 5)}),
    "matmul": ("y = MatMul (x, w)", {"w": (5, 7)}),
    "relu": ("y = Relu (x)", {}),
    "clip": ("y = Clip (x, low, high)", {"low": np.float32(-0.5), "high": np.float32(0.7)}),
    "clip_above": ("y = Clip (x, , high)", {"high": np.float32(0.7)}),
    "leaky": ("y = LeakyRelu <alpha = 0.2> (x)", {}),
    "prelu": ("y = PRelu (x, s)", {"s": (6, 1, 1)}),
    "sigmoid": ("y = Sigmoid (x)", {}),
    "hard_sigmoid": ("y = HardSigmoid <alpha = 0.3> (x)", {}),
    "hard_swish": ("y = HardSwish (x)", {}),
    "tanh": ("y = Tanh (x)", {}),
    "elu": ("y = Elu <alpha = 0.5> (x)", {}),
    "erf": ("y = Erf (x)", {}),
    "softmax": ("y = Softmax <axis = 1> (x)", {}),
    "arithmetic": ("a = Add (x, s) b = Sub (a, t) c = Mul (b, s) y = Div (c, u)", {
        "s": (6, 1, 1), "t": (1, 9, 5), "u": np.float32(3.0)}),
    "maximum": ("y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 0, 1]> (x)", {}),
    "maximum_dilated": ("y = MaxPool <kernel_shape = [3, 2], dilations = [2, 2]> (x)", {}),
    "maximum_ceil": ("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", {}),
    "maximum_ceil_padded": (
        "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = 1> (x)", {}),
    "mean": ("y = AveragePool <kernel_shape = [3, 3], strides = [2, 1], pads = [1, 1, 1, 0]> (x)", {}),
    "mean_with_padding": ("y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 0], count_include_pad = 1> (x)", {}),  # noqa: E501
    "mean_ceil": ("y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", {}),
    "global_mean": ("y = GlobalAveragePool (x)", {}),
    "reduce": ("y = ReduceMean <keepdims = 0> (x, axes)", {"axes": np.array([2, -1])}),
    "reduce_all": ("y = ReduceMean (x)", {}),
    "reshape": ("y = Reshape (x, shape)", {"shape": np.array([0, 3, -1])}),
    "flatten": ("y = Flatten <axis = 2> (x)", {}),
    "transpose": ("y = Transpose <perm = [0, 2, 3, 1]> (x)", {}),
    "transpose_reversed": ("y = Transpose (x)", {}),
    "concat": ("a = Relu (x) y = Concat <axis = 1> (x, a)", {}),
    "slice": ("y = Slice (x, starts, ends, axes, steps)", {
        "starts": np.array([-1, 1]), "ends": np.array([-(2**62), 2**62]), "axes": np.array([1, 2]),
        "steps": np.array([-2, 3])}),
    "split": ("a, b = Split <axis = 1> (x, sizes) y = Concat <axis = 1> (b, a)", {"sizes": np.array([4, 2])}),
    "split_evenly": ("a, b = Split <axis = 2, num_outputs = 2> (x) y = Concat <axis = 2> (b, a)", {}),
    "squeeze": ("a = Unsqueeze (x, axes) b = Relu (a) y = Squeeze (b, axis)", {
        "axes": np.array([1, -1]), "axis": np.array([1])}),
    "pad": ("y = Pad (x, pads, value)", {"pads": np.array([0, 1, 0, 2, 0, 0, 1, 0]), "value": np.float32(0.5)}),
    "pad_axes": ("y = Pad <mode = \"reflect\"> (x, pads, , axes)", {
        "pads": np.array([1, 2, 0, 1]), "axes": np.array([2, 3])}),
    "pad_edge": ("y = Pad <mode = \"edge\"> (x, pads)", {"pads": np.array([0, 0, 1, 2, 0, 0, 0, 1])}),
    "cast": ("a = Cast <to = 10> (x) y = Cast <to = 1> (a)", {}),
    "batch_normalization": ("y = BatchNormalization <epsilon = 0.01> (x, s, t, m, v)", {
        "s": (6,), "t": (6,), "m": (6,), "v": np.linspace(0.5, 2.0, 6, dtype=np.float32)}),
    "layer_normalization": ("y = LayerNormalization <axis = -2, epsilon = 0.01> (x, s, t)", {"s": (9, 5), "t": (9, 5)}),
    "shape": ("s = Shape <start = 0, end = 1> (x) k = Constant <value_ints = [-1]> () "
              "t = Concat <axis = 0> (s, k) y = Reshape (x, t)", {}),
    "gather": ("y = Gather <axis = 1> (x, i)", {"i": np.array([[0, -1], [2, 2]])}),
    "constant": ("k = Constant <value = float {2.5}> () y = Mul (x, k)", {}),
    "quantize_tensor": ("q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)", {
        "s": np.float32(0.01), "z": np.uint8(100)}),
    "quantize_channel": ("q = QuantizeLinear <axis = 1> (x, s, z) y = DequantizeLinear <axis = 1> (q, s, z)", {
        "s": np.linspace(0.005, 0.03, 6, dtype=np.float32), "z": np.zeros(6, np.int8)}),
    "dequantize": ("w = DequantizeLinear <axis = 0> (i, s, z) y = Conv (x, w)", {
        "i": np.arange(-60, 60, 5, dtype=np.int8).reshape(4, 6, 1, 1), "z": np.array([0, 1, -2, 3], np.int8),
        "s": np.linspace(0.005, 0.03, 4, dtype=np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_each_operator_gives_what_onnxruntime_gives(name: str) -> None:
    body, arrays = BODIES[name]
    x = normal("x", 2, 6, 9, 5)
    model = graph(body, "float[N, 6, 9, 5] x", _output_of(body, arrays), **arrays)
    assert_same(model, x)


def _output_of(body: str, arrays: dict[str, Any]) -> str:
    """The output's type, of any rank that fits: strict inference wants it declared."""
    for rank in (4, 3, 2, 5, 1):
        declared = f"float[{', '.join('ABCDE'[:rank])}] y"
        try:
            graph(body, "float[N, 6, 9, 5] x", declared, **arrays)
        except (onnx.shape_inference.InferenceError, RuntimeError):
            continue
        return declared
    raise AssertionError(f"no rank fits {body}")


def test_an_unknown_operator_is_refused_by_name() -> None:
    model = graph("[wave] y = Sin (x)", "float[N, 6] x", "float[N, 6] y")
    with pytest.raises(QuantizationError, match="wave is a Sin, an operator that cannot be run"):
        GraphModule(model)


def test_what_pytorch_cannot_express_is_refused() -> None:
    dilated = graph("y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x)")
    wrapped = graph('y = Pad <mode = "wrap"> (x, pads)', pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    for model, words in ((dilated, "dilated AveragePool"), (wrapped, "pads in a mode")):
        with pytest.raises(QuantizationError, match=words):
            GraphModule(model)


def test_a_trainable_constant_has_to_exist() -> None:
    model = graph("y = Conv (x, w)", w=(4, 3, 1, 1))
    assert [parameter.shape for parameter in GraphModule(model, ["w"]).parameters()] == [(4, 3, 1, 1)]
    assert not list(GraphModule(model).parameters())
    with pytest.raises(QuantizationError, match="no constant v that could be trained"):
        GraphModule(model, ["v"])


# --- Gradients ---------------------------------------------------------------------------------------------------


def test_gradients_pass_straight_through_rounding_and_stop_where_it_saturates() -> None:
    model = graph(
        "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)",
        "float[N] x",
        "float[N] y",
        s=np.float32(0.5),
        z=np.uint8(10),
    )
    x = torch.tensor([-9.0, -4.4, 0.0, 0.24, 122.0, 123.0], requires_grad=True)
    y = GraphModule(model)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [-5.0, -4.5, 0.0, 0.0, 122.0, 122.5]
    assert gradient.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_gradients_of_weights_are_those_of_the_same_network_in_pytorch() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Hardswish(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )
    model = ir.from_proto(onnx.load_from_string(export_onnx(network.eval(), (3, 8, 8))))
    x = torch.from_numpy(normal("x", 2, 3, 8, 8))
    expected = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    names = [name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT]
    module = GraphModule(model, names)
    found = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    by_shape = {gradient.shape: gradient for gradient in found}
    assert len(by_shape) == len(expected) == 4
    for gradient in expected:
        torch.testing.assert_close(by_shape[gradient.shape], gradient)


# --- Whole networks ----------------------------------------------------------------------------------------------


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        network: nn.Module = getattr(torchvision.models, name)(num_classes=10, **options)
        return network

    return build


def _line_up(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from edgewright.export.models import MODELS

        return MODELS[name].build(10)

    return build


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "lenet": (_line_up("lenet_bn"), (1, 28, 28)),
    "densenet": (_line_up("fashion_densenet"), (1, 32, 32)),
    "resnet": (_torchvision("resnet18"), (3, 32, 32)),
    "resnext": (_line_up("resnext_shallow"), (3, 32, 32)),
    "mobilenet_v3": (_torchvision("mobilenet_v3_small", width_mult=0.5), (3, 32, 32)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_networks_gives_what_onnxruntime_gives(name: str) -> None:
    build, shape = FAMILIES[name]
    torch.manual_seed(3)
    network = build().eval()
    disturb_statistics(network, shape, 3)
    model = fold_batchnorm(ir.from_proto(onnx.load_from_string(export_onnx(network, shape)))).model
    assert_same(model, normal("x", 2, *shape), 2e-5)


@pytest.fixture(scope="module")
def tiny() -> ir.Model:
    """Depthwise convolution, SiLU, squeeze-and-excitation, residual-free; folded."""
    network = TinyNetwork(3, 5, 32, linear=True)
    randomize(network, 4)
    return fold_batchnorm(ir.from_proto(onnx.load_from_string(export_onnx(network.eval(), (3, 16, 16))))).model


@pytest.mark.parametrize("dialect", DIALECTS)
def test_quantized_networks_give_what_onnxruntime_gives(tiny: ir.Model, dialect: str) -> None:
    x = normal("images", 8, 3, 16, 16)
    quantizer = Quantizer(dialect, tiny, collect(tiny, [x], identity={}))
    assert quantizer.layers
    model = quantizer.runnable()
    expected, found = by_onnxruntime(model, x), by_torch(model, x)
    distance, loss = np.abs(found - expected), np.abs(by_onnxruntime(tiny, x) - expected)
    # An activation on the border of two integers may round the other way: a step, and rarely.
    assert np.median(distance) < 1e-5
    assert distance.max() < loss.max()
    trained, weights = fake_quantized(model, tiny)
    np.testing.assert_array_equal(by_onnxruntime(trained, x), expected)
    assert len(weights) == len(quantizer.layers)
