"""What CUDA's driver answers becomes our errors, and whichever call fails, everything is freed; on the fake driver."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack, suppress

import numpy as np
import pytest

from cuda_objects import SIZE, Owned, current_context, pattern, view
from edgewright.runtime.cuda import CudaDriver, open_driver
from edgewright.runtime.errors import DeviceError, DeviceLostError, DeviceMemoryError
from host_cuda import HostCuda

on_fake = pytest.mark.host_cuda

KINDS = {
    1: DeviceError,
    2: DeviceMemoryError,
    214: DeviceLostError,
    400: DeviceError,
    700: DeviceLostError,
    702: DeviceLostError,
    **dict.fromkeys((710, *range(714, 720)), DeviceLostError),
    999: DeviceLostError,
}


@on_fake
@pytest.mark.parametrize("code", KINDS)
def test_a_code_becomes_its_own_error(code: int, package: str, host_cuda: HostCuda) -> None:
    driver = open_driver(package)
    with driver.current():
        stream = driver.create_stream()
        host_cuda.fail_named("cuStreamSynchronize", code)
        with pytest.raises(DeviceError) as caught:
            driver.synchronize(stream)
        with suppress(DeviceLostError):  # when the device is lost, freeing says so too
            driver.destroy_stream(stream)
    driver.close()
    assert type(caught.value) is KINDS[code]
    assert "cuStreamSynchronize failed: " in caught.value.message
    assert ("start a new process, and see dmesg" in caught.value.remedy) == (KINDS[code] is DeviceLostError)


def everything(driver: CudaDriver, image: bytes) -> None:
    """Every function of the interface, in the order in which an engine uses them."""
    with driver.current(), ExitStack() as stack:
        owned = Owned(driver, stack)
        driver.memory_info()
        stream, start, end = owned.stream(), owned.event(), owned.event()
        memory, up, down = owned.device(), owned.pinned(mapped=True), owned.pinned()
        kernel = driver.function(owned.module(image), "scale")
        stack.callback(driver.synchronize, stream)  # before anything that is in use is freed
        view(up)[...] = pattern()
        driver.record(start, stream)
        driver.copy_to_device(memory, up.address, SIZE, stream)
        arguments = (ctypes.c_void_p(memory), ctypes.c_int(0), ctypes.c_float(1))
        driver.launch(kernel, (1, 1, 1), (32, 1, 1), arguments, stream)
        driver.copy_on_device(up.device_address, memory, SIZE, stream)
        driver.record(end, stream)
        driver.wait(stream, end)
        if driver.captures:
            graph = driver.captured(stream, lambda: driver.copy_to_host(down.address, memory, SIZE, stream))
            stack.callback(driver.destroy_graph, graph)
            driver.launch_graph(graph, stream)
            stack.callback(driver.synchronize, stream)
        else:
            driver.copy_to_host(down.address, memory, SIZE, stream)
        driver.synchronize_event(end)
        driver.elapsed(start, end)
        driver.synchronize(stream)
        np.testing.assert_array_equal(view(down), pattern())


def used_and_closed(package: str, image: bytes) -> None:
    driver = open_driver(package)
    try:
        everything(driver, image)
    finally:
        driver.close()


PRINTED = ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy", "cuModuleUnload")
"""Functions of which pycuda only prints that they failed."""


@on_fake
@pytest.mark.parametrize("code", [1, 700])
def test_whichever_call_fails_it_is_said_and_all_is_freed(
    code: int, package: str, host_cuda: HostCuda, image: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    used_and_closed(package, image)
    host_cuda.assert_clean()
    calls, printed = host_cuda.total_calls(), sum(map(host_cuda.calls, PRINTED))
    assert calls > 40
    silent = 0
    for k in range(1, calls + 1):
        host_cuda.reset()
        host_cuda.fail_call(k, code)
        try:
            used_and_closed(package, image)
            silent += 1
        except DeviceError:
            pass
        host_cuda.assert_clean()
        assert current_context() is None
    # With pycuda also the release of its context, and the look and the pop after it.
    assert silent == (0 if package == "cuda-python" else printed + 3)
    assert ("PyCUDA WARNING: a clean-up operation failed" in capfd.readouterr().err) == (package == "pycuda")
