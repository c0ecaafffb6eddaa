"""The range methods against brute force and second implementations."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from edgewright.calibration import ranges as module
from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.ranges import (
    HALF_BINS,
    METHODS,
    Range,
    entropy_range,
    minmax_range,
    mse_range,
    percentile_range,
    silu,
    squared_error,
    symmetric,
    symmetric_mse_range,
)
from edgewright.runtime.errors import CalibrationError
from histograms import Array, nested, of, same, seeded

# --- Ranges in general -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_range", "expected"),
    [
        (Range(1, 2), Range(0, 2)),
        (Range(-2, -1), Range(-2, 0)),
        (Range(-1, 1), Range(-1, 1)),
        (Range(0, 0), Range(0, 0)),
    ],
)
def test_with_zero_widens_only_as_far_as_needed(given_range: Range, expected: Range) -> None:
    assert given_range.with_zero() == expected


@settings(max_examples=60, deadline=None)
@given(nested, st.sampled_from(sorted(METHODS)))
def test_every_range_holds_zero_and_nothing_beyond_the_values(batches: list[list[float]], method: str) -> None:
    histogram = of(*batches)
    interval = METHODS[method](histogram).with_zero()
    assert min(histogram.minimum, 0.0) <= interval.low <= 0.0 <= interval.high <= max(histogram.maximum, 0.0)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("power", [-40, 7, 90])
def test_ranges_scale_with_the_values(method: str, power: int) -> None:
    values = (seeded().standard_t(3, size=20_000) + 0.5).astype(np.float32)
    plain, scaled = METHODS[method](of(values)), METHODS[method](of(np.ldexp(values, power)))
    assert scaled.low == pytest.approx(math.ldexp(plain.low, power), rel=1e-12)
    assert scaled.high == pytest.approx(math.ldexp(plain.high, power), rel=1e-12)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_ranges_leave_the_histogram_alone(method: str) -> None:
    values = seeded().normal(size=5000)
    histogram = of(values)
    METHODS[method](histogram)
    assert same(histogram, of(values))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_constant_tensor_is_covered(method: str, value: float) -> None:
    interval = METHODS[method](of([value] * 50)).with_zero()
    assert (interval.low, interval.high) == (min(value, 0.0), max(value, 0.0))


# --- Min-max and percentile --------------------------------------------------------------------------------------


def test_minmax_is_exact() -> None:
    values = seeded().normal(size=3000).astype(np.float32)
    assert minmax_range(of(values[:7], values[7:])) == Range(float(values.min()), float(values.max()))


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9])
def test_percentile_agrees_with_numpy_to_a_bin(percentile: float) -> None:
    values = seeded().normal(size=200_000).astype(np.float32)
    histogram = of(values)
    width = 2.0**histogram.exponent
    interval = percentile_range(histogram, percentile)
    tail = (100 - percentile) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    assert interval.low == pytest.approx(low, abs=2 * width)  # a bin, and numpy's interpolation between values
    assert interval.high == pytest.approx(high, abs=2 * width)
    mutant = percentile_range(histogram, 100 - tail)  # the whole share at either end
    assert mutant.low != pytest.approx(low, abs=2 * width)


@pytest.mark.parametrize("percentile", [0.0, 80.0, 99.0, 99.99, 100.0])
def test_percentile_leaves_out_no_more_than_it_may_and_no_bin_less(percentile: float) -> None:
    values = seeded().gamma(1.5, size=30_000).astype(np.float32)
    histogram = of(values)
    width, allowed = 2.0**histogram.exponent, (100 - percentile) / 200 * values.size
    interval = percentile_range(histogram, percentile)
    assert (values < interval.low).sum() <= allowed
    assert (values >= interval.high).sum() <= allowed + (interval.high == histogram.maximum)
    if interval.low > histogram.minimum:
        assert (values < interval.low + width).sum() > allowed
    if interval.high < histogram.maximum:
        assert (values >= interval.high - width).sum() > allowed


def test_hundred_per_cent_is_minmax() -> None:
    histogram = of(seeded().normal(size=999))
    assert percentile_range(histogram, 100.0) == minmax_range(histogram)


def test_percentile_cuts_an_outlier() -> None:
    values = np.append(seeded().uniform(-1, 1, 99_999), 50.0)
    interval = percentile_range(of(values))
    assert interval.high < 1.1
    assert minmax_range(of(values)).high == 50.0


# --- MSE ---------------------------------------------------------------------------------------------------------


def u8_error(values: Array, low: float, high: float) -> float:
    """Mean squared error of `values` through U8 over [low, high], in float64 on the values themselves."""
    scale = (high - low) / 255
    zero_point = np.rint(-low / scale)
    levels = np.clip(np.rint(values / scale) + zero_point, 0, 255)
    return float(np.mean(((levels - zero_point) * scale - values) ** 2))


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda rng: rng.normal(size=20_000),
    "heavy tails": lambda rng: rng.standard_t(3, size=20_000),
    "relu": lambda rng: np.maximum(rng.normal(size=20_000), 0),
    "relu with outliers": lambda rng: np.maximum(rng.standard_t(2, size=20_000), 0),
    "silu": lambda rng: (x := rng.normal(0, 3, size=20_000)) / (1 + np.exp(-x)),
    "uniform": lambda rng: rng.uniform(-1, 3, size=20_000),
    "negative": lambda rng: -rng.gamma(2.0, size=20_000),
    "far from zero": lambda rng: rng.normal(8, 0.5, size=20_000),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_is_near_the_brute_force_optimum_and_not_worse_than_minmax(name: str) -> None:
    values = DISTRIBUTIONS[name](seeded()).astype(np.float32).astype(np.float64)
    found = mse_range(of(values)).with_zero()
    lowest, highest = min(values.min(), 0.0), max(values.max(), 0.0)
    shares = np.concatenate([np.linspace(0.02, 1.0, 50)])
    grid = [(s * lowest, t * highest) for s in (shares if lowest else [0.0]) for t in (shares if highest else [0.0])]
    best = min(u8_error(values, low, high) for low, high in grid)
    error = u8_error(values, found.low, found.high)
    assert error <= 1.05 * best
    assert error <= 1.01 * u8_error(values, lowest, highest)  # 1 %: the histogram knows values to half a bin
    wrong = Range(found.low / 3, found.high / 3)  # a mutant: the same range in a wrong unit
    assert u8_error(values, wrong.low, wrong.high) > 1.05 * best


def test_squared_error_is_that_of_the_plain_formula() -> None:
    rng = seeded()
    values, counts = rng.normal(size=300), rng.integers(1, 9, 300).astype(np.float64)
    repeated = np.repeat(values, counts.astype(int))
    for interval in (Range(-2.0, 1.5), Range(-0.3, 4.0), Range(0.0, 1.0), Range(-1.0, 0.0)):
        expected = u8_error(repeated, interval.low, interval.high) * repeated.size
        assert squared_error(values, counts, interval) == pytest.approx(expected, rel=1e-12)
        assert squared_error(values, counts, Range(interval.low, interval.high * 1.1 + 0.1)) != pytest.approx(
            expected, rel=1e-6
        )


def test_an_empty_interval_turns_every_value_into_zero() -> None:
    assert squared_error(np.array([1.0, -2.0]), np.array([3.0, 1.0]), Range(0.0, 0.0)) == 7.0


@pytest.mark.parametrize("count", [100_000, 1_000_000])
def test_mse_weighs_an_outlier_as_calculus_does(count: int) -> None:
    # n · (R / 255)² / 12 + (100 − R)² is least at this R
    optimum = 100 / (1 + count / (12 * 255**2))
    found = mse_range(of(np.append(seeded().uniform(0, 30, count), 100.0)))
    assert found.high == pytest.approx(optimum, abs=2.0)  # a step of the search grid


def test_mse_keeps_a_uniform_tensor() -> None:
    assert mse_range(of(seeded().uniform(0, 1, 50_000))).high > 0.97


@pytest.mark.filterwarnings("error")
def test_silu_is_that_of_scipy_without_overflow() -> None:
    x = np.concatenate([np.linspace(-40, 40, 1001), [-1e4, 1e4, -1e30, 1e30, 0.0]])
    np.testing.assert_allclose(silu(x), x * expit(x), rtol=1e-12, atol=1e-250)
    assert np.abs(silu(x[300:700]) - x[300:700] * expit(1.702 * x[300:700])).max() > 0.1  # a mutant: that is GELU's


@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])
def test_mse_behind_silu_is_near_the_brute_force_optimum(spread: float) -> None:
    values = (seeded(8).normal(-1, spread, 20_000)).astype(np.float32).astype(np.float64)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero_point = np.rint(-low / scale)
        back = (np.clip(np.rint(values / scale) + zero_point, 0, 255) - zero_point) * scale
        return float(np.mean((back * expit(back) - values * expit(values)) ** 2))

    histogram = of(values)
    found, plain = mse_range(histogram, silu), mse_range(histogram)
    shares = np.linspace(0.02, 1.0, 50)
    best = min(error(s * values.min(), t * values.max()) for s in shares for t in shares)
    assert error(found.low, found.high) <= 1.1 * best
    assert error(found.low, found.high) <= 1.01 * error(plain.low, plain.high)
    if spread > 4:  # what SiLU flattens needs no levels; a mutant that forgets the transfer is found out
        assert found.low > 0.8 * plain.low
        assert error(plain.low, plain.high) > 1.1 * best


# --- Entropy -----------------------------------------------------------------------------------------------------


def reference_divergence(magnitudes: list[int], bins: int, levels: int) -> float:
    """Migacz' slides, loop by loop; a bin of P that Q cannot represent costs its share times ln(1 / eps)."""
    p = [float(count) for count in magnitudes[:bins]]
    p[-1] += sum(magnitudes[bins:])
    q = [0.0] * bins
    for level in range(levels):
        start, end = level * bins // levels, (level + 1) * bins // levels
        members = [index for index in range(start, end) if magnitudes[index]]
        for index in members:
            q[index] = sum(magnitudes[index] for index in members) / len(members)
    total_p, total_q = sum(p), sum(q)
    divergence = 0.0
    for p_count, q_count in zip(p, q, strict=True):
        if p_count and q_count:
            divergence += p_count / total_p * math.log((p_count / total_p) / (q_count / total_q))
        elif p_count:
            divergence += p_count / total_p * math.log(1 / np.finfo(np.float64).eps)
    return divergence


@pytest.mark.parametrize("bins", [128, 129, 200, 511, 777])
def test_divergence_agrees_with_the_published_loops(bins: int) -> None:
    magnitudes = seeded(bins).poisson(3 * np.exp(-np.arange(900) / 200)).astype(np.int64)
    found = module._divergence(magnitudes, bins, 128)
    expected = reference_divergence(magnitudes.tolist(), bins, 128)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found != pytest.approx(reference_divergence(magnitudes.tolist(), bins, 64), rel=1e-3)


@pytest.mark.parametrize("signed", [True, False])
def test_entropy_takes_the_threshold_of_least_divergence(signed: bool) -> None:
    values = seeded(3).standard_t(3, size=20_000)
    histogram = of(values if signed else np.abs(values))
    positive, negative = histogram.counts[HALF_BINS:], histogram.counts[:HALF_BINS][::-1]
    magnitudes = (positive + negative).tolist()
    magnitudes[0] = magnitudes[1]
    magnitudes = magnitudes[: max(index for index, count in enumerate(magnitudes) if count) + 1]
    levels = 128 if signed else 256
    interval = entropy_range(histogram)
    width = 2.0**histogram.exponent
    chosen = round(interval.high / width)
    assert chosen < len(magnitudes)
    found = reference_divergence(magnitudes, chosen, levels)
    others = {int(bins) for bins in np.linspace(levels, len(magnitudes), 60)}
    best = min(reference_divergence(magnitudes, bins, levels) for bins in others)
    assert found <= best * 1.02 + 1e-9  # other candidates than the function's own
    assert found < reference_divergence(magnitudes, len(magnitudes), levels)
    assert interval.low == (max(-chosen * width, histogram.minimum) if signed else histogram.minimum)


def test_entropy_cuts_a_long_tail() -> None:
    values = np.concatenate([seeded().normal(size=100_000), [40.0, -35.0]])
    interval = entropy_range(of(values))
    assert 2.0 < interval.high < 12.0
    assert -12.0 < interval.low < -2.0


def test_entropy_keeps_a_uniform_tensor() -> None:
    interval = entropy_range(of(seeded().uniform(-1, 1, 200_000)))
    assert interval.low < -0.95
    assert interval.high > 0.95


def test_zeros_of_relu_do_not_drown_the_rest() -> None:
    positive = np.abs(seeded().normal(size=50_000)) + 0.01
    without = entropy_range(of(positive))
    with_zeros = entropy_range(of(np.concatenate([positive, np.zeros(2_000_000)])))
    assert with_zeros.high == pytest.approx(without.high, rel=0.02)
    assert with_zeros.high > 2.0


def test_entropy_keeps_a_tensor_of_few_values() -> None:
    histogram = of([0.0] * 100 + [1.0] * 3)
    assert entropy_range(histogram) == Range(0.0, 1.0)


# --- Symmetric ranges, for S8 with zero-point 0 ------------------------------------------------------------------


def s8_error(values: Array, magnitude: float) -> float:
    """Sum of squared errors of S8 in steps of magnitude / 127, by the plain formula."""
    step = magnitude / 127
    integers = np.clip(np.rint(values.astype(np.float64) / step), -128, 127)
    return float(((integers * step - values) ** 2).sum())


@pytest.mark.parametrize(
    ("interval", "magnitude"),
    [
        (Range(-1, 127), 127),
        (Range(-128, 3), 127),
        (Range(-128, 127), 127),
        (Range(0, 6), 6),
        (Range(-6, -2), 6 * 127 / 128),
        (Range(2, 4), 4),
        (Range(0, 0), 0),
    ],
)
def test_a_symmetric_range_has_the_levels_of_s8(interval: Range, magnitude: float) -> None:
    found = symmetric(interval)
    assert found.high == pytest.approx(magnitude)
    assert found.low == pytest.approx(-magnitude * 128 / 127)
    assert found.low <= interval.low + 1e-12
    assert found.high >= interval.high - 1e-12
    assert same_range(symmetric(found), found), "it holds itself"


def same_range(one: Range, other: Range) -> bool:
    return math.isclose(one.low, other.low) and math.isclose(one.high, other.high)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 100), st.lists(st.floats(-150, 150, width=32), min_size=1, max_size=40))
def test_u8_over_a_symmetric_range_is_s8(magnitude: float, drawn: list[float]) -> None:
    """255 steps from −128 to 127: what measures errors in the one measures them in the other."""
    values = np.asarray(drawn, np.float64)
    interval = symmetric(Range(0.0, magnitude))
    found = squared_error(values, np.ones(len(values)), interval)
    assert found == pytest.approx(s8_error(values, magnitude), rel=1e-6, abs=1e-9 * magnitude**2)


SIGNED: dict[str, Callable[[np.random.Generator], Array]] = {
    "normal": lambda rng: rng.normal(size=20_000),
    "heavy tails": lambda rng: rng.standard_t(3, size=20_000),
    "rectified": lambda rng: np.maximum(rng.normal(size=20_000), 0),
    "shifted": lambda rng: rng.normal(size=20_000) - 2.0,
    "uniform": lambda rng: rng.uniform(-1, 1, size=20_000),
    "an outlier": lambda rng: np.append(rng.normal(size=20_000), 40.0),
    "a negative outlier": lambda rng: np.append(rng.normal(size=20_000), -40.0),
}


@pytest.mark.parametrize("name", SIGNED)
def test_symmetric_mse_is_near_the_brute_force_optimum_and_not_worse_than_minmax(name: str) -> None:
    values = SIGNED[name](seeded(zlib.crc32(name.encode()))).astype(np.float32)
    found = symmetric_mse_range(of(values))
    assert same_range(found, symmetric(found)), "it is symmetric"
    largest = float(np.abs(values).max())
    best = min(s8_error(values, float(share) * largest) for share in np.linspace(0.02, 1.0, 400))
    error = s8_error(values, found.high)
    assert error <= 1.05 * best
    assert error <= 1.001 * s8_error(values, largest)
    assert s8_error(values, found.high * 0.7) > 1.05 * best, "a mutant that cuts off too much"
    mirrored = symmetric_mse_range(of(-values))
    assert s8_error(-values, mirrored.high) <= 1.05 * best


def test_symmetric_mse_cuts_an_outlier_and_keeps_a_uniform_tensor() -> None:
    for count in (100_000, 1_000_000):
        values = np.append(seeded(1).normal(size=count), 100.0)
        # (100 − m)² + n · (m / 127)² / 12 is least at:
        expected = 100 / (1 + count / (12 * 127**2))
        assert symmetric_mse_range(of(values)).high == pytest.approx(expected, abs=2.0), "the grid has steps of 2"
    assert symmetric_mse_range(of(seeded(2).uniform(-1, 1, size=100_000))).high > 0.97


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_constant_tensor_has_a_symmetric_range(value: float) -> None:
    found = symmetric_mse_range(of(np.full(100, value)))
    assert s8_error(np.full(100, value), found.high or 1.0) <= 100 * (abs(value) / 100) ** 2 + 1e-12
    if not value:
        assert (found.low, found.high) == (0.0, 0.0)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_table_gives_symmetric_ranges_by_every_method(method: str) -> None:
    values = seeded(3).normal(size=10_000) + 0.5
    table = CalibrationTable({}, 1, {"a": of(values), "b": of(np.maximum(values, 0))})
    signed, plain = table.ranges(method, signed=True), table.ranges(method)
    assert set(signed) == {"a", "b"}
    for name, interval in signed.items():
        assert interval.low == pytest.approx(-interval.high * 128 / 127)
        chosen = METHODS[method](table.histograms[name])
        expected = symmetric_mse_range(table.histograms[name]) if method == "mse" else symmetric(chosen)
        assert same_range(interval, expected), "and not widened once more"
        assert interval != plain[name]
    assert set(table.ranges(method, ["b"], signed=True)) == {"b"}
    with pytest.raises(CalibrationError, match="c was not measured"):
        table.ranges(method, ["c"], signed=True)


def test_an_unknown_method_is_refused_for_symmetric_ranges_too() -> None:
    with pytest.raises(CalibrationError, match="unknown range method 'magic'; choose one of auto, minmax"):
        CalibrationTable({}, 1, {}).ranges("magic", signed=True)
