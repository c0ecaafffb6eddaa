"""The modules whose stages make up a run, and a function that all of them use replaced in each."""

from __future__ import annotations

import pytest

from edgewright import context, engines, graphs, int8, proof

__all__ = ["replace_in_stages"]

MODULES = (context, graphs, int8, engines, proof)


def replace_in_stages(patch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Sets `name`, such as "source_hash", in every one of the modules that imports it."""
    holders = [module for module in MODULES if hasattr(module, name)]
    assert holders, f"no stage uses {name}"
    for module in holders:
        patch.setattr(module, name, value)
