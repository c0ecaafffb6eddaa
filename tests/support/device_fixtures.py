"""Fixtures of what a device has: a bundle, a cache, a fake GPU; and builds without child processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fake_gpu import Bundles, FakeGpu


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundles:
    """Makes toy bundles; nothing waits for the disk, which was the most of their time."""
    from toy_bundle import toy_bundle

    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def make(name: str = "toy.bundle", **changes: Any) -> Path:
        return toy_bundle(tmp_path / name, **changes)

    return make


@pytest.fixture
def bundle(bundles: Bundles) -> Path:
    """The test's own toy bundle."""
    return bundles()


@pytest.fixture
def device_cache(tmp_path: Path) -> Path:
    """Does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process, on what their JSON says; no time is spent on latencies."""
    from edgewright.runtime import latency
    from edgewright.runtime.device import build, child, rows, self_test, worker

    def answered(request: Mapping[str, Any], purpose: str, *, floor: int | None = None) -> dict[str, Any]:
        answer = worker.answer(json.loads(json.dumps(request)))
        return child.result_of(json.dumps(answer, allow_nan=False).encode(), 0, purpose, "")

    monkeypatch.setattr(self_test, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(latency, "_garbage_kept", contextlib.nullcontext)  # collecting what pytest holds takes longest
    for module in (build, rows):
        monkeypatch.setattr(module, "answer_of", answered)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, in_process: None) -> Iterator[FakeGpu]:
    """A fake GPU with a fake TensorRT, in place of what is or is not here."""
    from edgewright.runtime import backends, cuda
    from fake_gpu import ORIN, FakeGpu

    fake, before = FakeGpu(), dict(backends.BACKENDS)
    monkeypatch.setattr(cuda, "device_here", lambda: ORIN)
    _replace(backends.BACKENDS, {"onnxruntime": before["onnxruntime"], "tensorrt": fake})
    yield fake
    _replace(backends.BACKENDS, before)  # monkeypatch would put them back in another order


def _replace(target: dict[str, Any], content: Mapping[str, Any]) -> None:
    target.clear()
    target.update(content)
