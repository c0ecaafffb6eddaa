"""The learning curve: the CSV holds every digit, the picture every point."""

from __future__ import annotations

import csv
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.lines import Line2D

from edgewright.curve import CurveRow, curve_csv, curve_figure, curve_files, curve_svg, write_curve
from edgewright.runtime.errors import WorkspaceError

ROWS = (
    CurveRow(1, 60000, 0.1 + 0.2, 1 / 3, 0.5, 0.6, 12.25),
    CurveRow(2, 120000, 4e-9, 0.25, 0.75, 0.7004, 25.5),
    CurveRow(3, 180000, 1e-3, 0.2, 0.8, 0.71234, 36.0),
)
SVG = "{http://www.w3.org/2000/svg}"


def points(line: Line2D, axis: str) -> list[float]:
    values: list[float] = np.asarray(line.get_xdata() if axis == "x" else line.get_ydata()).tolist()
    return values


def test_the_csv_gives_the_rows_back() -> None:
    lines = curve_csv(ROWS).splitlines()
    assert lines[0] == "epoch,images,learning_rate,loss,train_top1,test_top1,seconds"
    assert len(lines) == 4
    read = [
        CurveRow(int(row.pop("epoch")), int(row.pop("images")), **{name: float(text) for name, text in row.items()})
        for row in csv.DictReader(lines)
    ]
    assert tuple(read) == ROWS


def test_the_svg_is_well_formed_and_says_what_came_out() -> None:
    root = ElementTree.fromstring(curve_svg(ROWS, "lenet <1> & co"))
    assert root.tag == f"{SVG}svg"
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "lenet <1> & co: 71.23 % of the test images after epoch 3" in words
    assert {"top-1 in %", "training loss", "training images", "test images"} <= set(words)


@pytest.mark.parametrize("count", [1, 3])
def test_the_picture_draws_every_row(count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracy, loss, rate = curve_figure(ROWS[:count], "a").axes
        curve_svg(ROWS[:count], "a")
    train, test = accuracy.lines
    assert points(test, "y") == [100 * row.test_top1 for row in ROWS[:count]]
    assert points(train, "y") == [100 * row.train_top1 for row in ROWS[:count]]
    assert points(loss.lines[0], "y") == [row.loss for row in ROWS[:count]]
    assert points(rate.lines[0], "y") == [row.learning_rate for row in ROWS[:count]]
    assert all(points(line, "x") == list(range(1, count + 1)) for axes in (accuracy, loss, rate) for line in axes.lines)


def test_the_same_rows_give_the_same_bytes_and_others_do_not() -> None:
    assert curve_svg(ROWS, "a") == curve_svg(ROWS, "a")
    assert curve_svg(ROWS, "a") != curve_svg((*ROWS[:2], replace(ROWS[2], test_top1=0.6)), "a")


def test_the_settings_of_others_neither_matter_nor_change() -> None:
    expected = curve_svg(ROWS, "a")
    with mpl.rc_context({"lines.linewidth": 9.0, "font.size": 20.0}):
        before = dict(mpl.rcParams)
        assert curve_svg(ROWS, "a") == expected
        assert dict(mpl.rcParams) == before


def test_the_files_stand_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "new" / "net.v2.safetensors"
    table, picture = curve_files(checkpoint)
    assert (table, picture) == (checkpoint.parent / "net.v2.csv", checkpoint.parent / "net.v2.svg")
    write_curve(checkpoint, (), "a")
    assert table.read_text() == curve_csv(())
    assert not picture.exists()
    write_curve(checkpoint, ROWS, "a")
    assert table.read_text() == curve_csv(ROWS)
    assert picture.read_bytes() == curve_svg(ROWS, "a")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match=r"cannot write .*file/net\.csv"):
        write_curve(tmp_path / "file" / "net.safetensors", (), "a")
