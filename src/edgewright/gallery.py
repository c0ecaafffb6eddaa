"""The images whose prediction an engine changed: which they are, how sure both sides were, small pictures of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Answer", "Change", "changes", "effects", "thumbnail"]

THUMBNAIL_SIDE = 112  # pixels of the longer side; what is smaller is not enlarged
JPEG_QUALITY = 82
Effect = Literal["lost", "gained", "other"]


@dataclass(frozen=True)
class Answer:
    """The class that was ranked first, and its softmax probability; None if the logits are not finite."""

    index: int
    probability: float | None


@dataclass(frozen=True)
class Change:
    """One image on which the two answer differently.

    * image: its position in the evaluation images; label: the right class, None if nobody knows it
    * effect: "lost" if only the reference was right, "gained" if only the engine was, else "other"
    """

    image: int
    label: int | None
    reference: Answer
    engine: Answer
    effect: Effect


def changes(reference: NDArray[Any], candidate: NDArray[Any], labels: NDArray[np.int64] | None) -> tuple[Change, ...]:
    """All images on which the logits `[N, classes]` of the two rank another class first, as `compare` counts them.

    Those first on which the reference was surest: they are the ones to look at.
    """
    finite = np.isfinite(candidate).all(axis=1)
    differs = np.flatnonzero(reference.argmax(axis=1) != np.where(finite, candidate.argmax(axis=1), -1))
    found = [_change(int(index), reference[index], candidate[index], labels) for index in differs]
    return tuple(sorted(found, key=lambda change: -(change.reference.probability or 0.0)))


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """A JPEG of what a network sees, uint8 `[H, W, 1 or 3]`, in base64."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(content.getvalue()).decode()


def _change(index: int, reference: NDArray[Any], candidate: NDArray[Any], labels: NDArray[np.int64] | None) -> Change:
    label = None if labels is None else int(labels[index])
    expected, found = _answer(reference), _answer(candidate)
    effect: Effect = "other"
    if label is not None and found.probability is not None and found.index == label:
        effect = "gained"
    elif label == expected.index:
        effect = "lost"
    return Change(index, label, expected, found, effect)


def _answer(logits: NDArray[Any]) -> Answer:
    if not np.isfinite(logits).all():
        return Answer(int(np.nan_to_num(logits).argmax()), None)
    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    return Answer(int(logits.argmax()), float(shifted.max() / shifted.sum()))


def effects(found: Sequence[Change]) -> dict[str, int]:
    """How many of the changes are of each kind."""
    return {word: sum(change.effect == word for change in found) for word in ("lost", "gained", "other")}
