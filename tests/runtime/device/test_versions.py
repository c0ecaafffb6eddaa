"""A version never goes back unless somebody says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgewright.runtime.device.versions import VERSIONS_FILE, check_version, highest_versions, record_version
from edgewright.runtime.errors import BundleError, RollbackError


def test_the_highest_version_is_remembered(tmp_path: Path) -> None:
    for version in (2, 5, 3):
        record_version(tmp_path, "toy", version)
    record_version(tmp_path, "other", 1)
    assert highest_versions(tmp_path) == {"toy": 5, "other": 1}


@pytest.mark.parametrize(("version", "older"), [(4, True), (5, False), (6, False)])
def test_an_older_version_is_refused(tmp_path: Path, version: int, older: bool) -> None:
    record_version(tmp_path, "toy", 5)
    check_version(tmp_path, "toy", version, allow_older=True)
    check_version(tmp_path, "other", 1)
    if older:
        with pytest.raises(RollbackError, match=r"version 4, here version 5.*--allow-older"):
            check_version(tmp_path, "toy", version)
    else:
        check_version(tmp_path, "toy", version)


def test_nothing_is_older_where_nothing_was_built(tmp_path: Path) -> None:
    check_version(tmp_path / "none", "toy", 1)


DAMAGED: tuple[Any, ...] = (None, [], {"toy": "5"}, {"toy": True}, {"toy": 1.5})


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"schema": "edgewright.device-versions/2", "models": {}}',
        *(json.dumps({"schema": "edgewright.device-versions/1", "models": models}) for models in DAMAGED),
    ],
)  # fmt: skip
def test_a_damaged_memory_is_a_refusal(tmp_path: Path, content: str) -> None:
    (tmp_path / VERSIONS_FILE).write_text(content)
    for allow_older in (False, True):
        with pytest.raises(BundleError, match=r"damaged.*remove it"):
            check_version(tmp_path, "toy", 9, allow_older=allow_older)
    with pytest.raises(BundleError):
        record_version(tmp_path, "toy", 9)
    assert (tmp_path / VERSIONS_FILE).read_text() == content
