"""The figures of a measurement, against numpy, and the interval of a ratio of medians by simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter

from edgewright.runtime.bench import Distribution, Result, SetUp
from edgewright.runtime.bench.comparing import unpaired

RANDOM = np.random.default_rng(4)


def result(samples: NDArray[np.float64]) -> Result:
    return Result("p", "b", "1", "fp32", "00", 1, (3, 8, 8), "", SetUp(1, 1), Distribution.of(samples), None)


def spells(random: np.random.Generator, median: float, n: int) -> NDArray[np.float64]:
    """Times that follow each other in slow and fast spells: log-normal, with an autocorrelation of 0.8."""
    noise = lfilter([0.6], [1, -0.8], random.normal(size=n + 100))[100:]
    return np.asarray(median * np.exp(0.1 * noise))


def test_distribution_of_known_samples() -> None:
    samples = RANDOM.gamma(3, size=500)
    found = Distribution.of(samples)
    assert (found.runs, found.min, found.max) == (500, samples.min(), samples.max())
    assert found.mean == pytest.approx(samples.mean())
    assert (found.p50, found.p90, found.p95, found.p99) == pytest.approx(np.percentile(samples, [50, 90, 95, 99]))
    assert found.cv == pytest.approx(samples.std(ddof=1) / samples.mean())
    assert found.min < found.p50_low < found.p50 < found.p50_high < found.max


def test_distribution_of_one_run() -> None:
    found = Distribution.of([2.0])
    assert {found.min, found.p50_low, found.p50, found.p50_high, found.p99, found.max} == {2.0}


@pytest.mark.parametrize(("cv", "stable"), [(0.024, True), (0.026, False)])
def test_stable_up_to_two_and_a_half_percent(cv: float, stable: bool) -> None:
    assert replace(Distribution.of([2.0]), cv=cv).stable is stable


def test_the_interval_of_a_ratio_of_medians_covers_the_truth_despite_slow_spells() -> None:
    random, inside, wider = np.random.default_rng(1), 0, 0
    for _ in range(200):
        found = unpaired(result(spells(random, 3.0, 400)), result(spells(random, 2.0, 400)))
        inside += found.low <= 1.5 <= found.high
        wider += found.low <= 1.0 or found.high >= 2.0
    assert inside >= 190  # at least 95 %, as it says
    assert wider == 0  # and it says something


def test_too_few_runs_have_no_confidence() -> None:
    few, many = result(np.ones(6)), result(np.ones(7))
    assert unpaired(many, few).confidence == 0
    assert unpaired(many, many).confidence == 0.95
