"""The folder where a device keeps what it made: engines, compiled kernels, timing caches, unpacked bundles.

An engine is native code, so whoever can write here decides what this process runs. The folder is therefore made for
its owner alone, and one that somebody else owns or may write to is refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import WorkspaceError

__all__ = ["CHOOSE_CACHE", "OWNER_ONLY", "cache_folder", "checked_cache", "locked_cache", "unpacking_alone"]

VARIABLE = "EDGEWRIGHT_CACHE"
LOCK_FILE, UNPACKING_FILE = ".lock", ".unpacking"
OWNER_ONLY = 0o600  # mode of the files that are believed: in a folder that others may search, with a umask of 0
CHOOSE_CACHE = f"choose another with --cache or ${VARIABLE}"


def cache_folder(chosen: Path | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """`chosen`, else $EDGEWRIGHT_CACHE, else edgewright in $XDG_CACHE_HOME or ~/.cache; it need not exist.

    A relative $XDG_CACHE_HOME is ignored, as its specification asks for (XDG Base Directory 0.8).
    Raises `WorkspaceError` if none of them is set and the user has no home.
    """
    if chosen is not None:
        return chosen
    if environment.get(VARIABLE):
        return Path(environment[VARIABLE])
    shared = Path(environment.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():
        return shared / "edgewright"
    try:
        return Path("~/.cache/edgewright").expanduser()
    except RuntimeError as error:
        raise WorkspaceError(f"there is no place for the cache ({error})", CHOOSE_CACHE) from error


def checked_cache(folder: Path, *, create: bool = False) -> bool:
    """Whether there is a cache in `folder`, which is then one that nobody else can write to.

    `create` makes it where there is none, with access for its owner alone.
    Raises `WorkspaceError` if it is no folder, belongs to another user or is writable by others.
    """
    try:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if create:
            raise WorkspaceError(f"the cache {folder} cannot be made ({error.strerror})", CHOOSE_CACHE) from error
        return False
    except OSError as error:
        raise WorkspaceError(f"the cache {folder} cannot be used ({error.strerror})", CHOOSE_CACHE) from error
    _check_owner(folder, status)
    return True


@contextlib.contextmanager
def locked_cache(folder: Path) -> Iterator[None]:
    """Makes the cache and keeps other builds out of it; the lock goes with the process, however that ends.

    Raises `WorkspaceError` if another build holds it, as `checked_cache`, and for what the file system refuses.
    """
    import fcntl  # not on Windows, where the rest of the runtime works too

    checked_cache(folder, create=True)
    try:
        with _opened(folder / LOCK_FILE) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkspaceError(f"another build is using the cache {folder}", "wait for it to end") from None
            yield
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        raise WorkspaceError(
            f"the cache {folder} cannot be used ({error.strerror or error}{place})", CHOOSE_CACHE
        ) from error


@contextlib.contextmanager
def unpacking_alone(folder: Path) -> Iterator[None]:
    """Waits until no other process unpacks into the cache, and keeps them waiting. Raises OSError."""
    import fcntl

    with _opened(folder / UNPACKING_FILE) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(lock: Path) -> Iterator[int]:
    """The descriptor of a file that is only there to be locked; closing it lets go of the lock."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _check_owner(folder: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise WorkspaceError(f"the cache {folder} is not a folder", CHOOSE_CACHE)
    if status.st_uid != os.geteuid():
        raise WorkspaceError(
            f"the cache {folder} belongs to user {status.st_uid}, this is user {os.geteuid()}: engines are native code",
            CHOOSE_CACHE,
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise WorkspaceError(
            f"the cache {folder} can be written by others (mode {stat.S_IMODE(status.st_mode):o}): engines are native "
            "code",
            f"chmod go-w {folder}, after a look at what is in it, or {CHOOSE_CACHE}",
        )
