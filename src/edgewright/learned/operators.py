"""ONNX operators of image classifiers in PyTorch, differentiable: `OPERATORS[node.op_type](node)` is a function.

It takes the tensors of the node's inputs, None for those left out at the end or in between, and gives that of its
output, or a tuple of them. Attributes are read once. Where versions of an operator differ in having an attribute or an
input for the same thing, both are read (opsets 13 to 21).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgewright.learned.operation import Operation, dimensions
from edgewright.learned.shape_operators import SHAPE_OPERATORS
from edgewright.learned.window_operators import WINDOW_OPERATORS

__all__ = ["OPERATORS"]

functional = nn.functional


def _always(operation: Operation) -> Callable[[ir.Node], Operation]:
    """An operator that has no attributes."""
    return lambda node: operation


def _clip(node: ir.Node) -> Operation:
    def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        if low is None and high is None:
            return x
        return torch.clamp(x, min=low, max=high)

    return clip


def _leaky_relu(node: ir.Node) -> Operation:
    return partial(functional.leaky_relu, negative_slope=node.attributes.get_float("alpha", 0.01))


def _hard_sigmoid(node: ir.Node) -> Operation:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return lambda x: (alpha * x + beta).clamp(0, 1)


def _elu(node: ir.Node) -> Operation:
    return partial(functional.elu, alpha=node.attributes.get_float("alpha", 1.0))


def _gelu(node: ir.Node) -> Operation:
    return partial(functional.gelu, approximate=node.attributes.get_string("approximate", "none"))


def _softmax(node: ir.Node) -> Operation:
    return partial(torch.softmax, dim=node.attributes.get_int("axis", -1))


def _parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def _gemm(node: ir.Node) -> Operation:
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    left_transposed, right_transposed = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        product = (a.mT if left_transposed else a) @ (b.mT if right_transposed else b)
        scaled = product if alpha == 1.0 else alpha * product
        return scaled if c is None else scaled + (c if beta == 1.0 else beta * c)

    return gemm


def _batch_normalization(node: ir.Node) -> Operation:
    epsilon = node.attributes.get_float("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, variance, scale, shift, eps=epsilon)

    return normalize


def _layer_normalization(node: ir.Node) -> Operation:
    axis, epsilon = node.attributes.get_int("axis", -1), node.attributes.get_float("epsilon", 1e-5)

    def normalize(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        normal = functional.layer_norm(x, x.shape[axis:], eps=epsilon) * scale
        return normal if shift is None else normal + shift

    return normalize


def _reduce_mean(node: ir.Node) -> Operation:
    attribute = node.attributes.get_ints("axes", ())
    keeps, does_nothing = (
        bool(node.attributes.get_int("keepdims", 1)),
        node.attributes.get_int("noop_with_empty_axes", 0),
    )

    def mean(x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = dimensions(axes) if axes is not None else list(attribute)
        if not chosen and does_nothing:
            return x
        return x.mean(chosen or list(range(x.ndim)), keepdim=keeps)

    return mean


def _quantize(node: ir.Node) -> Operation:
    """Fake quantization: integers as float32, with the gradient of the identity where nothing saturates.

    That is the straight-through estimator, zero beyond the ends (Jacob et al. 2018, "Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference").
    """
    axis = node.attributes.get_int("axis", 1)

    def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        limits = torch.iinfo(torch.uint8 if zero_point is None else zero_point.dtype)
        steps = x / _along(scale, axis, x.ndim)
        rounded = steps + (steps.round() - steps).detach()
        shifted = rounded if zero_point is None else rounded + _along(zero_point, axis, x.ndim).to(x.dtype)
        return shifted.clamp(limits.min, limits.max)

    return quantize


def _dequantize(node: ir.Node) -> Operation:
    axis = node.attributes.get_int("axis", 1)

    def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        values = integers.to(scale.dtype)
        if zero_point is not None:
            values = values - _along(zero_point, axis, values.ndim).to(scale.dtype)
        return values * _along(scale, axis, values.ndim)

    return dequantize


def _along(parameter: Tensor, axis: int, rank: int) -> Tensor:
    """`[C]` or `[]` so that it broadcasts along `axis` of a tensor with `rank` axes."""
    if parameter.ndim == 0:
        return parameter
    sides = [1] * rank
    sides[axis] = -1
    return parameter.reshape(sides)


OPERATORS: Mapping[str, Callable[[ir.Node], Operation]] = {
    **WINDOW_OPERATORS,
    **SHAPE_OPERATORS,
    "Relu": _always(functional.relu),
    "Clip": _clip,
    "LeakyRelu": _leaky_relu,
    "PRelu": _always(_parametric_relu),
    "Sigmoid": _always(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _always(functional.hardswish),
    "Tanh": _always(torch.tanh),
    "Elu": _elu,
    "Gelu": _gelu,
    "Erf": _always(torch.erf),
    "Sqrt": _always(torch.sqrt),
    "Pow": _always(torch.pow),
    "Softmax": _softmax,
    "Add": _always(torch.add),
    "Sub": _always(torch.sub),
    "Mul": _always(torch.mul),
    "Div": _always(_divide),
    "MatMul": _always(torch.matmul),
    "Gemm": _gemm,
    "BatchNormalization": _batch_normalization,
    "LayerNormalization": _layer_normalization,
    "ReduceMean": _reduce_mean,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
