"""Which engine of a bundle a session opens: the best that was proven on this device, else the one for any processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..bundle import Bundle
from ..bundle.spec_check import CPU_BACKEND
from ..cache import cache_folder
from ..choice import Choice
from ..errors import EngineError
from .opening import opened_bundle
from .proven import Proven, proven_engines
from .resizing import resize_warning

__all__ = ["chosen_of_bundle"]


def chosen_of_bundle(
    path: Path,
    backend: str | None,
    precision: str | None,
    *,
    require_signature: Path | None,
    allow_older: bool,
    cache: Path | None,
) -> Choice:
    """As `chosen`, for the bundle `path`."""
    folder = cache_folder(cache)
    with opened_bundle(path, folder, require_signature=require_signature, allow_older=allow_older) as bundle:
        choice = _proven(bundle, folder, backend, precision) or _carried(bundle, path, backend, precision)
        warning = resize_warning(bundle)
        return replace(choice, why=f"{choice.why}; {warning}") if warning else choice


def _proven(bundle: Bundle, cache: Path, backend: str | None, precision: str | None) -> Choice | None:
    """The best proven engine. A build that ends just now may remove it; then that build's engine is the best."""
    best = _best(bundle, cache, backend, precision)
    while best is not None:
        test = best.engine.self_test
        why = f"of the engines that were proven here it is the best ({test.reason}, {test.latency_ms:.3g} ms)"
        try:
            return Choice(best.engine.info, best.kept.content(best.engine), f"{_words(best)}: {why}")
        except EngineError:
            before, best = best, _best(bundle, cache, backend, precision)
            if best == before:
                raise
    return None


def _best(bundle: Bundle, cache: Path, backend: str | None, precision: str | None) -> Proven | None:
    fitting = (
        proven
        for proven in proven_engines(bundle.sha256, cache)
        if backend in (None, proven.kept.place.backend) and precision in (None, proven.engine.info.precision)
    )
    return next(fitting, None)


def _carried(bundle: Bundle, path: Path, backend: str | None, precision: str | None) -> Choice:
    """The CPU engine of the bundle, if it is what was asked for."""
    build = f"edgewright build {path}"
    for graph in bundle.spec.graphs:
        if graph.dialect == "cpu" and backend in (None, CPU_BACKEND) and precision in (None, graph.precision):
            why = f"the bundle carries it, proven when it was packed but not yet on this device: {build}"
            info = bundle.engine_info(graph)
            return Choice(info, bundle.read(graph.path), f"{info.backend} {info.precision}: {why}")
    wanted = " ".join(word for word in (backend, precision) if word)
    raise EngineError(f"no {wanted or 'bundled CPU'} engine of {path} is proven on this device", f"run {build}")


def _words(proven: Proven) -> str:
    info = proven.engine.info
    return " ".join(word for word in (info.backend, info.precision, info.target) if word)
