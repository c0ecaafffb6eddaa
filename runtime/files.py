"""Files that are whole or absent: written under a temporary name, synced, renamed; identified by their SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import WorkspaceError

__all__ = ["TEMPORARY_PREFIX", "read_json", "sha256_of", "sha256_of_file", "umask", "write_bytes", "write_json"]

TEMPORARY_PREFIX = ".partial-"
CHUNK_BYTES = 1 << 20
STATUS, UMASK = Path("/proc/self/status"), re.compile(r"^Umask:\s*([0-7]+)$", re.MULTILINE)  # proc(5), from Linux 4.7


def sha256_of(content: bytes | Iterable[bytes]) -> str:
    """Hexadecimal SHA-256 of `content`."""
    digest = hashlib.sha256()
    for part in (content,) if isinstance(content, bytes) else content:
        digest.update(part)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces of 1 MiB."""
    with path.open("rb") as stream:
        return sha256_of(iter(lambda: stream.read(CHUNK_BYTES), b""))


def write_bytes(path: Path, content: bytes | Iterable[bytes], *, mode: int = 0o666) -> None:
    """Writes `content` so that `path` holds either what it held before or all of it, even after a crash.

    `mode` is what the umask leaves at most of the permissions.
    Raises `WorkspaceError` if the disk is full or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.writelines((content,) if isinstance(content, bytes) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode & ~umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, mode: int = 0o666) -> None:
    """`write_bytes` of `content` as JSON; floats keep all their digits, NaN is refused."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(), mode=mode)


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file. Raises `WorkspaceError` if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WorkspaceError(f"{path} does not exist") from None
    except OSError as error:
        raise WorkspaceError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WorkspaceError(f"{path} is not valid JSON ({error})", "remove it; it is made again") from error


def _explained(path: Path, error: OSError) -> WorkspaceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkspaceError(
            f"no space left to write {path}", "free some space and run again; what is finished is kept"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return WorkspaceError(f"{path.parent} cannot be written ({error.strerror})", "choose another --build-dir")
    return WorkspaceError(f"cannot write {path}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # other systems cannot open a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The process's umask. Linux says it; elsewhere it has to be 0 for a moment, for all threads."""
    try:
        found = UMASK.search(STATUS.read_text())
    except OSError:
        found = None
    if found is not None:
        return int(found[1], 8)
    current = os.umask(0)
    os.umask(current)
    return current
