"""A graph with Q/DQ whose weights are float again, and quantized as it runs: what can be trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.learned.graph_module import GraphModule
from edgewright.optimize.edits import constant_tensor, remove_if_unused
from edgewright.optimize.plan import COMPUTE_OPERATORS
from edgewright.optimize.qdq import SMALLEST_SCALE, weight_s8

__all__ = ["QuantizedWeight", "dequantized_weights", "fake_quantized"]

LARGEST_INTEGER = 127  # that a weight becomes: `weight_s8`


@dataclass(frozen=True)
class QuantizedWeight:
    """A float weight that goes through Q/DQ, and its scales, by the names of these constants.

    * others: the axes that share a scale
    * floor: float32 in the shape of the scales, which are never smaller
    """

    weight: str
    scale: str
    others: tuple[int, ...]
    floor: NDArray[np.float32]

    @torch.no_grad()
    def rescale(self, module: GraphModule) -> None:
        """Makes ±127 cover the weight as it is now, as `weight_s8` will when the graph is written."""
        weight, scale = module.constant(self.weight), module.constant(self.scale)
        magnitude = weight.abs().amax(self.others)
        scale.copy_(torch.maximum(magnitude / LARGEST_INTEGER, torch.from_numpy(self.floor).to(scale.device)))

    def step(self, module: GraphModule) -> Tensor:
        """The scale as it is now, what the weight changes by from one integer to the next; it broadcasts to it."""
        sides = [1 if axis in self.others else side for axis, side in enumerate(module.constant(self.weight).shape)]
        return module.constant(self.scale).reshape(sides).clone()


def dequantized_weights(quantized: ir.Model) -> dict[str, NDArray[np.float32]]:
    """What the INT8 weights of `quantized` stand for, by the names of the layers that read them."""
    found = {}
    for node in quantized.graph:
        dequantize = _weight_dequantizer(node)
        if dequantize is None:
            continue
        integers, scale = (constant_tensor(value) for value in dequantize.inputs[:2])
        assert integers is not None
        assert scale is not None
        sides = [1] * integers.shape.rank()
        if scale.shape.rank():
            sides[dequantize.attributes.get_int("axis", 1)] = -1
        found[str(node.name)] = (integers.numpy() * scale.numpy().reshape(sides)).astype(np.float32)
    return found


def fake_quantized(quantized: ir.Model, reference: ir.Model) -> tuple[ir.Model, tuple[QuantizedWeight, ...]]:
    """A copy of `quantized` whose INT8 weights are the float ones of `reference` behind Q/DQ, and what they are.

    The float weights have the names that they have in `reference`, the network that `quantized` was made of.
    """
    graph_model = quantized.clone()
    graph = graph_model.graph
    originals = {node.name: node for node in reference.graph if node.op_type in COMPUTE_OPERATORS}
    found = []
    for node in tuple(graph):
        dequantize = _weight_dequantizer(node)
        if dequantize is None:
            continue
        original = originals[node.name].inputs[1]
        assert original is not None
        weight, scale = _float_weight(graph, original), dequantize.inputs[1]
        assert scale is not None
        quantize = ir.node(
            "QuantizeLinear",
            [weight, *dequantize.inputs[1:]],
            dict(dequantize.attributes),
            name=f"{dequantize.name}::quantize",
        )
        quantize.outputs[0].name = f"{dequantize.name}::integers"
        graph.insert_before(dequantize, quantize)
        integers = dequantize.inputs[0]
        dequantize.replace_input_with(0, quantize.outputs[0])
        remove_if_unused(integers)
        found.append(_described(weight, scale, dequantize))
    return graph_model, tuple(found)


def _weight_dequantizer(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a layer's INT8 weight; None if it has no such weight."""
    weight = node.inputs[1] if node.op_type in COMPUTE_OPERATORS else None
    producer = weight.producer() if weight is not None else None
    is_constant = producer is not None and constant_tensor(producer.inputs[0]) is not None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" and is_constant else None


def _float_weight(graph: ir.Graph, original: ir.Value) -> ir.Value:
    """The initializer of that name and content, made unless it is there already for another layer."""
    name = str(original.name)
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=original.const_value))
    return graph.initializers[name]


def _described(weight: ir.Value, scale: ir.Value, dequantize: ir.Node) -> QuantizedWeight:
    """A scale that is larger than its weights need, to leave room for a bias or because they are 0, is its floor."""
    values, scales = constant_tensor(weight), constant_tensor(scale)
    assert values is not None
    assert scales is not None
    given = scales.numpy()
    axis = dequantize.attributes.get_int("axis", 1) if given.ndim else None
    needed = weight_s8(values.numpy(), axis).scale
    larger = (given > needed) | ~values.numpy().any(axis=_all_but(axis, values.shape.rank()))
    floor = np.where(larger, given, np.float32(SMALLEST_SCALE)).astype(np.float32)
    return QuantizedWeight(str(weight.name), str(scale.name), _all_but(axis, values.shape.rank()), floor)


def _all_but(axis: int | None, rank: int) -> tuple[int, ...]:
    return tuple(other for other in range(rank) if other != axis)
