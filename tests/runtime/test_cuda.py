"""The thin layer over cuda-python, with a fake of its runtime module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgewright.runtime.cuda import Buffer, Cuda, Stream, driver
from edgewright.runtime.errors import DeviceError, EngineError
from fake_cuda import FakeCudart


def array(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_a_code_becomes_cudas_words() -> None:
    cuda = Cuda(FakeCudart("cudaMalloc"))
    with pytest.raises(DeviceError, match=r"cudaMalloc failed: out of memory \(2\); look at nvidia-smi") as caught:
        cuda.call("cudaMalloc", 16)
    assert isinstance(caught.value, EngineError)


def test_a_call_gives_what_stands_beside_the_code() -> None:
    fake = FakeCudart(devices=3)
    assert Cuda(fake).call("cudaGetDeviceCount") == 3
    address = Cuda(fake).call("cudaMalloc", 16)
    assert Cuda(fake).call("cudaFree", address) is None


@pytest.mark.parametrize(("capability", "name"), [((8, 7), "sm87"), ((12, 0), "sm120"), ((11, 0), "sm110")])
def test_the_device_is_named_by_its_architecture(capability: tuple[int, int], name: str) -> None:
    assert driver.device_of(Cuda(FakeCudart(capability=capability))).architecture == name


def test_no_device() -> None:
    with pytest.raises(DeviceError, match="there is no NVIDIA GPU here"):
        driver.device_of(Cuda(FakeCudart(devices=0)))
    with pytest.raises(DeviceError, match=r"no driver that fits cuda-python: .*driver version is insufficient"):
        driver.device_of(Cuda(FakeCudart("cudaGetDeviceCount", code=35)))


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "MODULES", ("no_such_module", "nor.this"))
    driver._library.cache_clear()
    with pytest.raises(
        DeviceError, match=r"cuda-python does not load \(no_such_module: .*; nor.this: .*edgewright\[cuda"
    ):
        Cuda.load()


@pytest.mark.parametrize("shape", [(4, 2, 3), (1, 2, 3), (3, 2, 3)])
def test_what_goes_up_comes_down(shape: tuple[int, ...]) -> None:
    fake = FakeCudart()
    cuda = Cuda(fake)
    stream, buffer = Stream(cuda), Buffer(cuda, (4, 2, 3), "float32")
    given = array(*shape)
    buffer.upload(given, stream)
    assert fake.copies == [("up", given.nbytes)]
    given[...] = -1  # the copy does not need it any more
    result = buffer.download(shape, stream)
    stream.synchronize()
    np.testing.assert_array_equal(result, array(*shape))
    assert fake.synchronized
    buffer.close()
    stream.close()
    assert fake.held == 0


def test_half_precision_is_stored_as_such() -> None:
    fake = FakeCudart()
    cuda = Cuda(fake)
    buffer = Buffer(cuda, (2, 3), "float16")
    assert {len(block) for block in fake.device.values()} == {12}
    stream = Stream(cuda)
    buffer.upload(array(2, 3), stream)
    assert buffer.download((2, 3), stream).dtype == np.float16


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMallocHost"])
def test_a_buffer_that_does_not_fit_leaves_nothing(function: str) -> None:
    fake = FakeCudart(function)
    with pytest.raises(DeviceError, match="out of memory"):
        Buffer(Cuda(fake), (2, 3), "float32")
    assert fake.held == 0


def test_both_are_freed_though_one_fails() -> None:
    fake = FakeCudart("cudaFreeHost")
    buffer = Buffer(Cuda(fake), (2, 3), "float32")
    with pytest.raises(DeviceError, match="cudaFreeHost failed"):
        buffer.close()
    assert fake.held == 0


@pytest.mark.gpu
def test_the_real_library() -> None:
    try:
        driver.device_here()
    except DeviceError as error:
        pytest.skip(error.message)
    cuda = Cuda.load()
    stream, buffer = Stream(cuda), Buffer(cuda, (4, 2, 3), "float32")
    buffer.upload(array(3, 2, 3), stream)
    result = buffer.download((3, 2, 3), stream)
    stream.synchronize()
    np.testing.assert_array_equal(result, array(3, 2, 3))
    buffer.close()
    stream.close()
    with pytest.raises(DeviceError, match="cudaFree failed: invalid"):
        cuda.call("cudaFree", 1)
