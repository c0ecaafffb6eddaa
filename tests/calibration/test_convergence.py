"""What half of the images would have cost, and how many more would pay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.convergence import Doubling, convergence, doublings, images_to_add, merged
from edgewright.calibration.findings import OK, PROBLEM, WARNING
from edgewright.calibration.ranges import Range, minmax_range
from histograms import of


def table(values: NDArray[np.float32], samples: int) -> CalibrationTable:
    return CalibrationTable({}, samples, {"a": of(values)})


def minmax(whole: CalibrationTable) -> dict[str, Range]:
    return {name: minmax_range(seen).with_zero() for name, seen in whole.histograms.items()}


def quarters(draw: str, images: int, seed: int = 5) -> list[CalibrationTable]:
    """Of images with 50 values each."""
    rng = np.random.default_rng(seed)
    values = {
        "even": lambda: rng.uniform(-1, 1, images // 4 * 50),
        "heavy": lambda: rng.standard_t(2, images // 4 * 50),
    }
    return [table(values[draw]().astype(np.float32), images // 4) for _ in range(4)]


def test_the_cost_is_the_error_of_the_narrower_range() -> None:
    levels = np.linspace(-1, 1, 801).astype(np.float32)
    low, high = table(levels, 4), table(4 * levels, 4)
    first, last = doublings([low, low, high, high], minmax)
    assert (first.images, last.images) == ((4, 8), (8, 16))
    assert first.moved == 0.0
    assert last.moved == pytest.approx(0.5 * 0.375), "half of the halves moves by three of eight"
    values = np.concatenate([np.tile(levels, 2), np.tile(4 * levels, 2)]).astype(np.float64)

    def error(limit: float) -> float:
        step = 2 * limit / 255
        return float(np.mean((np.clip(np.rint(values / step), -128, 127) * step - values) ** 2))

    assert last.cost_db == pytest.approx(0.5 * 10 * np.log10(error(1) / error(4)), rel=0.02)
    assert (last.worst, last.worst_db) == ("a", last.cost_db)


@pytest.mark.parametrize(
    ("costs", "add"),
    [
        ((0.3, 0.2), 0),  # enough already
        ((1.6, 0.8), 300),  # halves: 1/n; four times as many
        ((3.2, 0.8), 100),  # a quarter: 1/n²; twice as many
        ((0.4, 0.4), 300),  # does not fall: 1/√n is assumed; four times
        ((0.2, 0.4), 300),
        ((9.0, 9.0), None),
    ],
    ids=str,
)
def test_the_number_to_add_follows_the_power_law(costs: tuple[float, float], add: int | None) -> None:
    first, last = (Doubling((50, 100), 0.1, cost, "a", cost) for cost in costs)
    assert images_to_add(first, last) == add


def test_even_values_need_few_images_and_heavy_tails_more() -> None:
    enough = convergence(quarters("even", 64), minmax)
    assert enough.verdict == OK
    assert enough.figures["add"] == 0
    more = convergence(quarters("heavy", 64), minmax)
    assert more.verdict == WARNING
    assert "add " in more.remedy
    assert not more.figures["enough"]


def test_too_few_images_are_a_problem_whatever_they_show() -> None:
    finding = convergence(quarters("even", 8), minmax)
    assert finding.verdict == PROBLEM
    assert finding.evidence[0].startswith("only 8 calibration images")
    assert finding.remedy == "add at least 8 images"


def test_a_network_without_activations_to_quantize_needs_no_more_images() -> None:
    finding = convergence(quarters("even", 64), lambda table: {})
    assert finding.verdict == OK


def test_merging_counts_all_images() -> None:
    parts = quarters("even", 64)
    assert merged(parts).samples == 64
    assert parts[0].samples == replace(parts[0]).samples == 16, "the parts stay as they are"
