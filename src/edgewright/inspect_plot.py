"""Memory traffic and multiply-accumulates of a graph, layer by layer, as a picture."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.inspect_report import Row, rows_of
from edgewright.optimize.summary import Summary
from edgewright.report import in_short
from edgewright.runtime.errors import WorkspaceError
from edgewright.runtime.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot_path", "save_plot"]

SUFFIXES = (".svg", ".png")
DOTS_PER_INCH = 150
NAMED_ROWS = 32  # more names than these cannot be read below the bars
LETTERS_PER_PANEL = 125  # of the size of stage names, in the width of a panel
LETTERS_BETWEEN_SLANTED = 3  # so that lines of slanted text do not touch
CONSTANTS, ACTIVATIONS, WORK = "#3b6ea5", "#9cc3e6", "#d9822b"
INK, SHADE = "#333333", "#f1f3f5"
STYLE: Any = {
    "svg.hashsalt": "edgewright",  # or the ids in the file are random
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on all machines
    "font.size": 9.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def check_plot_path(path: Path) -> None:
    """Raises `WorkspaceError` if `path` is not a .svg or .png file in a folder that exists."""
    if path.suffix.lower() not in SUFFIXES:
        raise WorkspaceError(f"{path} is neither a .svg nor a .png file", "choose one of these suffixes")
    if path.is_dir():
        raise WorkspaceError(f"{path} is a folder", "give the name of a file")
    if not path.parent.is_dir():
        raise WorkspaceError(f"there is no folder {path.parent}", "make it, or choose another file")


def save_plot(summary: Summary, path: Path, title: str = "") -> None:
    """Writes bytes moved and MACs by layer, stages side by side, as SVG or PNG by the suffix of `path`.

    The layers are the rows of the table; the same summary gives the same file. Raises `WorkspaceError` for another
    suffix and where the file cannot be written.
    """
    check_plot_path(path)
    import matplotlib

    image = io.BytesIO()
    kind = path.suffix.lower()[1:]
    with matplotlib.rc_context(STYLE):
        figure = _figure(summary, title)
        # The date and the version would make each file another one.
        figure.savefig(
            image, format=kind, dpi=DOTS_PER_INCH, metadata={"Date": None} if kind == "svg" else {"Software": None}
        )
    write_bytes(path, image.getvalue())


def _figure(summary: Summary, title: str) -> Figure:
    from matplotlib.figure import Figure

    stages = [(stage.name, [row for row in rows_of(summary, stage) if _is_seen(row)]) for stage in summary.stages]
    rows = [row for _, part in stages for row in part]
    figure = Figure(figsize=(10.0, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes in (top, bottom):
        _shade(axes, [len(part) for _, part in stages])
    _draw_memory(top, rows)
    _draw_work(bottom, rows)
    _name_stages(top, stages)
    _name_rows(bottom, rows)
    figure.align_ylabels()
    figure.suptitle(_title(summary, title), fontsize=11)
    return figure


def _is_seen(row: Row) -> bool:
    """Reshapes have no bar."""
    return row.cost.bytes_moved > 0 or row.cost.macs > 0


def _title(summary: Summary, title: str) -> str:
    cost = summary.cost
    facts = (
        f"{in_short(cost.parameters, ' ').strip()} parameters, {in_short(cost.macs, ' ')}MACs, "
        f"{in_short(cost.bytes_moved, ' ')}B moved for one image"
    )
    return f"{title}: {facts}" if title else facts


def _shade(axes: Axes, sizes: Sequence[int]) -> None:
    """Every second stage, and the look that both panels share."""
    start = 0
    for number, size in enumerate(sizes):
        if number % 2 == 0:
            axes.axvspan(start - 0.5, start + size - 0.5, color=SHADE, linewidth=0, zorder=0)
        start += size
    axes.set_xlim(-0.5, start - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=1)
    axes.tick_params(axis="x", length=0)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    """Constants at the bottom of each bar, activations read and written on top of them."""
    constants = [float(row.cost.bytes_of_constants) for row in rows]
    activations = [float(row.cost.bytes_moved - row.cost.bytes_of_constants) for row in rows]
    axes.bar(range(len(rows)), constants, width=_bar(rows), color=CONSTANTS, label="weights", zorder=2)
    axes.bar(
        range(len(rows)),
        activations,
        width=_bar(rows),
        bottom=constants,
        color=ACTIVATIONS,
        label="activations",
        zorder=2,
    )
    _scale(axes, "bytes moved", "B")
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)


def _draw_work(axes: Axes, rows: Sequence[Row]) -> None:
    axes.bar(range(len(rows)), [float(row.cost.macs) for row in rows], width=_bar(rows), color=WORK, zorder=2)
    _scale(axes, "multiply-accumulates", "")


def _bar(rows: Sequence[Row]) -> float:
    """Few bars have gaps; many would dissolve in them."""
    return 0.6 if len(rows) < 16 else 0.8 if len(rows) < 120 else 1.0


def _scale(axes: Axes, label: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(EngFormatter(unit=unit))
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)


def _name_stages(axes: Axes, stages: Sequence[tuple[str, Sequence[Row]]]) -> None:
    """Above the upper panel; slanted where they would touch, and without those that would touch even then."""
    sizes = [len(part) for _, part in stages]
    letter = sum(sizes) / LETTERS_PER_PANEL
    middles = [end - (size + 1) / 2 for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
    names = [_short(name) for name, _ in stages]
    slanted = any(
        middles[i + 1] - middles[i] < (len(names[i]) + len(names[i + 1]) + 2) / 2 * letter
        for i in range(len(names) - 1)
    )
    named: list[float] = []
    for index in sorted(range(len(names)), key=lambda index: -sizes[index]):
        if slanted and any(abs(middles[index] - middle) < LETTERS_BETWEEN_SLANTED * letter for middle in named):
            continue
        named.append(middles[index])
        axes.annotate(
            names[index],
            (middles[index], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            rotation=35 if slanted else 0,
            rotation_mode="anchor",
            ha="left" if slanted else "center",
            va="bottom",
            fontsize=8,
        )


def _short(name: str) -> str:
    """The last part of a module's name if it says something by itself, such as "denseblock1"; of several the first."""
    first, _, others = name.partition(" … ")
    last = first.rpartition(".")[2]
    if last[:1].isdigit():
        return name
    return f"{last} …" if others else last


def _name_rows(axes: Axes, rows: Sequence[Row]) -> None:
    if len(rows) > NAMED_ROWS:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(rows)} layers in their order")
        return
    axes.set_xticks(range(len(rows)), [f"{row.name} {row.operators}" for row in rows])
    axes.tick_params(axis="x", labelsize=8, labelrotation=40)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
