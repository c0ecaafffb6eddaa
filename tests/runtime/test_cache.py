"""Where the cache is, whom it must belong to, and that one build at a time writes to it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edgewright.runtime.cache import cache_folder, checked_cache, locked_cache
from edgewright.runtime.errors import WorkspaceError


@pytest.mark.parametrize(
    ("chosen", "environment", "expected"),
    [
        ("chosen", {"EDGEWRIGHT_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "chosen"),
        (None, {"EDGEWRIGHT_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        (None, {"EDGEWRIGHT_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/edgewright"),
        (None, {"XDG_CACHE_HOME": "relative"}, "/home/ada/.cache/edgewright"),
        (None, {"XDG_CACHE_HOME": ""}, "/home/ada/.cache/edgewright"),
        (None, {}, "/home/ada/.cache/edgewright"),
    ],
)
def test_place(chosen: str | None, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_folder(Path(chosen) if chosen else None, environment) == Path(expected)


def test_no_home_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(WorkspaceError, match="--cache"):
        cache_folder(None, {})


def test_a_new_cache_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert checked_cache(tmp_path / "new", create=True)
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_no_cache_is_no_error_where_none_is_made(tmp_path: Path) -> None:
    assert not checked_cache(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("mode", "accepted"), [(0o700, True), (0o755, True), (0o770, False), (0o707, False)])
@pytest.mark.parametrize("create", [False, True])
def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, mode: int, accepted: bool, create: bool) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    if accepted:
        assert checked_cache(folder, create=create)
    else:
        with pytest.raises(WorkspaceError, match=f"mode {mode:o}.*chmod go-w"):
            checked_cache(folder, create=create)


def test_a_cache_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: here + 1)
    with pytest.raises(WorkspaceError, match=f"belongs to user {here}, this is user {here + 1}"):
        checked_cache(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_what_is_no_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(WorkspaceError):
        checked_cache(tmp_path / place, create=True)


def test_one_build_at_a_time(tmp_path: Path) -> None:
    with locked_cache(tmp_path / "cache"):
        with pytest.raises(WorkspaceError, match="another build"), locked_cache(tmp_path / "cache"):
            pytest.fail("two builds hold the cache")
        with locked_cache(tmp_path / "other"):
            pass
    with locked_cache(tmp_path / "cache"):
        pass  # free again


def test_a_full_disk_is_explained_and_not_taken_for_the_lock(tmp_path: Path) -> None:
    words = r"cannot be used \(No space left on device: x.plan\)"
    with pytest.raises(WorkspaceError, match=words), locked_cache(tmp_path / "cache"):
        raise OSError(errno.ENOSPC, "No space left on device", "x.plan")
    with pytest.raises(KeyError), locked_cache(tmp_path / "cache"):
        raise KeyError


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(WorkspaceError, match="cannot be used"), locked_cache(tmp_path):
        pytest.fail("there is no lock")
