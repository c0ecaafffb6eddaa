"""What is seen while the stages run: a line per stage, a bar for anything that takes more than two seconds.

All of it goes to stderr; stdout is for results.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from edgewright.outcome import Outcome
from edgewright.report import engine_table, remarks
from edgewright.stage_text import stage_details, stage_line
from edgewright.verdict_report import outcome_evidence, verdict_line
from edgewright.workspace import Observer, StageRun

__all__ = ["ConsoleObserver", "Detail", "print_audit", "print_listing", "print_outcome"]

SECONDS_BEFORE_BAR = 2.0
LABEL_WIDTH = 29  # columns
INDENT = 2  # columns
WIDEST_TABLE = 200  # columns; wider than any figures can make it


Detail = Literal["quiet", "usual", "verbose"]


class ConsoleObserver(Observer):
    """Prints to stderr. Use it in a `with`, so that no bar is left behind.

    * detail: "quiet" prints nothing, "usual" a line per stage, "verbose" also what its passes did
    * label_width: what a bar leaves for the name of its stage, in columns
    """

    def __init__(self, detail: Detail = "usual", label_width: int = LABEL_WIDTH) -> None:
        self._detail, self._label_width = detail, label_width
        self._console = Console(stderr=True, highlight=False)
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
        if self._detail == "quiet":
            return
        self._bar = _DelayedBar(self._console, stage, self._label_width)

    def progressed(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Moves the bar."""
        if self._detail == "quiet":
            return
        if self._bar is None:
            self._bar = _DelayedBar(self._console, stage, self._label_width)
        self._bar.move(done, total, text)

    def finished(self, run: StageRun) -> None:
        """Replaces the bar by a line."""
        self._remove_bar()
        if self._detail != "quiet":
            _print_lines(self._console, [stage_line(run)])
        if self._detail == "verbose":
            _print_lines(self._console, [f"      {sentence}" for sentence in stage_details(run)], style="dim")

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


def print_outcome(outcome: Outcome, folder: Path, detail: Detail = "usual") -> None:
    """The table, the remarks, the numbers behind the verdict, and its line, on stdout; `detail` "quiet": only that."""
    if detail != "quiet":
        _print_table(outcome)
    _print_lines(Console(highlight=False), [verdict_line(outcome, str(folder))], style="bold")


def _print_table(outcome: Outcome) -> None:
    console = Console(highlight=False)
    table = engine_table(outcome)
    wanted = console.measure(table, options=console.options.update(width=WIDEST_TABLE)).maximum
    console.width = max(console.width, wanted)  # a narrow terminal wraps the lines; figures are never cut off
    console.print(table)
    console.print()
    _print_lines(Console(highlight=False), [*remarks(outcome), *outcome_evidence(outcome)])


def print_audit(table: Table, line: str) -> None:
    """The kernels of an engine and what they come to, on stdout."""
    console = Console(highlight=False)
    console.print(table)
    console.print()
    _print_lines(Console(highlight=False), [line], style="bold")


def print_listing(table_within: Callable[[int], Table], lines: Iterable[str]) -> None:
    """A table made for the width of the terminal in columns, and lines below it, on stdout."""
    console = Console(highlight=False)
    console.print(table_within(console.width))
    console.print()
    _print_lines(Console(highlight=False), lines)


def _print_lines(console: Console, lines: Iterable[str], style: str | None = None) -> None:
    """Wrapped between words on a terminal, with what follows indented; in a log and in a pipe a line stays one."""
    for line in lines:
        within = _wrapped(line, console.width) if console.is_terminal else [line]
        for part in within:
            console.print(part, markup=False, soft_wrap=True, style=style)


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + INDENT)
    found = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return found or [line]
