"""The engines that were proven on this device, as it is now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..backends import BACKENDS
from ..errors import DeviceError
from .identity import Place, place_here
from .kept import Kept, KeptEngine, kept_for

__all__ = ["Proven", "kept_here", "proven_engines"]


@dataclass(frozen=True)
class Proven:
    """An engine that passed the self-test here, and where it is kept."""

    kept: Kept
    engine: KeptEngine


def proven_engines(bundle: str, cache: Path) -> tuple[Proven, ...]:
    """Those of the bundle of that hash that can run here and passed their self-test, the best first.

    A GPU's go before a processor's; among them the one with the lower latency in its self-test.
    Raises `EngineError` if a manifest of the cache is damaged.
    """
    found = (
        Proven(kept, engine) for kept in kept_here(bundle, cache) for engine in kept.engines if engine.self_test.passed
    )
    return tuple(
        sorted(found, key=lambda proven: (proven.engine.info.target is None, proven.engine.self_test.latency_ms))
    )


def kept_here(bundle: str, cache: Path) -> Iterator[Kept]:
    """What is kept for the bundle of that hash and this device, driver and versions, whatever the settings."""
    here: dict[str, Place | None] = {}
    for kept in kept_for(cache, bundle):
        name = kept.place.backend
        if name not in here:
            here[name] = _place(name)
        if kept.place == here[name]:
            yield kept


def _place(name: str) -> Place | None:
    """The backend here, None if it cannot be used."""
    backend = BACKENDS.get(name)
    if backend is None or (backend.absence() or backend.cannot_run()) is not None:
        return None
    try:
        return place_here(backend)
    except DeviceError:
        return None
