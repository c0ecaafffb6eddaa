"""Opens a bundle's folder: every byte is authenticated before anything parses it.

The order: the manifest's bytes and their signature, the manifest, the names in the folder, the hash of every file, and
then what `spec.json` says. Later a file is read again, and what is returned is the buffer that was hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, EdgewrightError
from ..files import sha256_of
from ..specs import EngineInfo
from .folder import Folder
from .keys import PublicKey, public_keys
from .manifest import ENVELOPE_FILE, MAGIC, MANIFEST_FILE, MOST_MANIFEST_BYTES, FileEntry, Manifest
from .signature import MOST_ENVELOPE_BYTES, signer
from .spec import BundledGraph, BundleSpec
from .spec_check import check_engine, check_spec
from .strict_json import parsed
from .typed import check_types

__all__ = ["SPEC_FILE", "Bundle", "Golden", "checked_spec", "is_bundle", "open_bundle"]

SPEC_FILE = "spec.json"


@dataclass(frozen=True)
class Golden:
    """Inputs and what the reference gives for them.

    * pixels: uint8 `[images, H, W, C]`, to be normalized; logits: float32 `[images, classes]`
    """

    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]


class Bundle:
    """A bundle whose every file was checked. Use it in a `with`, or close it.

    * path: of its folder; sha256: of the manifest, which stands for all of its content
    * signed_by: fingerprint of the key that was required and that signed it, None if none was required
    * documents: the bytes of the manifest and of the envelope, the latter empty if it is not signed
    """

    def __init__(self, folder: Folder, trusted: Sequence[PublicKey] | None) -> None:
        """Raises `BundleError` if it is not signed by a trusted key or a file is not what the manifest says."""
        self.path = folder.path
        content = folder.read(MANIFEST_FILE, MOST_MANIFEST_BYTES)
        envelope = folder.read(ENVELOPE_FILE, MOST_ENVELOPE_BYTES) if folder.has(ENVELOPE_FILE) else None
        self.signed_by = signer(content, envelope, trusted)
        self.sha256 = sha256_of(content)
        self.documents = content, envelope or b""
        self._folder = folder
        self._manifest = Manifest.parse(content)
        _check_files(folder, self._manifest)
        self.spec = checked_spec(self.read(SPEC_FILE), self._manifest)

    @property
    def version(self) -> int:
        """At least 1; a later one replaces an earlier one."""
        return self._manifest.version

    @property
    def model(self) -> str:
        """The network's name."""
        return self._manifest.model

    @property
    def tools(self) -> dict[str, str]:
        """Versions of what made it, by name."""
        return dict(self._manifest.tools)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files but the manifest and its envelope, sorted by path."""
        return self._manifest.files

    def read(self, name: str) -> bytes:
        """The content of a file of the bundle, hashed after it was read.

        Raises `BundleError` if the bundle does not list it or it was changed, `ClosedError` after `close`.
        """
        entry = self._manifest.entry(name)
        content = self._folder.read(name, entry.bytes)
        if sha256_of(content) != entry.sha256:
            raise _changed(name)
        return content

    def golden(self) -> Golden:
        """The golden inputs and the reference's logits."""
        golden, shape = self.spec.golden, self.spec.preprocess.input_shape
        assert shape is not None  # as `check_spec` found
        channels, height, width = shape
        pixels = np.frombuffer(self.read(golden.pixels), np.uint8)
        logits = np.frombuffer(self.read(golden.logits), "<f4").astype(np.float32, copy=False)
        return Golden(pixels.reshape(golden.images, height, width, channels), logits.reshape(golden.images, -1))

    def engine_info(self, graph: BundledGraph) -> EngineInfo:
        """What stands beside the CPU engine `graph`. Raises `BundleError` if it describes another engine."""
        name = f"{graph.path.removesuffix('.onnx')}.json"
        try:
            info = EngineInfo.from_json(parsed(self.read(name), name))
            check_types(info, EngineInfo, "engine")
        except (KeyError, TypeError, ValueError, AttributeError, EdgewrightError) as error:
            raise _explained(name, error) from error
        if info.engine_sha256 != self._manifest.entry(graph.path).sha256:
            raise BundleError(f"{name} describes another engine than {graph.path}", "pack the bundle again")
        check_engine(info, graph, self.spec)
        return info

    def close(self) -> None:
        """Gives the folder back; closing twice does nothing."""
        self._folder.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_bundle(path: Path, *, require_signature: Path | None = None) -> Bundle:
    """Opens the folder of a bundle; `require_signature` is a file with the public keys that are trusted.

    Raises `BundleError` that says why it is not taken, `SignatureError` if it is not signed by one of those keys or
    the file holds none.
    """
    trusted = None if require_signature is None else public_keys(require_signature)
    if is_bundle(path) and not path.is_dir():
        raise BundleError(f"{path} is a bundle in one file", f"unpack it first: edgewright unpack {path}")
    folder = Folder(path)
    try:
        return Bundle(folder, trusted)
    except BaseException:
        folder.close()
        raise


def is_bundle(path: Path) -> bool:
    """Whether `path` looks like a bundle, a folder or one file; nothing of it is checked, and nothing raised."""
    try:
        if path.is_dir():
            return (path / MANIFEST_FILE).is_file()
        if not path.is_file():  # a pipe would wait for its writer
            return False
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def _check_files(folder: Folder, manifest: Manifest) -> None:
    """The folder holds what the manifest lists, to the last bit, and nothing else."""
    listed = {entry.path for entry in manifest.files}
    folders = frozenset(str(parent) for path in listed for parent in Path(path).parents)
    extra = next((path for path in folder.files(folders) if path not in {*listed, MANIFEST_FILE, ENVELOPE_FILE}), None)
    if extra is not None:
        raise BundleError(f"{extra} is not in the bundle's manifest", "remove it, or copy the bundle again")
    for entry in manifest.files:
        if folder.sha256(entry.path, entry.bytes) != entry.sha256:
            raise _changed(entry.path)


def checked_spec(content: bytes, manifest: Manifest) -> BundleSpec:
    """What `spec.json` says. Raises `BundleError` if it is not a spec, or does not fit the files of the manifest."""
    try:
        spec = BundleSpec.from_json(parsed(content, SPEC_FILE))
        check_types(spec, BundleSpec, "spec")
        check_spec(spec, manifest)
    except (KeyError, TypeError, ValueError, AttributeError, EdgewrightError) as error:
        raise _explained(SPEC_FILE, error) from error
    return spec


def _explained(name: str, error: Exception) -> BundleError:
    if isinstance(error, BundleError):
        return error
    words = f"no {error}" if isinstance(error, KeyError) else str(error)
    return BundleError(f"{name} does not say what it should ({words})", "pack the bundle again")


def _changed(name: str) -> BundleError:
    return BundleError(f"{name} was changed: its SHA-256 differs from the manifest's", "copy the bundle again")
