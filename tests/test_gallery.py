"""The images that an engine answers otherwise: which they are, how sure both are, and pictures of them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import scipy.special
from PIL import Image

from edgewright.gallery import changes, effects, thumbnail
from edgewright.runtime.parity import compare


def test_what_changed_is_what_the_parity_counts() -> None:
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(400, 7))
    candidate = reference + rng.normal(scale=0.4, size=reference.shape)
    candidate[11, 3] = np.nan
    labels = rng.integers(0, 7, 400)
    found, parity = changes(reference, candidate, labels), compare(reference, candidate, labels)
    assert parity.pairs is not None
    assert len(found) == parity.disagreeing > 20
    assert (effects(found)["lost"], effects(found)["gained"]) == (parity.pairs.reference_only, parity.pairs.engine_only)
    assert sum(effects(found).values()) == len(found)
    probabilities = scipy.special.softmax(reference, axis=1)
    for change in found:
        assert change.reference.probability == pytest.approx(probabilities[change.image].max())
        assert change.reference.index != change.engine.index or change.image == 11
    sure = [change.reference.probability or 0 for change in found]
    assert sure == sorted(sure, reverse=True), "the surest first"
    broken = next(change for change in found if change.image == 11)
    assert broken.engine.probability is None
    assert broken.effect in ("lost", "other")


def test_large_logits_have_probabilities() -> None:
    (change,) = changes(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]]), None)
    assert (change.reference.probability, change.engine.probability) == (1.0, 1.0)
    assert (change.label, change.effect) == (None, "other")


def test_nothing_changed() -> None:
    logits = np.eye(3)
    assert changes(logits, 2 * logits, np.arange(3)) == ()


@pytest.mark.parametrize(("shape", "size"), [((224, 448, 3), (112, 56)), ((28, 28, 1), (28, 28))])
def test_a_thumbnail_is_small_and_the_same_picture(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    pixels = np.full(shape, 200, np.uint8)
    picture = Image.open(io.BytesIO(base64.b64decode(thumbnail(pixels))))
    assert (picture.format, picture.size) == ("JPEG", size)
    assert np.abs(np.asarray(picture).astype(int) - 200).max() <= 3
