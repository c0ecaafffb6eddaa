"""Images that are unlike the others, by their pixels and by their activations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import median_abs_deviation

from edgewright.calibration.findings import OK, PROBLEM, WARNING
from edgewright.calibration.outliers import contrast, outliers, unusual

RNG = np.random.default_rng(8)
USUAL = np.exp(RNG.normal(0, 0.3, (40, 25))).astype(np.float32)
NAMES = [f"{index}.jpg" for index in range(40)]
CONTRASTS = RNG.uniform(30, 80, 40)


def test_contrast_is_that_of_the_pixels() -> None:
    pixels = RNG.integers(0, 256, (5, 3, 9, 7))
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.1])
    batch = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    expected = pixels.reshape(5, 3, -1).std(axis=2).max(axis=1)
    np.testing.assert_allclose(contrast(batch.astype(np.float32), tuple(std)), expected, rtol=1e-5)


def test_the_score_is_scipys_median_absolute_deviation() -> None:
    logarithms = np.log(USUAL.astype(np.float64))
    deviation = median_abs_deviation(logarithms, axis=0, scale="normal")
    expected = np.median(abs(logarithms - np.median(logarithms, axis=0)) / deviation, axis=1)
    scores = unusual(USUAL)
    assert scores is not None
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_activations_that_are_always_the_same_say_nothing() -> None:
    clamped = np.concatenate([USUAL, np.full((40, 30), 6, np.float32), np.zeros((40, 30), np.float32)], axis=1)
    np.testing.assert_array_equal(unusual(clamped), unusual(USUAL))
    assert unusual(clamped[:, 25:]) is None
    assert unusual(USUAL[:, :15]) is None, "too few activations to tell"
    assert unusual(USUAL[:15]) is None, "too few images to tell"


def test_nothing_is_said_of_ordinary_images() -> None:
    finding = outliers(NAMES, CONTRASTS, USUAL)
    assert finding.verdict == OK
    assert finding.evidence[0].startswith("40 images: contrast at least 3")


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_an_image_that_activates_too_much_or_too_little_is_named(factor: float) -> None:
    activations = USUAL.copy()
    activations[11] *= factor
    finding = outliers(NAMES, CONTRASTS, activations)
    assert finding.verdict == WARNING
    assert [each["image"] for each in finding.figures["unusual"]] == ["11.jpg"]
    assert finding.figures["faint"] == []


def test_a_blank_image_is_named_once_although_it_is_unusual_too() -> None:
    activations, contrasts = USUAL.copy(), CONTRASTS.copy()
    activations[4] *= 0.01
    contrasts[4] = 0.5
    finding = outliers(NAMES, contrasts, activations)
    assert finding.evidence == ("nearly one colour, standard deviation of the pixels below 8 of 255: 4.jpg (0.5)",)
    assert finding.figures["unusual"] == []


def test_many_are_a_problem_and_of_few_images_none_is_unusual() -> None:
    contrasts = CONTRASTS.copy()
    contrasts[:5] = 1
    assert outliers(NAMES, contrasts, USUAL).verdict == PROBLEM
    activations = USUAL[:15].copy()
    activations[3] *= 100
    few = outliers(NAMES[:15], CONTRASTS[:15], activations)
    assert few.verdict == OK
    assert few.evidence[0].endswith("what is usual is not known of fewer than 16 images")
    narrow = outliers(NAMES, CONTRASTS, USUAL[:, :15])
    assert narrow.verdict == OK
    assert narrow.evidence[0].endswith("what is usual is not known of so few activations that differ")
    assert "standard deviations" in outliers(NAMES, CONTRASTS, USUAL).evidence[0]
