"""A bundle in one file: a header of capped size, then the files in the manifest's order without gaps, to the end.

| bytes        | content                                                                     |
|--------------|-----------------------------------------------------------------------------|
| 8            | `MAGIC`                                                                     |
| 4, 4         | sizes of the manifest and of the envelope (0: not signed), little-endian    |
| as they say  | the manifest, the envelope                                                  |
| as listed    | the files                                                                   |

Nothing in it is compressed and no name in it is a place: sizes and names come from the manifest, which is verified
before the first file is written.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import BundleError
from ..files import sha256_of, write_bytes
from .folder import regular_file, size_of
from .keys import public_keys
from .manifest import ENVELOPE_FILE, MAGIC, MANIFEST_FILE, MOST_MANIFEST_BYTES, FileEntry, Manifest
from .opening import open_bundle
from .signature import MOST_ENVELOPE_BYTES, signer
from .writing import fresh_folder, write_file

__all__ = ["ARCHIVE_SUFFIX", "manifest_sha256", "unpack", "write_archive"]

ARCHIVE_SUFFIX = ".edgewright"
SIZES = struct.Struct("<II")
CHUNK_BYTES = 1 << 20
AGAIN = "copy the file again"


def write_archive(folder: Path, path: Path) -> None:
    """Writes the bundle in `folder` as one file; `path` is whole or as it was.

    Raises `BundleError` if the bundle does not open, `WorkspaceError` if the file cannot be written.
    """
    with open_bundle(folder) as bundle:
        manifest, envelope = bundle.documents
        header = (MAGIC, SIZES.pack(len(manifest), len(envelope)), manifest, envelope)
        write_bytes(path, itertools.chain(header, (bundle.read(entry.path) for entry in bundle.files)))


def unpack(archive: Path, folder: Path, *, require_signature: Path | None = None) -> Path:
    """Unpacks a bundle into `folder`, which must not exist; returns it.

    The manifest and its signature are verified first, by the keys in the file `require_signature` if one is given; the
    files are hashed while they are written. The folder appears when all of them are on the disk; of a bundle that is
    refused nothing is left. Raises `BundleError`, `SignatureError` as `open_bundle` does.
    """
    trusted = None if require_signature is None else public_keys(require_signature)
    with _opened(archive) as stream:
        size = size_of(stream)
        content, envelope = _documents(stream, archive)
        signer(content, envelope or None, trusted)
        manifest = Manifest.parse(content)
        _check_sizes(archive, size, stream.tell(), manifest)
        with fresh_folder(folder) as temporary:
            _check_space(temporary, size)
            write_file(temporary / MANIFEST_FILE, (content,))
            if envelope:
                write_file(temporary / ENVELOPE_FILE, (envelope,))
            for entry in manifest.files:
                write_file(temporary / entry.path, _checked(stream, entry))
            open_bundle(temporary, require_signature=require_signature).close()
    return folder


def manifest_sha256(archive: Path) -> str:
    """Hash of the manifest that the archive begins with: which bundle it says it is; nothing of it is verified.

    Raises `BundleError` if it is no archive.
    """
    with _opened(archive) as stream:
        content, _ = _documents(stream, archive)
    return sha256_of(content)


def _opened(archive: Path) -> BinaryIO:
    """The file, opened without waiting for the writer of a pipe."""
    try:
        descriptor = os.open(archive, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"cannot open {archive}: {error.strerror}", "check the path") from error
    if archive.is_dir():
        os.close(descriptor)
        raise BundleError(f"{archive} is a folder, expected a bundle in one file", "unpacked bundles need no unpacking")
    return regular_file(descriptor, str(archive))


def _documents(stream: BinaryIO, archive: Path) -> tuple[bytes, bytes]:
    """The bytes of the manifest and of the envelope."""
    if size_of(stream) < len(MAGIC) or _exactly(stream, len(MAGIC), "the header") != MAGIC:
        raise BundleError(f"{archive} is no bundle in one file", "pack it with edgewright pack MODEL --archive")
    manifest_size, envelope_size = SIZES.unpack(_exactly(stream, SIZES.size, "the header"))
    for name, size, most in (
        (MANIFEST_FILE, manifest_size, MOST_MANIFEST_BYTES),
        (ENVELOPE_FILE, envelope_size, MOST_ENVELOPE_BYTES),
    ):
        if size > most:
            raise BundleError(f"{name} is larger than {most} bytes")
    return _exactly(stream, manifest_size, MANIFEST_FILE), _exactly(stream, envelope_size, ENVELOPE_FILE)


def _check_sizes(archive: Path, size: int, header: int, manifest: Manifest) -> None:
    """The files fill the archive to its last byte, so that it unpacks to no more than it is."""
    expected = header + sum(entry.bytes for entry in manifest.files)
    if size != expected:
        raise BundleError(f"{archive} has {size} bytes, by its manifest it has {expected}", AGAIN)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BundleError(f"the bundle takes {needed} bytes, {folder.parent} has {free} free", "free some space")


def _checked(stream: BinaryIO, entry: FileEntry) -> Iterator[bytes]:
    """The content of the next file in pieces of 1 MiB; raises `BundleError` after the last if its hash differs."""
    digest = hashlib.sha256()
    for start in range(0, entry.bytes, CHUNK_BYTES):
        piece = _exactly(stream, min(CHUNK_BYTES, entry.bytes - start), entry.path)
        digest.update(piece)
        yield piece
    if digest.hexdigest() != entry.sha256:
        raise BundleError(f"{entry.path} was changed: its SHA-256 differs from the manifest's", AGAIN)


def _exactly(stream: BinaryIO, size: int, name: str) -> bytes:
    try:
        content = stream.read(size)
    except OSError as error:  # a disk that fails
        raise BundleError(f"cannot read {name}: {error.strerror}", AGAIN) from error
    if len(content) != size:
        raise BundleError(f"the file ends inside {name}", AGAIN)
    return content
