"""An ONNX graph as a PyTorch module: for gradients, not for speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from edgewright.learned.operation import Operation
from edgewright.learned.operators import OPERATORS
from edgewright.optimize.edits import constant_tensor, label
from edgewright.runtime.errors import QuantizationError

__all__ = ["GraphModule"]


class GraphModule(nn.Module):
    """Runs a graph of one input and one output, FP32 or with Q/DQ: float32 `[N, C, H, W]` → its output.

    QuantizeLinear rounds and saturates as on a device, and gradients pass straight through where nothing saturates.
    `trainable` are the names of constants that become parameters; all others are buffers.

    Raises `QuantizationError` if PyTorch cannot run one of the operators, or a trainable constant does not exist.
    """

    def __init__(self, model: ir.Model, trainable: Collection[str] = ()) -> None:
        super().__init__()
        (source,), (result,) = model.graph.inputs, model.graph.outputs
        self._source, self._result = str(source.name), str(result.name)
        self._places: dict[str, str] = {}
        for name, array in _constants(model).items():
            self._register(name, torch.from_numpy(np.array(array)), trainable=name in trainable)
        if missing := [name for name in trainable if name not in self._places]:
            raise QuantizationError(f"the graph has no constant {missing[0]} that could be trained")
        self._steps = _steps(model, self._places)

    def constant(self, name: str) -> Tensor:
        """The parameter or buffer that holds the constant called `name` in the graph."""
        tensor: Tensor = getattr(self, self._places[name])
        return tensor

    def parametrize(self, name: str, parametrization: nn.Module) -> None:
        """Trains what `parametrization` makes the constant called `name` of, instead of the constant itself."""
        register_parametrization(self, self._places[name], parametrization)

    def forward(self, images: Tensor) -> Tensor:
        """The graph's output."""
        values = {name: self.constant(name) for name in self._places} | {self._source: images}
        for step in self._steps:
            results = step.operation(*(values[name] if name else None for name in step.inputs))
            values |= zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=False)
            for name in step.last_uses:
                del values[name]
        return values[self._result]

    def _register(self, name: str, tensor: Tensor, *, trainable: bool) -> None:
        """Under a name that PyTorch allows."""
        place = f"constant_{len(self._places)}"
        self._places[name] = place
        if trainable:
            self.register_parameter(place, nn.Parameter(tensor))
        else:
            self.register_buffer(place, tensor)


@dataclass(frozen=True)
class _Step:
    """One node: `last_uses` are the activations that nothing reads behind it."""

    operation: Operation
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...]


def _constants(model: ir.Model) -> dict[str, NDArray[Any]]:
    """Initializers and Constant nodes, by the names of their values."""
    values = (*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs))
    tensors = {str(value.name): constant_tensor(value) for value in values}
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def _steps(model: ir.Model, constants: Mapping[str, str]) -> tuple[_Step, ...]:
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    last_use = {value: node for node in nodes for value in node.inputs if value is not None}
    ends: defaultdict[ir.Node, list[str]] = defaultdict(list)
    for value, node in last_use.items():
        if value.name not in constants and not value.is_graph_output():
            ends[node].append(str(value.name))
    return tuple(
        _Step(
            _operation(node),
            tuple(str(value.name) if value is not None else "" for value in node.inputs),
            tuple(str(value.name) for value in node.outputs),
            tuple(ends[node]),
        )
        for node in nodes
    )


def _operation(node: ir.Node) -> Operation:
    if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
        raise QuantizationError(
            f"{label(node)} is a {node.op_type}, an operator that cannot be run in PyTorch here",
            "train without it, or take the plan that the other steps found",
        )
    return OPERATORS[node.op_type](node)
