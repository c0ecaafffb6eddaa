"""Pictures that were shrunk without antialiasing, against the same with it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgewright.calibration.aliasing import aliasing_evidence
from photographs import photographs


def shrunk(resample: Image.Resampling, count: int = 20) -> list[NDArray[np.uint8]]:
    pictures = photographs(count, height=192, width=256)
    return [np.asarray(Image.fromarray(each).resize((86, 64), resample)) for each in pictures]


def test_without_antialiasing_is_said() -> None:
    median, sentence = aliasing_evidence(shrunk(Image.Resampling.NEAREST))
    assert median is not None
    assert median > 0.12
    assert "shrunk without antialiasing" in sentence


@pytest.mark.parametrize(
    "resample",
    [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS],
    ids=["bilinear", "bicubic", "lanczos"],
)
def test_with_it_nothing_is_said(resample: Image.Resampling) -> None:
    median, sentence = aliasing_evidence(shrunk(resample))
    assert median is not None
    assert sentence == ""


def test_pictures_that_say_nothing_are_not_judged() -> None:
    assert aliasing_evidence(shrunk(Image.Resampling.NEAREST, 15)) == (None, "")
    small = [picture[:40, :40] for picture in shrunk(Image.Resampling.NEAREST)]
    assert aliasing_evidence(small) == (None, "")
    blank = [np.full((64, 64, 3), 7, np.uint8)] * 20
    assert aliasing_evidence(blank) == (0.0, "")
