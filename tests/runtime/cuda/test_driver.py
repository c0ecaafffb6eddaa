"""Memory, copies, events, graphs and kernels through cuda-python and pycuda, on the host-memory driver, a fake."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack

import numpy as np
import pytest

from cuda_objects import SIZE, Owned, pattern, view
from edgewright.runtime.cuda import CudaDriver, open_driver
from edgewright.runtime.errors import DeviceError, DeviceMemoryError
from host_cuda import HostCuda

on_fake = pytest.mark.host_cuda


@on_fake
def test_memory_is_taken_and_given_back(driver: CudaDriver, owned: Owned, host_cuda: HostCuda) -> None:
    free, total = driver.memory_info()
    address = driver.allocate(4096)
    assert driver.memory_info() == (free - 4096, total)
    driver.free(address)
    assert driver.memory_info() == (free, total)


@on_fake
def test_no_memory_is_left(driver: CudaDriver, owned: Owned, host_cuda: HostCuda) -> None:
    host_cuda.set_device(memory=1 << 20)
    owned.device(1 << 19)
    with pytest.raises(DeviceMemoryError, match=r"cuMemAlloc failed: out of memory.*; take a smaller batch or profile"):
        driver.allocate((1 << 19) + 1)
    owned.device(1 << 19)


@on_fake
@pytest.mark.parametrize("mapped", [False, True])
def test_pinned_memory(mapped: bool, owned: Owned, host_cuda: HostCuda) -> None:
    memory = owned.pinned(mapped=mapped)
    assert (memory.size, bool(memory.device_address)) == (SIZE, mapped)
    view(memory)[...] = 7
    assert host_cuda.live("pinned") == 1


@on_fake
def test_what_goes_up_comes_down(driver: CudaDriver, owned: Owned, host_cuda: HostCuda) -> None:
    stream, first, second = owned.stream(), owned.device(), owned.device()
    up, down = owned.pinned(), owned.pinned()
    view(up)[...], view(down)[...] = pattern(), 0
    driver.copy_to_device(first, up.address, SIZE, stream)
    driver.copy_on_device(second, first, SIZE - 16, stream)
    driver.copy_to_host(down.address, second, SIZE - 16, stream)
    assert not view(down).any()  # queued, not waited for
    driver.synchronize(stream)
    np.testing.assert_array_equal(view(down)[:-16], pattern()[:-16])
    assert not view(down)[-16:].any()
    assert host_cuda.pageable_copies() == 0


@on_fake
def test_mapped_memory_is_read_by_the_device(driver: CudaDriver, owned: Owned) -> None:
    stream, memory, host = owned.stream(), owned.pinned(mapped=True), owned.pinned()
    view(memory)[...] = pattern()
    driver.copy_to_host(host.address, memory.device_address, SIZE, stream)
    driver.synchronize(stream)
    np.testing.assert_array_equal(view(host), pattern())


@on_fake
@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_waits_for_another_if_it_is_told_to(waits: bool, driver: CudaDriver, owned: Owned) -> None:
    first, second, done = owned.stream(), owned.stream(), owned.event()
    memory, up, down = owned.device(), owned.pinned(), owned.pinned()
    view(up)[...] = pattern()
    driver.copy_to_device(memory, up.address, SIZE, first)
    driver.record(done, first)
    if waits:
        driver.wait(second, done)
    driver.copy_to_host(down.address, memory, SIZE, second)
    driver.synchronize(second)
    assert (view(down) == pattern()).all() == waits
    driver.synchronize(first)


@on_fake
def test_an_event_is_passed_before_what_comes_later(driver: CudaDriver, owned: Owned) -> None:
    stream, start, end = owned.stream(), owned.event(), owned.event()
    memory, up, down = owned.device(), owned.pinned(), owned.pinned()
    view(up)[...], view(down)[...] = pattern(), 0
    driver.record(start, stream)
    driver.copy_to_device(memory, up.address, SIZE, stream)
    driver.record(end, stream)
    driver.copy_to_host(down.address, memory, SIZE, stream)
    driver.synchronize_event(end)
    assert 0 <= driver.elapsed(start, end) < 10_000
    assert not view(down).any()
    driver.synchronize(stream)
    assert view(down).any()


@on_fake
def test_an_event_that_is_not_passed_has_no_time(driver: CudaDriver, owned: Owned) -> None:
    stream, start, end = owned.stream(), owned.event(), owned.event()
    driver.record(start, stream)
    driver.record(end, stream)
    with pytest.raises(DeviceError, match=r"cuEventElapsedTime.* failed: device not ready"):
        driver.elapsed(start, end)
    driver.synchronize(stream)
    assert driver.elapsed(start, end) >= 0


# ---- graphs ----


def needs_graphs(driver: CudaDriver) -> None:
    if not driver.captures:
        pytest.skip(f"{driver.name} has no CUDA graphs")


@on_fake
def test_a_graph_reads_what_is_there_when_it_is_launched(driver: CudaDriver, owned: Owned, host_cuda: HostCuda) -> None:
    needs_graphs(driver)
    stream, memory, up, down = owned.stream(), owned.device(), owned.pinned(), owned.pinned()
    view(down)[...] = 0
    driver.begin_capture(stream)
    driver.copy_to_device(memory, up.address, SIZE, stream)
    driver.copy_to_host(down.address, memory, SIZE, stream)
    graph = driver.end_capture(stream)
    driver.synchronize(stream)
    assert not view(down).any()  # noted, not done
    for seed in (2, 3):
        view(up)[...] = pattern(seed)
        driver.launch_graph(graph, stream)
        driver.synchronize(stream)
        np.testing.assert_array_equal(view(down), pattern(seed))
    assert (host_cuda.live("graph"), host_cuda.live("exec")) == (0, 1)
    driver.destroy_graph(graph)


@on_fake
def test_what_must_not_be_captured_ends_the_capture(driver: CudaDriver, owned: Owned, host_cuda: HostCuda) -> None:
    needs_graphs(driver)
    stream = owned.stream()
    driver.begin_capture(stream)
    with pytest.raises(DeviceError, match="operation not permitted when stream is capturing"):
        driver.allocate(16)
    with pytest.raises(DeviceError, match=r"cuStreamEndCapture failed: .*previous error during capture"):
        driver.end_capture(stream)
    assert host_cuda.misuse == ["cuMemAlloc: not allowed while a stream captures"]
    driver.destroy_stream(driver.create_stream())
    driver.begin_capture(stream)
    driver.destroy_graph(driver.end_capture(stream))
    host_cuda.forgive()


@on_fake
@pytest.mark.parametrize("function", ["cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy"])
def test_a_capture_that_fails_leaves_nothing(
    function: str, driver: CudaDriver, owned: Owned, host_cuda: HostCuda
) -> None:
    needs_graphs(driver)
    stream = owned.stream()
    driver.begin_capture(stream)
    host_cuda.fail_named(function, code=1)
    with pytest.raises(DeviceError, match=f"{function} failed: invalid argument"):
        driver.end_capture(stream)
    assert (host_cuda.live("graph"), host_cuda.live("exec")) == (0, 0)
    driver.synchronize(stream)


@on_fake
def test_an_exception_ends_the_capture(driver: CudaDriver, owned: Owned, host_cuda: HostCuda) -> None:
    needs_graphs(driver)
    stream = owned.stream()

    def enqueue() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        driver.captured(stream, enqueue)
    assert (host_cuda.live("graph"), host_cuda.live("exec")) == (0, 0)
    driver.synchronize(stream)


@on_fake
def test_pycuda_says_that_it_has_no_graphs(driver: CudaDriver, owned: Owned) -> None:
    if driver.captures:
        pytest.skip(f"{driver.name} has CUDA graphs")
    with pytest.raises(DeviceError, match="pycuda has no CUDA graphs; use cuda-python for them"):
        driver.begin_capture(owned.stream())


# ---- kernels ----


@on_fake
def test_a_kernel_runs_in_the_stream(driver: CudaDriver, owned: Owned, image: bytes) -> None:
    stream, memory = owned.stream(), owned.pinned(mapped=True)
    values = view(memory).view(np.float32)
    values[...] = 1.5
    kernel = driver.function(owned.module(image), "scale")
    factor = ctypes.c_float(-2)
    arguments = (ctypes.c_void_p(memory.device_address), ctypes.c_int(200), factor)
    driver.launch(kernel, (4, 1, 1), (64, 1, 1), arguments, stream)
    factor.value = 0  # the launch has its own copy
    assert (values == 1.5).all()
    driver.synchronize(stream)
    assert (values[:200] == -3).all()
    assert (values[200:] == 1.5).all()


@on_fake
def test_kernels_that_are_not_there(driver: CudaDriver, owned: Owned, image: bytes) -> None:
    with pytest.raises(DeviceError, match=r"cuModuleLoadData.* failed: device kernel image is invalid"):
        driver.load_module(b"neither\0")
    with pytest.raises(DeviceError, match="cuModuleGetFunction failed: named symbol not found"):
        driver.function(owned.module(image), "shrink")


@on_fake
def test_a_grid_of_nothing(driver: CudaDriver, owned: Owned, image: bytes) -> None:
    kernel, stream = driver.function(owned.module(image), "scale"), owned.stream()
    arguments = (ctypes.c_void_p(0), ctypes.c_int(0), ctypes.c_float(0))
    with pytest.raises(DeviceError, match="cuLaunchKernel failed: invalid argument"):
        driver.launch(kernel, (0, 1, 1), (64, 1, 1), arguments, stream)


@pytest.mark.gpu
def test_on_a_gpu(package: str) -> None:
    try:
        driver = open_driver(package)
    except DeviceError as error:
        pytest.skip(error.message)
    with driver.current(), ExitStack() as stack:
        owned = Owned(driver, stack)
        stream, memory, up, down = owned.stream(), owned.device(), owned.pinned(), owned.pinned()
        view(up)[...] = pattern()
        driver.copy_to_device(memory, up.address, SIZE, stream)
        driver.copy_to_host(down.address, memory, SIZE, stream)
        driver.synchronize(stream)
        np.testing.assert_array_equal(view(down), pattern())
    driver.close()
