"""Reuse by content, the lock, and folders that cannot be written."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright import workspace as module
from edgewright.runtime.errors import BuildError, WorkspaceError
from edgewright.runtime.files import write_json
from edgewright.workspace import FIRST_TIME, Observer, StageRun, Workspace, library_versions, machine, source_hash

PARTS = {"weights": "1", "opset": "19"}
KEY_FILE = "export.key.json"

HOLDER = """
import os, signal, sys
from pathlib import Path
from edgewright.runtime.files import write_bytes
from edgewright.workspace import Workspace

workspace = Workspace(Path(sys.argv[1]))

def make():
    write_bytes(workspace.path("out.bin"), b"of the killed run")
    (workspace.folder / ".partial-1234").write_bytes(b"half")
    print("made", flush=True)
    sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)

with workspace.locked():
    workspace.stage("export", {"weights": "1", "opset": "19"}, ("out.bin",), make)
"""


class Recorder(Observer):
    def __init__(self) -> None:
        self.started_stages: list[str] = []
        self.runs: list[StageRun] = []

    def started(self, stage: str) -> None:
        self.started_stages.append(stage)

    def finished(self, run: StageRun) -> None:
        self.runs.append(run)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "build", Recorder())


def run_stage(workspace: Workspace, content: bytes = b"content", parts: Mapping[str, str] = PARTS) -> StageRun:
    def make() -> dict[str, Any]:
        write_json(workspace.path("info.json"), [1])
        workspace.path("out.bin").write_bytes(content)
        return {"size": len(content), "shape": (1, None)}

    with workspace.locked():
        return workspace.stage("export", parts, ("out.bin", "info.json"), make)


def held_by_another(folder: Path, then: str = "wait") -> subprocess.Popen[str]:
    """A process that holds the lock of `folder`, in the middle of a stage, and then waits or kills itself."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), then], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# Reuse


def test_a_stage_is_made_once(workspace: Workspace) -> None:
    first, second = run_stage(workspace), run_stage(workspace, b"never written")
    assert (first.cached, first.changed) == (False, FIRST_TIME)
    assert (second.cached, second.changed) == (True, ())
    assert second.facts == {"size": 7, "shape": [1, None]}
    assert (second.key, second.seconds) == (first.key, first.seconds)
    assert workspace.path("out.bin").read_bytes() == b"content"


def test_the_observer_hears_of_both_but_a_start_only_of_the_first(workspace: Workspace) -> None:
    runs = [run_stage(workspace), run_stage(workspace)]
    assert isinstance(workspace.observer, Recorder)
    assert workspace.observer.started_stages == ["export"]
    assert workspace.observer.runs == runs


def test_the_observer_may_be_left_out(tmp_path: Path) -> None:
    assert not run_stage(Workspace(tmp_path)).cached


@pytest.mark.parametrize(
    ("parts", "changed"),
    [
        ({"weights": "2", "opset": "19"}, ("weights",)),
        ({"weights": "2", "opset": "20"}, ("opset", "weights")),
        ({"weights": "1"}, ("opset",)),
        ({"weights": "1", "opset": "19", "method": "mse"}, ("method",)),
    ],
)
def test_what_changed_is_named(workspace: Workspace, parts: dict[str, str], changed: tuple[str, ...]) -> None:
    before = run_stage(workspace)
    after = run_stage(workspace, b"new", parts)
    assert (after.cached, after.changed) == (False, changed)
    assert after.key != before.key
    assert workspace.path("out.bin").read_bytes() == b"new"


def test_the_order_of_the_parts_does_not_matter(workspace: Workspace) -> None:
    run_stage(workspace)
    assert run_stage(workspace, parts=dict(reversed(PARTS.items()))).cached


def test_time_stamps_do_not_matter(workspace: Workspace) -> None:
    run_stage(workspace)
    for path in workspace.folder.iterdir():
        os.utime(path, (0, 0))
    assert run_stage(workspace).cached


def test_the_place_of_the_folder_does_not_matter(workspace: Workspace, tmp_path: Path) -> None:
    run_stage(workspace)
    workspace.folder.rename(tmp_path / "moved")
    assert run_stage(Workspace(tmp_path / "moved")).cached


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "empty", "folder"])
def test_a_damaged_artefact_is_made_again_and_named(workspace: Workspace, damage: str) -> None:
    run_stage(workspace)
    path = workspace.path("out.bin")
    if damage in ("delete", "folder"):
        path.unlink()
    else:
        path.write_bytes({"truncate": b"conten", "flip": b"cOntent", "empty": b""}[damage])
    if damage == "folder":
        path.mkdir()
        with pytest.raises(WorkspaceError, match=r"cannot be written .*out\.bin"):
            run_stage(workspace)
        path.rmdir()
    run = run_stage(workspace)
    assert not run.cached
    assert run.changed == (("out.bin",) if damage != "folder" else FIRST_TIME)
    assert path.read_bytes() == b"content"
    assert run_stage(workspace).cached


def test_all_damaged_artefacts_are_named(workspace: Workspace) -> None:
    run_stage(workspace)
    workspace.path("info.json").unlink()
    workspace.path("out.bin").unlink()
    assert run_stage(workspace).changed == ("out.bin", "info.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"key"', '{"key": 1}', "\xff", "NaN"])
def test_a_damaged_key_file_is_named(workspace: Workspace, text: str) -> None:
    run_stage(workspace)
    workspace.path(KEY_FILE).write_text(text, encoding="latin-1")
    run = run_stage(workspace)
    assert (run.cached, run.changed) == (False, (KEY_FILE,))
    assert run_stage(workspace).cached


@pytest.mark.parametrize("field", ["schema", "key", "parts", "outputs", "seconds", "facts", "sha256"])
@pytest.mark.parametrize("value", ["x", {}, None])
def test_a_changed_key_file_is_not_believed(workspace: Workspace, field: str, value: object) -> None:
    run_stage(workspace)
    record = json.loads(workspace.path(KEY_FILE).read_text())
    workspace.path(KEY_FILE).write_text(json.dumps(record | {field: value}))
    assert run_stage(workspace).changed == (KEY_FILE,)


def test_what_failed_is_made_again_and_leaves_no_old_artefact(workspace: Workspace) -> None:
    run_stage(workspace)

    def fail() -> dict[str, Any]:
        raise BuildError("refused")

    with workspace.locked(), pytest.raises(BuildError):
        workspace.stage("export", {"weights": "2"}, ("out.bin", "info.json"), fail)
    assert [path.name for path in workspace.folder.iterdir()] == [".lock"]
    assert not run_stage(workspace).cached


def test_killed_between_artefact_and_key(workspace: Workspace) -> None:
    end(held_by_another(workspace.folder, "die"))
    assert workspace.path("out.bin").read_bytes() == b"of the killed run"
    run = run_stage(workspace)
    assert (run.cached, run.changed) == (False, FIRST_TIME)
    assert workspace.path("out.bin").read_bytes() == b"content"


def test_leftovers_of_killed_runs_are_removed(workspace: Workspace) -> None:
    end(held_by_another(workspace.folder, "die"))
    deep = workspace.folder / "engines" / ".partial-x"
    deep.parent.mkdir()
    deep.write_bytes(b"half")
    (workspace.folder / ".partial-bundle" / "graphs").mkdir(parents=True)
    with workspace.locked():
        left = [path for path in workspace.folder.rglob("*") if path.name.startswith(".partial-")]
    assert left == []


# The lock


def test_a_second_run_is_told_at_once(workspace: Workspace) -> None:
    other = held_by_another(workspace.folder)
    partial = workspace.path(".partial-1234")
    began = time.monotonic()
    with pytest.raises(WorkspaceError, match=r"another run is using .*build; wait for it"), workspace.locked():
        pytest.fail("both hold the lock")
    assert time.monotonic() - began < 1.0
    assert partial.exists(), "it belongs to the other run"
    end(other)


def test_a_killed_run_leaves_no_lock(workspace: Workspace) -> None:
    other = held_by_another(workspace.folder)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert not run_stage(workspace).cached
    end(other)


def test_the_lock_is_free_again_after_an_error(workspace: Workspace) -> None:
    with pytest.raises(KeyError), workspace.locked():
        raise KeyError
    with workspace.locked():
        pass


# Folders that cannot be written


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "build").write_text("not a folder")
    for folder in (tmp_path / "build", tmp_path / "build" / "model"):
        with pytest.raises(WorkspaceError, match=r"cannot be written .* choose another --build-dir"):
            run_stage(Workspace(folder))


@pytest.mark.parametrize("code", [28, 30, 13])
def test_a_file_system_that_refuses(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(WorkspaceError, match=os.strerror(code)):
        run_stage(workspace)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    order = ["mount", "-t", "tmpfs", "-o", "size=64k", "edgewright-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(order, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(mount: Path) -> None:
    workspace = Workspace(mount)

    def make(size: int) -> dict[str, Any]:
        write_json(workspace.path("out.json"), "x" * size)
        return {}

    with workspace.locked():
        workspace.stage("small", {}, ("out.json",), lambda: make(10))
        with pytest.raises(WorkspaceError, match=r"no space left to write .*out\.json; free some space"):
            workspace.stage("large", {}, ("out.json",), lambda: make(100_000))
    assert sorted(path.name for path in mount.iterdir()) == [".lock", "small.key.json"]
    with workspace.locked():
        assert workspace.stage("large", {}, ("out.json",), lambda: make(10)).changed == FIRST_TIME


def test_a_read_only_disk(mount: Path) -> None:
    run_stage(Workspace(mount))
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    with pytest.raises(WorkspaceError, match="Read-only file system"):
        run_stage(Workspace(mount))


# What keys are made of


def test_source_hash_follows_content_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "workspace.py"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    before = source_hash("a", "b.py")
    assert before == source_hash("a", "b.py")
    (tmp_path / "a" / "notes.txt").write_text("ignored")
    assert before == source_hash("a", "b.py")
    (tmp_path / "a" / "one.py").write_text("3")
    changed = source_hash("a", "b.py")
    (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "two.py")
    assert len({before, changed, source_hash("a", "b.py"), source_hash("a")}) == 4


def test_source_hash_refuses_what_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError):
        source_hash("optimize/misspelt.py")
    with pytest.raises(AssertionError, match="misspelt"):
        source_hash("misspelt")


def test_library_versions_leave_out_what_is_not_installed() -> None:
    assert library_versions("numpy", "no-such-thing") == f"numpy {np.__version__}"


def test_the_machine_is_its_processor_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(
        Path, "read_text", lambda path: "processor : 0\nmodel name\t: Cortex-A78AE: v2\nmodel name : other"
    )
    assert machine() == "Cortex-A78AE: v2, 6 cores"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(Path, "read_text", lambda path: "processor : 0\nFeatures : asimd")
    assert machine() == "aarch64, 6 cores"

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine() == "aarch64, 6 cores"
