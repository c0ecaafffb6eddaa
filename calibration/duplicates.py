"""The same picture twice: in the calibration images, where it counts double, or among those that judge them.

Two images are **equal** if their decoded pixels are, whatever the files are. They are **near** each other if few bits
of their perceptual hashes differ, see `near_distance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from .findings import OK, PROBLEM, WARNING, Finding, named
from .image_checks import FEWEST_IMAGES
from .signatures import HASH_BITS, Signatures

__all__ = ["Twins", "duplicates", "near_distance", "overlap", "twins_between", "twins_within"]

MOST_DISTANCE = 64
LEAST_DISTANCE = 16
"""Bits of 256 that may differ: never more, and always so many.

Measured on 500 photographs: of their 124,750 pairs the nearest two differ in 92 bits, half of them in 128. A picture
and its copy differ in at most 18 bits if it is a JPEG of quality 30, 8 if half as large, 28 if 1.2 times brighter or
shrunk without antialiasing, 30, 56 and 80 if 2, 4 and 6 % of width and height are cropped away, and 54 if it is 4 %
smaller, half as large, and of quality 50. A crop from 256 to 224 pixels leaves 118, a mirrored picture 128: these are
not recognized.
"""
USUAL, COPIES, MARGIN = 0.001, 0.25, 40
"""One pair in so many of different pictures is the nearest that is usual, or more where a quarter of the images may be
copies; nearer than that by so many bits is near.

On the photographs the nearest usual pair differs in 102 bits, on Fashion-MNIST, clothes on black, in 70: of its 10,000
test images six are then near a calibration image, two of them obviously the same photograph, the others very alike.
"""
NEGLIGIBLE = 0.001
"""Share of the evaluation images: a fifth of the budget of half a point, if all of them were judged wrongly."""
ROWS = 512  # of the matrix of distances at a time
SAMPLE = 1000  # images whose distances say what is usual
FLAT = 8  # bits of the hash that are set: a picture without structure, whose hash says nothing


@dataclass(frozen=True)
class Twins:
    """Two images that are the same picture.

    * image, twin: their names; distance: differing bits of 256, 0 to 256; equal: whether all pixels are the same
    """

    image: str
    twin: str
    distance: int
    equal: bool


def near_distance(looks: NDArray[np.bool_]) -> int:
    """How many bits two images may differ in and still be near, given the hashes `[N, 256]` of a set.

    40 fewer than the nearest of different pictures do in this set, because pictures of one kind of object on one
    background are more alike than photographs are; from 16 to 64.
    """
    looks = looks[_structured(looks)]
    looks = looks[np.linspace(0, len(looks) - 1, min(SAMPLE, len(looks))).astype(int)]
    if len(looks) < FEWEST_IMAGES:
        return LEAST_DISTANCE
    pairs = np.sort(_distances(looks, looks)[np.triu_indices(len(looks), 1)])
    nearest = pairs[int(max(USUAL * len(pairs), COPIES * len(looks)))]
    return int(np.clip(nearest - MARGIN, LEAST_DISTANCE, MOST_DISTANCE))


def twins_within(images: Signatures, limit: int) -> tuple[Twins, ...]:
    """Each image that an earlier one is equal to or near, with the nearest such one, at a distance up to `limit`."""
    return _twins(images, images, limit, within=True)


def twins_between(images: Signatures, others: Signatures, limit: int) -> tuple[Twins, ...]:
    """Each of `images` that one of `others` is equal to or near, with the nearest such one."""
    return _twins(images, others, limit, within=False)


def duplicates(calibration: Signatures) -> Finding:
    """Whether a picture is in the calibration images more than once."""
    limit = near_distance(calibration.looks)
    found = twins_within(calibration, limit)
    if not found:
        return Finding("duplicates", OK, (f"no picture twice among {len(calibration.pixels):,}",))
    return Finding(
        "duplicates",
        WARNING,
        _sentences(found, limit),
        "keep one of each: a picture that is there twice counts double, and says nothing new",
        _figures(found, limit),
    )


def overlap(calibration: Signatures, evaluation: Signatures) -> Finding:
    """Whether evaluation images are calibration images too: they would be judged by what chose the ranges."""
    limit = max(near_distance(images.looks) for images in (calibration, evaluation))
    found = twins_between(evaluation, calibration, limit)
    total = len(evaluation.pixels)
    if not found:
        return Finding("overlap", OK, (f"none of {total:,} evaluation images is or resembles a calibration image",))
    equal = any(twins.equal for twins in found)
    share = len(found) / total
    few = (
        ()
        if equal or share > NEGLIGIBLE
        else (f"{100 * share:.2g} % of the evaluation images: too few to move the verdict",)
    )
    return Finding(
        "overlap",
        PROBLEM if equal else OK if few else WARNING,
        (*_sentences(found, limit), *few),
        "" if few else "take them out of one of the two sets; --json lists all",
        _figures(found, limit),
    )


def _twins(images: Signatures, others: Signatures, limit: int, *, within: bool) -> tuple[Twins, ...]:
    found = []
    known: dict[str, int] = {}
    for position, pixels in reversed(list(enumerate(others.pixels))):
        known[pixels] = position  # the first
    structured = _structured(images.looks), _structured(others.looks)
    for start in range(0, len(images.looks), ROWS):
        distances = _distances(images.looks[start : start + ROWS], others.looks)
        distances[~structured[0][start : start + ROWS]] = HASH_BITS
        distances[:, ~structured[1]] = HASH_BITS
        for position, row in enumerate(distances, start):
            equal = known.get(images.pixels[position])
            if equal is not None and not (within and equal == position):
                found.append(Twins(images.name(position), others.name(equal), 0, True))
                continue
            earlier = row[:position] if within else row
            if len(earlier) and earlier.min() <= limit:
                nearest = int(earlier.argmin())
                found.append(Twins(images.name(position), others.name(nearest), int(earlier[nearest]), False))
    return tuple(found)


def _distances(images: NDArray[np.bool_], others: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Differing bits, `[N, M]`: of signs ±1 the product counts equal bits less differing ones."""
    signs = [np.where(looks, np.float32(1), np.float32(-1)) for looks in (images, others)]
    distances: NDArray[np.int64] = ((HASH_BITS - signs[0] @ signs[1].T) / 2).astype(np.int64)
    return distances


def _structured(looks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which hashes `[N, 256]` are of pictures with any structure, `[N]`; of one colour only a bit or two are set."""
    structured: NDArray[np.bool_] = looks.sum(axis=1) > FLAT
    return structured


def _sentences(found: Sequence[Twins], limit: int) -> tuple[str, ...]:
    equal = [twins for twins in found if twins.equal]
    near = sorted((twins for twins in found if not twins.equal), key=lambda twins: twins.distance)
    sentences = []
    if equal:
        sentences.append(f"{_are(len(equal))} equal to another, pixel by pixel: {named(_pairs(equal))}")
    if near:
        apart = [f"{twins.image} = {twins.twin} ({twins.distance})" for twins in near]
        sentences.append(
            f"{_are(len(near))} nearly equal to another, by the bits of {HASH_BITS} of their perceptual hashes that "
            f"differ, at most {limit}: {named(apart)}"
        )
    return tuple(sentences)


def _pairs(found: Sequence[Twins]) -> list[str]:
    return [f"{twins.image} = {twins.twin}" for twins in found]


def _figures(found: Sequence[Twins], limit: int) -> dict[str, object]:
    return {"limit_bits": limit, "pairs": [asdict(twins) for twins in found]}


def _are(images: int) -> str:
    return "1 image is" if images == 1 else f"{images} images are"
