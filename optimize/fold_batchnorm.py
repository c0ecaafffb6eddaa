"""Folds batch normalization into the linear operator in front of it.

At inference BatchNormalization is a constant affine map of each channel c (ONNX specification, BatchNormalization):

    y = (x − μ) / √(σ² + ε) · γ + β

The operator in front of it yields x = W·a + b, so that y = W'·a + b' with

    W' = W · γ / √(σ² + ε)                 (W scaled along its output channels)
    b' = (b − μ) · γ / √(σ² + ε) + β       (b = 0 where there is no bias)

computed in float64 and stored in float32. Where the output channels lie in W:

    Conv            [Cout, Cin/g, ...]     axis 0
    ConvTranspose   [Cin, Cout/g, ...]     axis 1 within each of the g groups of rows
    Gemm            [K, N], [N, K] if transB; x = α·a·W + β_gemm·C: α stays, β_gemm goes into the bias
    MatMul          [K, N], the right operand; its bias is that of an Add behind it, which is made if there is none

The tensor that BatchNormalization yielded keeps its name and its values; the one in front of it is gone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.edits import add_constant, constant_tensor, label, remove_if_unused, take_over, value_names
from edgewright.optimize.passes import PassResult, Skip
from edgewright.runtime.errors import QuantizationError

__all__ = ["BN_EPSILON", "LINEAR", "fold_batchnorm"]

Float64 = NDArray[np.float64]

BN_EPSILON = 1e-5  # ONNX specification, BatchNormalization: the default of `epsilon`, in all of its versions
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OF_THE_IMAGE = (  # their mean and variance are computed from the input at hand
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
)


class _NotFoldableError(Exception):
    """Carries the reason for a Skip; raised before anything is changed."""


def fold_batchnorm(model: ir.Model) -> PassResult:
    """A copy of `model` in which each BatchNormalization that follows a linear operator is folded into it.

    Requires a topologically sorted graph (as ONNX does). Folds in the main graph only. What cannot be folded stays
    as it is and is listed in `skipped`, together with the normalizations that are no constant affine map at all.
    Constants that folding leaves without a user are removed; constants with another user are never changed.

    Raises `QuantizationError` if variance + epsilon is not positive, or a statistic or a folded weight not finite.
    """
    folded = model.clone()
    nodes = [*folded.graph.all_nodes(), *(node for f in folded.functions.values() for node in f.all_nodes())]
    names = value_names(folded)
    changed = 0
    skipped: list[Skip] = []
    for node in nodes:
        if node.domain == "" and node.op_type in OF_THE_IMAGE:
            skipped.append(Skip(label(node), f"{node.op_type} depends on the image, not a constant affine map"))
        elif node.domain == "" and node.op_type == "BatchNormalization":
            try:
                _fold(node, folded.graph, names)
                changed += 1
            except _NotFoldableError as reason:
                skipped.append(Skip(label(node), str(reason)))
    return PassResult(folded, changed, tuple(skipped))


def _fold(norm: ir.Node, graph: ir.Graph, names: set[str | None]) -> None:
    """Folds `norm`, or raises _NotFoldableError with the graph unchanged; `names` are taken, and grow."""
    if norm.graph is not graph:
        raise _NotFoldableError("is inside a subgraph or a function; only the main graph is folded")
    scale, shift = _affine(norm)
    linear, biased, bias_index = _linear_in_front(norm)
    weight = _weight(linear)
    view, scale_view = _layout(linear, weight.shape)
    channels = math.prod(scale_view)
    bias = np.zeros(channels) if biased is None else _bias(biased, bias_index, channels)
    if scale.size != channels:
        raise _NotFoldableError(f"has statistics of {scale.size} channels behind {channels} output channels")
    scaled = (weight.reshape(view) * scale.reshape(scale_view)).reshape(weight.shape)
    new_weight, new_bias = _float32(scaled, norm), _float32(bias * scale + shift, norm)

    # Nothing declines from here on.
    if biased is None:
        biased = _insert_add(linear, norm)
    _set_constant(linear, 1, new_weight, f"{label(linear)}_weight_folded", names)
    _set_constant(biased, bias_index, new_bias, f"{label(biased)}_bias_folded", names)
    if linear.op_type == "Gemm":
        linear.attributes.add(ir.AttrFloat32("beta", 1.0))  # the old one is inside the bias now
    constants = norm.inputs[1:]
    take_over(biased.outputs[0], norm.outputs[0])
    graph.remove(norm, safe=True)
    for constant in constants:
        remove_if_unused(constant)


def _affine(norm: ir.Node) -> tuple[Float64, Float64]:
    """Scale γ / √(σ² + ε) and shift β − μ · scale of a BatchNormalization, float64 [C] each."""
    # Before opset 14 there is no training_mode; there it is the further outputs that ask for training.
    if norm.attributes.get_int("training_mode", 0) or any(output.name for output in norm.outputs[1:]):
        raise _NotFoldableError("is in training mode: it uses the statistics of the batch")
    roles = ("scale", "bias", "mean", "variance")
    gamma, beta, mean, variance = (
        _constant(norm, index, role).astype(np.float64) for index, role in enumerate(roles, start=1)
    )
    if gamma.ndim != 1 or not gamma.shape == beta.shape == mean.shape == variance.shape:
        raise _NotFoldableError(f"has statistics of shape {variance.shape}, not one number per channel")
    shifted = variance + norm.attributes.get_float("epsilon", BN_EPSILON)
    # Negated, so that a NaN is caught as well.
    if not (np.all(shifted > 0) and all(np.isfinite(array).all() for array in (gamma, beta, mean, variance))):
        raise QuantizationError(
            f"{label(norm)} has broken statistics: all must be finite and variance + epsilon positive",
            "check the checkpoint; the training may have diverged",
        )
    scale = gamma / np.sqrt(shifted)
    return scale, beta - mean * scale


def _linear_in_front(norm: ir.Node) -> tuple[ir.Node, ir.Node | None, int]:
    """The linear operator that yields the input of `norm`, the node that adds its bias and the bias's input index.

    That node is the operator itself, or the Add behind a MatMul; None if it has yet to be made. Nothing but `norm`
    sees the outputs of the two.
    """
    value = norm.inputs[0]
    last = value.producer() if value is not None else None
    if value is None or last is None:
        raise _NotFoldableError("follows a graph input, not a linear operator")
    linear, add_index = _behind_add(last) if last.op_type == "Add" else (last, 1)
    if linear.op_type not in LINEAR or linear.domain != "":
        raise _NotFoldableError(f"follows {last.op_type}, not a linear operator")
    for output in (linear.outputs[0], value):
        if output.is_graph_output():
            raise _NotFoldableError(f"follows {output.name}, which is a graph output")
        if len(output.uses()) > 1:
            raise _NotFoldableError(f"follows {output.name}, which has {len(output.uses())} consumers")
    if linear.op_type != "MatMul":
        return linear, linear, 2
    if 2 not in {_rank(tensor) for tensor in (linear.inputs[0], linear.outputs[0], value, norm.outputs[0])}:
        # With more axes, the channels of BatchNormalization (axis 1) are not those of the product (the last axis).
        raise _NotFoldableError("follows a MatMul whose output is not known to have two axes")
    return linear, None if last is linear else last, add_index


def _behind_add(add: ir.Node) -> tuple[ir.Node, int]:
    """The MatMul that an Add adds a bias to and the index of that bias; the Add itself if there is none."""
    for index, value in enumerate(add.inputs):
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "MatMul":
            return producer, 1 - index
    return add, 0


def _weight(linear: ir.Node) -> Float64:
    """The weight of `linear`, if nothing else uses it."""
    array, value = _constant(linear, 1, "weight"), linear.inputs[1]
    assert value is not None  # it is constant
    if array.dtype != np.float32:
        raise _NotFoldableError(f"weight {value.name} is {array.dtype}, only float32 is folded")
    if linear.op_type == "MatMul" and array.ndim != 2:
        raise _NotFoldableError(f"weight {value.name} has shape {array.shape}, not two axes")
    others = [user for user in value.consumers() if user is not linear]
    if others:
        raise _NotFoldableError(f"weight {value.name} is shared with {label(others[0])}")
    return array.astype(np.float64)


def _layout(linear: ir.Node, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a weight of `shape` and scales [C] are to be reshaped for their product to scale the output channels."""
    if linear.op_type == "ConvTranspose":  # [Cin, Cout/g, ...] -> [g, Cin/g, Cout/g, ...] and [g, 1, Cout/g, 1]
        groups = linear.attributes.get_int("group", 1)
        return (groups, shape[0] // groups, shape[1], -1), (groups, 1, shape[1], 1)
    if linear.op_type == "Conv" or linear.attributes.get_int("transB", 0) == 1:
        return shape, (shape[0], *[1] * (len(shape) - 1))
    return shape, (1, shape[1])


def _bias(node: ir.Node, index: int, channels: int) -> Float64:
    """What `node` adds to each channel, float64 [C]; zeros if that input is missing."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return np.zeros(channels)
    bias = _constant(node, index, "bias").astype(np.float64)
    if bias.ndim > 2 or bias.size not in (1, channels) or (bias.ndim == 2 and bias.shape[0] != 1):
        raise _NotFoldableError(f"bias of {label(node)} has shape {bias.shape}, not one number per channel")
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.broadcast_to(bias.reshape(-1) * beta, (channels,))


def _constant(node: ir.Node, index: int, role: str) -> NDArray[Any]:
    """The input at `index`, if it is an initializer that callers cannot override or comes from a Constant node."""
    tensor = constant_tensor(node.inputs[index])
    if tensor is None:
        raise _NotFoldableError(f"{role} of {label(node)} is not constant")
    return tensor.numpy()


def _float32(array: Float64, norm: ir.Node) -> NDArray[np.float32]:
    """`array` in float32; raises QuantizationError where it does not fit."""
    with np.errstate(over="ignore"):  # checked below
        rounded = array.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise QuantizationError(
            f"folding {label(norm)} yields weights that are not finite in float32", "check the checkpoint"
        )
    return rounded


def _insert_add(matmul: ir.Node, norm: ir.Node) -> ir.Node:
    """An Add without its bias yet, between `matmul` and `norm`."""
    assert norm.graph is not None
    add = ir.Node("", "Add", [matmul.outputs[0], None], name=norm.name)
    norm.graph.insert_before(norm, add)
    norm.replace_input_with(0, add.outputs[0])
    return add


def _set_constant(node: ir.Node, index: int, array: NDArray[np.float32], name: str, names: set[str | None]) -> None:
    """Makes `array` the input at `index`: a new initializer called `name` or like it; see `add_constant`."""
    assert node.graph is not None
    value = add_constant(node.graph, array, name, names)
    node.resize_inputs(max(len(node.inputs), index + 1))
    old = node.inputs[index]
    node.replace_input_with(index, value)
    remove_if_unused(old)


def _rank(value: ir.Value | None) -> int | None:
    """Number of axes, if the graph says it."""
    return value.shape.rank() if value is not None and value.shape is not None else None
