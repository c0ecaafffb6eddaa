"""Recognizes batch normalization that is written out from its formula, and writes it as BatchNormalization.

    y = (x − mean) / √(variance + ε) · γ + β

arrives as Sub, Div, Mul, Add with one constant number per channel each; as Mul and Add where a framework has computed
what is constant; or with the root, a reciprocal or a power still in the graph. All of these are chains of steps
x · a + b, so each chain, whatever its order, is one constant affine map of each channel,

    y = (x − m) · s + t

with m from the subtractions and additions in front of the first factor, s the product of the factors and t the rest.
BatchNormalization computes just that with γ = s, β = t, mean = m, variance = 1 and ε = 0: the root of 1 is exact, where
a variance recovered as the divisor's square would be rounded once more. s, m and t are computed in float64.

A chain is rewritten behind a linear operator, where `fold_batchnorm` makes something of it. It must scale by channel:
a lone addition is a bias, and a factor that is the same for all channels is no normalization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.edits import add_constant, constant_tensor, label, remove_if_unused, take_over, value_names
from edgewright.optimize.fold_batchnorm import LINEAR
from edgewright.optimize.passes import PassResult, Skip

__all__ = ["recognize_batchnorm"]

Float64 = NDArray[np.float64]

FIRST_OPSET = 9  # ONNX specification: since then BatchNormalization has its attributes of today, but training_mode
STEPS = ("Add", "Sub", "Mul", "Div")
ARITHMETIC: dict[str, Callable[..., Float64]] = {
    **{"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Pow": np.power},
    **{"Sqrt": np.sqrt, "Reciprocal": np.reciprocal, "Neg": np.negative, "Identity": np.positive},
}
VIEWS = ("Reshape", "Unsqueeze")  # with ARITHMETIC, what may stand between a parameter and the step that uses it
MEANS = ("ReduceMean", "GlobalAveragePool")


class _LeftAloneError(Exception):
    """Carries the reason for a Skip; raised before anything is changed."""


@dataclass(frozen=True)
class _Step:
    """A node that computes source · factor + addend; both are constants that broadcast to the source."""

    node: ir.Node
    source: ir.Value
    factor: Float64
    addend: Float64

    @property
    def scales(self) -> bool:
        return self.node.op_type in ("Mul", "Div")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.addend.shape


def recognize_batchnorm(model: ir.Model) -> PassResult:
    """A copy of `model` in which batch normalization that is written out behind a linear operator is one node.

    Requires a topologically sorted graph. Chains are looked for in the main graph only, in float32; each step must be
    the only reader of the one before. Listed in `skipped` is what has the form of batch normalization (a shift, a
    factor and another shift, some of them with several numbers) but cannot be one, and what normalizes by the image.
    """
    recognized = model.clone()
    graph = recognized.graph
    if graph.opset_imports.get("", FIRST_OPSET) < FIRST_OPSET:
        return PassResult(recognized, 0, ())
    names = value_names(recognized)
    steps = _steps(graph)
    changed = 0
    skipped: list[Skip] = []
    for node in tuple(graph):
        if node in steps and steps[node].source.producer() not in steps:
            chain = tuple(_chain(steps[node], steps))
            try:
                _rewrite(chain, graph, names)
                changed += 1
            except _LeftAloneError as reason:
                if _looks_like_batchnorm(chain):
                    skipped.append(Skip(label(node), str(reason)))
        elif _subtracts_own_mean(node):
            skipped.append(Skip(label(node), "subtracts the mean of the images at hand, not a constant affine map"))
    return PassResult(recognized, changed, tuple(skipped))


def _steps(graph: ir.Graph) -> dict[ir.Node, _Step]:
    """All steps of `graph` with a constant operand and one that is not constant."""
    steps: dict[ir.Node, _Step] = {}
    computed: dict[ir.Value | None, Float64] = {}
    for node in graph:
        if node.domain != "" or node.op_type not in (*ARITHMETIC, *VIEWS):
            continue
        operands = [_constant(value, computed) for value in node.inputs]
        result = _evaluated(node, operands)
        if result is not None:
            computed[node.outputs[0]] = result
        elif node.op_type in STEPS and (step := _step(node, *operands)) is not None:
            steps[node] = step
    return steps


def _constant(value: ir.Value | None, computed: Mapping[ir.Value | None, Float64]) -> Float64 | None:
    """The numbers of a float32 constant that callers cannot override; None for anything else."""
    if value in computed:
        return computed[value]
    tensor = constant_tensor(value)
    return tensor.numpy().astype(np.float64) if tensor is not None and tensor.dtype == ir.DataType.FLOAT else None


def _evaluated(node: ir.Node, operands: Sequence[Float64 | None]) -> Float64 | None:
    """What `node` yields, if it depends on constants alone."""
    data = operands[0] if operands else None
    if data is None:
        return None
    if node.op_type in VIEWS:
        return _view(node, data)
    known = [operand for operand in operands if operand is not None]
    if len(known) < len(operands):
        return None
    with np.errstate(all="ignore"):  # what is not finite is seen in the end
        return np.asarray(ARITHMETIC[node.op_type](*known))


def _view(node: ir.Node, data: Float64) -> Float64 | None:
    tensor = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    amounts = tuple(tensor.numpy().tolist() if tensor is not None else node.attributes.get_ints("axes", ()))
    if not amounts or (node.op_type == "Reshape" and 0 in amounts):  # 0 copies an axis
        return None
    return data.reshape(amounts) if node.op_type == "Reshape" else np.expand_dims(data, amounts)


def _step(node: ir.Node, left: Float64 | None, right: Float64 | None) -> _Step | None:
    """`node` with the one of its operands that is constant; None if neither is, or the constant is divided."""
    constant = right if left is None else left
    source = node.inputs[0 if left is None else 1]
    if constant is None or source is None or (node.op_type == "Div" and right is None):
        return None
    one, zero = np.ones_like(constant), np.zeros_like(constant)
    if node.op_type == "Add":
        return _Step(node, source, one, constant)
    if node.op_type == "Sub":
        return _Step(node, source, one, -constant) if left is None else _Step(node, source, -one, constant)
    with np.errstate(divide="ignore"):
        return _Step(node, source, constant if node.op_type == "Mul" else 1 / constant, zero)


def _chain(head: _Step, steps: Mapping[ir.Node, _Step]) -> Iterator[_Step]:
    """`head` and the steps behind it, whoever else may read their outputs."""
    step: _Step | None = head
    while step is not None:
        yield step
        step = next((steps[reader] for reader in step.node.outputs[0].consumers() if reader in steps), None)


def _rewrite(chain: Sequence[_Step], graph: ir.Graph, names: set[str | None]) -> None:
    """One BatchNormalization for as much of `chain` as can be, or raises _LeftAloneError with the graph unchanged."""
    source = chain[0].source
    rank, channels = _axes(source)
    reasons = [_reason_to_stay(step, rank, channels) for step in chain]
    usable = list(chain[: next((index for index, reason in enumerate(reasons) if reason), None)])
    while usable and usable[-1].addend.size < channels:
        usable.pop()  # a factor for all channels behind the normalization belongs to what follows
    if not any(step.scales and step.addend.size == channels for step in usable):
        raise _LeftAloneError(next(filter(None, reasons), "does not scale by channel"))
    mean, scale, shift = _affine(usable, channels)

    # Nothing declines from here on.
    first, last = usable[0].node, usable[-1].node
    arrays = {"scale": scale, "bias": shift, "mean": mean, "variance": np.ones(channels, np.float32)}
    constants = [add_constant(graph, array, f"{label(first)}_{role}", names) for role, array in arrays.items()]
    norm = ir.node("BatchNormalization", [source, *constants], {"epsilon": 0.0}, name=f"{label(first)}::batchnorm")
    graph.insert_before(first, norm)
    take_over(norm.outputs[0], last.outputs[0])
    remove_if_unused(last.outputs[0])


def _axes(value: ir.Value) -> tuple[int, int]:
    """Number of axes and channels of what a linear operator, or batch normalization behind one, yields as `value`."""
    linear = value.producer()
    if linear is None:
        raise _LeftAloneError("follows a graph input, not a linear operator")
    if linear.op_type not in (*LINEAR, "BatchNormalization") or linear.domain != "":
        raise _LeftAloneError(f"follows {linear.op_type}, not a linear operator")
    shape = value.shape if linear.op_type in ("MatMul", "BatchNormalization") else _output_shape(linear)
    if shape is None or shape.rank() < 2 or not isinstance(shape[1], int):
        raise _LeftAloneError(f"follows {value.name}, whose number of channels is not known")
    if linear.op_type == "MatMul" and shape.rank() != 2:
        raise _LeftAloneError(f"follows {value.name}, a product with {shape.rank()} axes")
    return shape.rank(), shape[1]


def _output_shape(linear: ir.Node) -> ir.Shape | None:
    """Of a Conv, ConvTranspose or Gemm by its weight: as many axes, the channels, and what is not looked at unknown."""
    weight = linear.inputs[1].shape if linear.inputs[1] is not None else None
    if weight is None or not weight.is_static() or weight.rank() < 2:
        return None
    channels = weight[0]
    if linear.op_type == "ConvTranspose":
        channels = weight.numpy()[1] * linear.attributes.get_int("group", 1)
    elif linear.op_type == "Gemm" and not linear.attributes.get_int("transB", 0):
        channels = weight[1]
    return ir.Shape([None, channels, *[None] * (weight.rank() - 2)])


def _reason_to_stay(step: _Step, rank: int, channels: int) -> str:
    """Why `step` cannot be part of a normalization of `channels`, axis 1 of `rank` axes; empty if it can."""
    source = step.source
    if source.is_graph_output():
        return f"follows {source.name}, which is a graph output"
    if len(source.uses()) > 1:
        return f"follows {source.name}, which has {len(source.uses())} consumers"
    aligned = (*[1] * (rank - len(step.shape)), *step.shape)
    if aligned not in ((1,) * rank, (1, channels, *[1] * (rank - 2))):
        return (
            f"{label(step.node)} has a constant of shape {step.shape}, not one number for each of {channels} channels"
        )
    return ""


def _affine(steps: Sequence[_Step], channels: int) -> tuple[NDArray[np.float32], ...]:
    """m, s and t of (x − m) · s + t, float32 [channels] each."""
    mean, scale, shift = np.zeros(channels), np.ones(channels), np.zeros(channels)
    in_front = True
    with np.errstate(all="ignore"):  # checked below
        for step in steps:
            factor, addend = step.factor.reshape(-1), step.addend.reshape(-1)
            in_front = in_front and bool((factor == 1).all())
            if in_front:
                mean = mean - addend
            else:
                scale, shift = scale * factor, shift * factor + addend
        rounded = tuple(array.astype(np.float32) for array in (mean, scale, shift))
    if not all(np.isfinite(array).all() for array in rounded):
        raise _LeftAloneError("its constants give numbers that are not finite")
    return rounded


def _looks_like_batchnorm(chain: Sequence[_Step]) -> bool:
    """A shift, a factor and another shift, in this order, with several numbers in at least one."""
    factors = [index for index, step in enumerate(chain) if step.scales]
    shifted_again = factors and not all(step.scales for step in chain[factors[0] :])
    return bool(shifted_again) and not chain[0].scales and any(step.addend.size > 1 for step in chain)


def _subtracts_own_mean(node: ir.Node) -> bool:
    """Whether `node` is x − mean(x), as normalization by statistics of the image or of the batch begins."""
    mean = node.inputs[1].producer() if node.op_type == "Sub" and node.inputs[1] is not None else None
    return mean is not None and mean.op_type in MEANS and mean.inputs[0] is node.inputs[0]
