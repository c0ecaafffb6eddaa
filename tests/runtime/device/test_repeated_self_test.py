"""Repeating the self-test: what changed since is found, and what was planted is never loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.runtime.backends import Absence
from edgewright.runtime.bundle import write_key_pair
from edgewright.runtime.device import rows
from edgewright.runtime.device.build import BuildOptions, build_bundle
from edgewright.runtime.device.proven import proven_engines
from edgewright.runtime.device.verify import verify_bundle
from edgewright.runtime.errors import BuildError, BundleError, EngineError, RollbackError, SignatureError
from fake_gpu import Bundles, FakeGpu
from toy_bundle import toy_files

ONE = BuildOptions(backends=("tensorrt",), precisions=("fp16",))


def statuses(bundle: Path, device_cache: Path, **options: Any) -> dict[str, str]:
    return {
        f"{row.backend} {row.precision}": row.status
        for row in verify_bundle(bundle, cache=device_cache, **options).rows
    }


def test_what_is_kept_is_tested_again(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    build_bundle(bundle, cache=device_cache)
    gpu.loaded.clear()
    lines: list[str] = []
    everything = ("onnxruntime fp32", "tensorrt fp32", "tensorrt fp16", "tensorrt int8")
    assert statuses(bundle, device_cache, say=lines.append) == dict.fromkeys(everything, "verified")
    assert len(gpu.loaded) == 3
    assert len(lines) == 4
    assert statuses(bundle, device_cache, backends=("onnxruntime",)) == {"onnxruntime fp32": "verified"}
    assert statuses(bundle, device_cache, precisions=("int8",)) == {"tensorrt int8": "verified"}


def test_nothing_is_kept(bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    assert statuses(bundle, device_cache) == {}
    with pytest.raises(EngineError, match="unknown backend 'tensorflow'"):
        statuses(bundle, device_cache, backends=("tensorflow",))


@pytest.mark.parametrize("reason", ["version", "absent"])
def test_engines_of_another_device_are_left_alone(bundle: Path, device_cache: Path, gpu: FakeGpu, reason: str) -> None:
    build_bundle(bundle, ONE, cache=device_cache)
    if reason == "version":
        gpu.release = "10.4.0"
    else:
        gpu.missing = Absence("device_missing", "no GPU", "")
    assert statuses(bundle, device_cache) == {}


def test_an_engine_that_fails_now_is_no_longer_proven(
    bundle: Path, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of something that no key names."""
    sha256 = build_bundle(bundle, ONE, cache=device_cache).bundle
    assert len(proven_engines(sha256, device_cache)) == 1
    with monkeypatch.context() as patch:
        open_engine = FakeGpu.open

        def worse(self: FakeGpu, engine: bytes, **options: Any) -> Any:
            runner = open_engine(self, engine, **options)
            infer = runner.infer
            patch.setattr(runner, "infer", lambda feeds: {name: -np.asarray(y) for name, y in infer(feeds).items()})
            return runner

        patch.setattr(FakeGpu, "open", worse)
        assert statuses(bundle, device_cache) == {"tensorrt fp16": "over_budget"}
    assert proven_engines(sha256, device_cache) == ()
    assert statuses(bundle, device_cache) == {"tensorrt fp16": "verified"}, "it is kept, and may pass again"
    assert len(proven_engines(sha256, device_cache)) == 1


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_changed_file_is_not_loaded(bundle: Path, device_cache: Path, gpu: FakeGpu, damage: str) -> None:
    (row,) = build_bundle(bundle, ONE, cache=device_cache).rows
    assert row.path is not None
    content = row.path.read_bytes()
    if damage == "gone":
        row.path.unlink()
    else:
        row.path.write_bytes(content[:-1] if damage == "cut" else b"planted|" + toy_files()["graphs/fp32.onnx"])
    gpu.loaded.clear()
    (found,) = verify_bundle(bundle, cache=device_cache).rows
    assert (found.status, found.reason_code) == ("failed", "run_failed")
    assert "build it again" in found.reason
    assert gpu.loaded == []


def test_an_engine_that_crashes_now_is_no_longer_proven(
    bundle: Path, device_cache: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that opened it for real would crash too."""
    sha256 = build_bundle(bundle, ONE, cache=device_cache).bundle

    def crash(*_: Any, **__: Any) -> Any:
        raise BuildError("the self-test of tensorrt fp16 crashed (SIGSEGV)")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "answer_of", crash)
        (row,) = verify_bundle(bundle, cache=device_cache).rows
    assert (row.status, row.reason_code, row.self_test) == ("failed", "run_failed", None)
    assert "SIGSEGV" in row.reason
    assert proven_engines(sha256, device_cache) == ()
    assert statuses(bundle, device_cache) == {"tensorrt fp16": "verified"}


def test_the_bundle_must_be_trusted_here_too(
    bundles: Bundles, device_cache: Path, gpu: FakeGpu, tmp_path: Path
) -> None:
    old, new = bundles("old.bundle"), bundles("new.bundle", version=2)
    for path in (old, new):
        build_bundle(path, ONE, cache=device_cache)
    with pytest.raises(RollbackError):
        verify_bundle(old, cache=device_cache)
    assert statuses(old, device_cache, allow_older=True) == {"tensorrt fp16": "verified"}
    with pytest.raises(SignatureError):
        verify_bundle(new, cache=device_cache, require_signature=write_key_pair(tmp_path / "key").public)
    (new / "spec.json").write_bytes(b"{}")
    with pytest.raises(BundleError):
        verify_bundle(new, cache=device_cache)
