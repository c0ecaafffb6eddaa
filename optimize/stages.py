"""Which layers of a graph form a stage, such as `stem`, `layer1` … `layer4` and `head` of a ResNet.

Where nodes are named after modules, a stage is a module. A module that spans more than two resolutions is a container,
and its parts are looked at instead (torchvision's `features`). Neighbours with at most one convolution or matrix
product are no stages of their own: they are joined, and parted again where the resolution falls. So are graphs without
names. Pooling belongs to what it closes, a normalization to the convolution that follows it in its module. Parts of a
container that give the same shape are one stage, such as the blocks of a MobileNet, whose modules are a flat list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Placed", "grouped_by_stage", "module_of"]

RESOLUTIONS_OF_A_STAGE = 2  # the one that it reads and the one that it gives


@dataclass(frozen=True)
class Placed:
    """A node as the grouping sees it.

    * module: the module that it comes from, such as "layer1.0.conv1", or empty
    * resolution: height × width of what it gives, 1 where nothing of the image's plane is left
    * output: shape of what it gives
    """

    module: str
    resolution: int
    output: tuple[int | None, ...] | None = None
    computes: bool = False
    pools: bool = False


def module_of(name: str) -> str:
    """The module in the name of a node, or empty.

    The exporter's `layer1.0.conv1/Conv`, and TorchScript's `/layer1/layer1.0/conv1/Conv`, which repeats the outer ones.
    """
    module = ""
    for part in name.strip("/").split("/")[:-1]:
        nested = f"{module}." if module else ""
        module = part if part.startswith(nested) else nested + part
    return module


def grouped_by_stage(nodes: Sequence[Placed]) -> list[tuple[str, list[int]]]:
    """Names of the stages in their order, each with the indices of its nodes."""
    resolutions = _settled([node.resolution for node in nodes])
    prefixes = _prefixes(nodes, resolutions)
    stages: dict[str, list[int]] = {}
    runs: set[str] = set()
    for is_run, indices in _segments(nodes, prefixes):
        if not is_run:
            stages.setdefault(prefixes[indices[0]], []).extend(indices)
            continue
        for part in _parts(nodes, resolutions, prefixes, indices):
            idle = not any(nodes[index].computes for index in part) and resolutions[part[0]] > 1
            if idle and stages:
                stages[next(reversed(stages))].extend(part)
                continue
            name = _unique(_name_of_run(nodes, prefixes, part), stages)
            runs.add(name)
            stages[name] = part
    listed = [(name, sorted(indices)) for name, indices in stages.items()]
    return _with_stem_and_head(nodes, _with_equals_joined(nodes, listed, runs), runs)


def _settled(resolutions: Sequence[int]) -> list[int]:
    """The largest resolution from each node on: gates of squeeze-and-excitation and quicker branches do not count."""
    settled = list(resolutions)
    for index in range(len(settled) - 2, -1, -1):
        settled[index] = max(settled[index], settled[index + 1])
    return settled


def _prefixes(nodes: Sequence[Placed], resolutions: Sequence[int]) -> list[str]:
    """For each node the outermost module that is no container; empty where there is none.

    What stands in a container itself belongs to the part before it.
    """
    seen: dict[str, set[int]] = {}
    for node, resolution in zip(nodes, resolutions, strict=True):
        for module in _outer_modules(node.module):
            seen.setdefault(module, set()).add(resolution)
    prefixes: list[str] = []
    for node in nodes:
        modules = _outer_modules(node.module)
        found = [module for module in modules if len(seen[module]) <= RESOLUTIONS_OF_A_STAGE]
        before = prefixes[-1] if prefixes and modules else ""
        prefixes.append(found[0] if found else before)
    return prefixes


def _outer_modules(module: str) -> list[str]:
    """Of "a.b.c": "a", "a.b" and itself."""
    parts = module.split(".") if module else []
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _segments(nodes: Sequence[Placed], prefixes: Sequence[str]) -> Iterator[tuple[bool, list[int]]]:
    """Neighbours of the same module, in order; those of modules with little in them together, marked with True."""
    work: Counter[str] = Counter()
    for prefix, node in zip(prefixes, nodes, strict=True):
        work[prefix] += node.computes
    small = [not prefix or work[prefix] <= 1 for prefix in prefixes]
    keys = ["" if is_small else prefix for is_small, prefix in zip(small, prefixes, strict=True)]
    for key, group in groupby(range(len(nodes)), key=lambda index: keys[index]):
        yield not key, list(group)


def _parts(
    nodes: Sequence[Placed], resolutions: Sequence[int], prefixes: Sequence[str], indices: Sequence[int]
) -> Iterator[list[int]]:
    """Parted where the resolution falls: behind a pooling, before anything else and what prepares it in its module."""
    part: list[int] = []
    for index in indices:
        falls = part and resolutions[index] < resolutions[part[-1]]
        closes = nodes[index].pools and resolutions[index] > 1
        closed = part and nodes[part[-1]].pools and resolutions[part[-1]] > 1 and any(nodes[i].computes for i in part)
        if part and (closed or (falls and not closes)):
            start = len(part) if closed else _start_of_preparation(nodes, prefixes, [*part, index])
            if start:
                yield part[:start]
            part = part[start:]
        part.append(index)
    if part:
        yield part


def _start_of_preparation(nodes: Sequence[Placed], prefixes: Sequence[str], part: Sequence[int]) -> int:
    """From where on `part` has nothing but nodes of the module of its last, none of which computes before that one.

    Such as a LayerNorm before the convolution that lowers the resolution, in ConvNeXt.
    """
    last = len(part) - 1
    start = last
    while start and prefixes[part[start - 1]] == prefixes[part[last]] != "":
        start -= 1
    return last if any(nodes[index].computes for index in part[start:last]) else start


def _name_of_run(nodes: Sequence[Placed], prefixes: Sequence[str], part: Sequence[int]) -> str:
    """From the first to the last module; without modules the size of the first map, such as "56×56"."""
    modules = [prefixes[index] for index in part if prefixes[index]]
    if modules:
        return _span(modules[0], modules[-1])
    maps = [output for index in part if (output := nodes[index].output) is not None and len(output) > 1]
    return "×".join(str(side or "?") for side in maps[0][1:]) if maps else "vectors"


def _span(first: str, last: str) -> str:
    """Of "features.0" and "features.2": "features.0 … 2"."""
    if first == last:
        return first
    parent = first.rpartition(".")[0]
    return f"{first} … {last.removeprefix(f'{parent}.') if parent else last}"


def _unique(name: str, taken: dict[str, list[int]]) -> str:
    numbered = (name if number == 1 else f"{name} ({number})" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken)


def _with_equals_joined(
    nodes: Sequence[Placed], stages: Sequence[tuple[str, list[int]]], runs: Container[str]
) -> list[tuple[str, list[int]]]:
    """Neighbours of one container that give the same shape, as one stage from the first name to the last."""
    joined: list[tuple[str, str, list[int]]] = []
    for name, indices in stages:
        first, last, before = joined[-1] if joined else ("", "", [])
        parent = name.rpartition(".")[0]
        siblings = before and name not in runs and last not in runs and parent == last.rpartition(".")[0] != ""
        if siblings and nodes[before[-1]].output == nodes[indices[-1]].output:
            joined[-1] = (first, name, sorted(before + indices))
        else:
            joined.append((name, name, indices))
    return [(_span(first, last), indices) for first, last, indices in joined]


def _with_stem_and_head(
    nodes: Sequence[Placed], stages: list[tuple[str, list[int]]], runs: Container[str]
) -> list[tuple[str, list[int]]]:
    """What stands before the first module, and what is left of one element per channel, under their usual names."""
    flat = [name for name, indices in stages if all(nodes[index].resolution == 1 for index in indices)]
    count = next((n for n, (name, _) in enumerate(reversed(stages)) if name not in flat), len(stages))
    if 0 < count < len(stages):
        last = sorted(index for _, indices in stages[-count:] for index in indices)
        stages = [*stages[:-count], ("head", last)]
    body = [name for name, _ in stages if name != "head" and name not in runs]
    if body and stages[0][0] in runs:
        stages = [("stem", stages[0][1]), *stages[1:]]
    return stages
