"""A bundle on the device: its archive unpacked once, its version held against the highest that was built here."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..bundle import Bundle, open_bundle, unpack
from ..bundle.archive import manifest_sha256
from ..cache import CHOOSE_CACHE, checked_cache, unpacking_alone
from ..errors import BundleError, WorkspaceError
from ..files import TEMPORARY_PREFIX
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
    try:
        is_file = path.is_file()
    except OSError as error:  # in a folder that may not be searched
        raise BundleError(f"cannot open {path}: {error.strerror}", "check the path") from error
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
    target = place / f"{manifest_sha256(archive)}.bundle"
    try:
        whole = _whole(target, require_signature)
        if whole is not None:
            return whole
        place.mkdir(mode=0o700, exist_ok=True)
        with unpacking_alone(cache):  # another process may have just done it
            return _whole(target, require_signature) or _replaced(archive, target, require_signature)
    except OSError as error:
        raise WorkspaceError(
            f"{archive} cannot be unpacked into {place} ({error.strerror or error})", CHOOSE_CACHE
        ) from error


def _replaced(archive: Path, target: Path, require_signature: Path | None) -> Bundle:
    """Unpacks; what is there, damaged or without the signature that is required now, goes when that has succeeded."""
    for unfinished in target.parent.glob(f"{TEMPORARY_PREFIX}*"):  # of processes that were killed
        shutil.rmtree(unfinished)
    fresh = unpack(archive, target.with_name(f"{TEMPORARY_PREFIX}{target.name}"), require_signature=require_signature)
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
    return open_bundle(target, require_signature=require_signature)


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
