"""Preprocessing on the device: images of any sizes as they were decoded, in; the network's input, out.

A batch goes to the device in one copy, with the tables of its resize, and through one launch of the kernel in
`resize.cu`. The result is that of `Preprocess.batch`, bit for bit: the same whole numbers up to the resized byte, and
what a byte becomes is looked up in the table that the host uses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ClosedError, DataError
from ..preprocess import Preprocess
from ..resampling import resampling
from .driver import CudaDriver, PinnedMemory
from .nvrtc import cubin

__all__ = ["KERNEL", "SOURCE", "PreprocessKernel"]

SOURCE = Path(__file__).with_name("resize.cu")
KERNEL = "preprocess"
BLOCK = (32, 8, 1)  # a warp is a line of pixels; other shapes were not measured
IMAGE_FIELDS = 5  # of struct Image in resize.cu: pixels, columns, rows, width, rows_first
ALIGNMENT = 16  # of what is staged, in bytes; CUDA asks for the size of the elements
GROWTH = 1.5  # room beyond the largest batch so far: sizes vary, and each new buffer waits for the device


class PreprocessKernel:
    """Makes batches on the device. Use it in one thread at a time, and close it before the driver.

    Holds one buffer in page-locked memory and one on the device, as large as the largest batch so far needed.
    """

    def __init__(self, driver: CudaDriver, preprocess: Preprocess, largest_batch: int) -> None:
        """Compiles and loads the kernel; the first time in a process that takes 0.1 to 0.3 s.

        Raises `DataError` if the results have no common size, `DeviceError` if NVRTC or the device refuses.
        """
        if preprocess.input_shape is None:
            raise DataError(
                "preprocessing on the device needs results of one size, and the resize keeps the aspect",
                "set a crop, or a resize of two sides",
            )
        self._driver = driver
        self._preprocess = preprocess
        self._largest_batch = largest_batch
        self._channels, self._height, self._width = preprocess.input_shape
        self._normalized = preprocess.normalized_bytes()
        self._staging: _Staging | None = None
        self._owned: ExitStack | None = None
        code = cubin(SOURCE.read_text(), driver.device.architecture, (f"CHANNELS={self._channels}",))
        with ExitStack() as failing:
            failing.callback(self.close)
            with driver.current():
                self._load(code)
            failing.pop_all()

    def enqueue(self, images: Sequence[NDArray[np.uint8]], target: int, stream: int) -> None:
        """Puts the work for `images` into the stream: float32 `[N, C, H, W]` at the device address `target`.

        `images` are uint8 `[H, W, C]` as `Preprocess.source_pixels` gives them; they may be changed at once. Waits
        until the device has done the batch before, whose buffers it takes; not while a CUDA graph is captured.
        Raises `DataError` if they are none or too many, or one of them is something else, `DeviceError` if the device
        fails, `ClosedError` after `close`.
        """
        if self._owned is None:
            raise ClosedError("the preprocessing kernel is closed", "open it again")
        self._check(images)
        batch, normalized = self._batch(images)
        with self._driver.current():
            self._driver.synchronize_event(self._done)
            staging = self._staging_for(batch.size)
            batch.write(staging.host)
            with ExitStack() as failing:
                failing.callback(self._driver.synchronize, stream)  # what is under way uses the buffers
                self._driver.copy_to_device(staging.address, staging.pinned.address, batch.size, stream)
                self._launch((staging.address, staging.address + normalized, target), len(images), stream)
                self._driver.record(self._done, stream)
                failing.pop_all()

    def close(self) -> None:
        """Waits for the batch under way and frees everything; closing twice does nothing."""
        if self._owned is not None:
            with self._driver.current():  # where this fails nothing is freed yet: close again
                owned, self._owned = self._owned, None
                owned.close()

    def _load(self, code: bytes) -> None:
        driver = self._driver
        with ExitStack() as owner:
            module = driver.load_module(code)
            owner.callback(driver.unload_module, module)
            self._function = driver.function(module, KERNEL)
            self._done = driver.create_event()
            owner.callback(driver.destroy_event, self._done)
            owner.callback(self._free_staging)
            owner.callback(driver.synchronize_event, self._done)
            self._owned = owner.pop_all()

    def _check(self, images: Sequence[NDArray[np.uint8]]) -> None:
        if not 1 <= len(images) <= self._largest_batch:
            raise DataError(f"{len(images)} images for a kernel that takes 1 to {self._largest_batch}", "split them")
        for number, image in enumerate(images):
            fits = image.ndim == 3 and image.shape[2] == self._channels and image.size > 0
            if image.dtype != np.uint8 or not fits:
                raise DataError(
                    f"image {number} is {image.dtype} {list(image.shape)}, expected uint8 [H, W, {self._channels}]",
                    "take what Preprocess.source_pixels gives",
                )

    def _batch(self, images: Sequence[NDArray[np.uint8]]) -> tuple[_Batch, int]:
        """The descriptions, what a byte becomes, the tables of each size and the pixels; and where the second lies."""
        batch = _Batch()
        descriptions = np.zeros((len(images), IMAGE_FIELDS), np.int64)
        batch.add(descriptions)
        normalized = batch.add(self._normalized)
        tables: dict[tuple[int, int], tuple[int, int]] = {}
        for description, image in zip(descriptions, images, strict=True):
            height, width = image.shape[:2]
            how = resampling(self._preprocess, width, height)
            if (width, height) not in tables:
                tables[width, height] = batch.add(how.columns), batch.add(how.rows)
            description[:] = batch.add(image), *tables[width, height], width, how.rows_first
        return batch, normalized

    def _launch(self, addresses: tuple[int, int, int], images: int, stream: int) -> None:
        grid = (-(-self._width // BLOCK[0]), -(-self._height // BLOCK[1]), images)
        arguments = (*map(ctypes.c_uint64, addresses), *map(ctypes.c_int, (self._height, self._width)))
        self._driver.launch(self._function, grid, BLOCK, arguments, stream)

    def _staging_for(self, size: int) -> _Staging:
        if self._staging is None or self._staging.pinned.size < size:
            grown = size if self._staging is None else int(size * GROWTH)
            self._free_staging()
            self._staging = _Staging(self._driver, grown)
        return self._staging

    def _free_staging(self) -> None:
        if self._staging is not None:
            staging, self._staging = self._staging, None
            staging.close()


class _Staging:
    """`size` bytes twice: `host` page-locked, `address` on the device.

    Also where both share their memory: the kernel reads each pixel several times, and page-locked memory may not be
    cached for it. Which of the two is faster on a Jetson has not been measured.
    """

    def __init__(self, driver: CudaDriver, size: int) -> None:
        with ExitStack() as owner:
            self.pinned: PinnedMemory = driver.allocate_pinned(size)
            owner.callback(driver.free_pinned, self.pinned)
            self.address = driver.allocate(size)
            owner.callback(driver.free, self.address)
            self.close = owner.pop_all().close
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.pinned.address))


@dataclass
class _Batch:
    """Arrays that are to lie one behind the other, and how many bytes they take."""

    size: int = 0
    parts: list[tuple[int, NDArray[Any]]] = field(default_factory=list)

    def add(self, array: NDArray[Any]) -> int:
        """Where the array will lie: its offset in bytes."""
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.parts.append((offset, array))
        self.size = offset + array.nbytes
        return offset

    def write(self, memory: NDArray[np.uint8]) -> None:
        """Copies all of them into `memory`."""
        for offset, array in self.parts:
            place = memory[offset : offset + array.nbytes]
            place.view(array.dtype).reshape(array.shape)[...] = array
