"""How far the activations of one graph are from those of another: in all, and by each layer's own doing.

Errors are carried on, so that behind one bad layer all look bad. A layer's own error is what it makes of the other
graph's activations. For that the candidate graph is cut at every tensor that is compared: behind the cut the other
graph's values are read. All cuts are made at once, so that all layers are measured in one run:

    reference    x ──► conv1 ──► a ──► conv2 ──► b
                                 │
    candidate    x ──► conv1 ──► a   a ──► conv2 ──► b         own error of conv2: its b against the reference's
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.collect import batch_size
from edgewright.optimize.plan import COMPUTE_OPERATORS, clamped_output
from edgewright.optimize.segments import GraphRun, values_by_name
from edgewright.runtime.parity import SQNR_LIMIT_DB

__all__ = [
    "GIVEN",
    "Activations",
    "LayerError",
    "activations_of",
    "decibels",
    "layer_errors",
    "layer_outputs",
    "own_errors",
    "shared_tensors",
]

Batch = NDArray[np.float32]
Activations = Callable[[Batch], Mapping[str, NDArray[Any]]]
"""Activations by name `[N, …]` of images `[N, C, H, W]`."""
GIVEN = "::given"
"""Ends the names of the inputs at which a graph was cut."""


@dataclass(frozen=True)
class LayerError:
    """What one tensor of a graph has to do with the same tensor of another.

    * sqnr_db: 10 log10(Σ reference² / Σ (reference − candidate)²) over all images, limited to ±300 dB; −300 where the
      candidate is NaN or infinite
    * own_sqnr_db: the same if all that is compared before it had no error
    """

    sqnr_db: float
    own_sqnr_db: float


def layer_outputs(model: ir.Model) -> dict[str, str]:
    """Per convolution and matrix product, in their order, the tensor that it gives: behind its ReLU or ReLU6."""
    return {str(node.name): str(clamped_output(node).name) for node in model.graph if node.op_type in COMPUTE_OPERATORS}


def shared_tensors(reference: ir.Model, candidate: ir.Model) -> tuple[str, ...]:
    """Names of the float activations that nodes of both graphs give, in the order of `candidate`."""
    known = {name for name, value in values_by_name(reference).items() if _is_computed(value)}
    return tuple(name for name, value in values_by_name(candidate).items() if name in known and _is_computed(value))


def activations_of(model: ir.Model, names: Sequence[str], *, threads: int = 0) -> Activations:
    """`model` run for the activations `names`."""
    run = GraphRun(model, outputs=names, threads=threads)
    (source,) = run.inputs
    return lambda images: run({source: images})


def layer_errors(
    reference: ir.Model,
    candidate: ir.Model,
    images: Batch,
    tensors: Sequence[str],
    *,
    threads: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, LayerError]:
    """Errors of the activations `tensors`, which both graphs have, on `images` `[N, C, H, W]`.

    A few images are passed through both at a time; `progress` is told how many are done.
    """
    expected = activations_of(reference, tensors, threads=threads)
    found = activations_of(candidate, tensors, threads=threads)
    own = _own_activations(candidate, tensors, threads)
    accumulated, local = _Energies(tensors), _Energies(tensors)
    done = 0
    for chunk in _chunks(images, candidate):
        right = expected(chunk)
        accumulated.add(right, found(chunk))
        local.add(right, own(chunk, right))
        done += len(chunk)
        progress(done)
    return {name: LayerError(accumulated.sqnr_db(name), local.sqnr_db(name)) for name in tensors}


def own_errors(
    expected: Activations, candidate: ir.Model, images: Batch, tensors: Sequence[str], *, threads: int = 0
) -> dict[str, float]:
    """Only the own errors, as SQNR in dB, where what is right comes from anything that gives activations by name.

    A tensor whose shape differs from what `expected` gives has −300 dB.
    """
    own = _own_activations(candidate, tensors, threads)
    energies = _Energies(tensors)
    for chunk in _chunks(images, candidate):
        right = expected(chunk)
        energies.add(right, own(chunk, right))
    return {name: energies.sqnr_db(name) for name in tensors}


class _Energies:
    """Sums of squares of what was expected and of its error, per tensor."""

    def __init__(self, names: Sequence[str]) -> None:
        self._sums = {name: np.zeros(2) for name in names}

    def add(self, expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> None:
        for name, sums in self._sums.items():
            right, other = expected[name], found[name]
            if right.shape != other.shape:
                sums[1] = math.inf
                continue
            with np.errstate(invalid="ignore", over="ignore"):  # infinities are counted as an infinite error
                signal, error = right.ravel(), (right - other).ravel()
                sums += float(np.dot(signal, signal)), float(np.dot(error, error))

    def sqnr_db(self, name: str) -> float:
        return decibels(*self._sums[name])


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies, limited to ±300; −300 for a noise that is infinite or NaN."""
    if noise == 0:
        return SQNR_LIMIT_DB
    if signal == 0 or not math.isfinite(noise):
        return -SQNR_LIMIT_DB
    return min(SQNR_LIMIT_DB, max(-SQNR_LIMIT_DB, 10 * (math.log10(signal) - math.log10(noise))))


def _own_activations(
    candidate: ir.Model, tensors: Sequence[str], threads: int
) -> Callable[[Batch, Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]:
    """What `candidate` makes of images and of given activations; see the head of this file."""
    (source,) = (value.name for value in candidate.graph.inputs)
    run = GraphRun(_cut(candidate, tensors), threads=threads)
    given = [name.removesuffix(GIVEN) for name in run.inputs if name.endswith(GIVEN)]

    def activations(images: Batch, right: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        feeds = {f"{name}{GIVEN}": right[name] for name in given}
        if source in run.inputs:
            feeds[str(source)] = images
        return run(feeds)

    return activations


def _cut(model: ir.Model, tensors: Sequence[str]) -> ir.Model:
    """A copy whose outputs are `tensors`, and in which their readers read inputs instead, `NAME::given`."""
    cut = model.clone()
    graph = cut.graph
    values = values_by_name(cut)
    graph.outputs.clear()
    for name in tensors:
        value = values[name]
        readers = tuple(value.uses())
        graph.outputs.append(value)
        if readers:
            given = ir.Value(name=f"{name}{GIVEN}", shape=value.shape, type=value.type)
            graph.inputs.append(given)
            for node, index in readers:
                node.replace_input_with(index, given)
    return cut


def _is_computed(value: ir.Value) -> bool:
    """Whether `value` is a float32 activation with a batch axis, given by a node."""
    shape = value.shape
    if value.producer() is None or value.dtype != ir.DataType.FLOAT or shape is None or shape.rank() == 0:
        return False
    return not isinstance(shape[0], int)


def _chunks(images: Batch, model: ir.Model) -> Iterator[Batch]:
    size = batch_size(model)
    return (images[start : start + size] for start in range(0, len(images), size))
