"""The process that does one task: reads the request from stdin, answers on stdout, and ends.

Whatever the libraries print goes to stderr, so that the answer is all of stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from ..errors import BuildError, EdgewrightError
from .tasks import TASKS

__all__ = ["answer", "main"]

STDIN, STDOUT, STDERR = 0, 1, 2


def main() -> int:
    """Entry point of the process."""
    answers = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    content = json.dumps(answer(request), allow_nan=False)
    with os.fdopen(answers, "w") as stream:
        stream.write(content)
    return 0


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The task's result, or the error that it ended in."""
    try:
        return {"result": TASKS[request["task"]].from_json(request).run()}
    except EdgewrightError as error:
        return _document(type(error).__name__, error)
    except MemoryError:
        return _document("BuildError", BuildError("memory ran out", "close other programs, or add swap"))
    except Exception as error:  # of a library: what it raises is not known, and the parent explains it
        traceback.print_exc()
        words = " ".join(str(error).split()) or "without a word"
        return _document("BuildError", BuildError(f"{type(error).__name__}: {words}"))


def _document(kind: str, error: EdgewrightError) -> dict[str, Any]:
    return {"error": kind, "message": error.message, "remedy": error.remedy}


def _end_with_parent() -> None:
    """The parent holds the other end of stdin for as long as it lives, and sends nothing more."""
    os.read(STDIN, 1)
    os._exit(1)
