"""Where the milliseconds and megabytes of an engine go: its kernels and its graph, by the stages of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgewright.runtime.backends.base import KernelTime

if TYPE_CHECKING:
    from edgewright.optimize.summary import Summary

__all__ = ["GraphStage", "StageShare", "by_kind", "by_stage", "graph_stages", "stage_names"]


@dataclass(frozen=True)
class GraphStage:
    """One stage of a graph for one image: its learned parameters, its work, and the bytes that it reads and writes.

    * weights: bytes of constants as the graph stores them
    """

    name: str
    parameters: int
    macs: int
    bytes_moved: int
    weights: int


@dataclass(frozen=True)
class StageShare:
    """What the kernels of one stage, or of one kind, take together: `milliseconds` in one run of one image."""

    name: str
    kernels: int
    milliseconds: float


def graph_stages(found: Summary, known: Mapping[str, str]) -> tuple[GraphStage, ...]:
    """The stages of a graph; `known`: the stage of each layer that has a name of its own.

    What has none, as what quantization put in, belongs to the layer before it.
    """
    sums: dict[str, list[int]] = {name: [0, 0, 0, 0] for name in dict.fromkeys(known.values())}
    current = next(iter(sums), "")
    for layer in found.layers:
        current = known.get(layer.name, current)
        cost = layer.cost
        amounts = (cost.parameters, cost.macs, cost.bytes_moved, cost.bytes_of_constants)
        sums[current] = [before + amount for before, amount in zip(sums[current], amounts, strict=True)]
    return tuple(GraphStage(name, *amounts) for name, amounts in sums.items())


def stage_names(found: Summary) -> dict[str, str]:
    """The stage of each layer of a graph, by the layer's name."""
    return {found.layers[index].name: stage.name for stage in found.stages for index in stage.layers}


def by_stage(times: Iterable[KernelTime], known: Mapping[str, str]) -> tuple[StageShare, ...]:
    """Kernel times by stage, in the order of the network; a kernel without a known layer belongs to the one before."""
    stages = dict.fromkeys(known.values())
    current = next(iter(stages), "")
    named = []
    for time in times:
        current = next((known[source] for source in time.kernel.sources if source in known), current)
        named.append((current, time.milliseconds))
    return _shares(named, tuple(stages))


def by_kind(times: Iterable[KernelTime]) -> tuple[StageShare, ...]:
    """Kernel times by the backend's own kinds and their precision, the slowest first."""
    named = [(f"{time.kernel.kind} {time.kernel.precision}".strip(), time.milliseconds) for time in times]
    shares = _shares(named, tuple(dict.fromkeys(name for name, _ in named)))
    return tuple(sorted(shares, key=lambda share: -share.milliseconds))


def _shares(named: Sequence[tuple[str, float]], order: Sequence[str]) -> tuple[StageShare, ...]:
    return tuple(
        StageShare(name, len(times), sum(times))
        for name in order
        if (times := [time for given, time in named if given == name])
    )
