"""Repeats the self-test of the engines that this device keeps for a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..backends import BACKENDS, backend_named
from ..bundle import Bundle
from ..cache import cache_folder, locked_cache
from .kept import Kept
from .opening import opened_bundle
from .proven import kept_here
from .rows import DeviceReport, DeviceRow, device_report, self_test_row

__all__ = ["verify_bundle"]


def verify_bundle(
    path: Path,
    *,
    backends: tuple[str, ...] = (),
    precisions: tuple[str, ...] = (),
    require_signature: Path | None = None,
    allow_older: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> DeviceReport:
    """Tests every engine that is kept for the bundle `path` and this device, or those of the named backends alone.

    An engine that fails is not used from then on, until it is built again. One whose file was changed is not loaded.
    Raises as `opened_bundle`; `EngineError` if a backend is not known or a manifest of the cache is damaged.
    """
    for name in backends:
        backend_named(name)
    folder = cache_folder(cache)
    with (
        locked_cache(folder),
        opened_bundle(path, folder, require_signature=require_signature, allow_older=allow_older) as bundle,
    ):
        rows = []
        for kept in list(kept_here(bundle.sha256, folder)):
            if kept.place.backend in (backends or BACKENDS):
                for row in _tested(bundle, kept, precisions):
                    say(f"{row.backend} {row.precision}: {row.status}: {row.reason}")
                    rows.append(row)
        return device_report(bundle, folder, rows)


def _tested(bundle: Bundle, kept: Kept, precisions: tuple[str, ...]) -> Iterator[DeviceRow]:
    """A row for each engine of those precisions, all if none is named; notes what the tests give."""
    for engine in kept.engines:
        precision = engine.info.precision
        if precision in (precisions or (precision,)):
            row = DeviceRow(kept.place.backend, precision, "skipped", "", "")
            row = self_test_row(row, bundle, kept.folder / engine.file, engine.info)
            tested = engine.doubted(row.reason) if row.self_test is None else replace(engine, self_test=row.self_test)
            kept = kept.with_engine(tested)
            kept.write()
            yield row
