"""The engines that a device keeps, with what was proven of them: `engines/KEY/engines.json` in the cache.

An engine is known by its hash there. A file that the manifest does not name, or whose content differs, is never loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle.spec import Limits
from ..bundle.typed import check_types
from ..cache import OWNER_ONLY, checked_cache
from ..engine_files import ENGINES_FOLDER, info_of, verified_bytes
from ..errors import EdgewrightError, EngineError
from ..files import read_json, write_json
from ..specs import EngineInfo
from .identity import BuildSettings, Place, cache_key, key_prefix

__all__ = ["MANIFEST", "Kept", "KeptEngine", "SelfTest", "engine_file", "engine_folder", "kept_for", "read_kept"]

MANIFEST = "engines.json"
SCHEMA = "edgewright.device-cache/1"
NAMED_DIGITS = 16


@dataclass(frozen=True)
class SelfTest:
    """An engine beside the reference on the golden inputs, in a process of its own.

    * sqnr_db, agreement, max_abs: as in `Parity`; the first and last are None if no logit was finite
    * passed: whether the limits were kept; reason: in words what was found
    * latency_ms: median time of one run at the smallest batch the engine takes, usually 1
    """

    images: int
    sqnr_db: float | None
    agreement: float
    max_abs: float | None
    limits: Limits
    passed: bool
    reason: str
    latency_ms: float

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SelfTest:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**content, "limits": Limits(**content["limits"])})


@dataclass(frozen=True)
class KeptEngine:
    """An engine file of the cache: its name, what it is, what the last self-test found."""

    file: str
    info: EngineInfo
    self_test: SelfTest

    def doubted(self, reason: str) -> KeptEngine:
        """The same after a self-test that gave no answer, as it did before."""
        return replace(self, self_test=replace(self.self_test, passed=False, reason=reason))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return {"file": self.file, "info": self.info.to_json(), "self_test": asdict(self.self_test)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> KeptEngine:
        """The inverse of `to_json`. Raises `ValueError` if the file is not one beside the manifest."""
        file = content["file"]
        if Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{file!r} is no file name")
        engine = cls(file, info_of(content["info"]), SelfTest.from_json(content["self_test"]))
        check_types(engine, KeptEngine, "engine")
        return engine


@dataclass(frozen=True)
class Kept:
    """The engines of one bundle, one place and one choice of settings; at most one for each precision.

    * bundle: its hash
    """

    folder: Path
    bundle: str
    place: Place
    settings: BuildSettings
    engines: tuple[KeptEngine, ...] = ()

    def engine(self, precision: str) -> KeptEngine | None:
        """The one of that precision, None if none is kept."""
        return next((engine for engine in self.engines if engine.info.precision == precision), None)

    def with_engine(self, engine: KeptEngine) -> Kept:
        """The same with `engine` in place of the one of its precision."""
        others = tuple(each for each in self.engines if each.info.precision != engine.info.precision)
        return replace(self, engines=(*others, engine))

    def content(self, engine: KeptEngine) -> bytes:
        """The engine's bytes, read once. Raises `EngineError` unless they are those of the manifest."""
        return verified_bytes(self.folder / engine.file, engine.info)

    def is_whole(self, engine: KeptEngine) -> bool:
        """Whether the engine's file is as it was."""
        try:
            return bool(self.content(engine))
        except EngineError:
            return False

    def write(self) -> None:
        """Replaces the manifest at once. Raises `WorkspaceError` if it cannot be written."""
        identity = {"bundle": self.bundle, "place": asdict(self.place), "settings": asdict(self.settings)}
        engines = [engine.to_json() for engine in self.engines]
        write_json(
            self.folder / MANIFEST, {"schema": SCHEMA, "identity": identity, "engines": engines}, mode=OWNER_ONLY
        )

    def remove_unnamed(self) -> None:
        """Removes the files that the manifest does not name."""
        named = {MANIFEST, *(engine.file for engine in self.engines)}
        for path in self.folder.iterdir():
            if path.name not in named and not path.is_dir():
                path.unlink(missing_ok=True)


def engine_folder(cache: Path, bundle: str, place: Place, settings: BuildSettings) -> Path:
    """Where the engines of a bundle are kept."""
    return cache / ENGINES_FOLDER / cache_key(bundle, place, settings)


def engine_file(precision: str, sha256: str, suffix: str) -> str:
    """The name carries the hash, so that a new engine never overwrites the one before it."""
    return f"{precision}-{sha256[:NAMED_DIGITS]}{suffix}"


def read_kept(folder: Path) -> Kept | None:
    """What the manifest in `folder` says, None if there is none.

    Raises `EngineError` if it is damaged, `WorkspaceError` if others could have written it.
    """
    for each in (folder.parent, folder):
        checked_cache(each)
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        identity = content["identity"]
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}")
        place, settings = Place(**identity["place"]), BuildSettings.from_json(identity["settings"])
        check_types(place, Place, "place")
        check_types(settings, BuildSettings, "settings")
        engines = tuple(KeptEngine.from_json(engine) for engine in content["engines"])
        if any(engine.info.backend != place.backend for engine in engines):
            raise ValueError(f"it names an engine that is not one of {place.backend}")
        return Kept(folder, identity["bundle"], place, settings, engines)
    except (EdgewrightError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{path} is damaged ({error})", "remove it and build the bundle again") from error


def kept_for(cache: Path, bundle: str) -> list[Kept]:
    """All that is kept for the bundle of that hash, for whatever device and settings."""
    found = (read_kept(folder) for folder in sorted((cache / ENGINES_FOLDER).glob(f"{key_prefix(bundle)}*")))
    return [kept for kept in found if kept is not None and kept.bundle == bundle]
