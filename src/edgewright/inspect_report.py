"""The layers of a graph for a person, as a table, and for a program, as the document `edgewright.inspect/1`.

In the table a row is what a person calls a layer: a convolution with the batch norm, the activation and the reshapes
that follow it. The document has each node by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgewright.optimize.receptive_field import Reach, Window
from edgewright.optimize.stages import module_of
from edgewright.optimize.summary import Cost, Layer, Stage, Summary, total
from edgewright.report import in_short

if TYPE_CHECKING:
    from rich.box import Box
    from rich.table import Table

__all__ = ["Row", "inspect_document", "inspect_lines", "inspect_table", "rows_of"]

SHORT_NAMES = {
    "AveragePool": "AvgPool",
    "BatchNormalization": "BN",
    "GlobalAveragePool": "GlobalPool",
    "GroupNormalization": "GroupNorm",
    "InstanceNormalization": "InstanceNorm",
    "LayerNormalization": "LayerNorm",
    "Relu": "ReLU",
}
SPELLED_OUT = {  # activations that the exporter writes as several nodes
    ("Sigmoid", "Mul"): "SiLU",
    ("HardSigmoid", "Mul"): "HardSwish",
    ("Div", "Erf", "Add", "Mul", "Mul"): "GELU",
    ("Mul", "Erf", "Add", "Mul", "Mul"): "GELU",
}
UNSAID = ("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Not worth a word behind another operator."""
NARROWEST_NAME = 14  # columns


@dataclass(frozen=True)
class Row:
    """Layers that a person reads as one: the first and what joins it.

    * output: shape of what the convolution or matrix product gives, before reshapes and transpositions that join it
    """

    name: str
    operators: str
    window: Window | None
    output: tuple[int | None, ...] | None
    cost: Cost
    reach: Reach | None


def rows_of(summary: Summary, stage: Stage) -> list[Row]:
    """The rows of a stage; names without what the name of the stage says, or the operator where that is all."""
    members: dict[int, list[Layer]] = {}
    for index in stage.layers:
        members.setdefault(summary.layers[index].joins, []).append(summary.layers[index])
    prefix = stage.name.partition(" … ")[0]
    if prefix != stage.name:
        prefix = prefix.rpartition(".")[0]
    return [_row(layers, prefix) for layers in members.values()]


def _row(layers: Sequence[Layer], prefix: str) -> Row:
    main = next((layer for layer in layers if layer.computes), layers[0])
    module = module_of(main.name) or main.name
    windows = [layer.window for layer in layers if layer.window is not None]
    return Row(
        SHORT_NAMES.get(main.operator, main.operator) if module == prefix else module.removeprefix(f"{prefix}."),
        _operators([layer.operator for layer in layers]),
        windows[0] if windows else None,
        main.output if main.computes else layers[-1].output,
        total(layer.cost for layer in layers),
        layers[-1].reach,
    )


def _operators(names: Sequence[str]) -> str:
    """The first operator and what follows it, as it is usually called: "Conv+BN+SiLU"."""
    first, rest = names[0], [name for name in names[1:] if name not in UNSAID]
    words = [SHORT_NAMES.get(first, first)]
    if first == "MatMul" and rest[:1] == ["Add"]:  # its bias
        rest = rest[1:]
    while rest:
        spelled = next((chain for chain in SPELLED_OUT if tuple(rest[: len(chain)]) == chain), (rest[0],))
        words.append(SPELLED_OUT.get(spelled, SHORT_NAMES.get(rest[0], rest[0])))
        rest = rest[len(spelled) :]
    return "+".join(words)


# What each column says of a row, and of a stage or the total
COLUMNS: tuple[tuple[str, Callable[[Row], str], Callable[[Cost], str]], ...] = (
    ("kernel", lambda row: _window(row.window), lambda cost: ""),
    ("output", lambda row: _shape(row.output), lambda cost: ""),
    ("param", lambda row: _count(row.cost.parameters, row.cost), lambda cost: in_short(cost.parameters)),
    ("MACs", lambda row: _count(row.cost.macs, row.cost), lambda cost: in_short(cost.macs)),
    ("field", lambda row: _field(row.reach), lambda cost: ""),
    ("jump", lambda row: _jump(row.reach), lambda cost: ""),
    ("bytes", lambda row: _count(row.cost.bytes_moved, row.cost), lambda cost: in_short(cost.bytes_moved)),
    ("MAC/B", lambda row: _intensity(row.cost), lambda cost: _intensity(cost)),
)
DISPENSABLE = ("MAC/B", "jump", "kernel", "bytes")
"""Left out in this order where the terminal is too narrow."""


def inspect_table(summary: Summary, width: int = 80) -> Table:
    """Stages with their outputs and sums, the rows of each below it, and the total.

    Fits `width` columns: names are shortened from the left, then columns are left out.
    """
    from rich.table import Table

    lines = _lines(summary)
    columns = [(heading, [line.cells[position] for line in lines]) for position, heading in enumerate(_headings())]
    columns = _that_fit(columns, width)
    space = width - sum(_width(heading, cells) + 1 for heading, cells in columns)
    table = Table(box=_head_rule(), show_edge=False, pad_edge=False, padding=0)
    table.add_column("layer", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("operator", "kernel") else "right")
    for number, line in enumerate(lines):
        name = _shortened(line.name, max(space, NARROWEST_NAME))
        table.add_row(name, *(cells[number] for _, cells in columns), style="bold" if line.is_sum else None)
    return table


@dataclass(frozen=True)
class _Line:
    name: str
    cells: tuple[str, ...]
    is_sum: bool


def _headings() -> list[str]:
    return ["operator", *(heading for heading, _, _ in COLUMNS)]


def _lines(summary: Summary) -> list[_Line]:
    lines = []
    for stage in summary.stages:
        lines.append(_sum_line(stage.name, stage.cost, _shape(stage.output)))
        for row in rows_of(summary, stage):
            lines.append(_Line(f" {row.name}", (row.operators, *(of_row(row) for _, of_row, _ in COLUMNS)), False))
    return [*lines, _sum_line("total", summary.cost, "")]


def _sum_line(name: str, cost: Cost, output: str) -> _Line:
    cells = (output if heading == "output" else of_cost(cost) for heading, _, of_cost in COLUMNS)
    return _Line(name, ("", *cells), True)


def _that_fit(columns: list[tuple[str, list[str]]], width: int) -> list[tuple[str, list[str]]]:
    columns = [(heading, cells) for heading, cells in columns if any(cells)]
    for name in DISPENSABLE:
        if width - sum(_width(*column) + 1 for column in columns) >= NARROWEST_NAME:
            break
        columns = [(heading, cells) for heading, cells in columns if heading != name]
    return columns


def _width(heading: str, cells: Sequence[str]) -> int:
    return max(len(heading), *map(len, cells))


def _shortened(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    indent = " " * (len(name) - len(name.lstrip()))
    return f"{indent}…{name[len(name) - width + len(indent) + 1 :]}"


def _head_rule() -> Box:
    from rich.box import Box

    return Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one space between columns


def inspect_lines(summary: Summary) -> list[str]:
    """What the layers come to, how to read the table, and what could not be counted."""
    cost, at_least = summary.cost, "" if summary.cost.complete else "at least "
    images = " and ".join(_shape(shape) for _, shape in summary.inputs)
    return [
        f"one image of {images}: {at_least}{cost.parameters:,} parameters, {in_short(cost.macs, ' ')}MACs, "
        f"{in_short(cost.activations, ' ').strip()} activations",
        f"{at_least}{in_short(cost.bytes_moved, ' ')}B moved, {cost.macs_per_byte:.1f} MACs per byte: "
        "each node by itself, nothing fused",
        "kernel/stride, g: groups, dw: depthwise, d: dilation; field and jump in pixels",
        *(f"note: {note}" for note in summary.notes),
    ]


def inspect_document(summary: Summary) -> dict[str, Any]:
    """The document `edgewright.inspect/1`: the totals, the stages, and each node.

    Sizes are those of one image, without the batch axis; null is what is not known. `receptive_field` and `jump` are
    `[height, width]` in pixels; "all" where a whole side of the image is seen. `row` is the name of the layer in whose
    row the table has this one.
    """
    stage_of = {index: stage.name for stage in summary.stages for index in stage.layers}
    return {
        "schema": "edgewright.inspect/1",
        "inputs": [{"name": name, "shape": list(shape)} for name, shape in summary.inputs],
        "totals": _cost_document(summary.cost),
        "stages": [
            {"name": stage.name, "output": _listed(stage.output), **_cost_document(stage.cost)}
            for stage in summary.stages
        ],
        "layers": [
            {
                "name": layer.name,
                "operator": layer.operator,
                "stage": stage_of[index],
                "row": summary.layers[layer.joins].name,
                **_window_document(layer.window),
                "output": _listed(layer.output),
                "receptive_field": _pixels(layer.reach, "size"),
                "jump": _pixels(layer.reach, "jump"),
                **_cost_document(layer.cost),
            }
            for index, layer in enumerate(summary.layers)
        ],
        "notes": list(summary.notes),
    }


def _cost_document(cost: Cost) -> dict[str, Any]:
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "activations": cost.activations,
        "bytes_read": cost.bytes_read,
        "bytes_of_constants": cost.bytes_of_constants,
        "bytes_written": cost.bytes_written,
        "bytes_moved": cost.bytes_moved,
        "macs_per_byte": cost.macs_per_byte,
        "complete": cost.complete,
    }


def _window_document(window: Window | None) -> dict[str, Any]:
    fields = ("kernel", "stride", "dilation")
    if window is None:
        return dict.fromkeys((*fields, "groups"))
    return {**{field: list(getattr(window, field)) for field in fields}, "groups": window.groups}


def _listed(shape: tuple[int | None, ...] | None) -> list[int | None] | None:
    return None if shape is None else list(shape)


def _pixels(reach: Reach | None, what: str) -> list[int | float | str | None] | None:
    """JSON knows no infinity; the jump says nothing where everything is seen."""
    if reach is None:
        return None
    values = reach.size if what == "size" else reach.jump
    whole = "all" if what == "size" else None
    return [whole if math.isinf(side) else _number(value) for side, value in zip(reach.size, values, strict=True)]


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else round(value, 3)


def _count(value: int, cost: Cost) -> str:
    """Zero is left out; what could not be counted is not zero."""
    return in_short(value) or ("" if cost.complete else "?")


def _intensity(cost: Cost) -> str:
    if not cost.macs:
        return ""
    return f"{cost.macs_per_byte:.1f}" if cost.macs_per_byte < 99.95 else f"{cost.macs_per_byte:.0f}"


def _shape(sides: Sequence[int | None] | None) -> str:
    return "?" if sides is None else "×".join("?" if side is None else str(side) for side in sides)


def _window(window: Window | None) -> str:
    """Stride, groups and dilation only where they are not 1."""
    if window is None:
        return ""
    stride = "" if set(window.stride) == {1} else f"/{_sides(window.stride)}"
    groups = "" if window.groups == 1 else " dw" if window.depthwise else f" g{window.groups}"
    dilation = "" if set(window.dilation) == {1} else f" d{_sides(window.dilation)}"
    return f"{_shape(window.kernel)}{stride}{groups}{dilation}"


def _field(reach: Reach | None) -> str:
    return "?" if reach is None else _sides(["all" if math.isinf(side) else f"{_number(side)}" for side in reach.size])


def _jump(reach: Reach | None) -> str:
    if reach is None:
        return "?"
    sides = [_number(jump) for size, jump in zip(reach.size, reach.jump, strict=True) if not math.isinf(size)]
    return _sides(sides) if sides else ""


def _sides(values: Sequence[object]) -> str:
    """One number for height and width where they are the same."""
    return "×".join(dict.fromkeys(map(str, values)) if len({*values}) == 1 else map(str, values))
