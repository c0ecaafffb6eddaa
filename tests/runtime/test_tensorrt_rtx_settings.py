"""TensorRT-RTX's runtime configuration and its cache on disk, with a stand-in for the package and a fake driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.backends import tensorrt_rtx as module
from edgewright.runtime.backends.tensorrt_rtx_settings import kernels_file
from edgewright.runtime.cuda.driver import Device
from edgewright.runtime.errors import WorkspaceError
from edgewright.runtime.files import sha256_of
from host_cuda import HostCuda
from stand_in_runs import GRAPH, images, opened, reference, stand_in
from stand_in_tensorrt import RtxConfig, StandInTensorRt

pytestmark = pytest.mark.host_cuda

COMPILED = b"kernels, compiled here"
RTX_3060 = Device("NVIDIA GeForce RTX 3060/Ti", "sm86", "13.0", False, 1 << 30)


@pytest.fixture
def trt(host_cuda: HostCuda) -> Iterator[StandInTensorRt]:
    made = stand_in("rtx-1.7")
    yield made
    assert made.problems == []
    assert not any(made.live.values()), made.live


def run(trt: StandInTensorRt, kernels: Path) -> None:
    with opened(trt, kernels=kernels) as runner:
        for _ in range(3):
            found = runner.infer({"x": images(4)})["y"]
            np.testing.assert_allclose(found, reference(images(4)), rtol=1e-5, atol=1e-6)


def test_what_was_compiled_is_kept_and_used_again(trt: StandInTensorRt, tmp_path: Path) -> None:
    kernels = tmp_path / "cache" / "kernels.bin"
    run(trt, kernels)
    assert kernels.read_bytes() == COMPILED
    kernels.write_bytes(b"kernels of another run")
    written = kernels.stat().st_mtime_ns
    run(trt, kernels)
    assert kernels.read_bytes() == b"kernels of another run"
    assert kernels.stat().st_mtime_ns == written
    assert trt.live == {"Runtime": 0, "RtxEngine": 0, "RtxConfig": 0, "RtxCache": 0, "Context": 0}


@pytest.mark.parametrize("content", [b"", b"damaged", b"\0" * 1000])
def test_a_damaged_cache_is_ignored_and_replaced(trt: StandInTensorRt, tmp_path: Path, content: bytes) -> None:
    kernels = tmp_path / "kernels.bin"
    kernels.write_bytes(content)
    run(trt, kernels)
    assert kernels.read_bytes() == COMPILED


def test_a_cache_that_cannot_be_read_or_written_is_no_error(trt: StandInTensorRt, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    run(trt, tmp_path / "file" / "kernels.bin")
    (tmp_path / "folder").mkdir()
    run(trt, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_its_own_cuda_graphs_are_taken_not_ours(host_cuda: HostCuda, trt: StandInTensorRt, tmp_path: Path) -> None:
    run(trt, tmp_path / "kernels.bin")
    assert host_cuda.calls("cuStreamBeginCapture") == 0
    assert [strategy.name for strategy in trt.strategies] == ["WHOLE_GRAPH_CAPTURE"]


def test_without_its_own_cuda_graphs_ours_are_taken(
    host_cuda: HostCuda, trt: StandInTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(RtxConfig, "cuda_graph_strategy")
    run(trt, tmp_path / "kernels.bin")
    assert host_cuda.calls("cuGraphLaunch") == 2
    assert trt.strategies == []


def test_siblings_share_one_cache(trt: StandInTensorRt, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels.bin"
    with opened(trt, kernels=kernels) as runner:
        other = runner.sibling()
        assert (trt.live["RtxCache"], trt.live["Context"]) == (1, 2)
    assert not kernels.exists()
    other.close()
    assert kernels.exists()


def test_the_file_stands_for_engine_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEWRIGHT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kernels_file(b"engine", "1.7.1", RTX_3060)
    name = f"{sha256_of(b'engine')}-1.7.1-NVIDIA-GeForce-RTX-3060-Ti-sm86.bin"
    assert path == tmp_path / "edgewright" / "rtx-runtime" / name
    others = [kernels_file(b"other", "1.7.1", RTX_3060), kernels_file(b"engine", "1.8.0", RTX_3060)]
    others.append(kernels_file(b"engine", "1.7.1", Device("Other", "sm86", "13.0", False, 1)))
    assert len({path, *others}) == 4
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (
        kernels_file(b"engine", "1.7.1", RTX_3060).parent == tmp_path / "home" / ".cache" / "edgewright" / "rtx-runtime"
    )


@pytest.mark.parametrize("place", ["", "rtx-runtime"])
def test_kernels_that_others_may_write_are_not_loaded(trt: StandInTensorRt, tmp_path: Path, place: str) -> None:
    kernels = tmp_path / "cache" / "rtx-runtime" / "kernels.bin"
    with opened(trt, kernels=kernels) as runner:
        runner.infer({"x": images(4)})
    assert kernels.stat().st_mode & 0o777 == 0o600
    (tmp_path / "cache" / place).chmod(0o775)
    with pytest.raises(WorkspaceError, match="can be written by others"):
        opened(trt, kernels=kernels)
    assert not any(trt.live.values())
    (tmp_path / "cache" / place).chmod(0o700)
    opened(trt, kernels=kernels).close()


def test_the_backend_keeps_it_in_the_users_cache(
    trt: StandInTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = BACKENDS["tensorrt-rtx"]
    monkeypatch.delenv("EDGEWRIGHT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_package", lambda: trt)
    monkeypatch.setattr(type(backend), "cannot_run", lambda self, target=None: None)
    with backend.open(GRAPH) as runner:
        np.testing.assert_allclose(runner.infer({"x": images(4)})["y"], reference(images(4)), rtol=1e-5, atol=1e-6)
    (kept,) = (tmp_path / "edgewright" / "rtx-runtime").iterdir()
    assert kept.read_bytes() == COMPILED
    assert kept.stat().st_mode & 0o022 == 0  # nobody else writes it
