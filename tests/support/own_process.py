"""A pytest plugin: tests marked `host_cuda` run in a process of their own, in which `libcuda.so.1` is the fake.

A library that was loaded once stays, and torch would find it: so a second pytest is started at the first such test. It
runs the tests it is told to, one by one, and sends back their reports, which are passed on as if they had run here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from typing import Any

import pytest

import host_cuda

__all__ = ["is_child"]

MARK = "host_cuda"
CHANNEL = "EDGEWRIGHT_TEST_CHANNEL"
"""Environment variable of the child: the number of the file descriptor on which it hears and answers."""
LONGEST_OUTPUT = 4000  # characters of what a child that died wrote


def is_child() -> bool:
    """Whether this is the process for the tests marked `host_cuda`."""
    return CHANNEL in os.environ


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Child(config) if is_child() else _Parent(), "own_process_side")


class _Parent:
    """Passes on what the child reports; starts it when the first test needs it, and again after one that it died of."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._process: _Process | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marked = [item for item in items if item.get_closest_marker(MARK)]
        self._files = list(dict.fromkeys(item.nodeid.split("::")[0] for item in marked))
        if host_cuda.COMPILER is None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no C compiler for the host-memory CUDA driver"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not item.get_closest_marker(MARK) or host_cuda.COMPILER is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in [*self._reports(item, nextitem), *_left_over(item, nextitem)]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self) -> None:
        if self._process is not None:
            self._process.close()

    def _reports(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        reports: list[pytest.TestReport] = []

        def receive() -> None:
            for data in self._answer(item, nextitem):
                reports.append(item.config.hook.pytest_report_from_serializable(config=item.config, data=data))

        call = pytest.CallInfo.from_call(receive, "call", reraise=KeyboardInterrupt)
        return reports if call.excinfo is None else [pytest.TestReport.from_item_and_call(item, call)]

    def _answer(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[dict[str, Any]]:
        if self._process is None:
            self._process = _Process(item.config, self._files)
        marked = nextitem is not None and nextitem.get_closest_marker(MARK)
        reports = self._process.reports(item.nodeid, nextitem.nodeid if nextitem and marked else None)
        if reports is None:
            output, self._process = self._process.close(), None
            pytest.fail(f"the process of this test died of it:\n{output}", pytrace=False)
        return reports


def _left_over(item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
    """Tears down what tests before this one kept for it here; the report of it if that fails."""
    call = pytest.CallInfo.from_call(lambda: item.session._setupstate.teardown_exact(nextitem), "teardown")
    return [] if call.excinfo is None else [pytest.TestReport.from_item_and_call(item, call)]


class _Process:
    """The second pytest, seen from the first."""

    def __init__(self, config: pytest.Config, files: list[str]) -> None:
        self._channel, channel = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        libraries = [str(host_cuda.library_folder()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        self._process = subprocess.Popen(
            # --capture=sys: what C code writes, such as why it aborts, goes to the file
            [sys.executable, __file__, "-p", "no:cacheprovider", "--capture=sys", *files],
            cwd=config.rootpath,
            env={**os.environ, CHANNEL: str(channel.fileno()), "LD_LIBRARY_PATH": ":".join(libraries)},
            pass_fds=[channel.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        channel.close()

    def reports(self, test: str, following: str | None) -> list[dict[str, Any]] | None:
        """Of the test, which it runs now; None if it died."""
        try:
            self._channel.send((test, following))
            reports: list[dict[str, Any]] = self._channel.recv()
        except (EOFError, OSError):
            return None
        return reports

    def close(self) -> str:
        """Waits until it has ended; the end of what it wrote."""
        self._channel.close()
        code = self._process.wait()
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        self._output.close()
        return f"{text[-LONGEST_OUTPUT:]}\nexit code {code}"


class _Child:
    """The second pytest: runs the tests whose names it receives."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        descriptor = int(os.environ[CHANNEL])
        os.set_inheritable(descriptor, False)
        self._channel = Connection(descriptor)
        self._reports: list[dict[str, Any]] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        while True:
            try:
                test, following = self._channel.recv()
            except EOFError:
                return True
            self._reports = []
            self._config.hook.pytest_runtest_protocol(item=items[test], nextitem=items.get(following))
            self._channel.send(self._reports)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._reports.append(hook.pytest_report_to_serializable(config=self._config, report=report))


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:]))
