"""Opening CUDA's driver, the device it finds, and the context that is current in a thread; on the fake driver."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from cuda_objects import PACKAGES, SIZE, Owned, current_context, is_installed, pattern, view
from edgewright.runtime.cuda import CudaDriver, Device, device_here, open_driver
from edgewright.runtime.errors import ClosedError, DeviceError
from host_cuda import HostCuda

on_fake = pytest.mark.host_cuda


@on_fake
@pytest.mark.parametrize("capability", [(8, 7), (12, 0), (11, 0)])
def test_the_device_is_described(capability: tuple[int, int], package: str, host_cuda: HostCuda) -> None:
    host_cuda.set_device(capability, integrated=capability == (8, 7), memory=3 << 30)
    driver = open_driver(package)
    architecture = f"sm{capability[0]}{capability[1]}"
    wanted = Device("Host memory (a fake)", architecture, "13.0", capability == (8, 7), 3 << 30)
    assert driver.device == type(driver).find_device() == wanted
    assert (driver.name, driver.captures) == (package, package == "cuda-python")
    driver.close()


@on_fake
def test_closing_releases_the_context_once(package: str, host_cuda: HostCuda) -> None:
    first, second = open_driver(package), open_driver(package)
    first.close()
    assert host_cuda.live("context") == 1  # the second still has it
    second.close()
    first.close()
    assert host_cuda.live("context") == 0
    with pytest.raises(ClosedError, match="the CUDA driver is closed; open it again"), second.current():
        pass


@on_fake
def test_another_thread_may_close_it(driver: CudaDriver, host_cuda: HostCuda) -> None:
    thread = threading.Thread(target=driver.close)
    thread.start()
    thread.join()
    host_cuda.assert_clean()


@on_fake
def test_looking_for_the_device_makes_no_context_and_is_done_once(
    package: str, host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEWRIGHT_CUDA", package)
    device_here.cache_clear()
    assert device_here().architecture == "sm87"
    calls = host_cuda.total_calls()
    assert device_here().architecture == "sm87"
    device_here.cache_clear()
    assert (host_cuda.total_calls(), host_cuda.calls("cuDevicePrimaryCtxRetain")) == (calls, 0)


@on_fake
def test_no_gpu(package: str, host_cuda: HostCuda) -> None:
    host_cuda.set_devices(0)
    with pytest.raises(DeviceError, match=r"there is no NVIDIA GPU here, or no driver: cuInit failed: no CUDA-capable"):
        open_driver(package)


@on_fake
def test_a_driver_older_than_cuda_python(host_cuda: HostCuda) -> None:
    if not is_installed("cuda-python"):
        pytest.skip("cuda-python is not installed")
    host_cuda.set_driver_version(11080)
    with pytest.raises(
        DeviceError, match=r"cuda-python is for CUDA 1\d\.\d, the driver supports 11.8; update the driv"
    ):
        open_driver("cuda-python")


def test_a_broken_driver_library(package: str, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    code = f"from edgewright.runtime.cuda import open_driver; open_driver({package!r})"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "DeviceError: " in last
    assert "NVIDIA's driver" in last


@pytest.mark.parametrize("choice", [None, "cuda-python", "pycuda"])
def test_nothing_is_installed(choice: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEWRIGHT_CUDA", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = choice or "cuda-python or pycuda"
    extra = "pycuda" if choice == "pycuda" else "cuda"
    with pytest.raises(DeviceError, match=rf"^{names} is not installed; pip install 'edgewright\[{extra}\]'$"):
        open_driver(choice)


def test_a_package_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWRIGHT_CUDA", "cupy")
    with pytest.raises(DeviceError, match="no package for CUDA is called 'cupy'; choose one of cuda-python, pycuda"):
        open_driver()
    with pytest.raises(DeviceError, match="no package for CUDA is called 'numba'"):
        open_driver("numba")


@on_fake
def test_the_first_that_is_installed_is_taken(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [name for name in PACKAGES if is_installed(name)]
    if not installed:
        pytest.skip("neither cuda-python nor pycuda is installed")
    monkeypatch.delenv("EDGEWRIGHT_CUDA", raising=False)
    driver = open_driver()
    assert driver.name == installed[0]
    driver.close()


# ---- the current context ----


@on_fake
def test_the_context_is_current_inside_only(driver: CudaDriver) -> None:
    assert current_context() is None
    with driver.current():
        outer = current_context()
        assert outer
        with driver.current():
            assert current_context() == outer
        assert current_context() == outer
    assert current_context() is None


@on_fake
def test_an_exception_leaves_no_context(driver: CudaDriver) -> None:
    with pytest.raises(KeyError), driver.current():
        raise KeyError
    assert current_context() is None


@on_fake
def test_what_another_library_made_current_stays_so(driver: CudaDriver) -> None:
    library, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert library.cuCtxPushCurrent_v2(context) == 0
    with driver.current():
        driver.memory_info()
    driver.close()
    assert current_context() == context.value
    assert library.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert library.cuDevicePrimaryCtxRelease_v2(0) == 0


@on_fake
def test_without_the_context_a_call_is_refused(driver: CudaDriver, host_cuda: HostCuda) -> None:
    with pytest.raises(DeviceError, match="invalid device context"):
        driver.memory_info()
    assert host_cuda.misuse == ["cuMemGetInfo: no context is current in this thread"]
    driver.close()
    host_cuda.reset()


@on_fake
def test_threads_work_side_by_side(driver: CudaDriver) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(20):
            with driver.current(), ExitStack() as stack:
                owned = Owned(driver, stack)
                stream, memory, host = owned.stream(), owned.device(), owned.pinned()
                view(host)[...] = pattern(seed)
                driver.copy_to_device(memory, host.address, SIZE, stream)
                driver.synchronize(stream)
                view(host)[...] = 0
                driver.copy_to_host(host.address, memory, SIZE, stream)
                driver.synchronize(stream)
                wrong.extend([seed] * int((view(host) != pattern(seed)).any()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
