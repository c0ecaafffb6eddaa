"""Which images check."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.calibration.division import held_back


@pytest.mark.parametrize(
    ("count", "checks"), [(0, []), (1, []), (3, []), (4, [3]), (7, [3]), (8, [3, 7]), (13, [3, 7, 11])]
)
def test_every_fourth_image_checks(count: int, checks: list[int]) -> None:
    found = held_back(count)
    assert found.shape == (count,)
    assert found.dtype == np.bool_
    assert np.flatnonzero(found).tolist() == checks


def test_a_quarter_of_many_images_checks() -> None:
    assert held_back(1000).sum() == 250
