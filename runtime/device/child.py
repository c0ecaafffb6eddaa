"""Builds and self-tests run in processes of their own: what runs out of memory or crashes there ends no other work.

The child gets one line of JSON on stdin and answers with one document on stdout. It lives no longer than its parent:
it ends when the pipe of its stdin closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from .. import errors
from ..errors import BuildError, EdgewrightError
from .memory import least_available, memory_here, resident_memory

__all__ = ["answer_of", "result_of"]

POLL_SECONDS = 0.2
LONGEST_ANSWER = 1 << 26  # bytes
LONGEST_WORDS = 300  # characters of what a child that failed said last
START = (
    "import sys; sys.path[:] = sys.argv[2:]; import importlib; sys.exit(importlib.import_module(sys.argv[1]).main())"
)
"""As `python -m`, but with the path of this process: -m would look for modules in the current folder first."""
LESS_MEMORY = (
    "close other programs, add swap, give a lower --workspace, or pack the bundle with a smaller largest batch"
)


def answer_of(request: Mapping[str, Any], purpose: str, *, floor: int | None = None) -> dict[str, Any]:
    """What a new process answers to `request`.

    * purpose: what it does, for errors, such as "the build of tensorrt int8"
    * floor: bytes of memory that must stay available, None for `least_available`; below it the process is ended

    No limit is put on its address space (RLIMIT_AS): CUDA reserves addresses far beyond the memory that it uses, and
    does not start with one.
    Raises the error of our own that the process reports; `BuildError` if it ran out of memory, crashed, or said
    something else.
    """
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as words:
        process = _started(answers, words, purpose)
        try:
            _send(process, request)
            _watch(process, purpose, floor)
        finally:  # Ctrl-C too
            _end(process)
        return result_of(_head(answers), process.returncode, purpose, _last_line(words))


def _started(answers: IO[bytes], words: IO[bytes], purpose: str) -> subprocess.Popen[bytes]:
    module = f"{__package__}.worker"  # where this folder was copied into another product, its name there
    try:
        return subprocess.Popen(
            [sys.executable, "-c", START, module, *sys.path],
            stdin=subprocess.PIPE,
            stdout=answers,
            stderr=words,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the child
        )
    except OSError as error:
        raise BuildError(f"{purpose} cannot be started: {sys.executable}: {error.strerror or error}") from error


def _send(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is gone already; its exit code says more
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()


def _watch(process: subprocess.Popen[bytes], purpose: str, floor: int | None) -> None:
    """Waits for the end. Raises `BuildError` if memory falls under the floor."""
    while True:
        memory = memory_here()
        if memory is not None:
            kept = least_available(memory) if floor is None else floor
            if memory.available < kept:
                raise BuildError(
                    f"{purpose} was ended, because only {_megabytes(memory.available)} of this device's memory were "
                    f"still available, less than the {_megabytes(kept)} that must stay; it held "
                    f"{_megabytes(resident_memory(process.pid))}",
                    LESS_MEMORY,
                )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def result_of(answer: bytes, code: int, purpose: str, last_line: str) -> dict[str, Any]:
    """What a process answered that ended with `code`, negative for a signal. Raises as `answer_of`."""
    if code < 0:
        raise _ended_by(-code, purpose, last_line)
    document = _document(answer)
    if code == 0 and isinstance(document.get("result"), dict):
        result: dict[str, Any] = document["result"]
        return result
    if code == 0 and {"error", "message", "remedy"} <= document.keys():
        raise _error_named(document["error"])(document["message"], document["remedy"])
    raise BuildError(f"{purpose} ended with code {code} and without an answer{_said(last_line)}")


def _ended_by(number: int, purpose: str, last_line: str) -> BuildError:
    if number == signal.SIGKILL:
        return BuildError(
            f"{purpose} was killed; where nobody did that, the kernel did, because memory ran out", LESS_MEMORY
        )
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return BuildError(f"{purpose} crashed ({name}){_said(last_line)}")


def _error_named(kind: str) -> type[EdgewrightError]:
    found = getattr(errors, kind, None) if kind in errors.__all__ else None
    return found if isinstance(found, type) and issubclass(found, EdgewrightError) else BuildError


def _document(answer: bytes) -> dict[str, Any]:
    try:
        document = json.loads(answer)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _head(stream: IO[bytes]) -> bytes:
    stream.seek(0)
    return stream.read(LONGEST_ANSWER)


def _last_line(stream: IO[bytes]) -> str:
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - (1 << 16)))
    lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip()[:LONGEST_WORDS] for line in reversed(lines) if line.strip()), "")


def _said(last_line: str) -> str:
    return f"; it said last: {last_line}" if last_line else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
