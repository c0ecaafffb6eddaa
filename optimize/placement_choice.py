"""Which nodes to run in INT8, if converting between INT8 and floating point takes time too: a minimum cut.

Every node is on one of two sides. What it takes there more than on the other side is an edge to a terminal; a tensor
that changes sides between the node that gives it and a node that reads it costs a conversion, once, however many read
it. The cheapest assignment is the cheapest cut between the terminals (Kolmogorov and Zabih 2004, "What Energy Functions
Can Be Minimized via Graph Cuts?": all these terms are regular).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Crossing", "cheapest"]

INT8_SIDE, FLOAT_SIDE = ("terminal", "int8"), ("terminal", "float")


@dataclass(frozen=True)
class Crossing:
    """A tensor between the node that gives it and the nodes that read it, and what its conversions take, at least 0.

    * to_int8: where `producer` is in floating point and any of `readers` in INT8
    * to_float: the other way round
    """

    producer: str
    readers: tuple[str, ...]
    to_int8: float
    to_float: float


def cheapest(gains: Mapping[str, float], crossings: Iterable[Crossing]) -> frozenset[str]:
    """The nodes to run in INT8, of those in `gains`: what each takes in floating point less what it takes in INT8.

    The sum of the gains of the nodes chosen less the conversions is as large as it can be; of several such choices it
    is the one with the fewest nodes. `crossings` are between nodes in `gains`, in the same unit.
    """
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from((INT8_SIDE, FLOAT_SIDE))
    for node, gain in gains.items():
        if gain > 0:
            graph.add_edge(node, INT8_SIDE, capacity=gain)
        else:
            graph.add_edge(FLOAT_SIDE, node, capacity=-gain)
    for index, crossing in enumerate(crossings):
        float_reads, int8_reads = ("float reads", index), ("int8 reads", index)
        graph.add_edge(float_reads, crossing.producer, capacity=crossing.to_float)
        graph.add_edge(crossing.producer, int8_reads, capacity=crossing.to_int8)
        for reader in crossing.readers:  # an edge without capacity is never cut
            graph.add_edge(reader, float_reads)
            graph.add_edge(int8_reads, reader)
    # In this direction: the second part of the cut is the smallest of several that are as cheap.
    _, (_, int8) = networkx.minimum_cut(graph, FLOAT_SIDE, INT8_SIDE)
    return frozenset(int8 & gains.keys())
