"""Files that are whole or absent, whatever fails in between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgewright.runtime import files
from edgewright.runtime.errors import EdgewrightError, WorkspaceError
from edgewright.runtime.files import TEMPORARY_PREFIX, read_json, sha256_of, sha256_of_file, write_bytes, write_json

OLD, NEW = b"what was there before", b"new content" * 1000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# --- Hashes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_hash_of_bytes_pieces_and_file_is_that_of_hashlib(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    expected = hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(content) == expected
    assert sha256_of([content[:7], b"", content[7:]]) == expected
    assert sha256_of_file(tmp_path / "file") == expected
    assert sha256_of(content + b"!") != expected


# --- Writing -----------------------------------------------------------------------------------------------------


def test_bytes_are_written_into_new_folders_and_over_old_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    for content in (OLD, NEW, b""):
        write_bytes(path, content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", NEW)
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_content_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    sync, rename = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        log.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"sync {os.fstat(handle).st_size}")
        sync(handle)

    def noted_rename(source: Any, target: Any) -> None:
        assert Path(source).parent == Path(target).parent  # a rename across file systems would not be atomic
        log.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    write_bytes(tmp_path / "file", NEW)
    assert log == [f"sync {len(NEW)}", "rename", "sync folder"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_failure_in_any_step_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, step, failing(number))
    with pytest.raises(WorkspaceError):
        write_bytes(path, NEW)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interruption_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, NEW)
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


KILLED = """
import os, sys
from pathlib import Path
from edgewright.runtime.files import write_bytes
os.replace = lambda source, target: os.kill(os.getpid(), 9)
write_bytes(Path(sys.argv[1]), b"new")
"""


def test_a_kill_before_the_rename_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert ended.returncode == -9
    assert path.read_bytes() == OLD
    (leftover,) = set(names(tmp_path)) - {"file"}
    assert leftover.startswith(TEMPORARY_PREFIX)  # by which the next run knows and removes it


def test_readers_see_the_old_or_the_new_content_never_a_mixture(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([value]) * 300_000 for value in (1, 2)]
    write_bytes(path, contents[0])
    done = threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        while not done.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for index in range(20):
            write_bytes(path, contents[index % 2])
    finally:
        done.set()
        reader.join()
    assert seen
    assert set(seen) <= set(contents)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"no space left to write .*file; free some space"),
        (errno.EDQUOT, r"no space left to write .*file; free some space"),
        (errno.EROFS, r"cannot be written \(Read-only file system\); choose another --build-dir"),
        (errno.EACCES, r"cannot be written \(Permission denied\); choose another --build-dir"),
        (errno.EPERM, r"cannot be written \(Operation not permitted\); choose another"),
        (errno.EIO, r"cannot write .*file: Input/output error"),
    ],
)
def test_system_errors_are_explained_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(WorkspaceError, match=message) as caught:
        write_bytes(tmp_path / "file", NEW)
    assert isinstance(caught.value, EdgewrightError)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(OLD)
    with pytest.raises(WorkspaceError, match="cannot write"):
        write_bytes(tmp_path / "folder" / "file", NEW)
    assert (tmp_path / "folder").read_bytes() == OLD


def test_a_folder_where_the_file_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(WorkspaceError, match=r"cannot write .*file"):
        write_bytes(tmp_path / "file", NEW)
    assert names(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], check=False, capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk_keeps_the_old_content(small_disk: Path) -> None:
    path = small_disk / "file"
    write_bytes(path, OLD)
    with pytest.raises(WorkspaceError, match="no space left"):
        write_bytes(path, b"x" * 500_000)
    assert path.read_bytes() == OLD
    assert names(small_disk) == ["file"]
    write_bytes(path, NEW)  # the failed attempt left no space occupied
    assert path.read_bytes() == NEW


def test_a_really_read_only_disk_is_explained(small_disk: Path) -> None:
    write_bytes(small_disk / "file", OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(WorkspaceError, match="Read-only file system"):
        write_bytes(small_disk / "file", NEW)
    assert (small_disk / "file").read_bytes() == OLD


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(WorkspaceError, match="Permission denied"):
            write_bytes(tmp_path / "file", NEW)
    finally:
        tmp_path.chmod(0o700)


# --- JSON --------------------------------------------------------------------------------------------------------


def test_json_keeps_every_digit_and_every_letter(tmp_path: Path) -> None:
    content = {"é": [0.1, 1e-300, 2**53 + 1, None, True], "nested": {"x": "\n"}}
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json") == content
    assert (tmp_path / "file.json").read_bytes().endswith(b"\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_no_number_and_keeps_the_old_file(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "file.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": value})
    assert names(tmp_path) == ["file.json"]
    assert read_json(tmp_path / "file.json") == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"not json"])
def test_damaged_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"file\.json is not valid JSON .*remove it") as caught:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(caught.value)


def test_missing_json_and_a_folder_in_its_place_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(WorkspaceError, match=r"cannot read .*folder\.json: Is a directory"):
        read_json(tmp_path / "folder.json")


def test_json_is_what_the_standard_library_reads(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", [1, {"b": 2}])
    assert json.loads((tmp_path / "a.json").read_text()) == [1, {"b": 2}]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("status", [files.STATUS, Path("/nowhere")])
def test_the_umask_is_read_and_where_linux_says_it_never_changed(
    mask: int, status: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the whole process's: what another thread made in that moment, everybody could write."""
    before, change = os.umask(mask), os.umask
    changed: list[int] = []

    def noted(mask: int) -> int:
        changed.append(mask)
        return change(mask)

    try:
        monkeypatch.setattr(files, "STATUS", status)
        monkeypatch.setattr(os, "umask", noted)
        assert files.umask() == mask
    finally:
        change(before)
    assert changed == ([] if status.exists() else [0, mask])
