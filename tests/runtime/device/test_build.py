"""Building on the device: what is kept, what is reused, what is refused, and that a good engine is never lost."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.runtime import Session, cuda
from edgewright.runtime.backends import Absence
from edgewright.runtime.bundle import write_archive, write_key_pair
from edgewright.runtime.choice import chosen
from edgewright.runtime.device import build as module
from edgewright.runtime.device.build import BuildOptions, build_bundle
from edgewright.runtime.device.kept import MANIFEST, read_kept
from edgewright.runtime.device.rows import DeviceReport, DeviceRow
from edgewright.runtime.device.verify import verify_bundle
from edgewright.runtime.device.versions import VERSIONS_FILE, highest_versions
from edgewright.runtime.errors import (
    BuildError,
    BundleError,
    DeviceError,
    EngineError,
    RollbackError,
    SignatureError,
    WorkspaceError,
)
from edgewright.runtime.files import sha256_of, write_json
from edgewright.runtime.specs import BatchProfile
from fake_gpu import ORIN, Bundles, FakeGpu
from toy_bundle import toy_files

ONLY_CPU = BuildOptions(backends=("onnxruntime",))
ONE = BuildOptions(backends=("tensorrt",), precisions=("fp16",))


def the_row(report: DeviceReport) -> DeviceRow:
    (row,) = report.rows
    return row


def engine_folder(device_cache: Path) -> Path:
    (folder,) = (device_cache / "engines").iterdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# With processes of their own, as a person has it


def test_a_build_is_proven_and_the_second_does_nothing(bundle: Path, device_cache: Path) -> None:
    lines: list[str] = []
    row = the_row(build_bundle(bundle, ONLY_CPU, cache=device_cache, say=lines.append))
    assert (row.status, row.reason_code, row.reused) == ("verified", "pass", False)
    assert row.path is not None
    assert row.info is not None
    assert row.self_test is not None
    assert row.path.read_bytes() == toy_files()["graphs/fp32.onnx"]
    assert (row.info.precision, row.info.actual_precision) == ("fp32", {"fp32": 2})
    assert (row.self_test.images, row.self_test.agreement) == (64, 1.0)
    assert row.self_test.latency_ms > 0
    assert len(lines) == 3
    assert highest_versions(device_cache) == {"toy": 1}
    before = files(engine_folder(device_cache))
    assert {MANIFEST, row.path.name} == before.keys()
    assert not (device_cache / "staging").exists()

    again = the_row(build_bundle(bundle, ONLY_CPU, cache=device_cache, say=lines.append))
    assert (again.status, again.reused, again.self_test) == ("verified", True, row.self_test)
    assert files(engine_folder(device_cache)) == before
    assert lines[3:] == ["onnxruntime fp32: kept, it passed its self-test"]


def test_too_little_memory_is_a_row_of_its_own(bundle: Path, device_cache: Path) -> None:
    row = the_row(build_bundle(bundle, BuildOptions(backends=("onnxruntime",), floor=1 << 60), cache=device_cache))
    assert (row.status, row.reason_code, row.path) == ("failed", "build_failed", None)
    assert "must stay" in row.reason
    assert "--workspace" in row.reason
    assert highest_versions(device_cache) == {}


def test_a_second_build_at_the_same_time_is_refused(bundle: Path, device_cache: Path) -> None:
    built, finish = threading.Event(), threading.Event()

    def wait(line: str) -> None:
        built.set()
        finish.wait(30)

    other = threading.Thread(target=build_bundle, args=(bundle, ONLY_CPU), kwargs={"cache": device_cache, "say": wait})
    other.start()
    try:
        assert built.wait(30)
        with pytest.raises(WorkspaceError, match="another build"):
            build_bundle(bundle, ONLY_CPU, cache=device_cache)
    finally:
        finish.set()
        other.join(30)
    assert the_row(build_bundle(bundle, ONLY_CPU, cache=device_cache)).reused


# In one process, with a fake GPU


def test_all_that_the_bundle_and_the_device_allow(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    report = build_bundle(bundle, cache=device_cache)
    assert [(row.backend, row.precision, row.status) for row in report.rows] == [
        ("onnxruntime", "fp32", "verified"),
        ("tensorrt", "fp32", "verified"),
        ("tensorrt", "fp16", "verified"),
        ("tensorrt", "int8", "verified"),
    ]
    assert (report.model, report.version, report.signed_by, report.cache) == ("toy", 1, None, device_cache)
    folders = [read_kept(folder) for folder in (device_cache / "engines").iterdir()]
    assert sorted(len(kept.engines) for kept in folders if kept) == [1, 3]
    (kept,) = (kept for kept in folders if kept and kept.place.backend == "tensorrt")
    assert (kept.place.device, kept.place.architecture, kept.place.driver) == ("Orin", "sm87", "12.6")
    for engine in kept.engines:
        assert sha256_of((kept.folder / engine.file).read_bytes()) == engine.info.engine_sha256
        assert engine.info.target == "sm87"


def test_what_the_backend_is_asked_for(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, BuildOptions(("tensorrt",), ("int8",), workspace=1 << 20), cache=device_cache)
    (request,) = gpu.requests
    assert request.onnx == toy_files()["graphs/int8.onnx"]
    assert (request.precision, request.target, request.dla) == ("int8", None, None)
    assert (request.profile, request.workspace) == (BatchProfile(1, 4, 8), 1 << 20)
    assert [layer.precision for layer in request.planned] == ["int8", "fp16"]


@pytest.mark.parametrize(("integrated", "limited"), [(True, True), (False, False)])
def test_the_workspace_is_limited_where_memory_is_shared(
    bundle: Path, device_cache: Path, gpu: FakeGpu, integrated: bool, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "device_here", lambda: replace(ORIN, integrated=integrated))
    build_bundle(bundle, ONE, cache=device_cache)
    assert (gpu.requests[0].workspace is not None) == limited


def test_measurements_are_kept_for_one_version_and_gpu(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, BuildOptions(("tensorrt",), ("fp32", "fp16")), cache=device_cache)
    assert [request.timing_cache for request in gpu.requests] == [b"", b"first"]
    gpu.release = "10.4.0"
    build_bundle(bundle, ONE, cache=device_cache)
    assert gpu.requests[-1].timing_cache == b""
    assert {path.name: path.read_bytes() for path in (device_cache / "timing").iterdir()} == {
        "tensorrt-10.3.0-Orin-sm87.timing": b"second",
        "tensorrt-10.4.0-Orin-sm87.timing": b"third",
    }


def test_another_version_of_the_library_builds_again(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    assert the_row(build_bundle(bundle, ONE, cache=device_cache)).reused
    gpu.release = "10.4.0"
    assert not the_row(build_bundle(bundle, ONE, cache=device_cache)).reused
    gpu.release = "10.3.0"
    assert the_row(build_bundle(bundle, ONE, cache=device_cache)).reused


def test_a_dla_takes_one_batch_and_no_fp32(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    report = build_bundle(bundle, BuildOptions(("tensorrt",), dla=0), cache=device_cache)
    assert [(row.precision, row.status) for row in report.rows] == [
        ("fp32", "skipped"),
        ("fp16", "verified"),
        ("int8", "verified"),
    ]
    assert report.rows[0].reason_code == "precision_unsupported"
    assert {(request.dla, request.profile) for request in gpu.requests} == {(0, BatchProfile(1, 1, 1))}
    with Session.open(bundle, cache=device_cache) as session:
        assert session.info.dla == 0
    assert gpu.cores
    assert {*gpu.cores} == {0}, "the self-test and the session load it on the core that it was built for"
    assert not the_row(build_bundle(bundle, ONE, cache=device_cache)).reused, "the GPU's engine is another one"


def test_an_absent_backend_is_skipped_with_its_reason(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    gpu.missing = Absence("package_missing", "it is not here", "fetch it")
    row = the_row(build_bundle(bundle, ONE, cache=device_cache))
    assert (row.status, row.reason_code, row.reason) == ("skipped", "package_missing", "it is not here; fetch it")
    assert highest_versions(device_cache) == {}


def test_a_gpu_that_goes_away_fails_its_rows_alone(
    bundle: Path, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise DeviceError("the GPU is lost")

    monkeypatch.setattr(cuda, "device_here", lost)
    rows = build_bundle(bundle, BuildOptions(precisions=("fp32",)), cache=device_cache).rows
    assert [(row.backend, row.status) for row in rows] == [("onnxruntime", "verified"), ("tensorrt", "failed")]
    assert rows[1].reason == "the GPU is lost"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (BuildOptions(backends=("tensorflow",)), EngineError, "unknown backend 'tensorflow'"),
        (BuildOptions(precisions=("bf16",)), BuildError, "no bf16 graph; it has fp32, fp16, int8"),
        (BuildOptions(("onnxruntime",), ("int8",)), BuildError, "no graph for the backends"),
    ],
)
def test_what_the_bundle_does_not_have(
    bundle: Path, device_cache: Path, gpu: FakeGpu, options: BuildOptions, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build_bundle(bundle, options, cache=device_cache)


# The self-test decides


def wrong_logits(change: Any) -> dict[str, bytes | None]:
    logits = np.frombuffer(toy_files()["golden/logits.f32"], "<f4").reshape(64, 4)
    return {"golden/logits.f32": change(logits).astype("<f4").tobytes()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits: -logits, "the logits have .* dB SQNR, at least 54.0 dB are needed; top-1 agrees on"),
        (lambda logits: logits * 1.01, "the logits have 40.1 dB SQNR, at least 54.0 dB are needed$"),
    ],
)
def test_an_engine_with_other_logits_is_discarded(
    bundles: Bundles, device_cache: Path, in_process: None, change: Any, words: str
) -> None:
    path = bundles(files=wrong_logits(change))
    row = the_row(build_bundle(path, ONLY_CPU, cache=device_cache))
    assert (row.status, row.reason_code, row.path) == ("over_budget", "self_test_failed", None)
    assert row.self_test is not None
    assert not row.self_test.passed
    assert re.search(words, row.reason)
    assert files(engine_folder(device_cache)) == {}
    assert highest_versions(device_cache) == {}


def nan_engine() -> bytes:
    import onnx

    proto = onnx.load_from_string(toy_files()["graphs/fp32.onnx"])
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name == "d")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, np.nan, 0, 0], np.float32), "d"))
    return bytes(proto.SerializeToString())


def test_a_failed_rebuild_keeps_the_engine_before_it(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    good = the_row(build_bundle(bundle, ONE, cache=device_cache))
    before = files(engine_folder(device_cache))
    gpu.graph = nan_engine()
    bad = the_row(build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",), rebuild=True), cache=device_cache))
    assert bad.status == "over_budget"
    assert "64 of 64 images give logits that are not finite" in bad.reason
    assert files(engine_folder(device_cache)) == before
    row = the_row(build_bundle(bundle, ONE, cache=device_cache))
    assert (row.reused, row.path) == (True, good.path)


def test_a_self_test_that_crashes_keeps_the_engine_before_it(
    bundle: Path, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = the_row(build_bundle(bundle, ONE, cache=device_cache))
    before = files(engine_folder(device_cache))
    with monkeypatch.context() as patch:
        patch.setattr(FakeGpu, "open", lambda self, engine, **_: gpu_opens(b"no graph"))
        row = the_row(build_bundle(bundle, replace(ONE, rebuild=True), cache=device_cache))
    assert (row.status, row.reason_code, row.path) == ("failed", "run_failed", None)
    assert "cannot load" in row.reason
    assert files(engine_folder(device_cache)) == before
    assert chosen(bundle, cache=device_cache).info == good.info


@pytest.mark.parametrize("error", [KeyboardInterrupt, BundleError("it was exchanged")])
def test_a_build_that_is_interrupted_keeps_the_engine_before_it(
    bundle: Path, device_cache: Path, gpu: FakeGpu, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    before = files(engine_folder(device_cache))

    def interrupted(*_: Any) -> None:
        raise error

    monkeypatch.setattr(module, "self_test_row", interrupted)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",), rebuild=True), cache=device_cache)
    assert files(engine_folder(device_cache)) == before
    assert not (device_cache / "staging").exists()


def test_a_rebuild_replaces_the_engine_and_removes_the_old_file(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    old = the_row(build_bundle(bundle, ONE, cache=device_cache)).path
    new = the_row(build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",), rebuild=True), cache=device_cache)).path
    assert old is not None
    assert new is not None
    assert old != new
    assert files(engine_folder(device_cache)).keys() == {MANIFEST, new.name}


def test_the_same_bytes_that_fail_now_are_not_proven_any_more(
    bundle: Path, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.marks = ["same"] * 3
    build_bundle(bundle, ONE, cache=device_cache)
    monkeypatch.setattr(FakeGpu, "open", lambda self, engine, **_: gpu_opens(nan_engine()))
    row = the_row(build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",), rebuild=True), cache=device_cache))
    assert row.status == "over_budget"
    kept = read_kept(engine_folder(device_cache))
    assert kept is not None
    assert [engine.self_test.passed for engine in kept.engines] == [False]


def gpu_opens(graph: bytes) -> Any:
    from edgewright.runtime.backends import backend_named

    return backend_named("onnxruntime").open(graph)


# What lies in the cache is held against its manifest


def test_a_changed_engine_is_built_again(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    path = the_row(build_bundle(bundle, ONE, cache=device_cache)).path
    assert path is not None
    path.write_bytes(b"planted|" + toy_files()["graphs/fp32.onnx"])
    row = the_row(build_bundle(bundle, ONE, cache=device_cache))
    assert (row.status, row.reused) == ("verified", False)
    assert not any(engine.startswith(b"planted") for engine in gpu.loaded)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": "edgewright.device-cache/2", "identity": {}}'])
def test_a_damaged_manifest_is_made_again(bundle: Path, device_cache: Path, gpu: FakeGpu, content: bytes) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    (engine_folder(device_cache) / MANIFEST).write_bytes(content)
    with pytest.raises(EngineError, match="is damaged"):
        read_kept(engine_folder(device_cache))
    row = the_row(build_bundle(bundle, ONE, cache=device_cache))
    assert (row.status, row.reused) == ("verified", False)


@pytest.mark.parametrize("place", ["engines", "engines/KEY"])
def test_engines_that_others_could_have_planted_are_not_read(
    bundle: Path, device_cache: Path, gpu: FakeGpu, place: str
) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    device_cache.chmod(0o755)
    folder = device_cache / place.replace("KEY", engine_folder(device_cache).name)
    folder.chmod(0o777)
    for use in (build_bundle, verify_bundle, chosen):
        with pytest.raises(WorkspaceError, match=f"{folder} can be written by others"):
            use(bundle, cache=device_cache)


def test_measurements_that_others_could_have_planted_are_not_read(
    bundle: Path, device_cache: Path, gpu: FakeGpu
) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    (device_cache / "timing").chmod(0o777)
    with pytest.raises(WorkspaceError, match="timing can be written by others"):
        build_bundle(bundle, replace(ONE, rebuild=True), cache=device_cache)
    assert len(gpu.requests) == 1


def test_what_is_believed_is_written_for_its_owner_alone(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    before = os.umask(0)
    try:
        build_bundle(bundle, ONE, cache=device_cache)
    finally:
        os.umask(before)
    believed = (device_cache / VERSIONS_FILE, engine_folder(device_cache) / MANIFEST)
    assert [path.stat().st_mode & 0o777 for path in believed] == [0o600, 0o600]


def test_a_manifest_of_another_device_is_not_reused(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    """As in a cache that was copied, with a key that happens to be the same."""
    build_bundle(bundle, ONE, cache=device_cache)
    manifest = engine_folder(device_cache) / MANIFEST
    content = json.loads(manifest.read_bytes())
    content["identity"]["place"]["driver"] = "12.5"
    write_json(manifest, content)
    row = the_row(build_bundle(bundle, ONE, cache=device_cache))
    assert (row.status, row.reused) == ("verified", False)


@pytest.mark.parametrize("file", ["../engine.plan", "/engine.plan", "folder/engine.plan", "", ".", ".."])
def test_a_manifest_that_leads_elsewhere_is_refused(bundle: Path, device_cache: Path, gpu: FakeGpu, file: str) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    manifest = engine_folder(device_cache) / MANIFEST
    content = json.loads(manifest.read_bytes())
    content["engines"][0]["file"] = file
    write_json(manifest, content)
    with pytest.raises(EngineError, match="is no file name"):
        read_kept(engine_folder(device_cache))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("identity", "place", "backend"), ["tensorrt"]),
        (("identity", "place", "features"), None),
        (("identity", "settings", "workspace"), "1"),
        (("engines", 0, "info", "backend"), "onnxruntime"),
        (("engines", 0, "info", "precision"), 16),
        (("engines", 0, "info", "outputs", 0, "shape"), []),
        (("engines", 0, "info", "preprocess", "crop"), []),
        (("engines", 0, "self_test", "latency_ms"), "fast"),
        (("engines", 0, "self_test", "passed"), "false"),
    ],
)
def test_a_manifest_with_other_types_is_damaged(
    bundle: Path, device_cache: Path, gpu: FakeGpu, path: tuple[Any, ...], value: Any
) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    manifest = engine_folder(device_cache) / MANIFEST
    content = json.loads(manifest.read_bytes())
    changed = content
    for key in path[:-1]:
        changed = changed[key]
    changed[path[-1]] = value
    write_json(manifest, content)
    with pytest.raises(EngineError, match="is damaged"):
        chosen(bundle, cache=device_cache)


# What a bundle must be


def test_an_older_bundle_is_refused(bundles: Bundles, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundles("new.bundle", version=2), ONE, cache=device_cache)
    old = bundles("old.bundle", version=1)
    with pytest.raises(RollbackError, match="version 1, here version 2"):
        build_bundle(old, ONE, cache=device_cache)
    assert len(gpu.requests) == 1
    assert the_row(build_bundle(old, ONE, cache=device_cache, allow_older=True)).status == "verified"
    assert highest_versions(device_cache) == {"toy": 2}


def test_a_signature_that_is_required(bundles: Bundles, device_cache: Path, gpu: FakeGpu, tmp_path: Path) -> None:
    ours, theirs = (write_key_pair(tmp_path / name) for name in ("ours", "theirs"))
    signed, unsigned = bundles("signed.bundle", signing_key=ours.private), bundles("unsigned.bundle")
    assert build_bundle(signed, ONE, cache=device_cache, require_signature=ours.public).signed_by is not None
    for path, key in ((signed, theirs.public), (unsigned, ours.public), (signed, tmp_path / "none")):
        with pytest.raises(SignatureError):
            build_bundle(path, ONE, cache=device_cache, require_signature=key)
    assert len(gpu.requests) == 1


def test_an_archive_is_unpacked_once(bundle: Path, device_cache: Path, gpu: FakeGpu, tmp_path: Path) -> None:
    archive = tmp_path / "toy.edgewright"
    write_archive(bundle, archive)
    build_bundle(archive, ONE, cache=device_cache)
    (unpacked,) = (device_cache / "bundles").iterdir()
    marker = unpacked.stat().st_ino
    assert the_row(build_bundle(archive, ONE, cache=device_cache)).reused
    assert the_row(build_bundle(bundle, ONE, cache=device_cache)).reused, "the folder form has the same hash"
    assert [path.stat().st_ino for path in (device_cache / "bundles").iterdir()] == [marker]

    (unpacked / "spec.json").write_bytes(b"{}")
    assert the_row(build_bundle(archive, ONE, cache=device_cache)).reused
    assert (unpacked / "spec.json").read_bytes() == (bundle / "spec.json").read_bytes()


@pytest.mark.parametrize("damage", ["short", "changed", "empty"])
def test_a_damaged_archive_is_refused(
    bundle: Path, device_cache: Path, gpu: FakeGpu, tmp_path: Path, damage: str
) -> None:
    archive = tmp_path / "toy.edgewright"
    write_archive(bundle, archive)
    content = archive.read_bytes()
    damaged = {"short": content[:-1], "changed": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}
    archive.write_bytes(damaged[damage])
    with pytest.raises(BundleError):
        build_bundle(archive, ONE, cache=device_cache)
    assert gpu.requests == []
    assert list(device_cache.glob("bundles/*")) == []


def test_a_bundle_that_is_exchanged_during_the_build(
    bundles: Bundles, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child verifies the bundle itself, and finds another one than its parent."""
    path, other = bundles("toy.bundle"), bundles("other.bundle", version=2)

    def exchange(line: str) -> None:
        if not (path.parent / "first.bundle").exists():
            path.rename(path.parent / "first.bundle")
            other.rename(path)

    with pytest.raises(BundleError, match="exchanged for another"):
        build_bundle(path, ONE, cache=device_cache, say=exchange)
    assert gpu.requests == []
