"""Logits of a reference and an engine as everything that compares them takes them: checked, finite, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ParityError

__all__ = ["checked_labels", "checked_logits", "chunks", "finite_or_zero", "finite_reference"]

LARGEST_LOGIT = float(np.finfo(np.float32).max)  # engines answer in float32: beyond it is as good as infinite
CHUNK_ELEMENTS = 1 << 20  # 8 MiB per float64 temporary, whatever the number of images


def checked_logits(reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as arrays `[N, C]`. Raises `ParityError` if their shapes differ or are empty, or they are not real."""
    reference, candidate = np.asarray(reference), np.asarray(candidate)
    if reference.shape != candidate.shape:
        raise ParityError(
            f"the reference has logits of shape {list(reference.shape)}, the engine {list(candidate.shape)}",
            "compare the same images and the same output",
        )
    if reference.ndim != 2 or reference.shape[0] < 1 or reference.shape[1] < 2:
        raise ParityError(f"the logits have shape {list(reference.shape)}, expected [images, classes], 1 × 2 or more")
    for name, logits in (("reference", reference), ("engine", candidate)):
        if logits.dtype.kind not in "fiu":
            raise ParityError(f"the logits of the {name} are {logits.dtype}, expected real numbers")
    return reference, candidate


def checked_labels(labels: NDArray[Any], images: int, classes: int) -> NDArray[Any]:
    """Labels, int64 `[images]`. Raises `ParityError` unless they are as many integers in 0…classes − 1."""
    labels = np.asarray(labels)
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ParityError(f"the labels are {found}, expected an integer for each of the {images} images")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        fact = f"image {outside[0]} has label {labels[outside[0]]}, expected 0 to {classes - 1}"
        raise ParityError(fact, "labels and model must use the same list of classes")
    return labels.astype(np.int64)


def chunks(images: int, classes: int) -> Iterator[slice]:
    """Rows of a matrix `[images, classes]`, as many at a time as bound the memory of what is computed from them."""
    step = max(1, CHUNK_ELEMENTS // classes)
    return (slice(start, min(start + step, images)) for start in range(0, images, step))


def finite_reference(logits: NDArray[Any], first_image: int) -> NDArray[np.float64]:
    """The reference's logits, float64 `[n, C]`. Raises `ParityError` that names the first image which is not finite."""
    logits, finite = finite_or_zero(logits)
    if not finite.all():
        image = first_image + int(finite.argmin())
        raise ParityError(
            f"the reference has a NaN or infinite logit on image {image}", "check weights and preprocessing"
        )
    return logits


def finite_or_zero(logits: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The logits, float64 `[n, C]`, with rows that are not finite set to 0, and which rows `[n]` are finite."""
    logits = logits.astype(np.float64)
    finite = np.asarray((np.abs(logits) <= LARGEST_LOGIT).all(axis=1))  # false for NaN too
    logits[~finite] = 0
    return logits, finite
