"""The command line, run in this process or as a process of its own, and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DRIVER", "Command", "Completed", "run_process"]

DRIVER = Path(__file__).with_name("tiny_network.py")


@dataclass(frozen=True)
class Completed:
    """The exit code and all output of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout; fails if there is anything else."""
        document: dict[str, Any] = json.loads(self.out)
        return document

    @property
    def error(self) -> str:
        """The one line that says what is wrong; fails if the command ended in another way."""
        assert self.code == 1, self
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("error: ")


Command = Callable[..., Completed]


def run_process(*arguments: object, **environment: str) -> Completed:
    """The command as a process of its own, with the tiny networks in its registry."""
    process = subprocess.run(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Completed(process.returncode, process.stdout, process.stderr)
