"""The one-file form: what is unpacked, and everything that is refused without a trace."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgewright.runtime.bundle import KeyPair, is_bundle, open_bundle, unpack, write_archive, write_key_pair
from edgewright.runtime.bundle.archive import manifest_sha256
from edgewright.runtime.bundle.manifest import MAGIC, MOST_MANIFEST_BYTES, FileEntry, Manifest
from edgewright.runtime.bundle.signature import MOST_ENVELOPE_BYTES
from edgewright.runtime.errors import BundleError, SignatureError
from edgewright.runtime.files import sha256_of
from toy_bundle import toy_bundle, toy_files


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys") / "pair")


@pytest.fixture
def archive(tmp_path: Path, pair: KeyPair) -> Path:
    bundle = toy_bundle(tmp_path / "toy.bundle", signing_key=pair.private)
    write_archive(bundle, tmp_path / "toy.edgewright")
    return tmp_path / "toy.edgewright"


def header(manifest: bytes, envelope: bytes = b"") -> bytes:
    return MAGIC + struct.pack("<II", len(manifest), len(envelope)) + manifest + envelope


def refused(content: bytes, folder: Path, reason: str, require_signature: Path | None = None) -> None:
    """`content` is refused for that reason, and leaves nothing in `folder`."""
    folder.mkdir()
    (folder / "it.edgewright").write_bytes(content)
    with pytest.raises(BundleError, match=reason):
        unpack(folder / "it.edgewright", folder / "out", require_signature=require_signature)
    assert [path.name for path in folder.iterdir()] == ["it.edgewright"]


def test_what_is_unpacked_is_what_was_packed(archive: Path, pair: KeyPair, tmp_path: Path) -> None:
    assert unpack(archive, tmp_path / "out", require_signature=pair.public) == tmp_path / "out"
    for folder, other in ((tmp_path / "out", tmp_path / "toy.bundle"), (tmp_path / "toy.bundle", tmp_path / "out")):
        for path in filter(Path.is_file, folder.rglob("*")):
            assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes()
    with open_bundle(tmp_path / "out", require_signature=pair.public) as opened:
        assert opened.signed_by == pair.fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {"toy.bundle", "toy.edgewright", "out"}


def test_others_can_read_what_is_unpacked(archive: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = unpack(archive, tmp_path / "out")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "graphs", folder / "spec.json")] == [
        0o755, 0o755, 0o644,
    ]  # fmt: skip


def test_the_container_is_as_documented(archive: Path) -> None:
    content, folder = archive.read_bytes(), archive.with_suffix(".bundle")
    manifest, envelope = ((folder / name).read_bytes() for name in ("manifest.json", "manifest.dsse.json"))
    files = b"".join(toy_files()[path] for path in sorted(toy_files()))
    assert content == header(manifest, envelope) + files
    assert is_bundle(archive)


def test_an_archive_says_which_bundle_it_is(archive: Path, tmp_path: Path) -> None:
    manifest = (archive.with_suffix(".bundle") / "manifest.json").read_bytes()
    assert manifest_sha256(archive) == sha256_of(manifest)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "other").write_bytes(b"PK\x03\x04" + bytes(99))
    (tmp_path / "cut").write_bytes(archive.read_bytes()[:99])
    for name in ("missing", "pipe", "toy.bundle", "other", "cut"):
        with pytest.raises(BundleError):
            manifest_sha256(tmp_path / name)


def test_an_unsigned_archive_has_no_envelope(tmp_path: Path, pair: KeyPair) -> None:
    write_archive(toy_bundle(tmp_path / "toy.bundle"), tmp_path / "toy.edgewright")
    assert (tmp_path / "toy.edgewright").read_bytes()[12:16] == bytes(4)
    assert not (unpack(tmp_path / "toy.edgewright", tmp_path / "out") / "manifest.dsse.json").exists()
    with pytest.raises(SignatureError, match="is not signed"):
        unpack(tmp_path / "toy.edgewright", tmp_path / "again", require_signature=pair.public)


def test_a_bundle_that_does_not_open_is_not_put_into_one_file(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle")
    (bundle / "extra").write_bytes(b"")
    with pytest.raises(BundleError, match="extra"):
        write_archive(bundle, tmp_path / "toy.edgewright")
    assert not (tmp_path / "toy.edgewright").exists()


def test_an_existing_target_is_left_alone(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for folder in (*map(tmp_path.joinpath, ("empty", "dangling", "toy.bundle", "toy.edgewright")), Path(), Path("/")):
        with pytest.raises(BundleError, match="exists"):
            unpack(archive, folder)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_in_no_folder_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot write"):
        unpack(archive, tmp_path / "missing" / "out")


def test_what_is_no_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    cases = {"missing": "cannot open", "pipe": "no regular file", "toy.bundle": "toy.bundle is a folder"}
    for name, reason in cases.items():
        with pytest.raises(BundleError, match=reason):
            unpack(tmp_path / name, tmp_path / "out")
    content = archive.read_bytes()
    for number, broken in enumerate((b"", MAGIC[:5], b"PK\x03\x04" + content, content.replace(b"\r\n", b"\n", 1))):
        refused(broken, tmp_path / str(number), "no bundle in one file")


def test_a_cut_archive_is_refused_wherever_it_is_cut(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    for end, reason in ((10, "inside the header"), (100, r"inside manifest\.json"), (len(content) - 1, "by its manif")):
        refused(content[:end], tmp_path / str(end), reason)
    manifest_size = struct.unpack_from("<I", content, 8)[0]
    refused(content[: 16 + manifest_size + 5], tmp_path / "envelope", r"inside manifest\.dsse\.json")


def test_nothing_may_follow_the_last_file(archive: Path, tmp_path: Path) -> None:
    refused(archive.read_bytes() + b"\0", tmp_path / "more", "by its manifest it has")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((MOST_MANIFEST_BYTES + 1, 0), r"manifest\.json is larger"),
        ((2**32 - 1, 0), r"manifest\.json is larger"),
        ((10, MOST_ENVELOPE_BYTES + 1), r"manifest\.dsse\.json is larger"),
    ],
)
def test_a_header_of_any_size_is_not_read(sizes: tuple[int, int], reason: str, tmp_path: Path) -> None:
    refused(MAGIC + struct.pack("<II", *sizes) + b"x" * 100, tmp_path / "huge", reason)


def test_a_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    entries = tuple(FileEntry(name, 2 << 30, "0" * 64) for name in ("a", "b"))
    refused(header(Manifest("toy", 1, {}, entries).serialized()) + b"x", tmp_path / "bomb", "by its manifest it has")


@pytest.mark.parametrize("path", ["../escape", "/tmp/escape", "a\\..\\b"])
def test_a_path_that_leaves_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    manifest = Manifest("toy", 1, {}, (FileEntry(path, 1, sha256_of(b"x")),)).serialized()
    refused(header(manifest) + b"x", tmp_path / "leaving", "which")
    assert [each.name for each in tmp_path.iterdir()] == ["leaving"]


def test_exchanged_files_are_refused(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    first, second = toy_files()["golden/logits.f32"], toy_files()["golden/pixels.u8"]  # neighbours in the file
    assert content.count(first + second) == 1
    refused(content.replace(first + second, second + first), tmp_path / "it", r"golden/logits\.f32 was changed")


def test_the_signature_comes_before_the_manifest_is_parsed(
    archive: Path, pair: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*_: object) -> None:
        raise AssertionError("the manifest was parsed")

    monkeypatch.setattr(Manifest, "parse", unreached)
    content = bytearray(archive.read_bytes())
    content[60] ^= 1
    refused(bytes(content), tmp_path / "changed", "another manifest", pair.public)
    other = write_key_pair(tmp_path / "other")
    refused(archive.read_bytes(), tmp_path / "untrusted", "trusted here is", other.public)


def test_a_spec_that_does_not_fit_is_not_unpacked(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy.bundle", spec_changes={"labels": []})
    manifest = (bundle / "manifest.json").read_bytes()
    files = (entry.path for entry in Manifest.parse(manifest).files)
    content = header(manifest) + b"".join((bundle / path).read_bytes() for path in files)
    refused(content, tmp_path / "it", "0 labels for 4 classes")


def test_a_full_disk_is_said_before_anything_is_written(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(content) - 1))
    refused(content, tmp_path / "full", "free")


def test_a_disk_that_fails_on_the_way_leaves_nothing(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    refused(archive.read_bytes(), tmp_path / "full", "no space left")
