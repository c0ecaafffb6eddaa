"""A bundle on the device: its archive unpacked once, its version held against the highest that was built here."""

from __future__ import annotations

import contextlib
import shutil
import struct
import tempfile
from pathlib import Path

from ..bundle import Bundle, open_bundle, unpack
from ..bundle.archive import SIZES
from ..bundle.manifest import MAGIC, MOST_MANIFEST_BYTES
from ..errors import BundleError, WorkspaceError
from ..files import TEMPORARY_PREFIX, sha256_of
from .cache import checked_cache
from .versions import check_version

__all__ = ["opened_bundle"]

BUNDLES_FOLDER = "bundles"


def opened_bundle(
    path: Path, cache: Path, *, require_signature: Path | None = None, allow_older: bool = False
) -> Bundle:
    """Opens and verifies the bundle in a folder, or in the one-file form, which is unpacked into the cache first.

    Raises `BundleError` if it is not what it says, `SignatureError` if `require_signature` names a key that did not
    sign it, `RollbackError` if a higher version was built here and `allow_older` does not permit it; `WorkspaceError`
    if the cache cannot be trusted or written.
    """
    is_file = path.is_file()
    checked_cache(cache, create=is_file)
    opened = _unpacked(path, cache, require_signature) if is_file else None
    bundle = opened or open_bundle(path, require_signature=require_signature)
    try:
        check_version(cache, bundle.model, bundle.version, allow_older=allow_older)
    except BaseException:
        bundle.close()
        raise
    return bundle


def _unpacked(archive: Path, cache: Path, require_signature: Path | None) -> Bundle:
    """The bundle of the archive in the folder `bundles/HASH.bundle` of the cache, where it may be already."""
    place = cache / BUNDLES_FOLDER
    place.mkdir(mode=0o700, exist_ok=True)
    target = place / f"{_manifest_hash(archive)}.bundle"
    whole = _whole(target, require_signature)
    if whole is not None:
        return whole
    staging = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=place))
    try:
        fresh = unpack(archive, staging / "fresh.bundle", require_signature=require_signature)
        if target.exists():  # damaged, or without the signature that is required now
            shutil.rmtree(target)
        with contextlib.suppress(FileExistsError):  # another process unpacked the same in the meantime
            fresh.rename(target)
        return open_bundle(target, require_signature=require_signature)
    except OSError as error:
        raise WorkspaceError(f"{archive} cannot be unpacked into {place} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _manifest_hash(archive: Path) -> str:
    """Hash of the manifest that the archive claims: it says which unpacked bundle to look for, and proves nothing."""
    try:
        with archive.open("rb") as stream:
            header = stream.read(len(MAGIC) + SIZES.size)
            size, _ = SIZES.unpack(header[len(MAGIC) :])
            return sha256_of(stream.read(min(size, MOST_MANIFEST_BYTES)))
    except (OSError, struct.error) as error:
        raise BundleError(f"cannot read {archive} ({error})", "copy the file again") from error


def _whole(folder: Path, require_signature: Path | None) -> Bundle | None:
    """The bundle that was unpacked there, None if there is none, or it is not what the folder is called after."""
    try:
        bundle = open_bundle(folder, require_signature=require_signature)
    except BundleError:
        return None
    if folder.name == f"{bundle.sha256}.bundle":
        return bundle
    bundle.close()
    return None
