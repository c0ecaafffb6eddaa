"""What an image is recognized by: a hash of its decoded pixels, and one that survives another encoding.

The perceptual hash is ImageHash's `phash` with 256 bits: the signs, against their median, of the lowest 16 × 16
frequencies of a discrete cosine transform of the picture at 64 × 64 in grey (Zauner 2010, "Implementation and
Benchmarking of Perceptual Image Hash Functions"). It knows neither size nor encoding nor, nearly, brightness.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgewright.runtime.errors import DataError
from edgewright.runtime.files import sha256_of
from edgewright.runtime.preprocess import Preprocess, resized_size

from .image_set import ImageSet

__all__ = ["HASH_BITS", "Signature", "Signatures", "signature_of", "signatures"]

HASH_SIDE = 16
HASH_BITS = HASH_SIDE**2


@dataclass(frozen=True)
class Signature:
    """Of one image.

    * pixels: SHA-256 of size and decoded pixels; looks: the perceptual hash, bool `[256]`
    """

    pixels: str
    looks: NDArray[np.bool_]


@dataclass(frozen=True)
class Signatures:
    """Of the images of a set that can be read.

    * readable: their indices in the set, int64 `[K]`; names: of all of its images, relative to its folder
    * pixels: SHA-256 of each, `K` of them; looks: bool `[K, 256]`
    * unreadable: what is wrong with the others, by index
    """

    readable: NDArray[np.int64]
    names: tuple[str, ...]
    pixels: tuple[str, ...]
    looks: NDArray[np.bool_]
    unreadable: dict[int, str]

    @property
    def different(self) -> NDArray[np.int64]:
        """The positions of the readable images, of equal ones the first alone, int64."""
        first = {pixels: position for position, pixels in reversed(list(enumerate(self.pixels)))}
        return np.array(sorted(first.values()), np.int64)

    def name(self, position: int) -> str:
        """Of the `position`-th readable image."""
        return self.names[int(self.readable[position])]


def signature_of(pixels: NDArray[np.uint8]) -> Signature:
    """Of decoded `pixels` `[H, W, C]`, C 1 or 3."""
    import imagehash

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    looks: NDArray[np.bool_] = imagehash.phash(picture, HASH_SIDE).hash.reshape(-1)
    return Signature(sha256_of([str(pixels.shape).encode(), pixels.tobytes()]), looks)


def signatures(
    images: ImageSet, preprocess: Preprocess, *, progress: Callable[[int], None] = lambda done: None
) -> Signatures:
    """Of all `images`, decoded in the network's colours; those that cannot be read or resized are named instead.

    `progress` is told how many are done.
    """
    found: dict[int, Signature] = {}
    unreadable: dict[int, str] = {}
    for index, result in enumerate(_results(images, preprocess)):
        if isinstance(result, DataError):
            unreadable[index] = result.message
        else:
            found[index] = result
        progress(index + 1)
    return Signatures(
        readable=np.array(list(found), np.int64),
        names=tuple(_name(images, index) for index in range(len(images))),
        pixels=tuple(one.pixels for one in found.values()),
        looks=np.array([one.looks for one in found.values()], bool).reshape(-1, HASH_BITS),
        unreadable=unreadable,
    )


def _name(images: ImageSet, index: int) -> str:
    return images.image_name(index).removeprefix(f"{images.name}{os.sep}")


def _results(images: ImageSet, preprocess: Preprocess) -> Iterator[Signature | DataError]:
    """In the order of `images`; Pillow decodes without Python's lock, so threads suffice."""

    def result(index: int) -> Signature | DataError:
        try:
            pixels = preprocess.source_pixels(images[index])
        except DataError as error:
            return error
        try:
            resized_size((pixels.shape[1], pixels.shape[0]), preprocess.resize)
        except DataError as error:
            return DataError(f"{images.image_name(index)}: {error.message}", error.remedy)
        return signature_of(pixels)

    pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="edgewright-hash")
    try:
        yield from pool.map(result, range(len(images)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
