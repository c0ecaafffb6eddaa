"""Bundles in one file are unpacked into the cache: once, whatever ends or comes in between."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edgewright.runtime.bundle import unpack, write_archive, write_key_pair
from edgewright.runtime.device import opening
from edgewright.runtime.device.opening import opened_bundle
from edgewright.runtime.errors import BundleError, SignatureError, WorkspaceError
from fake_gpu import Bundles


@pytest.fixture
def archive(bundle: Path, tmp_path: Path) -> Path:
    write_archive(bundle, tmp_path / "toy.edgewright")
    return tmp_path / "toy.edgewright"


def unpacked(device_cache: Path) -> list[str]:
    return [path.name for path in (device_cache / "bundles").iterdir()]


def test_of_two_at_once_the_second_takes_what_the_first_unpacked(
    archive: Path, device_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks while nothing is there, and comes to unpack when the first has opened what it unpacked."""
    looked, go_on, unpacks = threading.Event(), threading.Event(), []
    whole = opening._whole

    def look(folder: Path, require_signature: Path | None) -> object:
        found = whole(folder, require_signature)
        if threading.current_thread() is second and not looked.is_set():
            looked.set()
            go_on.wait(30)
        return found

    def counted(*arguments: Path, require_signature: Path | None) -> Path:
        unpacks.append(arguments)
        return unpack(*arguments, require_signature=require_signature)

    def open_second() -> None:
        with opened_bundle(archive, device_cache) as bundle:
            opened.append(bundle.sha256)

    monkeypatch.setattr(opening, "_whole", look)
    monkeypatch.setattr(opening, "unpack", counted)
    opened: list[str] = []
    second = threading.Thread(target=open_second)
    second.start()
    assert looked.wait(30)
    with opened_bundle(archive, device_cache) as bundle:
        go_on.set()
        second.join(30)
        assert opened == [bundle.sha256]
        assert bundle.read("spec.json"), "it is still there"
    assert len(unpacks) == 1
    assert unpacked(device_cache) == [f"{bundle.sha256}.bundle"]


def test_what_a_killed_process_left_is_removed(archive: Path, device_cache: Path) -> None:
    for name in (".partial-abc/fresh.bundle", ".partial-def"):
        (device_cache / "bundles" / name).mkdir(parents=True)
    device_cache.chmod(0o700)
    with opened_bundle(archive, device_cache) as bundle:
        assert unpacked(device_cache) == [f"{bundle.sha256}.bundle"]


def test_a_signed_archive_replaces_the_same_without_a_signature(
    bundles: Bundles, archive: Path, device_cache: Path, tmp_path: Path
) -> None:
    key = write_key_pair(tmp_path / "key")
    write_archive(bundles("signed.bundle", signing_key=key.private), tmp_path / "signed.edgewright")
    opened_bundle(archive, device_cache).close()
    before = unpacked(device_cache)
    with pytest.raises(SignatureError, match="is not signed"):
        opened_bundle(archive, device_cache, require_signature=key.public)
    assert unpacked(device_cache) == before
    opened_bundle(tmp_path / "signed.edgewright", device_cache, require_signature=key.public).close()
    assert unpacked(device_cache) == before


@pytest.mark.parametrize(
    "plant",
    [
        lambda place: place.symlink_to("nowhere"),
        lambda place: place.write_bytes(b""),
    ],
)
def test_a_cache_that_cannot_be_written_is_explained(
    archive: Path, device_cache: Path, plant: Callable[[Path], None]
) -> None:
    device_cache.mkdir(mode=0o700)
    plant(device_cache / "bundles")
    with pytest.raises(WorkspaceError, match=r"cannot be unpacked into .*; choose another with --cache"):
        opened_bundle(archive, device_cache)


def test_what_is_unpacked_already_needs_no_writing(
    archive: Path, device_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_bundle(archive, device_cache).close()
    monkeypatch.setattr(opening, "unpacking_alone", None)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    opened_bundle(archive, device_cache).close()


def test_a_place_that_may_not_be_searched(tmp_path: Path, device_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(BundleError, match=r"cannot open .*Permission denied"):
        opened_bundle(tmp_path / "toy.edgewright", device_cache)


def test_a_damaged_one_is_unpacked_again(archive: Path, device_cache: Path) -> None:
    opened_bundle(archive, device_cache).close()
    (folder,) = (device_cache / "bundles").iterdir()
    shutil.rmtree(folder / "graphs")
    opened_bundle(archive, device_cache).close()
    assert (folder / "graphs/fp32.onnx").is_file()
