"""The plugin that runs tests marked `host_cuda` in a process of their own: what such a run looks like from outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[2] / "support"
SETTINGS = f"""
[pytest]
pythonpath = {SUPPORT}
markers = host_cuda: in the other process
addopts = --strict-markers --import-mode=importlib
"""
TESTS = """
import os
from pathlib import Path

import pytest

other = pytest.mark.host_cuda
LOG = Path(__file__).with_name("log")


def note(what):
    with LOG.open("a") as file:
        print(what, os.getpid(), file=file)


@pytest.fixture(scope="module")
def shared():
    note("setup")
    yield
    note("teardown")


def test_here():
    note("here")


@other
@pytest.mark.parametrize("text", ["a::b", "c d", "[e]"])
def test_passes(shared, text):
    note("there")
    assert "edgewright-tests" in os.environ["LD_LIBRARY_PATH"]


@other
def test_skips():
    pytest.skip("for a reason")


@other
@pytest.mark.xfail
def test_is_expected_to_fail():
    raise KeyError


@other
def test_fails():
    print("what it printed")
    assert [1, 2] == [1, 3]


@other
def test_dies():
    os.write(2, b"last words")
    os._exit(7)


@other
def test_comes_after():
    note("there")


def test_here_again():
    note("here")
"""

EARLIER_TESTS = """
import pytest


@pytest.fixture(scope="module")
def kept():
    yield
    with open("log", "a") as file:
        print("end of the module", file=file)


def test_here(kept):
    pass


@pytest.mark.host_cuda
def test_there():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler for the host-memory CUDA driver")
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["own_process"]\n')
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def run(project: Path, *arguments: str) -> str:
    command = [sys.executable, str(SUPPORT / "own_process.py"), "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    return done.stdout


def noted(project: Path) -> list[tuple[str, str]]:
    """What was noted, in which process."""
    return [(line.split()[0], line.split()[1]) for line in (project / "log").read_text().splitlines()]


def test_reports_arrive_as_if_the_tests_had_run_here(project: Path) -> None:
    out = run(project, "-rA", "--durations=0", "-vv")
    assert re.search(r"2 failed, 6 passed, 1 skipped, 1 xfailed in ", out)
    assert "test_it.py::test_passes[a::b] PASSED" in out
    assert "assert [1, 2] == [1, 3]" in out
    assert "what it printed" in out
    assert re.search(r"SKIPPED \[1\] test_it.py:\d+: for a reason", out)
    assert re.search(r"\d\.\d\ds call +test_it.py::test_fails", out)
    assert re.search(r"the process of this test died of it:\n(.*\n)*.*last words\n(.*\n)*exit code 7", out)


def test_one_other_process_serves_until_it_dies(project: Path) -> None:
    run(project)
    log = noted(project)
    assert [what for what, _ in log] == ["here", "setup", "there", "there", "there", "there", "here"]
    here, first, second = log[0][1], log[1][1], log[5][1]
    assert [process for _, process in log] == [here, first, first, first, first, second, here]
    assert len({here, first, second}) == 3


def test_fixtures_of_a_module_that_ends_elsewhere_are_torn_down(project: Path) -> None:
    (project / "test_earlier.py").write_text(EARLIER_TESTS)
    assert "3 passed" in run(project, "test_earlier.py", "test_it.py::test_here")
    assert [line.split()[0] for line in (project / "log").read_text().splitlines()] == ["end", "here"]


@pytest.mark.parametrize(
    ("arguments", "summary"),
    [
        (("-x",), "1 failed, 4 passed, 1 skipped, 1 xfailed"),
        (("-k", "passes and a::b or test_here_again"), "2 passed, 8 deselected"),
        (("test_it.py::test_passes[a::b]",), "1 passed"),
        (("-m", "not host_cuda"), "2 passed, 8 deselected"),
        (
            ("-p", "xdist", "--numprocesses=2", "--deselect=test_it.py::test_dies"),
            "1 failed, 6 passed, 1 skipped, 1 xfailed",
        ),
    ],
)
def test_choosing_tests(arguments: tuple[str, ...], summary: str, project: Path) -> None:
    out = run(project, *arguments)
    assert re.search(rf"^[= ]*{summary} in ", out, re.MULTILINE), out
    teardowns = [what for what, _ in noted(project) if what == "teardown"]
    setups = [what for what, _ in noted(project) if what == "setup"]
    assert teardowns == ["teardown"] * len(setups)


def test_the_other_process_starts_light() -> None:
    code = """if True:
        import importlib, sys
        import conftest
        for name in conftest.pytest_plugins:
            importlib.import_module({"pytester": "_pytest.pytester"}.get(name, name))
        print(sorted({"torch", "onnx", "onnxruntime"} & set(sys.modules)))
    """
    environment = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{SUPPORT.parent}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
