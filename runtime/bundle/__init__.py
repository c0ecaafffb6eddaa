"""A model in a form that leaves the workstation: what it holds, how it is authenticated, how it is opened."""

from __future__ import annotations

from .archive import ARCHIVE_SUFFIX, unpack, write_archive
from .keys import KeyPair, write_key_pair
from .manifest import BUNDLE_SUFFIX, FileEntry, Manifest
from .opening import SPEC_FILE, Bundle, Golden, is_bundle, open_bundle
from .spec import BundledGraph, BundleSpec, GoldenSpec, Limits
from .writing import write_bundle

__all__ = [
    "ARCHIVE_SUFFIX",
    "BUNDLE_SUFFIX",
    "SPEC_FILE",
    "Bundle",
    "BundleSpec",
    "BundledGraph",
    "FileEntry",
    "Golden",
    "GoldenSpec",
    "KeyPair",
    "Limits",
    "Manifest",
    "is_bundle",
    "open_bundle",
    "unpack",
    "write_archive",
    "write_bundle",
    "write_key_pair",
]
