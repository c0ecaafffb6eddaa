"""What can be said against calibration images by looking at them alone: too few, all the same, grey, out of range."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.preprocess import Preprocess

__all__ = ["FEWEST_IMAGES", "image_warnings", "set_warnings", "too_few_warning", "unseen_share"]

Batch = NDArray[np.float32]

FEWEST_IMAGES = 16
"""Fewer leave more than a sixth of the images to come in doubt: see `unseen_share`."""
CONFIDENCE = 0.95
NARROW = 0.1
"""Share of what a byte can become; photographs together cover nearly all of it."""
MANY = 0.5
"""Share of the images from which on a fault is one of the set and not of some images."""
HALF_LEVEL = 0.5 / 255
LEVELS = 255


def unseen_share(images: int) -> float:
    """The share of new images that may exceed the largest value of `images` ones, with 95 % confidence.

    1 − 0.05^(1/n) bounds the share beyond the largest of n values of any distribution (Wilks 1941, "Determination of
    Sample Sizes for Setting Tolerance Limits", one-sided); for large n it is 3/n, the rule of three.
    """
    return float(1 - (1 - CONFIDENCE) ** (1 / images))


def too_few_warning(images: int) -> str:
    """A sentence if so few `images`, at least one, leave the ranges uncertain, or ""."""
    if images >= FEWEST_IMAGES:
        return ""
    noun = "image" if images == 1 else "images"
    return (
        f"only {images} calibration {noun}: with {100 * CONFIDENCE:.0f} % confidence no more can be said than that up "
        f"to {100 * unseen_share(images):.0f} % of new images exceed the largest value seen of an activation; "
        f"give at least {FEWEST_IMAGES}"
    )


def image_warnings(images: Batch, preprocess: Preprocess, *, grey_expected: bool = False) -> tuple[str, ...]:
    """Sentences about preprocessed `images` `[N, C, H, W]`, N at least 1, that look unlike photographs.

    `grey_expected`: the network is known to have been trained on grey images in three channels.
    """
    pixels = _pixels(images, preprocess)
    unlike, *grey = _of_the_set(pixels, grey_expected=grey_expected)
    return _said(unlike, _one_colour(pixels), _all_the_same(pixels), *grey)


def set_warnings(images: Batch, preprocess: Preprocess, *, grey_expected: bool = False) -> tuple[str, ...]:
    """Those of `image_warnings` that are about all images and not about some of them or about copies."""
    return _said(*_of_the_set(_pixels(images, preprocess), grey_expected=grey_expected))


def _pixels(images: Batch, preprocess: Preprocess) -> Batch:
    """From 0 to 1."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    pixels: Batch = images * std + mean
    return pixels


def _of_the_set(pixels: Batch, *, grey_expected: bool) -> tuple[str, str]:
    return _unlike_bytes(pixels), "" if grey_expected else _grey(pixels)


def _said(*sentences: str) -> tuple[str, ...]:
    return tuple(sentence for sentence in sentences if sentence)


def _unlike_bytes(pixels: Batch) -> str:
    low, high = float(pixels.min()), float(pixels.max())
    if low < -HALF_LEVEL or high > 1 + HALF_LEVEL:
        return (
            f"pixels are out of range: {LEVELS * low:.4g} … {LEVELS * high:.4g} before the normalization, "
            f"where 0 … {LEVELS} is possible"
        )
    if high - low <= NARROW:
        return (
            f"all pixels of {_counted(len(pixels))} lie between {LEVELS * low:.0f} and {LEVELS * high:.0f} of "
            f"0 … {LEVELS}: the network will hardly see anything"
        )
    return ""


def _one_colour(pixels: Batch) -> str:
    spread = pixels.max(axis=(2, 3)) - pixels.min(axis=(2, 3))
    empty = int((spread.max(axis=1) < HALF_LEVEL).sum())
    return f"{empty} of {_counted(len(pixels))} have one colour throughout" if empty else ""


def _all_the_same(images: Batch) -> str:
    same = len(images) > 1 and all(np.array_equal(image, images[0]) for image in images[1:])
    return f"all of {_counted(len(images))} are the same" if same else ""


def _grey(pixels: Batch) -> str:
    if pixels.shape[1] != 3:
        return ""
    grey = int((np.abs(pixels - pixels[:, :1]).max(axis=(1, 2, 3)) < HALF_LEVEL).sum())
    if grey <= MANY * len(pixels):
        return ""
    return f"{grey} of {_counted(len(pixels))} are grey, but the network takes colours"


def _counted(images: int) -> str:
    return "1 calibration image" if images == 1 else f"{images} calibration images that were looked at"
