"""The learning curve: one row for each epoch, as CSV and as an SVG picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edgewright.runtime.files import write_bytes

__all__ = ["CurveRow", "curve_csv", "curve_figure", "curve_files", "curve_svg", "write_curve"]

TRAIN, TEST, RATE = "#9aa5b1", "#0b6e99", "#c77d2e"
MARGINS = {"left": 0.05, "right": 0.985, "bottom": 0.115, "top": 0.845, "wspace": 0.17, "hspace": 0.5}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7b8794",
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": "#1f2933",
    "axes.labelcolor": "#52606d",
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "edgewright",  # names of elements that do not change from run to run
    "svg.fonttype": "none",  # text stays text
}


@dataclass(frozen=True)
class CurveRow:
    """What one epoch gave.

    * epoch: from 1; images: seen since the start
    * learning_rate: of the epoch's last step; loss: mean over the epoch's steps, of the network as it was in each
    * train_top1: of the (augmented) training images as they came, a fraction; test_top1: of the 10,000 test images
      after the epoch, a fraction
    * seconds: spent in epochs and the tests after them since the start; resizing the images beforehand, writing files
      and the time between an interruption and the resumption are left out
    """

    epoch: int
    images: int
    learning_rate: float
    loss: float
    train_top1: float
    test_top1: float
    seconds: float


def curve_files(checkpoint: Path) -> tuple[Path, Path]:
    """Where the curve of a checkpoint goes: the CSV and the SVG file beside it."""
    return checkpoint.with_suffix(".csv"), checkpoint.with_suffix(".svg")


def write_curve(checkpoint: Path, rows: Sequence[CurveRow], title: str) -> None:
    """Writes both files beside `checkpoint`; without rows, the header of the CSV alone.

    Raises `WorkspaceError` if the folder cannot be written.
    """
    table, picture = curve_files(checkpoint)
    write_bytes(table, curve_csv(rows).encode())
    if rows:
        write_bytes(picture, curve_svg(rows, title))


def curve_csv(rows: Sequence[CurveRow]) -> str:
    """A header and a line for each row; numbers keep all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CurveRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def curve_svg(rows: Sequence[CurveRow], title: str) -> bytes:
    """Top-1, loss and learning rate over the epochs, of one row at least; the same rows give the same bytes."""
    picture = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a person has set for other pictures
        mpl.rcParams.update(STYLE)
        curve_figure(rows, title).savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    return picture.getvalue()


def curve_figure(rows: Sequence[CurveRow], title: str) -> Figure:
    """The picture that `curve_svg` writes, in the present style of matplotlib."""
    figure = Figure(figsize=(9.0, 4.0))
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), height_ratios=(3, 2), **MARGINS)
    accuracy, loss, rate = (figure.add_subplot(grid[place]) for place in ((slice(None), 0), (0, 1), (1, 1)))
    epochs = [row.epoch for row in rows]
    train, test = ([100 * value for value in values] for values in _accuracies(rows))
    _draw_line(accuracy, epochs, train, TRAIN, "training images")
    _draw_line(accuracy, epochs, test, TEST, "test images")
    _draw_line(loss, epochs, [row.loss for row in rows], TRAIN, "")
    _draw_line(rate, epochs, [row.learning_rate for row in rows], RATE, "")
    for axes, text in ((accuracy, "top-1 in %"), (loss, "training loss"), (rate, "learning rate at the epoch's end")):
        axes.set_title(text, loc="left")
        axes.set_xlim(0.5, len(rows) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter("{x:g}")
    accuracy.set_xlabel("epoch")
    rate.set_xlabel("epoch")
    accuracy.legend(loc="lower right")
    title = f"{title}: {test[-1]:.2f} % of the test images after epoch {epochs[-1]}"
    figure.suptitle(title, x=0.05, y=0.98, ha="left")
    return figure


def _accuracies(rows: Sequence[CurveRow]) -> tuple[list[float], list[float]]:
    return [row.train_top1 for row in rows], [row.test_top1 for row in rows]


def _draw_line(axes: Axes, epochs: Sequence[int], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(epochs, values, color=colour, label=label, marker="o", markersize=3.5, clip_on=False)
