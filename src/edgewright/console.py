"""What is seen while the stages run: a line per stage, a bar for anything that takes more than two seconds.

All of it goes to stderr; stdout is for results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from edgewright.outcome import Outcome
from edgewright.report import engine_table, remarks, stage_line
from edgewright.verdict_report import outcome_evidence, verdict_line
from edgewright.workspace import Observer, StageRun

__all__ = ["ConsoleObserver", "print_audit", "print_listing", "print_outcome"]

SECONDS_BEFORE_BAR = 2.0
LABEL_WIDTH = 29  # columns
WIDEST_TABLE = 200  # columns; wider than any figures can make it


class ConsoleObserver(Observer):
    """Prints to stderr. Use it in a `with`, so that no bar is left behind.

    `label_width` is what a bar leaves for the name of its stage, in columns.
    """

    def __init__(self, label_width: int = LABEL_WIDTH) -> None:
        self._label_width = label_width
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: _DelayedBar | None = None

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_bar()

    def started(self, stage: str) -> None:
        """Begins to wait for the bar."""
        self._remove_bar()
        self._bar = _DelayedBar(self._console, stage, self._label_width)

    def progressed(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Moves the bar."""
        if self._bar is None:
            self._bar = _DelayedBar(self._console, stage, self._label_width)
        self._bar.move(done, total, text)

    def finished(self, run: StageRun) -> None:
        """Replaces the bar by a line."""
        self._remove_bar()
        self._console.print(stage_line(run, _note(run)), markup=False)

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bar.remove()
            self._bar = None


class _DelayedBar:
    """A progress bar that appears after two seconds, so that quick stages leave no flicker."""

    def __init__(self, console: Console, stage: str, label_width: int) -> None:
        self._progress = Progress(
            TextColumn(f"  {{task.description:<{label_width}}}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_interactive,  # in a log file a bar is a blank line
        )
        self._task: TaskID = self._progress.add_task(stage, total=None, text="")
        self._lock = threading.Lock()
        self._removed = False
        self._timer = threading.Timer(SECONDS_BEFORE_BAR, self._show)
        self._timer.daemon = True
        self._timer.start()

    def move(self, done: int, total: int, text: str) -> None:
        self._progress.update(self._task, completed=done, total=total, text=text)

    def remove(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._removed = True
            self._progress.stop()

    def _show(self) -> None:
        with self._lock:
            if not self._removed:
                self._progress.start()


def print_outcome(outcome: Outcome, folder: Path) -> None:
    """The table, the remarks, the numbers behind the verdict and the verdict line, on stdout."""
    console = Console(highlight=False)
    table = engine_table(outcome)
    wanted = console.measure(table, options=console.options.update(width=WIDEST_TABLE)).maximum
    console.width = max(console.width, wanted)  # a narrow terminal wraps the lines; figures are never cut off
    console.print(table)
    console.print()
    plain = Console(highlight=False, soft_wrap=True)
    for line in (*remarks(outcome), *outcome_evidence(outcome)):
        plain.print(line, markup=False)
    plain.print(verdict_line(outcome, str(folder)), markup=False, style="bold")


def print_audit(table: Table, line: str) -> None:
    """The kernels of an engine and what they come to, on stdout."""
    console = Console(highlight=False)
    console.print(table)
    console.print()
    Console(highlight=False, soft_wrap=True).print(line, markup=False, style="bold")


def print_listing(table_within: Callable[[int], Table], lines: Iterable[str]) -> None:
    """A table made for the width of the terminal in columns, and lines below it, on stdout."""
    console = Console(highlight=False)
    console.print(table_within(console.width))
    console.print()
    plain = Console(highlight=False, soft_wrap=True)
    for line in lines:
        plain.print(line, markup=False)


def _note(run: StageRun) -> str:
    """What a stage says beside its seconds."""
    facts: Mapping[str, Any] = run.facts
    if run.name == "fold":
        left = f", {len(facts['skipped'])} left" if facts["skipped"] else ""
        return f"{facts['folded']} batch norms folded{left}, differs by {facts['difference']:.0e}"
    if run.name == "calibrate":
        return f"{facts['images']} images, {facts['tensors']} activations"
    if run.name == "cast fp16":
        kept = f", {len(facts['fp32'])} of {facts['nodes']} nodes stay fp32" if facts["fp32"] else ""
        return f"{facts['casts']} casts{kept}"
    if run.name.startswith("place"):
        return f"INT8 does not pay in {len(facts['left_out'])} of {facts['layers']} layers" if facts["left_out"] else ""
    if run.name.startswith("quantize"):
        rungs = f": {', '.join(facts['rungs'])}" if facts["int8_layers"] else ""
        return f"{facts['int8_layers']} of {facts['layers']} layers to INT8{rungs}"
    if run.name.startswith("build"):
        counts = ", ".join(f"{count} × {precision}" for precision, count in facts["actual"].items())
        return counts if facts["share"] > 0.995 else f"{counts} ({100 * facts['share']:.0f} % of the work)"
    return ""
