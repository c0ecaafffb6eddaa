"""Which engine of a bundle is opened: the best that was proven here, else the one that the bundle carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgewright.runtime import Session
from edgewright.runtime.backends import Absence
from edgewright.runtime.bundle import write_archive, write_key_pair
from edgewright.runtime.choice import chosen, stands_for_bundle
from edgewright.runtime.device.build import BuildOptions, build_bundle
from edgewright.runtime.device.kept import MANIFEST, Kept, KeptEngine
from edgewright.runtime.errors import BundleError, EngineError, RollbackError, SignatureError, WorkspaceError
from edgewright.runtime.files import sha256_of, write_json
from fake_gpu import Bundles, FakeGpu
from toy_bundle import CPU_ENGINE, toy_files

GPU_ONLY = BuildOptions(backends=("tensorrt",))


def set_latency(device_cache: Path, **milliseconds: float) -> None:
    """By precision, in every manifest of the cache."""
    for manifest in (device_cache / "engines").glob(f"*/{MANIFEST}"):
        content = json.loads(manifest.read_bytes())
        for engine in content["engines"]:
            engine["self_test"]["latency_ms"] = milliseconds[engine["info"]["precision"]]
        write_json(manifest, content)


def test_without_a_build_it_is_the_engine_that_the_bundle_carries(bundle: Path, device_cache: Path) -> None:
    choice = chosen(bundle, cache=device_cache)
    assert choice.engine == toy_files()[CPU_ENGINE]
    assert (choice.info.backend, choice.info.precision) == ("onnxruntime", "fp32")
    assert "not yet on this device" in choice.why
    assert f"edgewright build {bundle}" in choice.why
    assert not device_cache.exists(), "nothing is written to open a folder"


def test_the_fastest_proven_engine_of_the_gpu(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, cache=device_cache)
    set_latency(device_cache, fp32=0.5, fp16=2.0, int8=3.0)
    choice = chosen(bundle, cache=device_cache)
    assert (choice.info.backend, choice.info.precision, choice.info.target) == ("tensorrt", "fp32", "sm87")
    set_latency(device_cache, fp32=5.0, fp16=2.0, int8=3.0)
    choice = chosen(bundle, cache=device_cache)
    assert choice.info.precision == "fp16"
    assert choice.engine.startswith(b"second|")
    assert "tensorrt fp16 sm87: of the engines that were proven here it is the best" in choice.why


def test_a_gpu_goes_before_the_processor(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, BuildOptions(precisions=("fp32",)), cache=device_cache)
    for manifest in (device_cache / "engines").glob(f"*/{MANIFEST}"):
        content = json.loads(manifest.read_bytes())
        slow = content["identity"]["place"]["backend"] == "tensorrt"
        content["engines"][0]["self_test"]["latency_ms"] = 9.0 if slow else 0.1
        write_json(manifest, content)
    assert chosen(bundle, cache=device_cache).info.backend == "tensorrt"
    proven = chosen(bundle, "onnxruntime", cache=device_cache)
    assert proven.info.backend == "onnxruntime"
    assert "proven here" in proven.why


def test_what_was_asked_for(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, GPU_ONLY, cache=device_cache)
    assert chosen(bundle, precision="int8", cache=device_cache).info.precision == "int8"
    assert chosen(bundle, "onnxruntime", cache=device_cache).info.backend == "onnxruntime"
    assert chosen(bundle, "tensorrt", "fp32", cache=device_cache).info.precision == "fp32"
    for wish in (("tensorrt", "bf16"), ("openvino", None), ("onnxruntime", "int8"), (None, "bf16")):
        with pytest.raises(EngineError, match=r"is proven on this device; run edgewright build"):
            chosen(bundle, *wish, cache=device_cache)


@pytest.mark.parametrize("change", ["release", "absent", "failed"])
def test_an_engine_that_is_not_proven_for_here_is_not_taken(
    bundle: Path, device_cache: Path, gpu: FakeGpu, change: str
) -> None:
    build_bundle(bundle, GPU_ONLY, cache=device_cache)
    if change == "release":
        gpu.release = "10.4.0"
    elif change == "absent":
        gpu.missing = Absence("device_missing", "no GPU", "")
    else:
        for manifest in (device_cache / "engines").glob(f"*/{MANIFEST}"):
            manifest.write_text(manifest.read_text().replace('"passed": true', '"passed": false'))
    assert chosen(bundle, cache=device_cache).info.backend == "onnxruntime"
    with pytest.raises(EngineError):
        chosen(bundle, "tensorrt", cache=device_cache)


def test_a_changed_engine_is_refused(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    (row,) = build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",)), cache=device_cache).rows
    assert row.path is not None
    row.path.write_bytes(b"planted|" + toy_files()["graphs/fp32.onnx"])
    with pytest.raises(EngineError, match="is not the engine that was built"):
        chosen(bundle, cache=device_cache)


def test_an_engine_that_a_build_replaces_just_now(
    bundle: Path, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading of the manifest and that of the engine."""
    build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",)), cache=device_cache)
    read = Kept.content

    def rebuilt(self: Kept, engine: KeptEngine) -> bytes:
        monkeypatch.setattr(Kept, "content", read)
        build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",), rebuild=True), cache=device_cache)
        return self.content(engine)

    monkeypatch.setattr(Kept, "content", rebuilt)
    assert chosen(bundle, cache=device_cache).engine.startswith(b"second|")


def test_an_engine_that_no_manifest_names_is_never_taken(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    (row,) = build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",)), cache=device_cache).rows
    assert row.path is not None
    planted = row.path.with_name("int8-0000000000000000.plan")
    planted.write_bytes(row.path.read_bytes())
    with pytest.raises(EngineError, match="no tensorrt int8 engine"):
        chosen(bundle, "tensorrt", "int8", cache=device_cache)
    with pytest.raises(EngineError, match="is not an engine"):
        chosen(planted)


def test_a_manifest_of_another_folder_is_not_taken(bundles: Bundles, device_cache: Path, gpu: FakeGpu) -> None:
    """An engine of one bundle, under the key of another."""
    first, second = bundles("first.bundle"), bundles("second.bundle", version=2)
    hashes = [
        build_bundle(path, BuildOptions(("tensorrt",), ("fp16",)), cache=device_cache).bundle
        for path in (first, second)
    ]
    folders = [next((device_cache / "engines").glob(f"{sha256[:16]}-*")) for sha256 in hashes]
    for path in folders[1].iterdir():
        path.unlink()
    for path in folders[0].iterdir():
        path.rename(folders[1] / path.name)
    assert chosen(second, cache=device_cache).info.backend == "onnxruntime"


def test_a_damaged_manifest_is_said(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, GPU_ONLY, cache=device_cache)
    for manifest in (device_cache / "engines").glob(f"*/{MANIFEST}"):
        manifest.write_text("{}")
    with pytest.raises(EngineError, match="is damaged"):
        chosen(bundle, cache=device_cache)


def test_an_archive_opens_too(bundle: Path, device_cache: Path, tmp_path: Path) -> None:
    archive = tmp_path / "toy.edgewright"
    write_archive(bundle, archive)
    choice = chosen(archive, cache=device_cache)
    assert choice.engine == toy_files()[CPU_ENGINE]
    assert len(list((device_cache / "bundles").iterdir())) == 1


def test_what_a_bundle_must_be(bundles: Bundles, device_cache: Path, gpu: FakeGpu, tmp_path: Path) -> None:
    key = write_key_pair(tmp_path / "key")
    old, new = bundles("old.bundle", signing_key=key.private), bundles("new.bundle", version=2)
    build_bundle(new, GPU_ONLY, cache=device_cache)
    with pytest.raises(RollbackError):
        chosen(old, cache=device_cache)
    assert chosen(old, cache=device_cache, allow_older=True, require_signature=key.public).info.backend == "onnxruntime"
    with pytest.raises(SignatureError):
        chosen(new, cache=device_cache, require_signature=key.public)
    device_cache.chmod(0o777)
    with pytest.raises(WorkspaceError, match="written by others"):
        chosen(new, cache=device_cache)


@pytest.mark.parametrize("name", ["none.bundle", "none.edgewright"])
def test_a_bundle_that_is_not_there(tmp_path: Path, name: str) -> None:
    assert stands_for_bundle(tmp_path / name)
    with pytest.raises(BundleError, match="there is no bundle"):
        chosen(tmp_path / name, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "option", [{"require_signature": Path("key")}, {"allow_older": True}, {"cache": Path("cache")}]
)
@pytest.mark.parametrize("place", ["folder", "engine.onnx"])
def test_a_build_folder_takes_no_option_of_a_bundle(tmp_path: Path, option: dict[str, Any], place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "engine.onnx").write_bytes(b"")
    assert not stands_for_bundle(tmp_path / place)
    with pytest.raises(EngineError, match="is not a bundle, and only a bundle is signed"):
        chosen(tmp_path / place, **option)


def test_a_provider_asks_for_the_backend_that_has_it(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, BuildOptions(precisions=("fp32",)), cache=device_cache)
    assert chosen(bundle, cache=device_cache).info.backend == "tensorrt"
    for provider in ("cpu", "cuda"):
        assert chosen(bundle, provider=provider, cache=device_cache).info.backend == "onnxruntime"
    with Session.open(bundle, provider="cpu", cache=device_cache) as session:
        assert session.info.backend == "onnxruntime"
    for backend, provider in (("tensorrt", "cpu"), (None, "gpu")):
        with pytest.raises(EngineError, match="tensorrt has no provider"):
            Session.open(bundle, backend=backend, provider=provider, cache=device_cache)


def test_a_bundle_cannot_carry_an_engine_of_another_backend(bundles: Bundles, device_cache: Path, gpu: FakeGpu) -> None:
    """A plan of TensorRT in place of the CPU engine's ONNX file, and a description that says so."""
    plan, described = b"evil|plan", CPU_ENGINE.replace(".onnx", ".json")
    info = {**json.loads(toy_files()[described]), "backend": "tensorrt", "engine_sha256": sha256_of(plan)}
    bundle = bundles(files={CPU_ENGINE: plan, described: json.dumps(info).encode()})
    with pytest.raises(BundleError, match="differs from the bundle in its backend"):
        Session.open(bundle, cache=device_cache)
    assert gpu.loaded == []


def test_places_may_be_given_as_text(bundles: Bundles, device_cache: Path, tmp_path: Path) -> None:
    key = write_key_pair(tmp_path / "key")
    bundle = bundles(signing_key=key.private)
    with Session.open(str(bundle), require_signature=str(key.public), cache=str(device_cache)) as session:
        assert session.info.backend == "onnxruntime"
    with pytest.raises(SignatureError, match="there is no key file"):
        Session.open(str(bundle), require_signature="", cache=str(device_cache))


def test_a_session_on_a_bundle(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    from PIL import Image

    build_bundle(bundle, BuildOptions(("tensorrt",), ("fp16",)), cache=device_cache)
    with Session.open(bundle, cache=device_cache) as session:
        assert session.info.backend == "tensorrt"
        (predictions,) = session.classify([Image.new("RGB", (8, 8), (200, 10, 10))], top=4)
    assert sum(prediction.probability for prediction in predictions) == pytest.approx(1)
