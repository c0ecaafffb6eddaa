"""What is seen while stages run, and how lines are broken: on a terminal, and in a log."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys

import pytest

from edgewright import console

WATCHED = """
import time
from edgewright import console
from edgewright.workspace import StageRun
console.SECONDS_BEFORE_BAR = 0.5
with console.ConsoleObserver() as observer:
    for stage, seconds in (("quick", 0.1), ("[slow]", 1.5)):
        observer.started(stage)
        for step in range(10):
            observer.progressed(stage, step, 10)
            time.sleep(seconds / 10)
        observer.finished(StageRun(stage, seconds, False, "", ("first build",), {}))
"""
BAR = "━"
LINE = "note: [red]a line[/red] of so many words that a terminal of forty columns has to break it"
LISTED = f"""
from rich.table import Table
from edgewright import console
console.print_listing(lambda width: Table(), [{LINE!r}, "", "{"x" * 60}"])
"""


def on_terminal(code: str, terminal: str = "xterm", columns: int = 80) -> str:
    """What a program writes to both outputs if they are a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": terminal, "COLUMNS": str(columns), "LINES": "24"},
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # what Linux says when the last writer has closed a terminal
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_the_bar_waits_for_two_seconds() -> None:
    assert console.SECONDS_BEFORE_BAR == 2.0


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_slow_stage_has_a_bar_on_a_terminal(terminal: str) -> None:
    seen = on_terminal(WATCHED, terminal)
    before_slow, _, slow = seen.partition("quick")
    assert BAR not in before_slow
    assert (BAR in slow) == (terminal == "xterm")
    assert "[slow]" in slow, "brackets were taken for markup"
    if terminal == "dumb":
        assert [line.split()[0] for line in seen.splitlines()] == ["quick", "[slow]"]


def test_a_log_file_has_lines_only() -> None:
    process = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    assert [line.split() for line in process.stderr.splitlines()] == [
        ["quick", "0.1", "s"],
        ["[slow]", "1.5", "s"],
    ]


def test_no_bar_is_left_behind_by_an_error() -> None:
    observer = console.ConsoleObserver()
    with contextlib.suppress(KeyError), observer:
        observer.started("export")
        raise KeyError
    assert observer._bar is None


def test_on_a_terminal_lines_are_broken_between_words() -> None:
    lines = on_terminal(LISTED, columns=40).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("note:"))
    assert lines[start : start + 3] == [
        "note: [red]a line[/red] of so many words",
        "  that a terminal of forty columns has",
        "  to break it",
    ]
    assert lines[start + 3] == ""
    assert "x" * 60 in "".join(lines[start + 4 :]), "a path stays one, so that it can be copied"


def test_in_a_pipe_a_line_stays_one() -> None:
    environment = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run([sys.executable, "-c", LISTED], capture_output=True, text=True, env=environment)
    assert LINE in done.stdout.splitlines()
