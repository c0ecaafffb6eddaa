"""A folder that is read through its own descriptor, so that no link is followed and no other file put in its place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import BundleError, ClosedError

__all__ = ["Folder", "regular_file", "size_of"]

CHUNK_BYTES = 1 << 20
FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe is not to wait for its writer
FOLDER_FLAGS = FLAGS | os.O_DIRECTORY


class Folder:
    """Holds a folder open until `close`. Paths are relative, with "/" between their parts."""

    def __init__(self, path: Path) -> None:
        """Raises `BundleError` if `path` is no folder or a link to one."""
        self.path = path
        try:
            self._descriptor = os.open(path, FOLDER_FLAGS)
        except FileNotFoundError:
            raise BundleError(f"there is no bundle {path}", "check the path") from None
        except OSError as error:
            if path.is_symlink():
                raise BundleError(f"{path} is a link", "give the folder itself") from None
            raise BundleError(f"cannot open the folder {path}: {error.strerror}") from error

    def read(self, path: str, most: int) -> bytes:
        """The content of a file, read once. Raises `BundleError` if it has more than `most` bytes or is no file."""
        with self.opened(path) as stream:
            if size_of(stream) > most:
                raise BundleError(f"{path} is larger than {most} bytes")
            content = _read(stream, most + 1, path)
        if len(content) > most:  # it grew while it was read
            raise BundleError(f"{path} is larger than {most} bytes")
        return content

    def has(self, name: str) -> bool:
        """Whether there is anything of that name, a link included."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def sha256(self, path: str, size: int) -> str:
        """Of a file of `size` bytes, in pieces of 1 MiB. Raises `BundleError` if it has another size or is no file."""
        digest, rest = hashlib.sha256(), size
        with self.opened(path) as stream:
            found = size_of(stream)
            if found != size:
                raise BundleError(f"{path} has {found} bytes, the bundle lists {size}", "copy the bundle again")
            while rest and (piece := _read(stream, min(rest, CHUNK_BYTES), path)):
                digest.update(piece)
                rest -= len(piece)
        return digest.hexdigest()

    def files(self, folders: frozenset[str]) -> Iterator[str]:
        """The paths of all files below; raises `BundleError` at a link, and at a folder that is not in `folders`."""
        yield from self._files("", self._descriptor, folders)

    def close(self) -> None:
        """Gives the descriptor back; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """A regular file for reading. Raises `BundleError` if it is missing, something else, or behind a link."""
        if self._descriptor < 0:
            raise ClosedError(f"the bundle {self.path} is closed", "open it again")
        *parts, name = path.split("/")
        with contextlib.ExitStack() as stack:
            parent = self._descriptor
            for end, part in enumerate(parts, 1):
                parent = _opened(part, FOLDER_FLAGS, parent, "/".join(parts[:end]))
                stack.callback(os.close, parent)
            yield stack.enter_context(regular_file(_opened(name, FLAGS, parent, path), path))

    def _files(self, prefix: str, descriptor: int, folders: frozenset[str]) -> Iterator[str]:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                path = f"{prefix}{entry.name}"
                if entry.is_symlink():
                    raise BundleError(f"{path} is a link, and a bundle has none")
                if not entry.is_dir(follow_symlinks=False):
                    yield path
                    continue
                if path not in folders:
                    raise BundleError(f"the folder {path} is not in the bundle's manifest", "remove it")
                child = _opened(entry.name, FOLDER_FLAGS, descriptor, path)
                try:
                    yield from self._files(f"{path}/", child, folders)
                finally:
                    os.close(child)


def regular_file(descriptor: int, path: str) -> BinaryIO:
    """The open file, which owns the descriptor. Raises `BundleError` if it is a folder, a pipe or a device."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise BundleError(f"{path} is no regular file")


def size_of(stream: BinaryIO) -> int:
    """Of an open file, in bytes."""
    return os.fstat(stream.fileno()).st_size


def _opened(name: str, flags: int, parent: int, path: str) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing", "copy the bundle again") from None
    except OSError as error:
        if _is_link(name, parent):
            raise BundleError(f"{path} is a link, and a bundle has none") from None
        raise BundleError(f"cannot open {path}: {error.strerror}") from error


def _is_link(name: str, parent: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _read(stream: BinaryIO, most: int, path: str) -> bytes:
    try:
        return stream.read(most)
    except OSError as error:  # a disk that fails
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
