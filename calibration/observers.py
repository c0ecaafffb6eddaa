"""A graph that watches itself: each activation reduced to extremes per channel and an even sample, image by image.

Only these leave onnxruntime. What a ReLU or ReLU6 gives follows exactly from what went in, so it is not observed a
second time: on EfficientNet-Lite0 that is a third of the tensors, and the larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "SAMPLES_PER_IMAGE",
    "Clamp",
    "Seen",
    "clamp_limits",
    "observer_outputs",
    "sampling_step",
    "with_observers",
]

SAMPLES_PER_IMAGE = 1024
"""Values per tensor and image that enter the histogram; minima and maxima see every value."""

Seen = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""Of one tensor and batch: minima `[N, C]` and maxima `[N, C]` of its channels, which are axis 1, samples `[N, S]`."""


@dataclass(frozen=True)
class Clamp:
    """A tensor that is `source` limited to low … high, elementwise."""

    source: str
    low: float
    high: float

    def applied_to(self, seen: Seen) -> Seen:
        """What would have been seen behind the clamp: it is monotonic, so extremes stay extremes."""
        minima, maxima, samples = (np.clip(part, np.float32(self.low), np.float32(self.high)) for part in seen)
        return minima, maxima, samples


def observer_outputs(name: str) -> tuple[str, str, str]:
    """Names of the outputs that hold the minima, maxima and samples of tensor `name`."""
    return f"{name}::min", f"{name}::max", f"{name}::samples"


def with_observers(model: ir.Model) -> tuple[ir.Model, tuple[str, ...], dict[str, Clamp]]:
    """A copy of `model` whose outputs are those of `observer_outputs` for each float activation with a batch axis.

    Also returned: the names of all activations in the order of the graph, and those of them that are not observed
    because they follow from another by a clamp.
    """
    observed = ir.from_proto(ir.to_proto(model))
    graph = observed.graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    values = [*inputs, *(value for node in graph for value in node.outputs)]
    activations = [value for value in values if _is_batched_activation(value)]
    clamped = {str(value.name): clamp for value in activations if (clamp := _clamp_of(value)) is not None}
    constants = _Constants(graph)
    graph.outputs.clear()
    for value in activations:
        if value.name not in clamped:
            _observe(graph, value, constants)
    return observed, tuple(str(value.name) for value in activations), clamped


class _Constants:
    """Integer initializers of a graph, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[int, ...], ir.Value] = {}

    def __getitem__(self, numbers: Sequence[int]) -> ir.Value:
        key = tuple(numbers)
        if key not in self._made:
            name = f"::{key}"
            value = ir.Value(name=name, shape=ir.Shape([len(key)]), type=ir.TensorType(ir.DataType.INT64))
            value.const_value = ir.tensor(np.array(key, np.int64), name=name)
            self._graph.register_initializer(value)
            self._made[key] = value
        return self._made[key]


def _observe(graph: ir.Graph, value: ir.Value, constants: _Constants) -> None:
    assert value.shape is not None
    step = sampling_step(math.prod(int(side) for side in value.shape[1:] if isinstance(side, int)))
    minimum, maximum = (_reduced(operator, value, constants) for operator in ("ReduceMin", "ReduceMax"))
    flat = ir.node("Reshape", [value, constants[0, -1]])
    flat.outputs[0].name = f"{value.name}::flat"
    end = constants[[np.iinfo(np.int64).max]]
    samples = ir.node("Slice", [flat.outputs[0], constants[[0]], end, constants[[1]], constants[[step]]])
    graph.extend([minimum, maximum, flat, samples])
    for node, name in zip((minimum, maximum, samples), observer_outputs(str(value.name)), strict=True):
        output = node.outputs[0]
        output.name, output.dtype = name, ir.DataType.FLOAT
        graph.outputs.append(output)


def _reduced(operator: str, value: ir.Value, constants: _Constants) -> ir.Node:
    """The node that reduces `value` to `[N, C]`, which it may be already."""
    assert value.shape is not None
    if value.shape.rank() == 2:
        return ir.node("Identity", [value])
    return ir.node(operator, [value, constants[range(2, value.shape.rank())]], {"keepdims": 0})


def clamp_limits(node: ir.Node) -> tuple[float, float] | None:
    """Lower and upper limit of a Relu or of a Clip between constants; None for any other node."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    low, high = _constant_limit(node, 1, -math.inf), _constant_limit(node, 2, math.inf)
    return None if low is None or high is None else (low, high)


def _clamp_of(value: ir.Value) -> Clamp | None:
    """How `value` follows from an observed activation by a clamp; None if it does not."""
    node = value.producer()
    limits = clamp_limits(node) if node is not None else None
    source = node.inputs[0] if node is not None and limits is not None else None
    if limits is None or source is None or not _is_batched_activation(source):
        return None
    if _clamp_of(source) is not None:
        return None  # a clamp of a clamp is rare enough to be observed
    return Clamp(str(source.name), *limits)


def _constant_limit(node: ir.Node, index: int, missing: float) -> float | None:
    limit = node.inputs[index] if len(node.inputs) > index else None
    if limit is None:
        return missing
    constant = ir.convenience.get_const_tensor(limit)
    return None if constant is None else float(constant.numpy().reshape(-1)[0])


def _is_batched_activation(value: ir.Value) -> bool:
    """Whether `value` is a float tensor with a batch axis and a fixed size behind it, as observers need it."""
    shape = value.shape
    return (
        value.dtype == ir.DataType.FLOAT
        and shape is not None
        and shape.rank() >= 2
        and not isinstance(shape[0], int)
        and all(isinstance(side, int) for side in shape[1:])
    )


def sampling_step(size: int) -> int:
    """The smallest step that leaves at most `SAMPLES_PER_IMAGE` of `size` values and shares no factor with `size`.

    A step that divides the row length would look at a few columns only.
    """
    step = max(1, math.ceil(size / SAMPLES_PER_IMAGE))
    while math.gcd(step, size) > 1:
        step += 1
    return step
