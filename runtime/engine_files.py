"""An engine on disk: the file, and beside it the JSON that says what it is and how its content is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bundle.typed import check_types
from .errors import EdgewrightError, EngineError, WorkspaceError
from .files import read_json, sha256_of
from .specs import EngineInfo

__all__ = ["ENGINES_FOLDER", "description_of", "info_of", "read_info", "verified_bytes"]

ENGINES_FOLDER = "engines"


def description_of(path: Path) -> Path:
    """The JSON beside the engine `path`. Raises `EngineError` if either is missing."""
    if not path.is_file():
        raise EngineError(f"there is no engine {path}", "run edgewright engine MODEL first")
    described = path.with_suffix(".json")
    if path == described or not described.is_file():
        raise EngineError(
            f"{path} is not an engine: no {path.stem}.json describes it", f"engines are in build/MODEL/{ENGINES_FOLDER}"
        )
    return described


def read_info(path: Path) -> EngineInfo:
    """What the JSON file beside an engine says. Raises `EngineError` if it is missing or says something else."""
    try:
        return info_of(read_json(path))
    except WorkspaceError as error:
        raise EngineError(f"no description of the engine: {error.message}", "build it again") from error
    except (KeyError, TypeError, ValueError, AttributeError, EdgewrightError) as error:
        raise EngineError(f"{path} does not describe an engine ({error!r})", "build it again") from error


def info_of(content: Any) -> EngineInfo:
    """What a JSON document says of an engine, with the types that it should have.

    Raises KeyError, TypeError, ValueError, AttributeError or an `EdgewrightError` if it is none.
    """
    info = EngineInfo.from_json(content)
    check_types(info, EngineInfo, "engine")
    if not info.inputs or not info.outputs or not info.outputs[0].shape:
        raise ValueError("it has no inputs or no outputs")
    return info


def verified_bytes(path: Path, info: EngineInfo) -> bytes:
    """The engine's bytes, read once. Raises `EngineError` unless they are those that `info` describes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}", "build it again") from error
    if sha256_of(content) != info.engine_sha256:
        raise EngineError(f"{path} is not the engine that was built (its SHA-256 differs)", "build it again")
    return content
