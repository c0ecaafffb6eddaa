"""Small edits of a graph that several passes make: constants added under free names, what is unused taken out."""

from __future__ import annotations

import itertools
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["add_constant", "constant_tensor", "label", "remove_if_unused", "take_over", "value_names"]


def label(node: ir.Node) -> str:
    """The node's name; where it has none, the name of its first output."""
    return node.name or node.outputs[0].name or node.op_type


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that callers cannot override or of a Constant node; None for anything else."""
    if value is None or value.is_graph_input():
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes.get_tensor("value")  # get_const_tensor would rename it, and clones share it
    return ir.convenience.get_const_tensor(value)


def value_names(model: ir.Model) -> set[str | None]:
    """The names of all tensors, of subgraphs and functions too."""
    names = {output.name for node in model.graph.all_nodes() for output in node.outputs}
    for function in model.functions.values():
        names.update(output.name for node in function.all_nodes() for output in node.outputs)
    for graph in model.graphs():
        names.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
    return names


def add_constant(graph: ir.Graph, array: NDArray[Any], name: str, names: set[str | None]) -> ir.Value:
    """A new initializer called `name` or, where that is taken, name_1, name_2, …; `names` are taken, and grow."""
    candidates = itertools.chain((name,), (f"{name}_{number}" for number in itertools.count(1)))
    unique = next(candidate for candidate in candidates if candidate not in names)
    names.add(unique)
    value = ir.val(unique, const_value=ir.tensor(array, name=unique))
    graph.initializers.add(value)
    return value


def take_over(value: ir.Value, old: ir.Value) -> None:
    """Gives `value` the users, the name, the type and the shape of `old`, which then has no users."""
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    value.name, value.type, value.shape = old.name, old.type or value.type, old.shape or value.shape


def remove_if_unused(value: ir.Value | None) -> None:
    """Removes a tensor that has lost its last user, with all that it alone was computed from.

    Graph inputs and outputs stay, and so does a node of which another output is used.
    """
    waiting = [value]
    while waiting:
        unused = waiting.pop()
        if unused is None or unused.is_graph_input() or _is_needed(unused):
            continue
        producer = unused.producer()
        if unused.is_initializer() and unused.graph is not None:
            del unused.graph.initializers[unused.name or ""]
        elif producer is not None and producer.graph is not None and not any(map(_is_needed, producer.outputs)):
            waiting.extend(producer.inputs)
            producer.graph.remove(producer, safe=True)


def _is_needed(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
