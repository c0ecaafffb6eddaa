"""The tables of Pillow's resize, against Pillow itself: bit for bit, through an emulation of the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgewright.runtime import resampling as module
from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import INTERPOLATIONS, Preprocess
from edgewright.runtime.resampling import COUNT, FIRST, PRECISION_BITS, WEIGHTS, Axis, resampling
from resize_emulation import emulated, matrix

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RGB = Preprocess(resize=40, crop=(32, 32), mean=MEAN, std=STD)
GREY = Preprocess(resize=40, crop=(32, 32), mean=MEAN[:1], std=STD[:1], colour="L")
ONE = 1 << PRECISION_BITS


def noise(width: int, height: int, channels: int = 3, seed: int = 0, *, hard: bool = False) -> NDArray[np.uint8]:
    """Every rounding shows; `hard` noise is black and white, and drives sums below 0 and above 255."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if hard else pixels


def assert_as_pillow(preprocess: Preprocess, pixels: NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(emulated(preprocess, pixels), preprocess.pixels(pixels), strict=True)


SIZES = [(48, 64), (64, 48), (40, 40), (41, 40), (33, 77), (20, 90), (16, 16), (1, 1), (1, 50), (50, 1), (400, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("resize", [40, 24, (32, 32), (30, 47), None], ids=str)
def test_equals_pillow_at_every_size(
    size: tuple[int, int], interpolation: str, resize: int | tuple[int, int] | None
) -> None:
    for preprocess, channels in ((RGB, 3), (GREY, 1)):
        chosen = replace(preprocess, resize=resize, interpolation=interpolation)
        assert_as_pillow(chosen, noise(*size, channels, sum(size), hard=channels == 1))


SIDE = st.integers(1, 90)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.tuples(SIDE, SIDE),
    resize=st.one_of(SIDE, st.tuples(SIDE, SIDE), st.none()),
    crop=st.one_of(st.tuples(SIDE, SIDE), st.none()),
    interpolation=st.sampled_from(sorted(INTERPOLATIONS)),
    hard=st.booleans(),
)
def test_equals_pillow_for_any_sizes(
    size: tuple[int, int],
    resize: int | tuple[int, int] | None,
    crop: tuple[int, int] | None,
    interpolation: str,
    hard: bool,
) -> None:
    assert_as_pillow(Preprocess(resize, crop, MEAN[:1], STD[:1], interpolation, "L"), noise(*size, 1, hard=hard))


@pytest.mark.parametrize("size", [(2, 203), (1, 101), (2, 300), (203, 2), (3, 3000)], ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_equals_pillow_for_strips(size: tuple[int, int], interpolation: str) -> None:
    assert_as_pillow(replace(RGB, resize=(50, 5), interpolation=interpolation), noise(*size, hard=True))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_equals_pillow_from_a_camera(interpolation: str) -> None:
    preprocess = Preprocess(256, (224, 224), MEAN[:1], STD[:1], interpolation, "L")
    assert_as_pillow(preprocess, noise(1280, 720, 1))


CURVE = (np.arange(20) ** 2 * 2 // 3).astype(np.uint8).reshape(4, 5, 1)
GOLDEN = {  # what Pillow made of CURVE, with a row of padding
    "nearest": [[0, 2, 10], [66, 96, 130], [150, 192, 240], [0, 0, 0]],
    "bilinear": [[6, 11, 20], [46, 64, 86], [133, 163, 198], [0, 0, 0]],
    "bicubic": [[2, 6, 15], [43, 62, 85], [139, 172, 209], [0, 0, 0]],
    "lanczos": [[1, 4, 13], [40, 60, 83], [140, 175, 212], [0, 0, 0]],
}


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_golden_vectors(interpolation: str) -> None:
    preprocess = Preprocess((3, 3), (4, 3), MEAN[:1], STD[:1], interpolation, "L")
    assert emulated(preprocess, CURVE)[..., 0].tolist() == GOLDEN[interpolation]


@pytest.mark.parametrize("interpolation", sorted(set(INTERPOLATIONS) - {"nearest"}))
def test_weights_of_an_output_add_up_to_one(interpolation: str) -> None:
    how = resampling(Preprocess((29, 31), None, MEAN, STD, interpolation), 90, 20)
    for table in (how.columns, how.rows):
        np.testing.assert_allclose(table[WEIGHTS:].sum(axis=0), ONE, rtol=0, atol=len(table))


def test_what_is_padded_has_no_source() -> None:
    how = resampling(Preprocess(None, (6, 5), MEAN, STD), 2, 9)
    assert how.columns.tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, ONE, ONE, 0, 0]]
    assert how.rows[FIRST].tolist() == [2, 3, 4, 5, 6, 7]
    assert how.rows[COUNT].tolist() == [1] * 6


def test_only_the_crop_is_computed() -> None:
    whole = resampling(Preprocess((60, 60), None, MEAN, STD), 90, 90).columns
    part = resampling(Preprocess((60, 60), (20, 20), MEAN, STD), 90, 90).columns
    np.testing.assert_array_equal(part, whole[: len(part), 20:40])


def test_tables_are_made_once_and_cannot_be_changed() -> None:
    how = resampling(RGB, 71, 53)
    assert resampling(replace(RGB), 71, 53) is how
    with pytest.raises(ValueError, match="read-only"):
        how.columns[0, 0] = 1


def test_refuses_what_would_not_fit_into_memory() -> None:
    with pytest.raises(DataError, match="would be 256×5120000 after the resize"):
        resampling(replace(RGB, resize=256), 1, 20000)


@pytest.mark.parametrize(
    ("pillow", "source", "resized", "rows_first"),
    [
        ((9, 4), (2, 203), (5, 50), False),
        ((12, 1), (2, 203), (5, 50), False),
        ((12, 2), (2, 203), (5, 50), True),
        ((12, 3), (2, 200), (5, 50), False),  # not more than a hundred times as high
        ((12, 3), (2, 203), (5, 300), False),  # it grows
        ((13, 0), (2, 203), (5, 300), False),
        ((13, 0), (40, 60), (30, 40), False),  # 20 lines less, 10 columns less
        ((13, 0), (40, 60), (30, 39), True),
        ((13, 0), (40, 60), (50, 59), True),
        ((13, 0), (40, 60), (50, 60), False),
    ],
)
def test_order_of_the_passes_is_that_of_the_version(
    pillow: tuple[int, int], source: tuple[int, int], resized: tuple[int, int], rows_first: bool
) -> None:
    columns, rows = (Axis(before, after, after) for before, after in zip(source, resized, strict=True))
    assert module._rows_first(columns, rows, pillow) is rows_first


# Mutants: each of these slips must show against Pillow, or the tests above prove nothing.


def in_the_other_order(how: module.Resampling) -> module.Resampling:
    return replace(how, rows_first=not how.rows_first)


def with_another_weight(how: module.Resampling) -> module.Resampling:
    columns = how.columns.copy()
    columns[WEIGHTS] += 1 << (PRECISION_BITS - 8)
    return replace(how, columns=columns)


def one_pixel_off(how: module.Resampling) -> module.Resampling:
    rows = how.rows.copy()
    rows[FIRST] = np.maximum(rows[FIRST] - 1, 0)
    return replace(how, rows=rows)


@pytest.mark.parametrize("mutant", [in_the_other_order, with_another_weight, one_pixel_off])
def test_pillow_tells_a_mutant(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    preprocess, pixels = replace(RGB, interpolation="bicubic"), noise(60, 90, hard=True)
    assert_as_pillow(preprocess, pixels)
    changed = mutant(resampling(preprocess, 60, 90))
    monkeypatch.setattr("resize_emulation.resampling", lambda *_: changed)
    assert not np.array_equal(emulated(preprocess, pixels), preprocess.pixels(pixels))


def test_matrix_of_the_emulation() -> None:
    table = np.array([[1, 0], [2, 0], [5, 0], [7, 0]], np.int32)
    assert matrix(table, 4).tolist() == [[0, 5, 7, 0], [0, 0, 0, 0]]


def test_version_of_pillow_is_read() -> None:
    assert module._pillow_version() == tuple(map(int, PIL.__version__.split(".")[:2]))
