"""The fixture `edgewright_build`, for pytest: engines of one's own model, built when a test asks for them.

pytest loads this module in every run where Edgewright is installed, so that it imports nothing but pytest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from edgewright.built_model import BuiltModel

__all__ = ["BuildFixture", "edgewright_build"]


class BuildFixture(Protocol):
    """What the fixture gives."""

    def __call__(self, model: str, **options: Any) -> BuiltModel:
        """The model, whose engines are built when they are asked for; options as `edgewright engine` has them."""


def _cached(pytestconfig: pytest.Config) -> Path | None:
    """A folder of pytest's cache; None without one, or where nothing can be written."""
    cache: Any = getattr(pytestconfig, "cache", None)
    try:
        return None if cache is None else Path(cache.mkdir("edgewright"))
    except OSError:
        return None


@pytest.fixture(scope="session")
def edgewright_build(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> BuildFixture:
    """Engines of one's own model: `edgewright_build("net.py:model", ...).assert_parity("onnxruntime", "int8")`.

    What is built is kept in pytest's cache, and used again as long as nothing that decides it has changed.
    """
    folder = _cached(pytestconfig) or tmp_path_factory.mktemp("edgewright")
    worker = getattr(pytestconfig, "workerinput", {}).get("workerid", "")  # of xdist: each has its own build folder

    def build(model: str, **options: Any) -> BuiltModel:
        from edgewright.built_model import built_model

        options.setdefault("build_dir", folder / worker)
        return built_model(model, **options)

    return build
