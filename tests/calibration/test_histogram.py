"""Histograms against `np.histogram` on the same bins, whatever the order and the batches."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.calibration.ranges import HALF_BINS, METHODS, Histogram
from edgewright.runtime.errors import CalibrationError
from histograms import FLOAT32, SMALLEST, expected_counts, nested, of, same, seeded


@settings(max_examples=60, deadline=None)
@given(nested, st.randoms(use_true_random=False))
def test_histogram_does_not_depend_on_order_or_batches(batches: list[list[float]], random: Any) -> None:
    values = [value for batch in batches for value in batch]
    whole = of(values)
    shuffled = random.sample(values, len(values))
    cut = random.randint(1, len(values))
    assert same(of(*batches), whole)
    assert same(of(*([value] for value in shuffled)), whole)
    assert same(of(*(part for part in (shuffled[:cut], shuffled[cut:]) if part)), whole)


@settings(max_examples=150, deadline=None)
@given(nested)
def test_merged_bins_are_those_of_numpy_on_the_final_edges(batches: list[list[float]]) -> None:
    values = np.array([value for batch in batches for value in batch], np.float32)
    histogram = of(*batches)
    np.testing.assert_array_equal(histogram.counts, expected_counts(values, histogram))
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
    assert histogram.counts.sum() == values.size


def test_oracle_sees_one_value_in_a_wrong_bin() -> None:
    values = seeded().normal(size=1000).astype(np.float32)
    histogram = of(values)
    occupied = np.flatnonzero(histogram.counts)[0]
    histogram.counts[[occupied, occupied - 1]] += [-1, 1]
    assert not np.array_equal(histogram.counts, expected_counts(values, histogram))


@pytest.mark.parametrize("largest", [1.0, 0.75, 2.0**-20, 3.0e4, float(FLOAT32.max), float(FLOAT32.tiny) * 2**13])
def test_bins_are_the_finest_power_of_two_that_holds_the_largest_value(largest: float) -> None:
    histogram = of([-largest])
    width = 2.0**histogram.exponent
    assert width * HALF_BINS > largest >= width * HALF_BINS / 2


def test_bins_close_below_and_open_above() -> None:
    histogram = of(
        [1.0, np.nextafter(np.float32(0.5), np.float32(0)), 0.5, -0.5, np.nextafter(np.float32(-0.5), np.float32(-1))]
    )
    width = 2.0**histogram.exponent
    found = {int(index) - HALF_BINS: int(histogram.counts[index]) for index in np.flatnonzero(histogram.counts)}
    half = round(0.5 / width)
    assert found == {round(1 / width): 1, half: 1, half - 1: 1, -half: 1, -half - 1: 1}


def test_samples_of_any_shape_count_and_the_bounds_may_be_wider() -> None:
    values = seeded().normal(size=(4, 3, 5)).astype(np.float32)
    histogram = Histogram.empty()
    histogram.add(values, -9.0, 11.0)
    assert (histogram.minimum, histogram.maximum) == (-9.0, 11.0)
    np.testing.assert_array_equal(histogram.counts, expected_counts(values, histogram))
    assert histogram.counts.sum() == 60


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [-0.0],
        [SMALLEST],
        [-SMALLEST],
        [SMALLEST, 1e-40, 0.0],
        [float(FLOAT32.tiny), -float(FLOAT32.tiny)],
        [1e-38, 1e-37],
        [-1e-30, 1e30],
        [float(FLOAT32.max), float(FLOAT32.min), SMALLEST, -SMALLEST],
        [3.5],
        [-3.5],
    ],
    ids=str,
)
def test_extreme_values_are_counted_and_give_sound_ranges(values: list[float]) -> None:
    histogram = of(values)
    np.testing.assert_array_equal(histogram.counts, expected_counts(values, histogram))
    assert same(of(*([value] for value in values[::-1])), histogram)
    for choose in METHODS.values():
        interval = choose(histogram).with_zero()
        assert min(histogram.minimum, 0.0) <= interval.low <= 0.0 <= interval.high <= max(histogram.maximum, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["samples", "minimum", "maximum"])
def test_values_that_are_not_finite_are_refused_and_change_nothing(bad: float, place: str) -> None:
    histogram = of([1.0, -2.0])
    before = of([1.0, -2.0])
    given_values = {"samples": np.array([0.5], np.float32), "minimum": 0.5, "maximum": 0.5}
    given_values[place] = np.array([0.5, bad], np.float32) if place == "samples" else bad
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        histogram.add(**given_values)  # type: ignore[arg-type]
    assert same(histogram, before)


@settings(max_examples=100, deadline=None)
@given(nested)
def test_json_round_trip_is_exact(batches: list[list[float]]) -> None:
    histogram = of(*batches)
    text = json.dumps(histogram.to_json(), allow_nan=False)
    assert same(Histogram.from_json(json.loads(text)), histogram)


def test_json_leaves_out_empty_ends_but_no_gap() -> None:
    content = of([0.0, 1.0, -0.25]).to_json()
    assert content["counts"][0] == content["counts"][-1] == 1
    assert sum(content["counts"]) == 3
    assert content["first_bin"] == -0.25 / 2.0 ** content["exponent"]


def test_occupied_bins_carry_every_value_to_within_half_a_bin_and_zero_exactly() -> None:
    values = np.concatenate([seeded().normal(size=400), np.zeros(600)]).astype(np.float32)
    histogram = of(values)
    centres, counts = histogram.occupied()
    assert counts.sum() == 1000
    assert counts[centres == 0.0] >= 600
    errors = np.abs(np.sort(values) - np.repeat(centres, counts.astype(int)))
    assert errors.max() <= 2.0**histogram.exponent


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-6, 3.0), (700.0, 1e-30)])
def test_merged_histograms_are_those_of_all_values(scales: tuple[float, float]) -> None:
    rng = np.random.default_rng(2)
    one, other = (rng.normal(0, scale, 500).astype(np.float32) for scale in scales)
    both, expected = of(one).merged(of(other)), of(np.concatenate([one, other]))
    assert both.to_json() == expected.to_json()
    assert of(other).merged(of(one)).to_json() == expected.to_json()
    assert of(one).merged(Histogram.empty()).to_json() == of(one).to_json()
