"""A bundle's folder: what opens, and everything that is refused before a byte of it reaches a parser."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import backend_named
from edgewright.runtime.bundle import KeyPair, is_bundle, open_bundle, opening, write_bundle, write_key_pair, writing
from edgewright.runtime.bundle.manifest import MOST_MANIFEST_BYTES, FileEntry, Manifest
from edgewright.runtime.bundle.signature import MOST_ENVELOPE_BYTES
from edgewright.runtime.errors import BundleError, ClosedError, SignatureError
from edgewright.runtime.files import sha256_of
from edgewright.runtime.parity import compare
from toy_bundle import CPU_ENGINE, LABELS, spec, toy_bundle, toy_files


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys") / "pair")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return toy_bundle(tmp_path / "toy.bundle")


@pytest.fixture
def signed(tmp_path: Path, pair: KeyPair) -> Path:
    return toy_bundle(tmp_path / "signed.bundle", signing_key=pair.private)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_an_open_bundle_says_what_it_is(signed: Path, pair: KeyPair) -> None:
    with open_bundle(signed, require_signature=pair.public) as opened:
        assert opened.path == signed
        assert opened.sha256 == sha256_of((signed / "manifest.json").read_bytes())
        assert (opened.version, opened.model, opened.signed_by) == (1, "toy", pair.fingerprint)
        assert opened.tools == {"edgewright": "0"}
        assert opened.spec == spec()
        assert [entry.path for entry in opened.files] == sorted(toy_files())
        for path, content in toy_files().items():
            assert opened.read(path) == content


def test_the_golden_logits_are_those_of_the_graph(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        golden, graph = opened.golden(), opened.spec.graph("tensorrt", "fp32")
        assert graph is not None
        images = opened.spec.preprocess.normalize(golden.pixels)
        with backend_named("onnxruntime").open(opened.read(graph.path)) as runner:
            logits = runner.infer({"x": images})["y"]
    assert golden.pixels.shape == (64, 8, 8, 3)
    assert golden.pixels.dtype == np.uint8
    assert golden.logits.shape == (64, 4)
    assert golden.logits.dtype == np.float32
    parity = compare(golden.logits, logits, None)
    assert parity.agreement == 1
    assert parity.sqnr_db is not None
    assert parity.sqnr_db > 100


def test_the_cpu_engine_is_described(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        graph = opened.spec.graph("cpu", "fp32")
        assert graph is not None
        info = opened.engine_info(graph)
        assert info.engine_sha256 == sha256_of(opened.read(graph.path))
    assert (info.backend, info.labels) == ("onnxruntime", LABELS)


def test_a_signed_bundle_opens_without_a_required_key(signed: Path) -> None:
    with open_bundle(signed) as opened:
        assert opened.signed_by is None


def test_a_closed_bundle_is_not_read(bundle: Path) -> None:
    opened = open_bundle(bundle)
    before = open_files()
    opened.close()
    opened.close()
    assert open_files() == before - 1
    with pytest.raises(ClosedError):
        opened.read("spec.json")


def test_a_refused_bundle_leaves_nothing_open(bundle: Path) -> None:
    (bundle / "extra").write_bytes(b"")
    before = open_files()
    with pytest.raises(BundleError):
        open_bundle(bundle)
    assert open_files() == before


def _replace(path: Path, other: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    other(path)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link_folder(bundle: Path) -> None:
    (bundle / "graphs").rename(bundle.parent / "elsewhere")
    (bundle / "graphs").symlink_to(bundle.parent / "elsewhere")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda b: (b / "graphs/fp16.onnx").unlink(), "graphs/fp16.onnx is missing"),
    "a missing folder": (lambda b: shutil.rmtree(b / "golden"), "golden is missing"),
    "an extra file": (lambda b: (b / "graphs/more.onnx").write_bytes(b""), "graphs/more.onnx is not in the bundle's"),
    "an extra hidden file": (lambda b: (b / ".DS_Store").write_bytes(b""), ".DS_Store is not in the bundle's"),
    "an extra folder": (lambda b: (b / "more").mkdir(), "the folder more is not in the bundle's"),
    "a changed bit": (lambda b: _flip(b / "graphs/fp16.onnx"), "graphs/fp16.onnx was changed"),
    "a changed spec": (lambda b: _flip(b / "spec.json"), "spec.json was changed"),
    "a truncated file": (lambda b: os.truncate(b / CPU_ENGINE, 50), f"{CPU_ENGINE} has 50 bytes, the bundle lists"),
    "a longer file": (lambda b: (b / "parity.json").write_bytes(b"{}\n\n"), "parity.json has 4 bytes, the bundle"),
    "an empty file": (lambda b: os.truncate(b / "golden/pixels.u8", 0), "golden/pixels.u8 has 0 bytes"),
    "a missing manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json is missing"),
    "a changed manifest": (lambda b: _flip(b / "manifest.json"), "manifest"),
    "a truncated manifest": (lambda b: os.truncate(b / "manifest.json", 99), "manifest.json is not valid JSON"),
    "a manifest too large": (
        lambda b: os.truncate(b / "manifest.json", MOST_MANIFEST_BYTES + 1),
        "larger than 1048576",
    ),
    "a linked file": (
        lambda b: _replace(b / "spec.json", lambda p: p.symlink_to(b.parent / "toy.bundle/parity.json")),
        "spec.json is a link",
    ),
    "a link to nowhere": (
        lambda b: _replace(b / "spec.json", lambda p: p.symlink_to("nowhere")),
        "spec.json is a link",
    ),
    "a linked manifest": (
        lambda b: _replace(b / "manifest.json", lambda p: p.symlink_to(b.parent / "m")),
        "manifest.json is a link",
    ),
    "a linked folder": (_link_folder, "graphs is a link"),
    "an extra link": (lambda b: (b / "more").symlink_to("/etc/passwd"), "more is a link"),
    "a pipe": (lambda b: _replace(b / "spec.json", os.mkfifo), "spec.json is no regular file"),
    "a pipe as manifest": (lambda b: _replace(b / "manifest.json", os.mkfifo), "manifest.json is no regular file"),
    "a folder as manifest": (lambda b: _replace(b / "manifest.json", Path.mkdir), "manifest.json is no regular file"),
    "an extra pipe": (lambda b: os.mkfifo(b / "more"), "more is not in the bundle's"),
    "a socket": (lambda b: _replace(b / "spec.json", _socket), "cannot open spec.json"),
    "a folder for a file": (lambda b: _replace(b / "spec.json", Path.mkdir), "spec.json"),
    "a file for a folder": (
        lambda b: _replace(b / "golden", lambda p: p.write_bytes(b"")),
        "golden is not in the bundle's",
    ),
    "another case": (lambda b: (b / "spec.json").rename(b / "Spec.json"), "Spec.json is not in the bundle's"),
    "an empty envelope": (lambda b: (b / "manifest.dsse.json").write_bytes(b""), "manifest.dsse.json is not valid"),
    "a linked envelope": (lambda b: (b / "manifest.dsse.json").symlink_to("x"), "manifest.dsse.json is a link"),
    "an envelope too large": (
        lambda b: (b / "manifest.dsse.json").write_bytes(b" " * (MOST_ENVELOPE_BYTES + 1)),
        "manifest.dsse.json is larger than",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_bundle_is_refused_with_its_reason(
    change: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*_: object) -> None:
        raise AssertionError("the spec was parsed")

    make, reason = CHANGES[change]
    monkeypatch.chdir(bundle)  # the path of a socket is short
    make(bundle)
    monkeypatch.setattr(opening, "checked_spec", unreached)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert reason in caught.value.message


@pytest.mark.parametrize("name", ["manifest.json", "manifest.dsse.json"])
def test_the_signature_comes_before_the_manifest_is_parsed(
    name: str, signed: Path, pair: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*_: object) -> None:
        raise AssertionError("the manifest was parsed")

    _flip(signed / name)
    monkeypatch.setattr(Manifest, "parse", unreached)
    with pytest.raises(BundleError):
        open_bundle(signed, require_signature=pair.public)


def test_a_key_file_that_cannot_be_used_refuses_a_good_bundle(signed: Path, tmp_path: Path, pair: KeyPair) -> None:
    (tmp_path / "empty.pub").write_bytes(b"")
    (tmp_path / "broken.pub").write_bytes(pair.public.read_bytes()[:-9])
    for name in ("missing.pub", "empty.pub", "broken.pub"):
        with pytest.raises(SignatureError):
            open_bundle(signed, require_signature=tmp_path / name)


def test_an_unsigned_bundle_is_refused_where_a_signature_is_required(bundle: Path, pair: KeyPair) -> None:
    with pytest.raises(SignatureError, match="is not signed"):
        open_bundle(bundle, require_signature=pair.public)


def test_an_envelope_of_another_bundle_is_refused_even_without_a_key(signed: Path, bundle: Path) -> None:
    other = toy_bundle(bundle.parent / "other.bundle", version=2)
    shutil.copy(signed / "manifest.dsse.json", other)
    with pytest.raises(SignatureError, match="another manifest"):
        open_bundle(other)


def test_the_folder_itself_is_no_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(BundleError, match="link is a link"):
        open_bundle(tmp_path / "link")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name, reason in (("missing", "there is no bundle"), ("file", "cannot open"), ("", "manifest.json is missing")):
        with pytest.raises(BundleError, match=reason):
            open_bundle(tmp_path / name)


def test_a_file_that_changes_after_opening_is_noticed(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        (bundle / "graphs/fp32.onnx").write_bytes(b"other")
        with pytest.raises(BundleError, match="was changed"):
            opened.read("graphs/fp32.onnx")
        (bundle / "parity.json").write_bytes(b"x" * 99)
        with pytest.raises(BundleError, match="larger than"):
            opened.read("parity.json")
        _link_folder(bundle)
        with pytest.raises(BundleError, match="graphs is a link"):
            opened.read("graphs/fp16.onnx")


def test_another_folder_in_its_place_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    with open_bundle(bundle) as opened:
        bundle.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", bundle)
        (bundle / "parity.json").write_bytes(b"[]\n")
        assert opened.read("parity.json") == b"{}\n"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "manifest.json", "graphs", "graphs/../spec.json", ""])
def test_only_what_is_listed_can_be_read(name: str, bundle: Path) -> None:
    (bundle.parent / "secret").write_bytes(b"")
    with open_bundle(bundle) as opened, pytest.raises(BundleError, match="has no file"):
        opened.read(name)


SPEC = json.loads(toy_files()["spec.json"])


def _graphs(**fields: Any) -> dict[str, Any]:
    """The spec's graphs, the first of them with other fields."""
    return {"graphs": [{**SPEC["graphs"][0], **fields}, *SPEC["graphs"][1:]]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, "model 'other', the manifest 'toy'"),
        ({"model": 7}, "spec.model is 7"),
        ({"labels": ["ant", "bee"]}, "2 labels for 4 classes"),
        ({"labels": ["ant", "bee", "cat", 4]}, r"labels\[3\] is 4"),
        ({"labels": ["ant", "bee", "cat", "\ud800"]}, "surrogates not allowed"),
        ({"labels": None}, "spec.json does not say"),
        ({"input": {**SPEC["input"], "shape": [None, 3, 8, 9]}}, r"shape \[None, 3, 8, 9\]"),
        ({"input": {**SPEC["input"], "shape": [1, 3, 8, 8]}}, r"shape \[1, 3, 8, 8\]"),
        ({"input": {**SPEC["input"], "shape": [None, 3, 8, 8.0]}}, "8.0"),
        ({"input": {**SPEC["input"], "shape": [None, 3, 8, True]}}, "True"),
        ({"input": {**SPEC["input"], "dtype": "float16"}}, "input of float16"),
        ({"output": {**SPEC["output"], "shape": [None, 4, 1]}}, r"output of shape \[None, 4, 1\]"),
        ({"output": {**SPEC["output"], "shape": [None, None]}}, "None classes"),
        ({"output": {**SPEC["output"], "shape": [None, 1]}, "labels": ["ant"]}, "1 classes"),
        ({"output": {**SPEC["output"], "dtype": "int8"}}, "output of int8"),
        ({"preprocess": {**SPEC["preprocess"], "resize": 8}}, "preprocessing that makes None"),
        ({"preprocess": {**SPEC["preprocess"], "std": [0, 0, 0]}}, "above 0"),
        ({"preprocess": {**SPEC["preprocess"], "colour": "CMYK"}}, "colour is 'CMYK'"),
        ({"preprocess": {**SPEC["preprocess"], "mean": "abc"}}, "spec.json does not say"),
        ({"preprocess": []}, "spec.json does not say"),
        ({"profile": {"minimum": 0, "optimum": 1, "maximum": 2}}, "not in order"),
        ({"profile": {"minimum": 1, "optimum": 1, "maximum": 1.5}}, "profile.maximum is 1.5"),
        ({"profile": {"more": 1}}, "spec.json does not say"),
        ({"golden": {**SPEC["golden"], "images": 63}}, "63 golden inputs, for which golden/pixels.u8"),
        ({"golden": {**SPEC["golden"], "images": 0}}, "0 golden inputs"),
        ({"golden": {**SPEC["golden"], "images": "64"}}, "images is '64'"),
        ({"golden": {**SPEC["golden"], "logits": "golden/none"}}, "no file golden/none"),
        ({"golden": {**SPEC["golden"], "logits": "golden/pixels.u8"}}, "golden/pixels.u8 would have 1024 bytes"),
        ({"graphs": []}, "no graph"),
        ({"graphs": [SPEC["graphs"][0]] * 2}, "two graphs"),
        (_graphs(path="../fp32.onnx"), "no file ../fp32.onnx"),
        (_graphs(path="spec.json"), "no ONNX file"),
        (_graphs(path=["graphs/fp32.onnx"]), r"graphs\[0\].path"),
        (_graphs(precision="fp8"), "nothing here can build"),
        (_graphs(dialect="cuda"), "nothing here can build"),
        (_graphs(dialect="cpu", precision="int8"), "no file graphs/fp32.json"),
        (_graphs(limits={"sqnr_db": "9", "agreement": 1}), "sqnr_db is '9'"),
        (_graphs(limits={"sqnr_db": 9, "agreement": 1.1}), "agreement of 1.1"),
        (_graphs(limits={"sqnr_db": 9}), "spec.json does not say"),
        (_graphs(more=1), "spec.json does not say"),
        (_graphs(planned=[{"name": "conv"}]), "spec.json does not say"),
        (_graphs(planned=[{**SPEC["graphs"][0]["planned"][0], "macs": "many"}]), "macs is 'many'"),
        (_graphs(planned=7), "spec.json does not say"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = toy_bundle(tmp_path / "toy.bundle", spec_changes=changes)
    with pytest.raises(BundleError, match=reason):
        open_bundle(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"{" * 9000, b'{"model": NaN}', b"\xff"])
def test_a_spec_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"spec\.json"):
        open_bundle(toy_bundle(tmp_path / "toy.bundle", files={"spec.json": content}))


def test_a_bundle_without_a_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no file spec\.json"):
        open_bundle(toy_bundle(tmp_path / "toy.bundle", files={"spec.json": None}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine_sha256": "0" * 64}, "describes another engine"),
        ({"labels": 7}, "does not say what it should"),
        ({"bytes": "9"}, "bytes is '9'"),
        ({"versions": {"onnxruntime": 1}}, "versions.onnxruntime is 1"),
        ({"layers": [{"name": "x"}]}, "does not say what it should"),
        ({"backend": "tensorrt"}, "differs from the bundle in its backend"),
        ({"backend": "openvino"}, "differs from the bundle in its backend"),
        ({"precision": "int8"}, "differs from the bundle in its precision"),
        ({"target": "sm87"}, "differs from the bundle in its target"),
        ({"inputs": []}, "differs from the bundle in its inputs"),
        ({"outputs": [SPEC["output"]] * 2}, "differs from the bundle in its outputs"),
        ({"preprocess": {**SPEC["preprocess"], "mean": [0, 0, 0]}}, "in its preprocess"),
        ({"labels": ["bee", "ant", "cat", "dog"]}, "differs from the bundle in its labels"),
    ],
)
def test_a_description_of_another_engine_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    name = CPU_ENGINE.replace(".onnx", ".json")
    content = json.dumps({**json.loads(toy_files()[name]), **changes}).encode()
    with open_bundle(toy_bundle(tmp_path / "toy.bundle", files={name: content})) as opened:
        graph = opened.spec.graph("cpu", "fp32")
        assert graph is not None
        with pytest.raises(BundleError, match=reason):
            opened.engine_info(graph)


def test_the_plans_are_those_that_the_workstation_makes() -> None:
    for graph in spec().graphs:
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(toy_files()[graph.path]))
        assert planned_layers(ir.from_proto(model)) == graph.planned


def test_a_bundle_is_told_from_what_is_none(bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"\x89EWB")
    assert is_bundle(bundle)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file", tmp_path / "missing", Path("\0"), Path("x" * 5000)):
        assert not is_bundle(path)


@pytest.mark.parametrize("path", ["../escape", "A/../../b", "manifest.json", "ä"])
def test_no_bundle_is_written_that_would_not_open(path: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "b", {path: b""}, version=1, model="toy", tools={})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays_unless_it_is_to_be_replaced(bundle: Path) -> None:
    with pytest.raises(BundleError, match="exists"):
        toy_bundle(bundle, version=2)
    with open_bundle(bundle) as opened:
        assert opened.version == 1
    write_bundle(bundle, toy_files(), version=2, model="toy", tools={}, replace=True)
    with open_bundle(bundle) as opened:
        assert opened.version == 2
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_killed_process_put_aside_comes_back(bundle: Path, version: int) -> None:
    """Killed between the two renames, or after them; else the next version would be 1 again."""
    aside = bundle.with_name(f"{writing.BEFORE}{bundle.name}")
    bundle.rename(aside)
    if version == 2:
        toy_bundle(bundle.parent / "new", version=2).rename(bundle)
    writing.recover(bundle)
    with open_bundle(bundle) as opened:
        assert opened.version == version
    write_bundle(bundle, toy_files(), version=3, model="toy", tools={}, replace=True)
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_what_cannot_be_replaced_stays(bundle: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.startswith(".partial-") and not path.name.startswith(writing.BEFORE):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError if isinstance(error, OSError) else KeyboardInterrupt):
        write_bundle(bundle, toy_files(), version=2, model="toy", tools={}, replace=True)
    with open_bundle(bundle) as opened:
        assert opened.version == 1
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_only_a_folder_is_replaced(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(bundle)
    for name in ("file", "link"):
        with pytest.raises(BundleError, match="exists"):
            write_bundle(tmp_path / name, toy_files(), version=2, model="toy", tools={}, replace=True)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert (tmp_path / "link").is_symlink()


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    before_the_name: set[int] = set()
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))

    def renamed(path: Path, target: Path) -> Path:
        before_the_name.update(synced)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    folder = tmp_path / "toy.bundle"
    write_bundle(folder, toy_files(), version=1, model="toy", tools={})
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= before_the_name
    assert tmp_path.stat().st_ino in synced - before_the_name


def test_the_same_files_make_the_same_bundle(tmp_path: Path, pair: KeyPair) -> None:
    first, second = (toy_bundle(tmp_path / name, signing_key=pair.private) for name in ("a", "b"))
    for path in first.rglob("*.json"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_the_hashes_are_of_the_files(bundle: Path) -> None:
    manifest = Manifest.parse((bundle / "manifest.json").read_bytes())
    for entry in manifest.files:
        content = (bundle / entry.path).read_bytes()
        assert entry == FileEntry(entry.path, len(content), sha256_of(content))
