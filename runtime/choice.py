"""Which engine a path stands for: a bundle's, an engine file, or a build folder's; verified before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .backends import BACKENDS, backend_named
from .backends.base import Backend
from .bundle import is_bundle
from .engine_files import ENGINES_FOLDER, description_of, read_info, verified_bytes
from .errors import EngineError, WorkspaceError
from .files import read_json
from .specs import EngineInfo

__all__ = ["REPORT_FILE", "Choice", "chosen", "stands_for_bundle"]

REPORT_FILE = "report.json"
BUNDLE_SUFFIXES = (".bundle", ".edgewright")
REBUILD = "run edgewright engine MODEL again"


@dataclass(frozen=True)
class Choice:
    """An engine: what it is, its verified bytes, and why it is this one."""

    info: EngineInfo
    engine: bytes
    why: str


def chosen(
    path: Path,
    backend: str | None = None,
    precision: str | None = None,
    *,
    provider: str | None = None,
    require_signature: str | Path | None = None,
    allow_older: bool = False,
    cache: str | Path | None = None,
) -> Choice:
    """The engine that `path` names, or that of a build folder or a bundle that was asked for or is best there.

    Of a bundle's engines the best that was proven on this device, else the CPU engine that the bundle carries; a
    `provider` asks for the backend that has it. What the other arguments ask of a bundle is as in `opened_bundle`.
    What is verified is what is loaded: the file is read once, and its hash compared with the one that is known of it.
    Raises `EngineError` if there is no such engine, it was changed, or another version of its library built it;
    `BundleError` and its kinds if a bundle is not taken.
    """
    if stands_for_bundle(path):
        from .device.choice import chosen_of_bundle

        backend = backend or next((name for name, each in BACKENDS.items() if provider in each.providers), None)
        choice = chosen_of_bundle(
            path,
            backend,
            precision,
            require_signature=None if require_signature is None else Path(require_signature),
            allow_older=allow_older,
            cache=None if cache is None else Path(cache),
        )
    elif require_signature is not None or allow_older or cache is not None:
        raise EngineError(
            f"{path} is not a bundle, and only a bundle is signed, has versions and uses the cache",
            "give a bundle, or leave these options out",
        )
    else:
        choice = _of_workstation(path, backend, precision)
    classes, labels = choice.info.outputs[0].shape[-1], len(choice.info.labels)
    if classes != labels:
        raise EngineError(f"the engine of {path} names {labels} labels for {classes} classes", "build it again")
    return choice


def stands_for_bundle(path: Path) -> bool:
    """Whether `path` is a bundle, or is called like one: then its errors are those of a bundle."""
    return path.suffix in BUNDLE_SUFFIXES or is_bundle(path)


def _of_workstation(path: Path, backend: str | None, precision: str | None) -> Choice:
    """An engine file, or the engine of a build folder."""
    if path.is_dir():
        described, why = _pick(path, backend, precision)
    else:
        described, why = description_of(path), f"{path.name} was named"
    info = read_info(described)
    if (backend or info.backend) != info.backend or (precision or info.precision) != info.precision:
        raise EngineError(
            f"{path} is {info.backend} {info.precision}, asked for was {backend or 'any'} {precision or 'any'}"
        )
    loader = backend_named(info.backend)
    _check_version(loader, info)
    return Choice(info, verified_bytes(described.with_suffix(loader.suffix), info), why)


def _check_version(loader: Backend, info: EngineInfo) -> None:
    """Says in our words what a library would say of another version's engine, if it noticed."""
    built_with = info.versions.get(loader.name)
    if loader.version_bound and loader.absence() is None and built_with != loader.version():
        raise EngineError(
            f"the engine was built with {loader.name} {built_with}, here is {loader.version()}", "build it again here"
        )


def _pick(folder: Path, backend: str | None, precision: str | None) -> tuple[Path, str]:
    """The description of one engine of a build folder, and why it is this one."""
    report = _report_of(folder)
    recommended = report.get("recommended")
    if backend is None and precision is None and recommended is not None:
        try:
            path = (folder / recommended["path"]).with_suffix(".json")
            return path, f"{recommended['backend']} {recommended['precision']} is the fastest engine that passed"
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{folder / REPORT_FILE} is damaged ({error!r})", REBUILD) from error
    fitting: list[tuple[Path, EngineInfo]] = []
    for path in sorted((folder / ENGINES_FOLDER).glob("*.json")):
        info = read_info(path)
        if backend in (None, info.backend) and precision in (None, info.precision):
            fitting.append((path, info))
    wanted = " ".join(word for word in (backend, precision) if word) or "recommended"
    if not fitting:
        raise EngineError(f"{folder} has no {wanted} engine", "run edgewright engine MODEL to build it")
    if len(fitting) > 1:  # of GPU engines the one for the GPU that is here
        here = [(path, info) for path, info in fitting if info.target in (None, backend_named(info.backend).device())]
        fitting = here if len(here) == 1 else fitting
    if len(fitting) > 1:
        words = ([info.backend, info.precision, info.target or ""] for _, info in fitting)
        found = ", ".join(" ".join(word for word in each if word) for each in words)
        raise EngineError(
            f"{folder} has several engines ({found}), and it is not clear which is meant by {wanted}",
            "name one, such as --precision fp32, or its file",
        )
    ((path, info),) = fitting
    return path, f"{info.backend} {info.precision} is the only engine that was asked for"


def _report_of(folder: Path) -> dict[str, Any]:
    if not (folder / REPORT_FILE).exists():
        return {}
    try:
        report = read_json(folder / REPORT_FILE)
    except WorkspaceError as error:
        raise EngineError(error.message, REBUILD) from error
    if not isinstance(report, dict):
        raise EngineError(f"{folder / REPORT_FILE} is not a report", REBUILD)
    return report
