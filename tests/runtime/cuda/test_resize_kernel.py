"""resize.cu, compiled for the processor, on the host-memory CUDA driver (a fake): equal to Pillow, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.runtime.cuda import CudaDriver, open_driver
from edgewright.runtime.cuda import resize_kernel as module
from edgewright.runtime.cuda.resize_kernel import PreprocessKernel
from edgewright.runtime.errors import ClosedError, DataError, DeviceError
from edgewright.runtime.preprocess import INTERPOLATIONS, Preprocess
from host_cuda import HostCuda
from resize_emulation import emulated
from resize_on_host import host_cubin

pytestmark = pytest.mark.host_cuda

Images = Sequence[NDArray[np.uint8]]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RGB = Preprocess(resize=40, crop=(33, 35), mean=MEAN, std=STD)  # no multiples of a block of threads
GREY = Preprocess(resize=40, crop=(33, 35), mean=MEAN[:1], std=STD[:1], colour="L")
SIZES = [(48, 64), (64, 48), (40, 40), (33, 77), (20, 90), (1, 1), (1, 50), (50, 1), (203, 2), (2, 203)]
LARGEST_BATCH = 16
OUT_OF_MEMORY = 2


def noise(size: tuple[int, int], channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Black and white drives sums below 0 and above 255, grey shows every rounding."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)
    pixels[: size[0] // 2] = np.where(pixels[: size[0] // 2] > 127, 255, 0)
    return pixels


@pytest.fixture(autouse=True)
def _compiled_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cubin", host_cubin)


@pytest.fixture
def driver(host_cuda: HostCuda) -> Iterator[CudaDriver]:
    opened = open_driver("cuda-python")
    yield opened
    opened.close()
    host_cuda.assert_clean()


class Bench:
    """A kernel with a stream and memory for its results, full of NaN before each batch."""

    def __init__(self, driver: CudaDriver, preprocess: Preprocess, owner: ExitStack) -> None:
        assert preprocess.input_shape is not None
        self.driver = driver
        self._shape = preprocess.input_shape
        self._size = 4 * LARGEST_BATCH * int(np.prod(self._shape))
        with driver.current():
            self.stream = driver.create_stream()
            owner.callback(driver.destroy_stream, self.stream)
            self.target = driver.allocate(self._size)
            owner.callback(driver.free, self.target)
        self.kernel = PreprocessKernel(driver, preprocess, LARGEST_BATCH)
        owner.callback(self.kernel.close)

    def results(self, images: Images) -> NDArray[np.float32]:
        """What the kernel makes of them, float32 `[N, C, H, W]`; nothing behind them was written."""
        memory = np.full((LARGEST_BATCH, *self._shape), np.nan, np.float32)
        self.driver.copy_to_device(self.target, memory.ctypes.data, self._size, self.stream)
        self.kernel.enqueue(images, self.target, self.stream)
        self.driver.copy_to_host(memory.ctypes.data, self.target, self._size, self.stream)
        self.driver.synchronize(self.stream)
        assert np.isnan(memory[len(images) :]).all()
        return memory[: len(images)]


@contextmanager
def bench(driver: CudaDriver, preprocess: Preprocess) -> Iterator[Bench]:
    with driver.current(), ExitStack() as owner:
        yield Bench(driver, preprocess, owner)


def assert_as_on_the_host(driver: CudaDriver, preprocess: Preprocess, images: Images) -> None:
    with bench(driver, preprocess) as made:
        np.testing.assert_array_equal(made.results(images), preprocess.batch(images), strict=True)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("resize", [40, (30, 47), None], ids=str)
@pytest.mark.parametrize("base", [RGB, GREY], ids=["RGB", "L"])
def test_a_batch_of_several_sizes_equals_pillow(
    driver: CudaDriver, base: Preprocess, resize: int | tuple[int, int] | None, interpolation: str
) -> None:
    preprocess = replace(base, resize=resize, interpolation=interpolation)
    images = [noise(size, len(base.mean), seed) for seed, size in enumerate(SIZES)]
    assert_as_on_the_host(driver, preprocess, images)
    pixels = np.stack([emulated(preprocess, image) for image in images])
    np.testing.assert_array_equal(preprocess.normalize(pixels), preprocess.batch(images))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_any_sizes_equal_pillow(driver: CudaDriver, interpolation: str) -> None:
    sides = np.random.default_rng(7)
    for seed in range(8):
        crop, resize = sides.integers(1, 70, 2), sides.integers(1, 70, 2)
        preprocess = Preprocess(
            (int(resize[0]), int(resize[1])), (int(crop[0]), int(crop[1])), MEAN, STD, interpolation
        )
        images = [noise((int(h), int(w)), 3, seed) for h, w in sides.integers(1, 90, (6, 2))]
        assert_as_on_the_host(driver, preprocess, images)


def test_a_frame_of_a_camera_equals_pillow(driver: CudaDriver) -> None:
    assert_as_on_the_host(driver, Preprocess(256, (224, 224), MEAN, STD, "bicubic"), [noise((480, 640))])


def test_a_resize_to_both_sides_needs_no_crop(driver: CudaDriver) -> None:
    assert_as_on_the_host(driver, RGB.with_size(29), [noise((31, 57)), noise((29, 29))])


def test_pixels_of_files_and_pictures_are_what_it_takes(driver: CudaDriver, tmp_path: Any) -> None:
    from PIL import Image

    picture = Image.fromarray(noise((60, 50))).convert("P")
    picture.save(tmp_path / "a.png")
    images = [tmp_path / "a.png", picture, noise((41, 52), 1)]
    with bench(driver, RGB) as made:
        results = made.results([RGB.source_pixels(image) for image in images])
    np.testing.assert_array_equal(results, RGB.batch(images))


def test_arrays_may_be_views_and_may_be_changed_at_once(driver: CudaDriver) -> None:
    whole = noise((120, 130))
    view = whole[3:-4:2, ::-1]
    wanted = RGB.batch([np.ascontiguousarray(view)])
    with bench(driver, RGB) as made:
        made.kernel.enqueue([view], made.target, made.stream)
        whole[...] = 0
        found = np.empty_like(wanted)
        driver.copy_to_host(found.ctypes.data, made.target, found.nbytes, made.stream)
        driver.synchronize(made.stream)
    np.testing.assert_array_equal(found, wanted)


def test_batches_one_behind_the_other_in_several_streams(driver: CudaDriver) -> None:
    batches = [[noise((50 + 9 * number, 70), seed=number)] * (1 + number % 3) for number in range(9)]
    with bench(driver, RGB) as made, ExitStack() as owner:
        streams = [made.stream, driver.create_stream()]
        owner.callback(driver.destroy_stream, streams[1])
        targets = [driver.allocate(4 * LARGEST_BATCH * 3 * 33 * 35) for _ in batches]
        for target in targets:
            owner.callback(driver.free, target)
        for number, images in enumerate(batches):
            made.kernel.enqueue(images, targets[number], streams[number % 2])
        for stream in streams:
            driver.synchronize(stream)
        for images, target in zip(batches, targets, strict=True):
            wanted = RGB.batch(images)
            found = np.empty_like(wanted)
            driver.copy_to_host(found.ctypes.data, target, found.nbytes, made.stream)
            driver.synchronize(made.stream)
            np.testing.assert_array_equal(found, wanted)


def test_one_copy_and_one_launch_for_a_batch(driver: CudaDriver, host_cuda: HostCuda) -> None:
    with bench(driver, RGB) as made:
        made.kernel.enqueue([noise((60, 50))] * LARGEST_BATCH, made.target, made.stream)
        assert host_cuda.calls("cuLaunchKernel") == 1
        assert host_cuda.pageable_copies() == 0
        allocations = host_cuda.calls("cuMemAlloc") + host_cuda.calls("cuMemHostAlloc")
        assert allocations > 0
        for count in (1, LARGEST_BATCH, 3):
            made.kernel.enqueue([noise((60, 50))] * count, made.target, made.stream)
        assert host_cuda.calls("cuMemAlloc") + host_cuda.calls("cuMemHostAlloc") == allocations, "buffers are reused"


def test_buffers_grow_and_the_smaller_ones_are_freed(driver: CudaDriver, host_cuda: HostCuda) -> None:
    with bench(driver, RGB) as made:
        for side in (20, 60, 200, 40):
            image = noise((side, side))
            np.testing.assert_array_equal(made.results([image] * 3), RGB.batch([image] * 3))
            assert (host_cuda.live("device"), host_cuda.live("pinned")) == (2, 1), "the target is one of them"


# Refusals


def test_refuses_results_of_several_sizes(driver: CudaDriver) -> None:
    for resize in (40, None):
        with pytest.raises(DataError, match=r"needs results of one size.*; set a crop"):
            PreprocessKernel(driver, replace(RGB, resize=resize, crop=None), 1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "0 images for a kernel that takes 1 to 16"),
        ([noise((9, 9))] * 17, "17 images for a kernel that takes 1 to 16"),
        ([noise((9, 9)), noise((9, 9)).astype(np.float32)], r"image 1 is float32 \[9, 9, 3\], expected uint8"),
        ([noise((9, 9), 1)], r"image 0 is uint8 \[9, 9, 1\], expected uint8 \[H, W, 3\]; take what .*source_pixels"),
        ([noise((9, 9))[..., 0]], r"image 0 is uint8 \[9, 9\]"),
        ([noise((9, 9))[:0]], r"image 0 is uint8 \[0, 9, 3\]"),
        ([noise((20000, 1))], "would be 400×8000000 after the resize"),
    ],
)
def test_refuses_what_are_no_images(driver: CudaDriver, images: Images, message: str) -> None:
    preprocess = replace(RGB, resize=400)
    with bench(driver, preprocess) as made:
        with pytest.raises(DataError, match=message):
            made.kernel.enqueue(images, made.target, made.stream)
        np.testing.assert_array_equal(made.results([noise((9, 9))]), preprocess.batch([noise((9, 9))]))


def test_refuses_to_be_used_after_it_was_closed(driver: CudaDriver) -> None:
    with bench(driver, RGB) as made:
        made.kernel.close()
        made.kernel.close()
        with pytest.raises(ClosedError, match="closed"):
            made.kernel.enqueue([noise((9, 9))], made.target, made.stream)


# Failures of the driver


def two_batches(driver: CudaDriver, target: int, stream: int) -> None:
    """Of several sizes, with all that can go wrong in between."""
    kernel = PreprocessKernel(driver, RGB, 2)
    try:
        kernel.enqueue([noise((30, 30))], target, stream)
        kernel.enqueue([noise((90, 90))] * 2, target, stream)
    finally:
        try:
            kernel.close()
        except DeviceError:
            kernel.close()
            raise


def test_whichever_call_fails_nothing_is_left(driver: CudaDriver, host_cuda: HostCuda) -> None:
    with driver.current():
        stream, target = driver.create_stream(), driver.allocate(4 * 2 * 3 * 33 * 35)
        before = host_cuda.total_calls()
        two_batches(driver, target, stream)
        calls = host_cuda.total_calls() - before
        assert calls > 20
        left = host_cuda.live()
        for number in range(1, calls + 1):
            host_cuda.fail_call(number, OUT_OF_MEMORY)
            with pytest.raises(DeviceError):
                two_batches(driver, target, stream)
            assert host_cuda.live() == left, f"call {number}"
        two_batches(driver, target, stream)
        driver.free(target)
        driver.destroy_stream(stream)


def test_kernel_that_fails_is_a_device_error(driver: CudaDriver, host_cuda: HostCuda) -> None:
    with bench(driver, RGB) as made:
        host_cuda.fail_named("cuLaunchKernel", OUT_OF_MEMORY)
        with pytest.raises(DeviceError, match="cuLaunchKernel failed"):
            made.kernel.enqueue([noise((30, 30))], made.target, made.stream)
        np.testing.assert_array_equal(made.results([noise((30, 30))]), RGB.batch([noise((30, 30))]))
