"""The preprocessing kernel compiled for Jetsons and for a desktop GPU, which needs no GPU; and what NVRTC refuses."""

from __future__ import annotations

import ctypes
import importlib
import locale
import struct
import sys
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import pytest

from edgewright.runtime.cuda import nvrtc as nvrtc_module
from edgewright.runtime.cuda import open_driver
from edgewright.runtime.cuda.nvrtc import cubin
from edgewright.runtime.cuda.resize_kernel import KERNEL, SOURCE, PreprocessKernel
from edgewright.runtime.errors import DeviceError
from edgewright.runtime.preprocess import INTERPOLATIONS, Preprocess

pytest.importorskip("cuda.bindings.nvrtc")

EM_CUDA = 190  # machine in the header of an ELF file
MACHINE_AT, FLAGS_AT = 18, 48  # offsets in the header of a 64-bit ELF file


def nvrtc_major() -> int:
    return int(importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()[1])


@pytest.mark.parametrize("architecture", [87, 86, 110])
@pytest.mark.parametrize("channels", [1, 3])
def test_kernel_compiles_without_a_gpu(architecture: int, channels: int) -> None:
    if architecture == 110 and nvrtc_major() < 13:
        pytest.skip("NVRTC before CUDA 13 does not know Thor")
    code = cubin(SOURCE.read_text(), f"sm{architecture}", (f"CHANNELS={channels}",))
    assert code[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", code, MACHINE_AT) == (EM_CUDA,)
    assert code[FLAGS_AT + (nvrtc_major() >= 13)] == architecture, "compiled for another GPU"
    assert f".text.{KERNEL}\0".encode() in code


def test_compiled_once_in_a_process() -> None:
    arguments = (SOURCE.read_text(), "sm87", ("CHANNELS=3",))
    assert cubin(*arguments) is cubin(*arguments)


@pytest.mark.parametrize("source", ['extern "C" __global__ void k() {}', "refused"])
def test_the_locale_stays_as_it_is(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC 12.4 sets the thread's to "C" when it compiles; so does this step in front of it, whatever the version."""
    libc = ctypes.CDLL(None)
    libc.newlocale.restype = libc.uselocale.restype = ctypes.c_void_p
    compiled = nvrtc_module._compiled

    def select(name: bytes) -> None:
        libc.uselocale(ctypes.c_void_p(libc.newlocale(1 << locale.LC_CTYPE, name, None)))

    def rude(*arguments: Any) -> bytes:
        select(b"C")
        assert locale.nl_langinfo(locale.CODESET) != "UTF-8"
        return compiled(*arguments)

    monkeypatch.setattr(nvrtc_module, "_compiled", rude)
    before = ctypes.c_void_p(libc.uselocale(None))
    select(b"C.UTF-8")
    try:
        with nullcontext() if source != "refused" else pytest.raises(DeviceError):
            cubin(f"// locale\n{source}", "sm86")
        assert locale.nl_langinfo(locale.CODESET) == "UTF-8"
    finally:
        libc.uselocale(before)


def test_defines_reach_the_source() -> None:
    with pytest.raises(DeviceError, match=r"cannot compile for sm_87: .*CHANNELS.*; NVRTC here is of CUDA \d+\.\d+"):
        cubin(SOURCE.read_text(), "sm87")


@pytest.mark.parametrize(
    ("source", "architecture", "message"),
    [
        ("int main", "sm87", r"cannot compile for sm_87: .*error: expected"),
        ('extern "C" __global__ void k() {}', "sm999", r"cannot compile for sm_999: .*invalid value for --gpu-arch"),
    ],
)
def test_what_is_refused_is_said_in_one_line(source: str, architecture: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as raised:
        cubin(source, architecture)
    assert "\n" not in str(raised.value)


def test_missing_package_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(DeviceError, match=r"NVRTC, which compiles for the GPU, is not here: .*; pip install"):
        cubin("// never compiled before", "sm87")


def test_missing_library_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")

    def fail() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so":\nNo such file')

    monkeypatch.setattr(nvrtc, "nvrtcVersion", fail)
    with pytest.raises(DeviceError, match=r'is not here: Failure finding "libnvrtc.so": No such file; pip install'):
        cubin("// never compiled either", "sm87")


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_on_a_gpu_the_kernel_equals_pillow(interpolation: str) -> None:
    try:
        driver = open_driver("cuda-python")
    except DeviceError as error:
        pytest.skip(error.message)
    preprocess = Preprocess(40, (33, 35), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation)
    pixels = np.random.default_rng(1)
    images = [pixels.integers(0, 256, (*size, 3), np.uint8) for size in ((48, 64), (480, 640), (1, 50), (33, 35))]
    wanted = preprocess.batch(images)
    found = np.empty_like(wanted)
    with ExitStack() as owner:
        owner.callback(driver.close)
        owner.enter_context(driver.current())
        stream, target = driver.create_stream(), driver.allocate(wanted.nbytes)
        owner.callback(driver.destroy_stream, stream)
        owner.callback(driver.free, target)
        kernel = PreprocessKernel(driver, preprocess, len(images))
        owner.callback(kernel.close)
        kernel.enqueue(images, target, stream)
        driver.copy_to_host(found.ctypes.data, target, found.nbytes, stream)
        driver.synchronize(stream)
    np.testing.assert_array_equal(found, wanted)
