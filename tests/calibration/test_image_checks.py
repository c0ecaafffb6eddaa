"""What is said against calibration images, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.calibration.glimpse import Glimpse
from edgewright.calibration.image_checks import image_warnings, too_few_warning, unseen_share
from edgewright.runtime.preprocess import Preprocess

COLOUR = Preprocess((8, 8), None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Preprocess((8, 8), None, (0.5,), (0.25,), colour="L")


def pictures(count: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(6).integers(0, 256, (count, 8, 8, channels), np.uint8)


def prepared(pixels: NDArray[Any]) -> NDArray[np.float32]:
    return COLOUR.normalize(pixels.astype(np.uint8))


@pytest.mark.parametrize("count", [1, 7, 15])
def test_the_share_that_few_images_leave_open_is_that_of_a_simulation(count: int) -> None:
    # of uniform values the share beyond the largest of n is one minus it: in 95 % of the draws it is below the bound
    largest = np.random.default_rng(count).random((40_000, count)).max(axis=1)
    assert np.mean(1 - largest <= unseen_share(count)) == pytest.approx(0.95, abs=0.005)


def test_few_images_are_named_with_what_they_leave_open() -> None:
    assert "only 7 calibration images: with 95 % confidence" in too_few_warning(7)
    assert "up to 35 % of new images" in too_few_warning(7)
    assert "only 1 calibration image:" in too_few_warning(1)
    assert "up to 18 %" in too_few_warning(15)
    assert too_few_warning(16) == too_few_warning(5000) == ""


def test_nothing_is_said_against_ordinary_images() -> None:
    assert image_warnings(prepared(pictures(6)), COLOUR) == ()
    assert image_warnings(prepared(pictures(1)), COLOUR) == ()
    assert image_warnings(GREY.normalize(pictures(6, 1)), GREY) == ()


def test_pixels_that_no_image_has_are_out_of_range() -> None:
    (warning,) = image_warnings(pictures(4).transpose(0, 3, 1, 2).astype(np.float32), COLOUR)
    assert warning.startswith("pixels are out of range: ")


def test_images_that_were_divided_by_255_twice_are_narrow() -> None:
    (warning,) = image_warnings(prepared(pictures(4) // 16), COLOUR)
    assert "lie between 0 and 15 of 0 … 255" in warning
    assert image_warnings(prepared(pictures(4) // 8), COLOUR) == ()


def test_images_of_one_colour_are_counted() -> None:
    pixels = pictures(5)
    pixels[1], pixels[3] = (255, 0, 10), 7
    assert image_warnings(prepared(pixels), COLOUR) == (
        "2 of 5 calibration images that were looked at have one colour throughout",
    )


def test_equal_images_are_noticed() -> None:
    pixels = np.repeat(pictures(1), 4, axis=0)
    assert image_warnings(prepared(pixels), COLOUR) == ("all of 4 calibration images that were looked at are the same",)


def test_grey_images_are_noticed_where_colours_are_expected() -> None:
    pixels = pictures(4)
    pixels[:3] = pixels[:3, ..., :1]
    assert image_warnings(prepared(pixels), COLOUR) == (
        "3 of 4 calibration images that were looked at are grey, but the network takes colours",
    )
    assert image_warnings(prepared(pixels), COLOUR, grey_expected=True) == ()
    pixels[2] = pictures(4)[2]
    assert image_warnings(prepared(pixels), COLOUR) == ()  # half of them may be


@pytest.mark.parametrize(("total", "kept"), [(3, 3), (64, 64), (200, 64)])
def test_a_glimpse_keeps_images_from_first_to_last(total: int, kept: int) -> None:
    images = np.arange(total, dtype=np.float32).reshape(-1, 1, 1, 1)
    glimpse = Glimpse(total)
    passed = list(glimpse.watched(images[start : start + 7] for start in range(0, total, 7)))
    np.testing.assert_array_equal(np.concatenate(passed), images)
    numbers = glimpse.images.reshape(-1)
    assert len(numbers) == len(set(numbers)) == kept
    assert np.diff(numbers).max() <= -(-total // kept)
