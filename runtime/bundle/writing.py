"""A bundle as a folder: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import BundleError
from ..files import TEMPORARY_PREFIX, sha256_of, umask
from .keys import private_key
from .manifest import ENVELOPE_FILE, MANIFEST_FILE, FileEntry, Manifest
from .signature import signed_envelope

__all__ = ["fresh_folder", "manifest_of", "recover", "write_bundle", "write_file"]

BEFORE = f"{TEMPORARY_PREFIX}before-"


def manifest_of(files: Mapping[str, bytes], *, version: int, model: str, tools: Mapping[str, str]) -> Manifest:
    """The manifest of a bundle of `files`, contents by path. Raises `BundleError` if no bundle can hold them."""
    entries = tuple(FileEntry(path, len(files[path]), sha256_of(files[path])) for path in sorted(files))
    return Manifest.parse(Manifest(model, version, tools, entries).serialized())


def write_bundle(
    folder: Path,
    files: Mapping[str, bytes],
    *,
    version: int,
    model: str,
    tools: Mapping[str, str],
    signing_key: Path | None = None,
    replace: bool = False,
) -> str:
    """Writes a bundle of `files`, contents by path, and returns its hash: the SHA-256 of the manifest.

    `signing_key` is the file of a private key. `replace` takes the place of an existing folder.
    Raises `BundleError` if no bundle can hold the files, the folder exists, or it cannot be written.
    """
    manifest = manifest_of(files, version=version, model=model, tools=tools).serialized()
    written = {**files, MANIFEST_FILE: manifest}
    if signing_key is not None:
        written[ENVELOPE_FILE] = signed_envelope(manifest, private_key(signing_key))
    with fresh_folder(folder, replace=replace) as temporary:
        for path, content in written.items():
            write_file(temporary / path, (content,))
    return sha256_of(manifest)


@contextlib.contextmanager
def fresh_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end; at an exception nothing is left of it.

    Raises `BundleError` if `folder` exists (with `replace`: and is no folder), or cannot be written.
    """
    recover(folder)
    if os.path.lexists(folder) and not (replace and folder.is_dir() and not folder.is_symlink()):
        raise BundleError(f"{folder} exists", "remove it or choose another folder")
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder.parent))
        yield temporary
        _publish(temporary)
        _take_place(temporary, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(f"no space left to write {folder}", "free some space and run again") from error
        raise BundleError(f"cannot write {folder}: {error.strerror or error}", "choose another folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: Path) -> None:
    """Gives a folder back that was put aside to be replaced by a process that was killed then."""
    aside = _aside(folder)
    if aside.exists() and not os.path.lexists(folder):
        aside.rename(folder)


def write_file(path: Path, pieces: Iterable[bytes]) -> None:
    """A new file, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        stream.writelines(pieces)
        stream.flush()
        os.fsync(stream.fileno())


def _publish(folder: Path) -> None:
    """Syncs the names in it, and lets everybody read what only its writer could (`mkdtemp` makes it so)."""
    folder.chmod(0o777 & ~umask())
    for place, _, _ in os.walk(folder):
        _sync(Path(place))


def _take_place(temporary: Path, folder: Path) -> None:
    """Renames; a folder that is there, which no rename replaces unless it is empty, is put aside and then removed."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        recover(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.parent / f"{BEFORE}{folder.name}"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
