"""Builds a bundle's engines on the device and proves them: build → stage → self-test → keep, each one way only.

Both steps run in new processes. The self-test reads the engine from the file on disk that will be used later. An
engine becomes known by the manifest of the cache, which is replaced last: until then the one before it is in use.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..backends import BACKENDS, Absence, Backend, backend_named
from ..bundle import Bundle
from ..cache import cache_folder, checked_cache, locked_cache
from ..engine_files import verified_bytes
from ..errors import BuildError, BundleError, EdgewrightError, EngineError, WorkspaceError
from ..specs import BatchProfile, EngineInfo
from .child import answer_of
from .identity import GPU_DIALECTS, BuildSettings, Place, place_here
from .kept import Kept, KeptEngine, engine_file, engine_folder, read_kept
from .opening import opened_bundle
from .rows import DeviceReport, DeviceRow, device_report, kept_row, self_test_row
from .tasks import STAGED_ENGINE, STAGED_TIMING, BuildTask, graph_for
from .versions import record_version

__all__ = ["BuildOptions", "build_bundle"]

STAGING_FOLDER, TIMING_FOLDER = "staging", "timing"
DLA_BATCH = BatchProfile(1, 1, 1)  # a DLA takes one fixed size, and a camera gives one image at a time
NO_DLA = Absence("target_unsupported", "a DLA is part of a Jetson", "the backend tensorrt builds for it")
NO_FP32_ON_DLA = Absence("precision_unsupported", "a DLA computes in fp16 and int8", "leave --dla out for fp32")
Say = Callable[[str], None]
"""Takes a line of progress."""


@dataclass(frozen=True)
class BuildOptions:
    """What is to be built, and how.

    * backends, precisions: only these; empty for all that the bundle and the device allow
    * workspace: the most scratch memory of a GPU layer, in bytes, None for the default of the device
    * dla: the DLA core of a Jetson, None for the GPU; what it cannot run falls back to the GPU
    * rebuild: even where a proven engine is kept
    * floor: bytes of memory that must stay available, None for 5 % and 200 MB at least
    """

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    workspace: int | None = None
    dla: int | None = None
    rebuild: bool = False
    floor: int | None = None


def build_bundle(
    path: Path,
    options: BuildOptions = BuildOptions(),
    *,
    require_signature: Path | None = None,
    allow_older: bool = False,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> DeviceReport:
    """Builds and proves the engines of the bundle `path` for every backend that is ready here, or those asked for.

    * cache: where they are kept, None for `cache_folder()`; say: takes lines of progress

    A row says what became of each. Raises as `opened_bundle`; `BuildError` if the bundle has no graph for what is asked
    for, `WorkspaceError` if another build uses the cache or it cannot be written.
    """
    folder = cache_folder(cache)
    with (
        locked_cache(folder),
        opened_bundle(path, folder, require_signature=require_signature, allow_older=allow_older) as bundle,
    ):
        builder = _Builder(bundle, folder, options, say)
        try:
            rows = tuple(builder.row(*combination) for combination in _combinations(bundle, options))
        finally:
            shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
        if any(row.status == "verified" for row in rows):
            record_version(folder, bundle.model, bundle.version)
        return device_report(bundle, folder, rows)


class _Builder:
    """Builds the engines of one bundle, one after the other."""

    def __init__(self, bundle: Bundle, cache: Path, options: BuildOptions, say: Say) -> None:
        self._bundle = bundle
        self._cache = cache
        self._options = options
        self._say = say

    def row(self, backend: Backend, precision: str) -> DeviceRow:
        """One engine: kept, built and proven, or why not."""
        row = DeviceRow(backend.name, precision, "skipped", "", "")
        name = f"{backend.name} {precision}"
        try:
            row = self._row(row, backend)
        except (BundleError, WorkspaceError):
            raise  # of the whole run, not of one engine
        except EdgewrightError as error:
            row = replace(row, status="failed", reason_code="build_failed", reason=str(error))
        if row.reused:
            self._say(f"{name}: kept, it passed its self-test")
        elif row.status == "verified":
            self._say(f"{name}: passed its self-test: {row.reason}")
        else:
            self._say(f"{name}: {row.status}, {row.reason_code.replace('_', ' ')}")
        return row

    def _row(self, row: DeviceRow, backend: Backend) -> DeviceRow:
        absence = self._absence(backend, row.precision)
        if absence is not None:
            return replace(row, reason_code=absence.reason_code, reason=f"{absence.reason}; {absence.hint}")
        place = place_here(backend)
        settings = self._settings(backend)
        kept = _kept_before(
            Kept(engine_folder(self._cache, self._bundle.sha256, place, settings), self._bundle.sha256, place, settings)
        )
        before = kept.engine(row.precision)
        if before is not None and not self._options.rebuild and before.self_test.passed and kept.is_whole(before):
            return replace(kept_row(row, kept, before), reused=True)
        return self._built(row, backend, kept)

    def _absence(self, backend: Backend, precision: str) -> Absence | None:
        """Why this engine is not built here, None if it is."""
        absence = backend.absence() or backend.cannot_run()
        if absence is not None:
            return absence
        if self._options.dla is not None and backend.dialect in GPU_DIALECTS:
            if backend.targets:
                return NO_DLA
            if precision == "fp32":
                return NO_FP32_ON_DLA
        return backend.unsupported(precision, _target(backend, place_here(backend)))

    def _settings(self, backend: Backend) -> BuildSettings:
        if backend.dialect not in GPU_DIALECTS:
            return BuildSettings()
        profile = self._bundle.spec.profile if self._options.dla is None else DLA_BATCH
        return BuildSettings(profile, self._options.workspace, self._options.dla)

    def _built(self, row: DeviceRow, backend: Backend, kept: Kept) -> DeviceRow:
        """Builds, tests and keeps. What fails leaves the engine before it in its place."""
        name = f"{row.backend} {row.precision}"
        began = time.monotonic()
        self._say(f"{name}: builds …")
        info = self._compiled(row, backend, kept)
        counts = ", ".join(f"{count} × {precision}" for precision, count in info.actual_precision.items())
        self._say(f"{name}: built in {time.monotonic() - began:.1f} s{f', {counts}' if counts else ''}")
        file = kept.folder / engine_file(row.precision, info.engine_sha256, backend.suffix)
        same = any(engine.file == file.name for engine in kept.engines)
        os.replace(self._cache / STAGING_FOLDER / STAGED_ENGINE, file)
        try:
            row = self_test_row(row, self._bundle, file, info, self._options.floor)
        finally:
            if row.status != "verified" and not same:
                file.unlink(missing_ok=True)
        if row.self_test is not None and (row.self_test.passed or same):
            kept = kept.with_engine(KeptEngine(file.name, info, row.self_test))
            kept.write()
            kept.remove_unnamed()
        return row if row.status == "verified" else replace(row, path=None)

    def _compiled(self, row: DeviceRow, backend: Backend, kept: Kept) -> EngineInfo:
        """Builds the engine into the staging folder, and remembers what was measured on the way."""
        staging = self._cache / STAGING_FOLDER
        shutil.rmtree(staging, ignore_errors=True)
        timing = self._cache / TIMING_FOLDER / _timing_file(kept.place)
        for folder in (staging, timing.parent, kept.folder.parent, kept.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            checked_cache(folder)
        task = BuildTask(
            bundle=str(self._bundle.path.absolute()),
            sha256=self._bundle.sha256,
            backend=backend.name,
            precision=row.precision,
            target=_target(backend, kept.place),
            architecture=kept.place.architecture if backend.dialect in GPU_DIALECTS else None,
            settings=kept.settings,
            timing=str(timing.absolute()),
            staging=str(staging.absolute()),
        )
        purpose = f"the build of {row.backend} {row.precision}"
        info = EngineInfo.from_json(answer_of(task.to_json(), purpose, floor=self._options.floor)["info"])
        verified_bytes(staging / STAGED_ENGINE, info)
        if (staging / STAGED_TIMING).exists():
            os.replace(staging / STAGED_TIMING, timing)
        return info


def _combinations(bundle: Bundle, options: BuildOptions) -> Iterator[tuple[Backend, str]]:
    """What the bundle has graphs for, of what is asked for. Raises `BuildError` if that is nothing."""
    wanted = [backend_named(name) for name in dict.fromkeys(options.backends)] or list(BACKENDS.values())
    known = dict.fromkeys(graph.precision for graph in bundle.spec.graphs)
    for precision in options.precisions:
        if precision not in known:
            raise BuildError(f"the bundle has no {precision} graph", f"it has {', '.join(known)}")
    found = [
        (backend, precision)
        for backend in wanted
        for precision in backend.precisions
        if precision in (options.precisions or known) and graph_for(bundle.spec, backend, precision) is not None
    ]
    if not found:
        graphs = ", ".join(f"{graph.dialect} {graph.precision}" for graph in bundle.spec.graphs)
        raise BuildError(
            "the bundle has no graph for the backends and precisions that were asked for", f"it has {graphs}"
        )
    return iter(found)


def _kept_before(empty: Kept) -> Kept:
    """What is kept in the folder of `empty`; that itself where nothing is, or the manifest is damaged or another's."""
    try:
        found = read_kept(empty.folder)
    except EngineError:
        return empty
    return found if found is not None and replace(found, engines=()) == empty else empty


def _target(backend: Backend, place: Place) -> str | None:
    """The architecture to name to a backend that builds for several."""
    return place.architecture if backend.targets else None


def _timing_file(place: Place) -> str:
    """A cache of measurements holds for one version of TensorRT and one GPU."""
    words = f"{place.backend}-{place.version}-{place.device}-{place.architecture}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", words) + ".timing"
