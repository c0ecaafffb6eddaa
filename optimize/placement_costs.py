"""What each layer takes in floating point and in INT8, read off two engines of the whole network.

Timed where it runs, a layer has the caches, the memory layout and the fused activations that it will have. A kernel
that runs no layer of its own counts for the layer before it, but for a quantization: that one feeds the layer behind
it. What lies between two layers that are INT8 (no conversion at all) cannot be read off either engine; there a tensor
of n elements is taken to cost n times what an element cost where a quantization was seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import onnx_ir as ir

from edgewright.optimize.placement_choice import Crossing, cheapest
from edgewright.optimize.plan import COMPUTE_OPERATORS, QuantPlan, clamped_output
from edgewright.runtime.backends import KernelTime

__all__ = ["LayerTimes", "conversions", "layer_times", "layers_in_int8", "milliseconds_per_element"]

QUANTIZE_KIND = "QuantizeLinear"
QUANTIZE_NAME = "{}::quantize"
"""What `optimize/qdq.py` calls the node that quantizes a tensor."""


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of a layer with all that follows it up to the next; `int8_ms` includes conversions around it."""

    node: str
    float_ms: float
    int8_ms: float

    @property
    def gain_ms(self) -> float:
        """What INT8 saves; below 0 where it costs."""
        return self.float_ms - self.int8_ms


def layer_times(
    layers: Sequence[str], in_float: Sequence[KernelTime], in_int8: Sequence[KernelTime]
) -> tuple[LayerTimes, ...]:
    """For each of `layers` what it takes in the two engines; empty if either backend times no kernels."""
    if not in_float or not in_int8:
        return ()
    floats, integers = _by_layer(layers, in_float), _by_layer(layers, in_int8)
    return tuple(LayerTimes(layer, floats[layer], integers[layer]) for layer in layers)


def _by_layer(layers: Sequence[str], kernels: Sequence[KernelTime]) -> dict[str, float]:
    totals = dict.fromkeys(layers, 0.0)
    current, for_the_next = "", 0.0
    for timed in kernels:
        running = next((source for source in timed.kernel.sources if source in totals), "")
        if running and timed.kernel.computes:
            current = running
            totals[current] += for_the_next
            for_the_next = 0.0
        if not current or timed.kernel.kind == QUANTIZE_KIND:
            for_the_next += timed.milliseconds
        else:
            totals[current] += timed.milliseconds
    return totals


def milliseconds_per_element(model: ir.Model, in_int8: Sequence[KernelTime]) -> float:
    """What it takes to quantize an element: the median of the tensors that have a kernel for it; 0 if none has."""
    elements = {
        QUANTIZE_NAME.format(value.name): _elements(value)
        for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs))
    }
    rates = [
        timed.milliseconds / elements[timed.kernel.name] for timed in in_int8 if elements.get(timed.kernel.name, 0)
    ]
    return median(rates) if rates else 0.0


def conversions(model: ir.Model, plan: QuantPlan, per_element: float) -> Iterator[Crossing]:
    """Between the nodes that `plan` has in INT8: what it would take to convert each tensor, at `per_element` ms.

    A tensor that nodes in floating point read as well is converted for them already: then it costs nothing more.
    """
    integer = {decision.node for decision in plan.nodes_in("int8")}
    for node in model.graph:
        result = clamped_output(node)
        readers = tuple(str(reader.name) for reader in dict.fromkeys(result.consumers()) if reader.name in integer)
        if node.name in integer and result.name in plan.activations and readers:
            price = per_element * _elements(result)
            converted_already = result.is_graph_output() or len(readers) < len(set(result.consumers()))
            yield Crossing(str(node.name), readers, price, 0.0 if converted_already else price)


def layers_in_int8(
    model: ir.Model, plan: QuantPlan, times: Mapping[str, LayerTimes], per_element: float
) -> frozenset[str]:
    """The layers of `plan` that are INT8 where all layers and conversions together take the least time."""
    gains = {
        decision.node: times[decision.node].gain_ms if decision.operator in COMPUTE_OPERATORS else 0.0
        for decision in plan.nodes_in("int8")
    }
    return frozenset(cheapest(gains, conversions(model, plan, per_element)) & times.keys())


def _elements(value: ir.Value) -> int:
    """Of one image; 0 where the shape is not known."""
    sides = value.shape[1:] if value.shape is not None else (0,)
    return math.prod(side if isinstance(side, int) else 0 for side in sides)
