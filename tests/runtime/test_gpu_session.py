"""`Session` and `SessionPool` with an engine for a GPU: a stand-in for TensorRT on the host-memory driver, a fake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.runtime import Session, SessionPool
from edgewright.runtime.backends import tensorrt_gpu
from edgewright.runtime.cuda import resize_kernel
from edgewright.runtime.errors import ClosedError, DeviceError, EngineError, InputError
from edgewright.runtime.files import write_json
from gpu_tensors import DlpackTensor, lent
from host_cuda import HostCuda
from resize_on_host import host_cubin
from stand_in_runs import DRIVERS, failures_in_threads, stand_in
from stand_in_tensorrt import StandInTensorRt
from toy_build import expected_logits, normal, photograph, put_engine

pytestmark = pytest.mark.host_cuda


@pytest.fixture(params=DRIVERS, autouse=True)
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package behind the driver, as the environment names it."""
    monkeypatch.setenv("EDGEWRIGHT_CUDA", request.param)
    return str(request.param)


@pytest.fixture
def trt(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInTensorRt]:
    made = stand_in()
    monkeypatch.setattr(tensorrt_gpu, "_package", lambda: made)
    monkeypatch.setattr(tensorrt_gpu, "PACKAGE", "json")  # installed, but without a record of its version
    monkeypatch.setattr(tensorrt_gpu, "_no_device", lambda: None)
    monkeypatch.setattr(resize_kernel, "cubin", host_cubin)
    yield made
    assert made.problems == []
    assert not any(made.live.values()), made.live


@pytest.fixture
def build(trt: StandInTensorRt, tmp_path: Path) -> Path:
    """A build folder with one engine for the GPU."""
    path = put_engine(tmp_path, backend="tensorrt", versions={"tensorrt": trt.__version__})
    path.rename(path.with_suffix(".plan"))
    return tmp_path


def check(found: dict[str, Any], batch: Any) -> None:
    np.testing.assert_allclose(found["logits"], expected_logits("fp32", batch), rtol=1e-4, atol=1e-4)


def test_a_session_on_the_gpu_answers_as_numpy_does(build: Path) -> None:
    with Session.open(build) as session:
        for count in (4, 4, 4, 1, 19):
            batch = normal("batch", count, 3, 8, 8)
            check(session.infer(batch), batch)
        with lent(DlpackTensor, batch) as tensor:
            check(session.infer(tensor), batch)
            session.submit(tensor)
            check(session.result(), batch)
        counters = session.counters
    assert counters.batches == 7
    assert min(counters.copy_in_ms, counters.compute_ms, counters.copy_out_ms) > 0


def test_a_pool_of_eight_threads(build: Path, trt: StandInTensorRt) -> None:
    with SessionPool(build, size=8) as pool:
        assert (trt.live["Engine"], trt.live["Context"]) == (1, 8)

        def work(index: int) -> None:
            for turn in range(15):
                batch = normal(f"{index} {turn}", 1 + turn // 3 % 9, 3, 8, 8)
                with pool.session() as session:
                    check(session.infer(batch), batch)
                    session.submit(batch)
                    check(session.result(), batch)

        assert failures_in_threads(work) == []


def test_a_pool_that_cannot_be_filled_leaves_nothing(build: Path, trt: StandInTensorRt, host_cuda: HostCuda) -> None:
    host_cuda.set_device(memory=20_000)
    with pytest.raises(DeviceError, match="take a smaller batch or profile"):
        SessionPool(build, size=8)
    assert host_cuda.live() == 0


@pytest.mark.parametrize("integrated", [False, True])
def test_images_are_preprocessed_on_the_device(build: Path, host_cuda: HostCuda, integrated: bool) -> None:
    host_cuda.set_device(integrated=integrated)
    pictures = [photograph(seed, size) for seed, size in enumerate([(9, 12), (30, 20), (8, 8)] * 7)]
    with Session.open(build) as session:
        wanted = session.classify(pictures, top=2)
    with Session.open(build, device_preprocessing=True) as session:
        found = session.classify(pictures, top=2)
        counters, launches = session.counters, host_cuda.calls("cuLaunchKernel")
        other = session.sibling()
    assert [[p.index for p in row] for row in found] == [[p.index for p in row] for row in wanted]
    np.testing.assert_allclose([row[0].probability for row in found], [row[0].probability for row in wanted], rtol=1e-5)
    assert launches == 3  # 16 images are 8 and 8, and 5 more
    assert (counters.batches, counters.images) == (2, 21)
    assert other.classify(pictures[:1], top=2) == found[:1]
    other.close()


def test_preprocessing_that_the_engine_does_not_take_is_refused(build: Path, host_cuda: HostCuda) -> None:
    (described,) = build.rglob("*.json")
    content = json.loads(described.read_text())
    content["preprocess"]["crop"] = [9, 9]
    write_json(described, content)
    with pytest.raises(EngineError, match=r"preprocessing gives .*\(3, 9, 9\), the engine takes .*; leave out"):
        Session.open(build, device_preprocessing=True)
    assert host_cuda.live() == 0


def test_without_images_there_is_nothing_to_preprocess(build: Path) -> None:
    with Session.open(build, device_preprocessing=True) as session:
        assert session.classify([]) == []
        runner = vars(session)["_runner"]
        with pytest.raises(InputError, match="there are no images"):
            runner.infer_images([])
    with Session.open(build) as session, pytest.raises(EngineError, match="open with device_preprocessing=True"):
        vars(session)["_runner"].infer_images([photograph()])
    with pytest.raises(ClosedError):
        session.infer(normal("batch", 1, 3, 8, 8))


def test_a_provider_is_refused(build: Path, host_cuda: HostCuda) -> None:
    with pytest.raises(EngineError, match="tensorrt has no provider 'cuda', it has none; leave it out"):
        Session.open(build, provider="cuda")
    assert host_cuda.live() == 0
