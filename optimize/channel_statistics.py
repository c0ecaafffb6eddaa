"""What the channels of activations reach on given images, reduced inside the graph: one number a channel and image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.optimize.segments import GraphRun, values_by_name

__all__ = ["channel_statistics"]


def channel_statistics(
    model: ir.Model, names: Sequence[str], images: NDArray[np.float32], operator: str, *, threads: int = 0
) -> dict[str, NDArray[np.float32]]:
    """`operator` ("ReduceMean", "ReduceMin" or "ReduceMax") of activations `names`, over places: `[N, C]` each.

    * model: of opset 18 or later, of one input; names: of activations `[N, C, …]`
    * images: `[N, …]`, a few of them at a time
    """
    observed = model.clone()
    values = values_by_name(observed)
    observed.graph.outputs.clear()
    observed.graph.outputs.extend(_reduced(observed.graph, values[name], operator) for name in names)
    run = GraphRun(observed, threads=threads)
    parts = list(run.batches({run.inputs[0]: images}))
    return {
        name: np.concatenate([part[output] for part in parts]) for name, output in zip(names, run.outputs, strict=True)
    }


def _reduced(graph: ir.Graph, value: ir.Value, operator: str) -> ir.Value:
    """A new value `[N, C]`."""
    assert value.shape is not None
    name = f"{value.name}::{operator}"
    axes = ir.val(f"{name}::axes", const_value=ir.tensor(np.arange(2, value.shape.rank()), name=f"{name}::axes"))
    graph.initializers.add(axes)
    node = ir.node(operator, [value, axes], {"keepdims": 0, "noop_with_empty_axes": 1})
    result = node.outputs[0]
    result.name, result.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    return result
