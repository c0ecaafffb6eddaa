"""The manifest of a bundle: what it is, and name, size and SHA-256 of every file in it.

What it says is checked in full before anything is done with it; every check that fails is a `BundleError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import BundleError
from ..files import sha256_of
from .strict_json import parsed, spelled

__all__ = [
    "BUNDLE_SUFFIX",
    "ENVELOPE_FILE",
    "MAGIC",
    "MANIFEST_FILE",
    "MOST_BYTES",
    "MOST_FILES",
    "MOST_FILE_BYTES",
    "MOST_MANIFEST_BYTES",
    "FileEntry",
    "Manifest",
]

SCHEMA = "edgewright.bundle/1"
BUNDLE_SUFFIX, DOCUMENT_SUFFIX = ".bundle", ".json"
MANIFEST_FILE, ENVELOPE_FILE = "manifest.json", "manifest.dsse.json"
MAGIC = b"\x89EWB\r\n\x1a\n"  # of the one-file form; as PNG's it shows a transfer that took it for text
MOST_MANIFEST_BYTES = 1 << 20  # 64 entries take 20 KiB
MOST_FILES = 64
MOST_FILE_BYTES = 2 << 30  # protobuf, and so an ONNX file without external data, ends there
MOST_BYTES = 4 << 30
MOST_DOCUMENT_BYTES = 8 << 20  # of a JSON file: parsed, it takes many times its size; EfficientNet-Lite0's take 80 KB
MOST_VERSION = (1 << 31) - 1
MOST_MODEL_LETTERS = 200
MOST_PATH_LETTERS = 200
MOST_PARTS = 4

SHA256 = re.compile(r"[0-9a-f]{64}")
TOOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,99}")  # a name or a version (PEP 440); both stand in messages
PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(/[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)*")
FLAWS = (
    (re.compile(r"[^\x00-\x7f]"), "has letters beyond ASCII"),
    (re.compile(r"[\x00-\x1f\x7f]"), "has control characters"),
    (re.compile(r"^/"), "is absolute"),
    (re.compile(r"\\"), "has a backslash"),
    (re.compile(r"^[A-Za-z]:"), "has a drive letter"),
    (re.compile(r"(^|/)\.{1,2}(/|$)"), "leaves its folder"),
    (re.compile(r"^$|//|/$"), "has an empty part"),
)
"""Only a name that `PATH` matches is taken; these say what is wrong with most others."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle.

    * path: relative to the bundle, parts joined by "/"
    * sha256: of its content, hexadecimal
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    * version: of the bundle, at least 1; a device does not go back behind one that it has used
    * tools: versions of what made it, by name
    * files: sorted by path, which is their order in the one-file form too
    """

    model: str
    version: int
    tools: Mapping[str, str]
    files: tuple[FileEntry, ...]

    def serialized(self) -> bytes:
        """The manifest's one spelling, with a hash of itself: without a signature it tells of accidents."""
        content = {
            "schema": SCHEMA,
            "model": self.model,
            "version": self.version,
            "tools": dict(sorted(self.tools.items())),
            "files": [asdict(entry) for entry in self.files],
        }
        return spelled({**content, "sha256": sha256_of(spelled(content))})

    def entry(self, path: str) -> FileEntry:
        """The file of that path. Raises `BundleError` if there is none."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise BundleError(f"the bundle has no file {path}")

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """The inverse of `serialized`. Raises `BundleError` that says what is wrong with anything else."""
        fields = parsed(content, MANIFEST_FILE)
        if fields.get("schema") != SCHEMA:
            raise BundleError(
                f"the bundle's schema is {_short(fields.get('schema'))}, known here is {SCHEMA}",
                "install the edgewright that it was made for",
            )
        _check_spelling(fields, content)
        return cls(_model(fields), _version(fields), _tools(fields), _files(fields))


def _check_spelling(fields: Mapping[str, Any], content: bytes) -> None:
    """A manifest has one spelling, and its own hash fits."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    try:
        same, digest = spelled(fields) == content, sha256_of(spelled(rest))
    except ValueError as error:  # half of a surrogate pair
        raise BundleError(f"{MANIFEST_FILE} is not valid text ({error})") from None
    if not same:
        raise BundleError(f"{MANIFEST_FILE} is not spelled as bundles are", "copy the bundle again as it was packed")
    if fields.get("sha256") != digest:
        raise BundleError(f"{MANIFEST_FILE} was changed: its hash of itself differs", "copy the bundle again")


def _model(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not 1 <= len(model) <= MOST_MODEL_LETTERS or not model.isprintable():
        raise BundleError(f"the bundle's model is {_short(model)}, expected a name")
    return model


def _version(fields: Mapping[str, Any]) -> int:
    version = fields.get("version")
    if type(version) is not int or not 1 <= version <= MOST_VERSION:
        raise BundleError(f"the bundle's version is {_short(version)}, expected a whole number from 1")
    return version


def _tools(fields: Mapping[str, Any]) -> dict[str, str]:
    tools = fields.get("tools")
    if not isinstance(tools, dict) or not all(
        isinstance(word, str) and TOOL.fullmatch(word) for tool in tools.items() for word in tool
    ):
        raise BundleError(f"the bundle's tools are {_short(tools)}, expected versions by name")
    return tools


def _files(fields: Mapping[str, Any]) -> tuple[FileEntry, ...]:
    listed = fields.get("files")
    if not isinstance(listed, list):
        raise BundleError(f"the bundle's files are {_short(listed)}, expected a list")
    if not 1 <= len(listed) <= MOST_FILES:
        raise BundleError(f"the bundle lists {len(listed)} files, expected 1 to {MOST_FILES}")
    files = tuple(map(_file, listed))
    total = sum(entry.bytes for entry in files)
    if total > MOST_BYTES:
        raise BundleError(f"the bundle's files are {total} bytes in all, more than {MOST_BYTES}")
    _check_paths([entry.path for entry in files])
    return files


def _file(entry: Any) -> FileEntry:
    if not isinstance(entry, dict):
        raise BundleError(f"the manifest lists {_short(entry)}, expected a file")
    path, size, digest = entry.get("path"), entry.get("bytes"), entry.get("sha256")
    if not isinstance(path, str):
        raise BundleError(f"the manifest lists a file with the path {_short(path)}, expected text")
    _check_path(path)
    most = MOST_DOCUMENT_BYTES if path.endswith(DOCUMENT_SUFFIX) else MOST_FILE_BYTES
    if type(size) is not int or not 0 <= size <= most:
        raise BundleError(f"the size of {path} is {_short(size)}, expected 0 to {most} bytes")
    if not isinstance(digest, str) or not SHA256.fullmatch(digest):
        raise BundleError(f"the SHA-256 of {path} is {_short(digest)}, expected 64 hexadecimal digits")
    return FileEntry(path, size, digest)


def _check_path(path: str) -> None:
    flaw = next((words for pattern, words in FLAWS if pattern.search(path)), None)
    if flaw is None and len(path) > MOST_PATH_LETTERS:
        flaw = f"has more than {MOST_PATH_LETTERS} letters"
    if flaw is None and path.count("/") >= MOST_PARTS:
        flaw = f"has more than {MOST_PARTS} parts"
    if flaw is None and not PATH.fullmatch(path):
        flaw = "has other characters than letters, digits, '_', '-', and '.' between them"
    if flaw is not None:
        raise BundleError(f"the bundle lists the path {_short(path)}, which {flaw}")


def _check_paths(paths: Sequence[str]) -> None:
    """Each path names one file on every file system, also on one that ignores case."""
    spelling: dict[str, str] = {}  # of every file and folder, by its name in small letters
    for path in (MANIFEST_FILE, ENVELOPE_FILE, *paths):
        if path.lower() in spelling:
            other = spelling[path.lower()]
            how = "twice" if other == path else f"beside {other}, which differs in case or is a folder"
            raise BundleError(f"the bundle lists {path} {how}")
        spelling[path.lower()] = path
        for end in (index for index, letter in enumerate(path) if letter == "/"):
            folder = f"{path[:end]}/"
            if path[:end].lower() in spelling and spelling[path[:end].lower()] != folder:
                raise BundleError(f"the bundle lists {path} beside {spelling[path[:end].lower()]}")
            spelling[path[:end].lower()] = folder
    if list(paths) != sorted(paths):
        raise BundleError("the files of the manifest are not sorted by path")


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:60]}…"
