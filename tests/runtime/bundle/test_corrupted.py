"""Corrupted bundles: each is refused with a `BundleError`, soon, and leaves nothing behind."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from corrupt import attacked, corrupted_archive, corrupted_folder
from edgewright.runtime.bundle import KeyPair, open_bundle, opening, unpack, write_archive, write_key_pair
from toy_bundle import toy_bundle

CASES = 200
SECONDS = 2.0


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for no disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys") / "pair")


@pytest.mark.parametrize("signed", [False, True])
def test_no_corrupted_bundle_is_accepted(signed: bool, keys: KeyPair, tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle", signing_key=keys.private if signed else None)
    (tmp_path / "scratch").mkdir()
    attack = attacked(
        bundle, tmp_path / "scratch", CASES, seed=signed, require_signature=keys.public if signed else None
    )
    assert attack.accepted == []
    assert attack.uncaught == []
    assert attack.refused == CASES
    assert attack.slowest < SECONDS
    assert {path.name for path in (tmp_path / "scratch").iterdir()} <= {"whole.edgewright", "aside"}


def test_the_bundle_itself_is_accepted(keys: KeyPair, tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle", signing_key=keys.private)
    write_archive(bundle, tmp_path / "toy.edgewright")
    unpack(tmp_path / "toy.edgewright", tmp_path / "unpacked", require_signature=keys.public)
    for folder in (bundle, tmp_path / "unpacked"):
        open_bundle(folder, require_signature=keys.public).close()


def test_a_check_that_is_left_out_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(opening, "_check_files", lambda *_: None)
    attack = attacked(bundle, tmp_path / "scratch", 40, seed=3)
    assert 5 <= len(attack.accepted) <= 20  # half of them are archives, whose files are hashed elsewhere
    assert attack.uncaught == []


def test_every_corruption_changes_something(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    write_archive(bundle, tmp_path / "toy.edgewright")
    content, rng, kinds = (tmp_path / "toy.edgewright").read_bytes(), random.Random(0), set()
    for _ in range(200):
        kind, damaged = corrupted_archive(content, rng)
        assert damaged != content, kind
        kinds.add(kind)
    assert len(kinds) == 8
    assert corrupted_folder(bundle, rng)
