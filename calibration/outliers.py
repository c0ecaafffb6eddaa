"""Images that are unlike the others: hardly any contrast, or activations that no other image has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .findings import OK, PROBLEM, WARNING, Finding, named
from .image_checks import FEWEST_IMAGES

__all__ = ["FAINT", "contrast", "outliers", "unusual"]

FAINT = 8.0
"""Levels of 255: a smaller standard deviation of all pixels of an image is nearly one colour.

The least of 500 photographs is 22, of 512 images of Fashion-MNIST 21.
"""
FAR = 2.0
"""Standard deviations that the largest value of half of the activations is from the usual one.

On EfficientNet-Lite0 500 photographs reach 0.4 … 1.6; images of one colour 3.4, a chessboard and pixels in random order
2.6, noise and a picture whose lower nine tenths are missing 2.1; one whose lower half is missing is not told.
"""
NORMAL_MAD = 1.4826  # standard deviation by median absolute deviation of a normal distribution
FEWEST_ACTIVATIONS = 16
"""That tell anything; the median of fewer is moved by chance."""
MANY = 0.1
"""Share of the images from which on outliers are a problem of the set."""


def contrast(batch: NDArray[np.float32], std: Sequence[float]) -> NDArray[np.float64]:
    """The standard deviation of the pixels of preprocessed images `[N, C, H, W]`, in levels of 255, `[N]`.

    The largest of the channels; `std` is that of the preprocessing.
    """
    levels = batch.reshape(*batch.shape[:2], -1).std(axis=2, dtype=np.float64) * np.asarray(std) * 255
    largest: NDArray[np.float64] = levels.max(axis=1)
    return largest


def unusual(magnitudes: NDArray[np.float32]) -> NDArray[np.float64] | None:
    """How far each image is from the others, `[N]`, by the largest `magnitudes` `[N, T]` in each of T activations.

    The median over the activations of the distance, on a logarithmic scale, from the median of the images, in their
    robust standard deviations (Hampel 1974, "The Influence Curve and its Role in Robust Estimation"). Activations that
    reach the same in half of the images, such as behind a ReLU6, say nothing; None if fewer than 16 are left that do,
    or there are fewer than 16 images.
    """
    if len(magnitudes) < FEWEST_IMAGES:
        return None
    logarithms = np.log(np.maximum(magnitudes.astype(np.float64), np.finfo(np.float32).tiny))
    distances = np.abs(logarithms - np.median(logarithms, axis=0))
    deviation = NORMAL_MAD * np.median(distances, axis=0)
    telling = deviation > np.finfo(np.float32).eps
    if telling.sum() < FEWEST_ACTIVATIONS:
        return None
    scores: NDArray[np.float64] = np.median(distances[:, telling] / deviation[telling], axis=1)
    return scores


def outliers(names: Sequence[str], contrasts: NDArray[np.float64], magnitudes: NDArray[np.float32]) -> Finding:
    """Of images with `names`, their `contrast` `[N]`, and the largest `magnitudes` `[N, T]` of their activations.

    Where nobody knows what is usual, none is called unusual.
    """
    known = unusual(magnitudes)
    scores = np.zeros(len(names)) if known is None else known
    faint = np.flatnonzero(contrasts < FAINT)
    far = np.setdiff1d(np.flatnonzero(scores > FAR), faint)
    far = far[np.argsort(-scores[far], kind="stable")]
    blank, strange = faint.tolist(), far.tolist()
    if not len(faint) and not len(far):
        usual = f"activations at most {scores.max():.1f} standard deviations from the usual ones"
        few = f"fewer than {FEWEST_IMAGES} images" if len(names) < FEWEST_IMAGES else "so few activations that differ"
        told = f"what is usual is not known of {few}" if known is None else usual
        seen = f"{len(names):,} images: contrast at least {contrasts.min():.0f} of 255, {told}"
        return Finding("outliers", OK, (seen,))
    evidence = []
    if len(faint):
        shown = named([f"{names[index]} ({contrasts[index]:.1f})" for index in blank])
        evidence.append(f"nearly one colour, standard deviation of the pixels below {FAINT:.0f} of 255: {shown}")
    if len(far):
        shown = named([f"{names[index]} ({scores[index]:.1f})" for index in strange])
        evidence.append(f"activations more than {FAR:.0f} standard deviations from the usual ones: {shown}")
    return Finding(
        "outliers",
        PROBLEM if len(faint) + len(far) > MANY * len(names) else WARNING,
        tuple(evidence),
        "look at them; take out what the network will not be shown",
        {
            "faint": [{"image": names[index], "contrast": float(contrasts[index])} for index in blank],
            "unusual": [{"image": names[index], "deviations": float(scores[index])} for index in strange],
        },
    )
