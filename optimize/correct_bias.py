"""Empirical bias correction: what quantization adds to a layer's mean output is taken out of its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2: the error of a
quantized layer is not zero on average, and its mean, one number a channel, is a shift that a bias can undo. Measured as
in their appendix D: layer after layer, each behind layers that are quantized and corrected already.

A bias adds to what its layer gives, so that nothing is computed twice: the quantized graph is cut behind each layer,
all images are passed up to the cut, the shift is added to what came out, and from there they go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.channel_statistics import channel_statistics
from edgewright.optimize.edits import constant_tensor
from edgewright.optimize.segments import LARGEST_BATCH, GraphRun, segment

__all__ = ["bias_shifts"]

Batch = NDArray[np.float32]

MOST_IMAGES = 32
"""On EfficientNet-Lite0 16 images gain what 256 do, 3 dB of logit SQNR, within the noise of which ones they are."""
MOST_BYTES = 1 << 30
"""Of the activations that are kept at a cut, for all images."""


def bias_shifts(
    reference: ir.Model,
    quantized: ir.Model,
    layers: Sequence[str],
    images: Batch,
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, NDArray[np.float32]]:
    """Mean over images and places of what `reference` gives minus what `quantized` does, `[O]` for each of `layers`.

    * reference: folded FP32; quantized: the same network with Q/DQ, as onnxruntime runs it on a CPU
    * layers: names of nodes of `reference`; all others are taken as they are. MatMul, which has no bias, a layer whose
      bias is computed at run time, and one behind which the graph cannot be cut have no shift
    * images: `[N, C, H, W]`; at most `MOST_IMAGES` of them are used, evenly chosen, and fewer if these would need more
      than 1 GiB
    * progress: told the layers done so far, and how many there are
    """
    results = {str(node.outputs[0].name): str(node.name) for node in reference.graph if _takes_shift(node, layers)}
    cuts = tuple(_cuts(quantized, results))
    if not cuts:
        return {}
    affordable = MOST_BYTES // max(cut.bytes_per_image for cut in cuts)
    chosen = _evenly_chosen(images, min(MOST_IMAGES, max(1, affordable)))
    means = channel_statistics(reference, [cut.result for cut in cuts], chosen, "ReduceMean", threads=threads)
    (source,) = (str(value.name) for value in quantized.graph.inputs)
    state = [{source: batch} for batch in _batches(chosen)]
    shifts: dict[str, NDArray[np.float32]] = {}
    for done, cut in enumerate(cuts, 1):
        _advance(state, quantized, cut, threads)
        parts = [feeds[cut.result] for feeds in state]
        shift = np.asarray(means[cut.result].mean(axis=0, dtype=np.float64) - _mean(parts), np.float32)
        for part in parts:
            part += shift.reshape(-1, *[1] * (part.ndim - 2))
        shifts[results[cut.result]] = shift
        progress(done, len(cuts))
    return shifts


@dataclass(frozen=True)
class _Cut:
    """A place where a graph is cut in two: right behind the layer that gives activation `result`.

    * crossing: the activations that what lies behind the cut reads, by their names, and `result`
    """

    result: str
    crossing: tuple[str, ...]
    bytes_per_image: int


def _takes_shift(node: ir.Node, layers: Collection[str]) -> bool:
    """Whether `node` is one of `layers` and has, or could have, a constant bias."""
    if node.name not in layers or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or constant_tensor(bias) is not None


def _cuts(model: ir.Model, results: Collection[str]) -> Iterator[_Cut]:
    """The cuts of `model` behind activations `results`, in the order of its graph, where it can be cut."""
    variable = _variable(model)
    done: set[ir.Node] = set()
    for node in model.graph:
        for value in node.outputs:
            if value.name not in results:
                continue
            before = done | _ancestors(node, done)
            crossing = [other for other in variable if other is value or _crosses(other, before)]
            if all(map(_is_batched, crossing)):
                done = before
                yield _Cut(str(value.name), tuple(str(other.name) for other in crossing), sum(map(_bytes, crossing)))


def _crosses(value: ir.Value, before: Collection[ir.Node]) -> bool:
    """Whether `value` is there before a cut, behind nodes `before`, and read after it."""
    producer = value.producer()
    return (producer is None or producer in before) and any(reader not in before for reader in value.consumers())


def _variable(model: ir.Model) -> tuple[ir.Value, ...]:
    """The values that depend on the input of `model`, in the order of its graph."""
    found = dict.fromkeys(model.graph.inputs)
    for node in model.graph:
        if any(value in found for value in node.inputs):
            found |= dict.fromkeys(node.outputs)
    return tuple(found)


def _ancestors(node: ir.Node, done: Collection[ir.Node]) -> set[ir.Node]:
    """All that `node` is computed from, itself too, without what is `done`."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found and current not in done:
            found.add(current)
            waiting += [producer for value in current.inputs if value is not None and (producer := value.producer())]
    return found


def _is_batched(value: ir.Value) -> bool:
    """Whether images can be told apart in `value`: a float tensor with a batch axis in front of a fixed size."""
    shape = value.shape
    if value.dtype != ir.DataType.FLOAT or shape is None or shape.rank() < 2 or isinstance(shape[0], int):
        return False
    return all(isinstance(side, int) for side in shape[1:])


def _bytes(value: ir.Value) -> int:
    """Of one image of a batched value."""
    assert value.shape is not None
    return 4 * int(np.prod([side for side in value.shape[1:] if isinstance(side, int)]))


def _evenly_chosen(images: Batch, count: int) -> Batch:
    """At most `count` of `images`, as far apart as they can be."""
    if len(images) <= count:
        return images
    chosen: Batch = images[np.linspace(0, len(images) - 1, count).round().astype(int)]
    return chosen


def _batches(images: Batch) -> Iterator[Batch]:
    for start in range(0, len(images), LARGEST_BATCH):
        yield images[start : start + LARGEST_BATCH]


def _advance(state: list[dict[str, Batch]], model: ir.Model, cut: _Cut, threads: int) -> None:
    """Takes each batch of activations from the cut before to `cut`."""
    old = state[0].keys()
    new = [name for name in cut.crossing if name not in old]
    run = GraphRun(segment(model, tuple(old), new), threads=threads)
    for index, feeds in enumerate(state):
        found = run({name: feeds[name] for name in run.inputs})
        state[index] = {name: found[name] if name in found else feeds[name] for name in cut.crossing}


def _mean(parts: Sequence[Batch]) -> NDArray[np.float64]:
    """Over images and places, of each channel `[C]`; `parts` are batches `[n, C, …]`."""
    sums = [part.reshape(*part.shape[:2], -1).mean(axis=2, dtype=np.float64).sum(axis=0) for part in parts]
    mean: NDArray[np.float64] = np.sum(sums, axis=0) / sum(map(len, parts))
    return mean
