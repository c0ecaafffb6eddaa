"""Preprocessed batches from an `ImageSet`, decoded ahead by a few threads, in bounded memory.

Pillow decodes and resizes without Python's lock, so threads suffice. Each batch is one array that is divided among the
threads; at most so many batches are under way that every thread has work while the consumer holds one more.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import Preprocess

from .image_set import ImageSet

__all__ = ["batches"]

Batch = NDArray[np.float32]


def batches(
    image_set: ImageSet, preprocess: Preprocess, batch_size: int, *, workers: int | None = None
) -> Generator[Batch, None, None]:
    """The images in order, float32 `[n, C, H, W]`; n is `batch_size` but for the last. The arrays are the caller's.

    Memory does not grow with the number of images. The threads end with the iteration: at its end, at an error, when
    the generator is closed or dropped. `workers` is the number of threads, by default one a processor.
    Raises `DataError` at once if the size of the network's input is not fixed, and while iterating, naming the image,
    if one cannot be read.
    """
    shape = preprocess.input_shape
    if shape is None:
        raise DataError(
            f"the preprocessing (resize {preprocess.resize}, no crop) gives images of different sizes",
            "give it a crop or a resize to (H, W)",
        )
    if batch_size < 1:
        raise DataError(f"the batch size is {batch_size}, expected at least 1")
    return _stream(image_set, preprocess, batch_size, shape, max(1, workers or os.cpu_count() or 1))


def _stream(
    image_set: ImageSet, preprocess: Preprocess, batch_size: int, shape: tuple[int, int, int], workers: int
) -> Generator[Batch, None, None]:
    stop = threading.Event()
    part_size = -(-batch_size // workers)
    batches_ahead = -(-workers * part_size // batch_size)  # parts of so many batches keep all threads busy

    def fill(out: Batch, start: int) -> None:
        for offset, row in enumerate(out):
            if stop.is_set():
                return
            row[...] = _input_of(image_set, start + offset, preprocess)

    def submit(start: int) -> tuple[Batch, list[Future[None]]]:
        out = np.empty((min(batch_size, len(image_set) - start), *shape), np.float32)
        offsets = range(0, len(out), part_size)
        return out, [pool.submit(fill, out[offset : offset + part_size], start + offset) for offset in offsets]

    starts: Iterator[int] = iter(range(0, len(image_set), batch_size))
    under_way: deque[tuple[Batch, list[Future[None]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="edgewright-decode")
    try:
        while True:
            while len(under_way) <= batches_ahead and (start := next(starts, None)) is not None:
                under_way.append(submit(start))
            if not under_way:
                return
            batch, parts = under_way.popleft()
            for part in parts:
                part.result()
            parts.clear()
            yield batch
            del batch  # the consumer's now: keeping it would hold one batch more in memory
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _input_of(image_set: ImageSet, index: int, preprocess: Preprocess) -> Batch:
    try:
        return preprocess(image_set[index])
    except DataError as error:
        name = image_set.image_name(index)
        if name in error.message:
            raise
        raise DataError(f"{name}: {error.message}", error.remedy) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{image_set.image_name(index)} cannot be preprocessed: {error}") from error
