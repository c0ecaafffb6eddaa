"""Learned rounding for the layers of a quantized network, one after the other, each behind those already rounded.

Two networks run side by side: the FP32 one says what a layer should give, the quantized one what it really sees, with
the errors of all layers before it. Both are cut into parts at borders, so that what is kept is the activation at one
border of each, for all images; of what lies in between only sampled rows are copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.calibration.observers import clamp_limits
from edgewright.learned.layer_rows import (
    as_filters,
    as_weight,
    has_rows,
    input_rows,
    output_rows,
    sampled_places,
)
from edgewright.learned.rounding import AdaRoundSettings, RoundingProblem, learned_rounding
from edgewright.optimize.edits import constant_tensor
from edgewright.optimize.plan import is_silu
from edgewright.optimize.segments import LARGEST_BATCH, GraphRun, borders, segment, values_by_name
from edgewright.runtime.errors import QuantizationError

__all__ = ["AdaRoundSettings", "learned_integers"]

Batch = NDArray[np.float32]
USUAL = AdaRoundSettings()
HELD_BACK = 0.25  # of the images: they check the rounding, as docs/contract.md has it


def learned_integers(
    reference: ir.Model,
    quantized: ir.Model,
    layers: Sequence[str],
    images: Batch,
    *,
    settings: AdaRoundSettings = USUAL,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, NDArray[np.int8]]:
    """The integers of the weights of `layers`, each in the shape of the weight, for `Repairs`.

    * reference: folded FP32; quantized: the same network with Q/DQ, as onnxruntime runs it on a CPU; its scales stay
    * layers: names of nodes that are INT8 in `quantized`; all others are taken as they are. Those that are not rows
      times filters (see `has_rows`) have no integers in the result
    * images: `[N, C, H, W]`; a quarter of them only checks
    * progress: told the layers done so far, and how many there are

    Raises `QuantizationError` if one of `layers` is not INT8 in `quantized`.
    """
    rounded = quantized.clone()
    pairs = _layer_pairs(reference, rounded, layers)
    walk = _Walk(reference, rounded, images, settings.memory_bytes, threads)
    found: dict[str, NDArray[np.int8]] = {}
    for index, pair in enumerate(pairs):
        walk.advance_to(pair)
        problem = _problem(pair, *walk.rows(pair, settings, index), settings)
        filters = learned_rounding(problem).cpu().numpy()
        found[pair.name] = as_weight(pair.node, filters, pair.weight.shape).astype(np.int8)
        pair.integers.const_value = ir.tensor(found[pair.name], name=pair.integers.name)
        progress(index + 1, len(pairs))
    return found


@dataclass(frozen=True)
class _Pair:
    """A layer in both networks: `node` of FP32, `twin` with Q/DQ, whose weight is `integers` times `scale`."""

    node: ir.Node
    twin: ir.Node
    weight: Batch
    integers: ir.Value
    scale: Batch

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def result(self) -> str:
        """What the FP32 layer gives."""
        return str(self.node.outputs[0].name)

    @property
    def source(self) -> str:
        """What the quantized layer sees."""
        assert self.twin.inputs[0] is not None
        return str(self.twin.inputs[0].name)


def _layer_pairs(reference: ir.Model, quantized: ir.Model, layers: Sequence[str]) -> list[_Pair]:
    """Those of `layers` that are rows times filters, in the order of the graph."""
    twins = {node.name: node for node in quantized.graph}
    found = []
    for node in reference.graph:
        if node.name not in layers:
            continue
        twin = twins.get(node.name)
        weight = constant_tensor(node.inputs[1])
        dequantize = twin.inputs[1].producer() if twin is not None and twin.inputs[1] is not None else None
        integers = dequantize.inputs[0] if dequantize is not None else None
        if twin is None or weight is None or dequantize is None or integers is None or not _is_int8(integers):
            raise QuantizationError(f"{node.name} is not INT8 in the quantized graph: there is no rounding to learn")
        if has_rows(node, weight.shape.rank()):
            found.append(_Pair(node, twin, weight.numpy(), integers, _scale(dequantize, weight.shape.rank())))
    return found


def _is_int8(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == ir.DataType.INT8


def _scale(dequantize: ir.Node, rank: int) -> Batch:
    """Of a weight with `rank` axes, in a shape that broadcasts to the weight's."""
    scale = constant_tensor(dequantize.inputs[1])
    assert scale is not None
    along = [1] * rank
    if scale.shape.rank():
        along[dequantize.attributes.get_int("axis", 1)] = -1
    return scale.numpy().astype(np.float32).reshape(along)


class _Walk:
    """Both networks, run up to one border: the activations there, for all images."""

    def __init__(
        self, reference: ir.Model, quantized: ir.Model, images: Batch, memory_bytes: int, threads: int
    ) -> None:
        self._reference, self._quantized, self._threads = reference, quantized, threads
        self._cuts = _cuts(reference, quantized, memory_bytes // (4 * len(images)))
        self._order = {node.name: index for index, node in enumerate(reference.graph)}
        (self._border,) = (str(value.name) for value in reference.graph.inputs)
        self._expected = self._seen = images

    def advance_to(self, pair: _Pair) -> None:
        """To the last border in front of the layer."""
        ahead = [name for name, index in self._cuts if index < self._order[pair.name]]
        if ahead and ahead[-1] != self._border:
            self._expected = self._passed(self._reference, self._expected, ahead[-1])
            self._seen = self._passed(self._quantized, self._seen, ahead[-1])
            self._border = ahead[-1]

    def rows(self, pair: _Pair, settings: AdaRoundSettings, index: int) -> tuple[Batch, Batch, int]:
        """What the quantized layer sees `[G, R, K]`, what the FP32 one gives `[G, R, O]`, and how many rows check.

        Those of the last images check; the others come in a random order.
        """
        generator = np.random.default_rng([settings.seed, index])
        per_image = -(-_row_limit(pair, settings) // len(self._seen))
        reference = self._run(self._reference, pair.result)
        quantized = self._run(self._quantized, pair.source)
        inputs, outputs = [], []
        for start in range(0, len(self._seen), LARGEST_BATCH):
            part = slice(start, start + LARGEST_BATCH)
            (given,) = reference({self._border: self._expected[part]}).values()
            (seen,) = quantized({self._border: self._seen[part]}).values()
            places = sampled_places(pair.node, given, per_image, generator)
            outputs.append(output_rows(pair.node, given, places))
            inputs.append(input_rows(pair.node, seen, places))
        count = sum(rows.shape[1] for rows in inputs)
        held_back = count // len(self._seen) * math.floor(HELD_BACK * len(self._seen))
        order = np.arange(count)
        generator.shuffle(order[: count - held_back])
        return np.concatenate(inputs, axis=1)[:, order], np.concatenate(outputs, axis=1)[:, order], held_back

    def _run(self, model: ir.Model, result: str) -> GraphRun:
        return GraphRun(segment(model, [self._border], [result]), threads=self._threads)

    def _passed(self, model: ir.Model, batch: Batch, border: str) -> Batch:
        """What `model` makes of the activations at this border, at another."""
        run = self._run(model, border)
        results: Batch | None = None
        for start in range(0, len(batch), LARGEST_BATCH):
            (part,) = run({self._border: batch[start : start + LARGEST_BATCH]}).values()
            if results is None:
                results = np.empty((len(batch), *part.shape[1:]), np.float32)
            results[start : start + len(part)] = part
        assert results is not None
        return results


def _cuts(reference: ir.Model, quantized: ir.Model, bytes_per_image: int) -> list[tuple[str, int]]:
    """The borders of both networks that are small enough, each with the index of the node that gives it."""
    common = set(borders(quantized))
    index = {value.name: place for place, node in enumerate(reference.graph) for value in node.outputs}
    values = values_by_name(reference)
    return [
        (name, index[name])
        for name in borders(reference)
        if name in index and name in common and _bytes_per_image(values[name]) <= bytes_per_image
    ]


def _bytes_per_image(value: ir.Value) -> float:
    """Of a float32 activation; infinite if its size is not known."""
    sides = value.shape[1:] if value.shape is not None else (None,)
    return 4 * math.prod(side if isinstance(side, int) else math.inf for side in sides)


def _row_limit(pair: _Pair, settings: AdaRoundSettings) -> int:
    """How many rows of a layer are learned from, so that they and what is computed of them fit into the memory."""
    groups, outputs, inputs = as_filters(pair.node, pair.weight).shape
    bytes_per_row: int = 4 * groups * (inputs + outputs)
    return max(1, min(settings.rows, settings.memory_bytes // (4 * bytes_per_row)))


def _problem(pair: _Pair, rows: Batch, given: Batch, held_back: int, settings: AdaRoundSettings) -> RoundingProblem:
    scale = np.broadcast_to(pair.scale, pair.weight.shape)
    scales = as_filters(pair.node, scale)[..., :1]
    groups, outputs, _ = scales.shape
    tensors = (rows, given, as_filters(pair.node, pair.weight / scale), scales, _bias(pair, groups, outputs))
    x, y, weights, steps, bias = (torch.from_numpy(np.array(each)).to(settings.device) for each in tensors)
    return RoundingProblem(x, y, weights, steps, bias, _activation(pair.node), held_back)


def _bias(pair: _Pair, groups: int, outputs: int) -> Batch:
    """What the quantized layer adds, `[G, 1, O]`; the CPU dialect adds the bias of a Gemm in a node of its own."""
    owner, index = pair.twin, 2
    if pair.node.op_type == "Gemm" and len(pair.node.inputs) > 2 and len(owner.inputs) < 3:
        (owner,) = owner.outputs[0].consumers()
        index = 1
    bias = constant_tensor(owner.inputs[index]) if len(owner.inputs) > index else None
    beta = np.float32(owner.attributes.get_float("beta", 1.0))
    values = np.zeros(1, np.float32) if bias is None else bias.numpy().reshape(-1) * beta
    return np.broadcast_to(values, (groups * outputs,)).reshape(groups, 1, outputs)


def _activation(node: ir.Node) -> Callable[[Tensor], Tensor]:
    """What alone follows a layer: a clamp such as ReLU, a SiLU, or nothing."""
    output = node.outputs[0]
    readers = output.consumers()
    if any(map(is_silu, readers)):
        return nn.functional.silu
    limits = clamp_limits(readers[0]) if len(readers) == 1 and not output.is_graph_output() else None
    return partial(torch.clamp, min=limits[0], max=limits[1]) if limits is not None else _unchanged


def _unchanged(outputs: Tensor) -> Tensor:
    return outputs
