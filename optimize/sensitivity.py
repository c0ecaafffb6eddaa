"""What INT8 in one layer costs the logits, and what leaving that layer in float would bring: for every layer.

Both are measured on the network itself: once with this layer alone in INT8, once with this layer alone in float. What
lies in front of the layer is then the same for all layers behind it, all float or all INT8. So the activation in front
of a block is kept from one run of what is before it, and only the graph from there on is run for each layer in it.

To first order the errors that layers cause in the logits are independent, so that their powers add up (`noise_power`);
the rounding of an activation between two INT8 layers is then counted with both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.plan import NOTHING_LEFT_OUT
from edgewright.optimize.segments import GraphRun, borders, segment, values_by_name
from edgewright.optimize.work import macs
from edgewright.runtime.parity import Parity, compare

__all__ = ["MOST_IMAGES", "LayerSensitivity", "noise_power", "sensitivities"]

Batch = NDArray[np.float32]

MOST_IMAGES = 64
"""That the layers are measured on: they rank layers, and each image is run about once per layer."""
MEASURING = "its sensitivity is measured"
KEPT_BYTES = 1 << 28
"""Of an activation that is kept for all images; where a border is wider, an earlier one serves."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What one convolution or matrix product does to the logits, beside those of the FP32 network.

    * macs: multiply-accumulates, for one image
    * only_quantized: every other layer is float
    * only_kept: this layer is float, and every other one INT8 that can be and is not left out anyway
    """

    node: str
    operator: str
    macs: int
    only_quantized: Parity
    only_kept: Parity


def noise_power(parity: Parity) -> float:
    """Error power of the logits over their power, 10^(−SQNR / 10); infinite where no logit is finite."""
    return math.inf if parity.sqnr_db is None else 10.0 ** (-parity.sqnr_db / 10)


def sensitivities(
    quantizer: Quantizer,
    reference_logits: NDArray[Any],
    images: Batch,
    *,
    layers: Sequence[str] | None = None,
    left_out: Mapping[str, str] = NOTHING_LEFT_OUT,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LayerSensitivity, ...]:
    """The sensitivity of `layers`, None for all that can be INT8 and are not in `left_out`, in the graph's order.

    * reference_logits: `[N, classes]`, of the original FP32 network; images: `[N, C, H, W]`, decoded. At most
      `MOST_IMAGES` of them are used, evenly spaced; `Parity.images` says how many
    * threads: of onnxruntime, 0 for all cores
    * progress: is told how many layers are done, and of how many

    Two activations of at most 256 MiB each are kept at a time.
    """
    chosen = _evenly_spaced(len(images), MOST_IMAGES)
    reference = reference_logits[chosen]
    wanted = [name for name in quantizer.layers if name not in left_out and (layers is None or name in layers)]
    nodes = {str(node.name): node for node in quantizer.model.graph}
    quantized = quantizer.runnable(left_out)
    in_float = in_int8 = _Activation(str(quantizer.model.graph.inputs[0].name), images[chosen])
    measured: list[LayerSensitivity] = []
    for border, name in _borders_before(quantizer.model, wanted, len(chosen)):
        in_float = in_float.moved_to(border, quantizer.model, threads)
        in_int8 = in_int8.moved_to(border, quantized, threads)
        only_quantized = quantizer.runnable({other: MEASURING for other in quantizer.layers if other != name})
        only_kept = quantizer.runnable({**left_out, name: MEASURING})
        node = nodes[name]
        measured.append(
            LayerSensitivity(
                name,
                node.op_type,
                macs(node),
                compare(reference, in_float.logits(only_quantized, threads), None, source="simulation"),
                compare(reference, in_int8.logits(only_kept, threads), None, source="simulation"),
            )
        )
        progress(len(measured), len(wanted))
    return tuple(measured)


@dataclass(frozen=True)
class _Activation:
    """What one form of the network gives at a border, for all images `[N, …]`.

    It is the tensor in front of Q/DQ: the pair belongs to what follows, which may have none there.
    """

    name: str
    values: Batch

    def moved_to(self, name: str, model: ir.Model, threads: int) -> _Activation:
        """The activation `name` of `model`, computed from this one."""
        if name == self.name:
            return self
        run = GraphRun(segment(model, [self.name], [name]), threads=threads)
        return _Activation(name, run.all({self.name: self.values})[name])

    def logits(self, model: ir.Model, threads: int) -> Batch:
        """What `model` yields if this is its activation here."""
        return self.moved_to(str(model.graph.outputs[0].name), model, threads).values


def _borders_before(model: ir.Model, layers: Sequence[str], images: int) -> Iterator[tuple[str, str]]:
    """For each of `layers`, in their order, the last border in front of it that is narrow enough, and its name."""
    order: dict[ir.Node | None, int] = {node: index for index, node in enumerate(model.graph)}
    values = values_by_name(model)
    first, *others = borders(model)
    narrow = [first, *(name for name in others if _bytes_per_image(values[name]) * images <= KEPT_BYTES)]
    positions = [order.get(values[name].producer(), -1) for name in narrow]  # -1: the input
    indices = {str(node.name): order[node] for node in model.graph}
    for layer in layers:
        before = sum(position < indices[layer] for position in positions)
        yield narrow[before - 1], layer


def _bytes_per_image(value: ir.Value) -> float:
    """Of float32 values; infinite where the size is not known."""
    sides = value.shape[1:] if value.shape is not None else (None,)
    return 4 * math.prod(side if isinstance(side, int) else math.inf for side in sides)


def _evenly_spaced(count: int, most: int) -> NDArray[np.intp]:
    """Indices of at most `most` of `count` things."""
    chosen = min(count, most)
    return np.arange(chosen) * count // max(chosen, 1)
