"""What TensorRT says while it works, kept: its Python calls return None or False, the reason is in the log alone."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

__all__ = ["Log", "logger_of", "one_line", "recorded"]

# A build ahead of time needs no driver, but each error is followed by the complaint that there is none.
NO_DRIVER = re.compile(r"\(cudaError 35:|catchCudaError")
# The parser's errors are asked for one by one, with the node's name; the log repeats them in four lines each.
PARSER_ECHO = re.compile(r"^(ModelImporter\.cpp:|In node )")


@dataclass
class Log:
    """What was said during one recording: errors, and the details, among which a builder lists an engine's layers."""

    errors: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def cause(self, *, without_driver: bool = False) -> str:
        """The errors in one line, each once, "" if there was none; `without_driver` drops those about a missing GPU."""
        said = (one_line(error) for error in self.errors if not PARSER_ECHO.match(error))
        kept = [text for text in said if not (without_driver and NO_DRIVER.search(text))]
        return "; ".join(dict.fromkeys(kept))


@contextmanager
def recorded(trt: ModuleType) -> Iterator[Log]:
    """Keeps what `trt` logs inside the `with`; what happens at the same time in other threads comes along."""
    log = Log()
    logger = logger_of(trt)
    logger.keep(log)
    try:
        yield log
    finally:
        logger.drop(log)


@functools.cache
def logger_of(trt: ModuleType) -> Any:
    """What builders, parsers and runtimes are made with: the one logger of this process and package, kept for good.

    TensorRT keeps the first logger it is given, for all builders and runtimes, and its objects call it when they are
    freed: a second one would be ignored, and a freed one called.
    """

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # the package is known at run time only
        """Passes on to those that record."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # what pybind11 asks for, instead of super()
            self._logs: tuple[Log, ...] = ()
            self._lock = threading.Lock()

        def keep(self, log: Log) -> None:
            with self._lock:
                self._logs = (*self._logs, log)

        def drop(self, log: Log) -> None:
            with self._lock:
                self._logs = tuple(other for other in self._logs if other is not log)

        def log(self, severity: Any, text: str) -> None:
            """Called by TensorRT, from any thread; must not raise."""
            for log in self._logs:
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    log.errors.append(text)
                elif severity == trt.ILogger.Severity.VERBOSE:
                    log.details.append(text)

    return Logger()


def one_line(text: str) -> str:
    """The text without line breaks; our errors have one line."""
    return " ".join(text.split())
