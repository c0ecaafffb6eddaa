"""A bundle's version never goes back unless somebody says so: the highest one that was built here is remembered."""

from __future__ import annotations

from pathlib import Path

from ..cache import OWNER_ONLY
from ..errors import BundleError, RollbackError, WorkspaceError
from ..files import read_json, write_json

__all__ = ["check_version", "highest_versions", "record_version"]

VERSIONS_FILE = "versions.json"
SCHEMA = "edgewright.device-versions/1"


def highest_versions(cache: Path) -> dict[str, int]:
    """The highest version that was built here, by model.

    Raises `BundleError` if the file that remembers them is damaged: then nobody knows what is older.
    """
    path = cache / VERSIONS_FILE
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        models = content["models"] if content["schema"] == SCHEMA else None
    except (WorkspaceError, KeyError, TypeError):
        models = None
    if not isinstance(models, dict) or not all(type(version) is int for version in models.values()):
        raise BundleError(
            f"{path} is damaged, so it is not known which versions were used here",
            "remove it if any version of your bundles may be used",
        )
    return models


def check_version(cache: Path, model: str, version: int, *, allow_older: bool = False) -> None:
    """Raises `RollbackError` if a higher version of the model's bundle was built here, unless `allow_older`."""
    highest = highest_versions(cache).get(model, version)
    if version < highest and not allow_older:
        raise RollbackError(
            f"the bundle of {model} has version {version}, here version {highest} was built already",
            "take the newer bundle, or go back with --allow-older",
        )


def record_version(cache: Path, model: str, version: int) -> None:
    """Remembers the version, if it is the highest so far."""
    versions = highest_versions(cache)
    if version > versions.get(model, version - 1):
        write_json(cache / VERSIONS_FILE, {"schema": SCHEMA, "models": {**versions, model: version}}, mode=OWNER_ONLY)
