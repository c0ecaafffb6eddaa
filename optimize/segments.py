"""Parts of a graph: where it can be cut, what lies between two cuts, and running such a part.

A border is an activation through which everything behind it gets what it needs: all paths from the input to the output
pass through this one tensor. Between two borders lies a block, such as a residual block or a lone convolution. Whatever
is asked of one layer again and again (its sensitivity, the shift of its mean, its rounding) needs no more than the
activation at the border in front of it, kept from one run, and the layers from there on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.plan import activation_inputs

__all__ = ["GraphRun", "borders", "logits_of", "segment", "values_by_name"]

Batch = NDArray[np.float32]
LARGEST_BATCH = 16
"""Images that are passed through a part of a graph at once."""


def borders(model: ir.Model) -> tuple[str, ...]:
    """Names of the activations at which `model` can be cut in two, from its input to its only output.

    Both ends are among them. Constants cross a cut freely: each part keeps its own.
    """
    (source,), (result,) = model.graph.inputs, model.graph.outputs
    nodes = list(model.graph)
    last_use: dict[ir.Value, int] = {result: len(nodes)}
    for index, node in enumerate(nodes):
        for value in activation_inputs(node):
            last_use[value] = max(last_use.get(value, 0), index)
    found = [str(source.name)]
    alive = {source}
    for index, node in enumerate(nodes):
        if any(value in alive for value in activation_inputs(node)):  # what is computed from constants is a constant
            alive |= {value for value in node.outputs if value in last_use}
        alive = {value for value in alive if last_use[value] > index}
        if len(alive) == 1:
            (only,) = alive
            if str(only.name) != found[-1]:
                found.append(str(only.name))
    return tuple(found)


def segment(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The part of `model` that computes activations `outputs` from activations `inputs`, as a model of its own.

    Raises `ValueError` if `outputs` need anything else that is not a constant.
    """
    return ir.Model(ir.convenience.extract(model.graph, inputs, outputs), ir_version=model.ir_version)


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """All inputs and all results of nodes, by their names."""
    values = itertools.chain(model.graph.inputs, (value for node in model.graph for value in node.outputs))
    return {str(value.name): value for value in values}


class GraphRun:
    """A graph in onnxruntime on the CPU, called like a function.

    `threads` is that of onnxruntime, 0 for all cores. `outputs`, names of activations, are given instead of the graph's
    own; onnxruntime then fuses nothing across them.
    """

    def __init__(self, model: ir.Model, *, outputs: Sequence[str] = (), threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact sums without VNNI
        content = ir.to_proto(_with_outputs(model, outputs) if outputs else model).SerializeToString()
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def __call__(self, feeds: Mapping[str, Batch]) -> dict[str, Batch]:
        """All outputs for one batch `[N, …]` of each input."""
        return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(feeds)), strict=True))

    def batches(self, feeds: Mapping[str, Batch]) -> Iterator[dict[str, Batch]]:
        """The outputs for `feeds`, a few images at a time."""
        count = len(next(iter(feeds.values())))
        for start in range(0, count, LARGEST_BATCH):
            yield self({name: array[start : start + LARGEST_BATCH] for name, array in feeds.items()})

    def all(self, feeds: Mapping[str, Batch]) -> dict[str, Batch]:
        """The outputs for `feeds`, joined; nothing but they and one batch is in memory at a time."""
        count = len(next(iter(feeds.values())))
        joined: dict[str, Batch] = {}
        start = 0
        for part in self.batches(feeds):
            for name, values in part.items():
                if name not in joined:
                    joined[name] = np.empty((count, *values.shape[1:]), values.dtype)
                joined[name][start : start + len(values)] = values
            start += len(values)
        return joined


def logits_of(model: ir.Model, images: Batch, *, threads: int = 0) -> Batch:
    """What `model`, of one input and one output, gives for `images` `[N, C, H, W]`, run as onnxruntime runs it best."""
    run = GraphRun(model, threads=threads)
    (name,), (output,) = run.inputs, run.outputs
    return run.all({name: images})[output]


def _with_outputs(model: ir.Model, outputs: Sequence[str]) -> ir.Model:
    observed = model.clone()
    values = values_by_name(observed)
    observed.graph.outputs.clear()
    observed.graph.outputs.extend(values[name] for name in outputs)
    return observed
