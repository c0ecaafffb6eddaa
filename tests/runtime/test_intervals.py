"""Intervals against published examples, scipy, a second implementation, simulation, and mutants that must be caught."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from edgewright.runtime.errors import ParityError
from edgewright.runtime.intervals import (
    Z95,
    binomial_half_cdf,
    mcnemar_exact_p,
    newcombe_paired_interval,
    paired_ratio_interval,
    wilson_interval,
)

Table = tuple[int, int, int, int]
Interval = Callable[[int, int, int, int], tuple[float, float]]

properties = settings(derandomize=True, deadline=None, max_examples=150)
counts = st.integers(0, 400)
tables = st.tuples(counts, counts, counts, counts).filter(lambda table: sum(table) > 0)

# Newcombe 1998 (Stat Med 17:2635-2650), his examples for method 10; the values also stand in the tests of the R
# package propint (ci.two.dep.props, "produces the results reported in Newcombe1998").
NEWCOMBE_1998: list[tuple[Table, tuple[float, float]]] = [
    ((36, 12, 2, 0), (0.0569, 0.3404)),
    ((18, 12, 2, 18), (0.0562, 0.3290)),
    ((53, 0, 0, 1), (-0.0729, 0.0729)),
    ((0, 30, 0, 0), (0.8395, 1.0)),
]
# "Newcombe square-and-add" of Fagerland, Lydersen & Laake is method 10. Complete response (Cavo et al. 2012): the value
# stands in the tests of their R package contingencytables. Airway hyper-responsiveness (Bentur et al. 2009): the value
# is quoted second-hand; the correction takes φ from 0.08 to 0, uncorrected it would be -0.502 to -0.036.
FAGERLAND: list[tuple[Table, tuple[float, float]]] = [
    ((1, 1, 7, 12), (-0.507, -0.026)),
    ((59, 6, 16, 80), (-0.1186, -0.0046)),
]


def second_implementation(
    a: int,
    b: int,
    c: int,
    d: int,
    *,
    correction: float = 0.5,
    phi_of: Callable[[float], float] = lambda phi: phi,
    crossed: bool = True,
) -> tuple[float, float]:
    """Newcombe's method 10 from images as vectors, scipy's Wilson and a quadratic form; the keywords plant faults."""
    n = a + b + c + d
    first, second = np.repeat([1, 1, 0, 0], [a, b, c, d]), np.repeat([1, 0, 1, 0], [a, b, c, d])
    wilson = [binomtest(int(x.sum()), n).proportion_ci(0.95, method="wilson") for x in (first, second)]
    low, high = np.array([w.low for w in wilson]), np.array([w.high for w in wilson])
    p = np.array([first.mean(), second.mean()])
    phi = 0.0
    if 0 < p[0] < 1 and 0 < p[1] < 1:
        phi = float(np.corrcoef(first, second)[0, 1])
        if phi > 0:
            spread = float(first.std() * second.std())
            phi = max(0.0, phi - correction / (n * spread))
    form = np.array([[1.0, -phi_of(phi)], [-phi_of(phi), 1.0]])
    towards_low, towards_high = np.array([p[0] - low[0], high[1] - p[1]]), np.array([high[0] - p[0], p[1] - low[1]])
    if not crossed:
        towards_low, towards_high = towards_high, towards_low
    difference = float(p[0] - p[1])
    return (
        difference - math.sqrt(max(0.0, float(towards_low @ form @ towards_low))),
        difference + math.sqrt(max(0.0, float(towards_high @ form @ towards_high))),
    )


def wald(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    n = a + b + c + d
    half = Z95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return (b - c) / n - half, (b - c) / n + half


MUTANTS: dict[str, Interval] = {
    "unpaired": lambda a, b, c, d: second_implementation(a, b, c, d, phi_of=lambda phi: 0.0),
    "phi uncorrected (method 8)": lambda a, b, c, d: second_implementation(a, b, c, d, correction=0.0),
    "phi corrected twice": lambda a, b, c, d: second_implementation(a, b, c, d, correction=1.0),
    "phi without sign": lambda a, b, c, d: second_implementation(a, b, c, d, phi_of=abs),
    "negative phi dropped": lambda a, b, c, d: second_implementation(a, b, c, d, phi_of=lambda phi: max(phi, 0.0)),
    "limits not crossed": lambda a, b, c, d: second_implementation(a, b, c, d, crossed=False),
    "discordant cells swapped": lambda a, b, c, d: newcombe_paired_interval(a, c, b, d),
    "cells in the wrong order": lambda a, b, c, d: newcombe_paired_interval(a, b, d, c),
    "z of a one-sided 95 %": lambda a, b, c, d: newcombe_paired_interval(a, b, c, d, z=1.645),
    "wald": wald,
}


def reproduces_published(interval: Interval) -> bool:
    tables = [(table, expected, 1.01e-4) for table, expected in NEWCOMBE_1998]
    tables += [(table, expected, 6e-4) for table, expected in FAGERLAND]
    return all(
        abs(found - value) < tolerance
        for table, expected, tolerance in tables
        for found, value in zip(interval(*table), expected, strict=True)
    )


@pytest.mark.parametrize(("table", "expected"), [*NEWCOMBE_1998, *FAGERLAND])
def test_newcombe_published_example(table: Table, expected: tuple[float, float]) -> None:
    assert newcombe_paired_interval(*table) == pytest.approx(expected, abs=6e-4 if table == (1, 1, 7, 12) else 1.01e-4)


def test_both_implementations_reproduce_the_published_examples() -> None:
    assert reproduces_published(newcombe_paired_interval)
    assert reproduces_published(second_implementation)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_published_examples_catch_the_mutant(mutant: str) -> None:
    assert not reproduces_published(MUTANTS[mutant])


@properties
@given(tables)
def test_newcombe_equals_second_implementation(table: Table) -> None:
    assert newcombe_paired_interval(*table) == pytest.approx(second_implementation(*table), abs=1e-7)


@properties
@given(tables)
def test_newcombe_mirrors_when_the_two_are_exchanged(table: Table) -> None:
    a, b, c, d = table
    lower, upper = newcombe_paired_interval(a, b, c, d)
    assert newcombe_paired_interval(a, c, b, d) == pytest.approx((-upper, -lower), abs=1e-12)
    assert newcombe_paired_interval(d, c, b, a) == pytest.approx((-upper, -lower), abs=1e-12)  # wrong for right


@properties
@given(tables)
def test_newcombe_contains_the_difference_and_stays_inside(table: Table) -> None:
    lower, upper = newcombe_paired_interval(*table)
    assert -1 <= lower <= (table[1] - table[2]) / sum(table) <= upper <= 1


@properties
@given(tables, st.floats(1.0, 1e4))
def test_newcombe_narrows_as_all_counts_grow(table: Table, factor: float) -> None:
    lower, upper = newcombe_paired_interval(*table)
    a, b, c, d = (factor * count for count in table)
    narrow_lower, narrow_upper = newcombe_paired_interval(a, b, c, d)
    assert lower - 1e-12 <= narrow_lower
    assert narrow_upper <= upper + 1e-12


def coverage(interval: Interval, n: int, cells: list[float], repeats: int, seed: int) -> float:
    drawn = np.random.default_rng(seed).multinomial(n, cells, size=repeats)
    kinds, times = np.unique(drawn, axis=0, return_counts=True)
    truth = cells[1] - cells[2]
    inside = [lower <= truth <= upper for lower, upper in (interval(*map(int, kind)) for kind in kinds)]
    return float(times @ inside) / repeats


SCENARIOS = [
    (50, [0.60, 0.15, 0.10, 0.15]),
    (200, [0.85, 0.04, 0.03, 0.08]),
    (1_000, [0.90, 0.015, 0.01, 0.075]),
    (10_000, [0.925, 0.006, 0.004, 0.065]),
    (10_000, [0.70, 0.0005, 0.0005, 0.299]),
]


@pytest.mark.parametrize(("n", "cells"), SCENARIOS)
def test_newcombe_covers(n: int, cells: list[float]) -> None:
    repeats = 3_000
    error = 3 * math.sqrt(0.94 * 0.06 / repeats)  # three standard errors of a coverage of 0.94
    assert coverage(newcombe_paired_interval, n, cells, repeats, seed=1) >= 0.94 - error


@pytest.mark.parametrize("mutant", ["discordant cells swapped", "z of a one-sided 95 %"])
def test_coverage_catches_the_mutant(mutant: str) -> None:
    repeats = 3_000
    n, cells = SCENARIOS[1]
    assert coverage(MUTANTS[mutant], n, cells, repeats, seed=1) < 0.94 - 3 * math.sqrt(0.94 * 0.06 / repeats)


def test_unpaired_interval_would_be_several_times_too_wide() -> None:
    table = (9_260, 50, 40, 650)
    lower, upper = newcombe_paired_interval(*table)
    unpaired_lower, unpaired_upper = MUTANTS["unpaired"](*table)
    assert (unpaired_upper - unpaired_lower) > 3 * (upper - lower)


@pytest.mark.parametrize("table", [(10_000, 0, 0, 0), (0, 0, 0, 10_000), (9_300, 0, 0, 700), (1, 0, 0, 0)])
def test_newcombe_without_discordant_pairs_is_around_0_but_not_empty(table: Table) -> None:
    lower, upper = newcombe_paired_interval(*table)
    assert lower == pytest.approx(-upper, abs=1e-12)
    assert 0 < upper < 1


@pytest.mark.parametrize("table", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_newcombe_of_one_image(table: Table) -> None:
    assert newcombe_paired_interval(*table) == pytest.approx(second_implementation(*table), abs=1e-9)


@pytest.mark.parametrize("table", [(0, 0, 0, 0), (-1, 2, 3, 4), (math.nan, 1, 1, 1), (math.inf, 1, 1, 1)])
def test_newcombe_refuses(table: tuple[float, float, float, float]) -> None:
    with pytest.raises(ParityError, match="paired counts"):
        newcombe_paired_interval(*table)


def test_z95_is_the_normal_quantile() -> None:
    assert pytest.approx(norm.ppf(0.975), abs=1e-15) == Z95


@properties
@given(st.integers(1, 100_000), st.floats(0, 1))
def test_wilson_equals_scipy(n: int, share: float) -> None:
    successes = round(share * n)
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    lower, upper = wilson_interval(successes, n)
    assert (lower, upper) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= lower <= successes / n <= upper <= 1


def test_wilson_is_exact_at_the_ends() -> None:
    for n in (1, 3, 1_024, 50_000):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5), (math.nan, 5), (1, math.inf)])
def test_wilson_refuses(successes: float, n: float) -> None:
    with pytest.raises(ParityError, match="have no proportion"):
        wilson_interval(successes, n)


@properties
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_scipy(first_only: int, second_only: int) -> None:
    expected = binomtest(first_only, first_only + second_only).pvalue if first_only + second_only else 1.0
    assert mcnemar_exact_p(first_only, second_only) == pytest.approx(expected, rel=1e-10)
    assert mcnemar_exact_p(second_only, first_only) == mcnemar_exact_p(first_only, second_only)


@pytest.mark.parametrize(
    ("first_only", "second_only"), [(100_000, 100_000), (100_000, 99_000), (100_000, 98_500), (90_000, 110_000)]
)
def test_mcnemar_of_large_counts(first_only: int, second_only: int) -> None:
    expected = binomtest(first_only, first_only + second_only).pvalue
    assert mcnemar_exact_p(first_only, second_only) == pytest.approx(expected, rel=1e-7)


def test_mcnemar_underflows_to_0_and_refuses_negative_counts() -> None:
    assert mcnemar_exact_p(0, 100_000) == 0.0
    with pytest.raises(ParityError, match="discordant"):
        mcnemar_exact_p(-1, 3)


@properties
@given(st.integers(0, 500), st.integers(-2, 502))
def test_binomial_half_cdf_equals_scipy(n: int, k: int) -> None:
    assert binomial_half_cdf(k, n) == pytest.approx(float(binom.cdf(k, n, 0.5)), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("k", "n"), [(4_999, 5_000), (4_000, 5_000), (2_500, 5_000), (2_499, 5_000), (0, 5_000)])
def test_binomial_half_cdf_where_the_largest_term_underflows(k: int, n: int) -> None:
    assert binomial_half_cdf(k, n) == pytest.approx(float(binom.cdf(k, n, 0.5)), rel=1e-9, abs=1e-300)


# --- The ratio of paired proportions -----------------------------------------------------------------------------

# Complete response before and after consolidation therapy (Cavo et al. 2012), in Fagerland, Lydersen & Laake,
# "Statistical Analysis of Contingency Tables" (2017), chapter 8: Bonett-Price hybrid Wilson score, without continuity
# correction. The value stands in the tests of their R package contingencytables.
CAVO, CAVO_RATIO = (59, 6, 16), (0.7579, 0.9910)

Ratio = Callable[[int, int, int], tuple[float, float]]

RATIO_MUTANTS: dict[str, Ratio] = {
    "the two exchanged": lambda a, b, c: paired_ratio_interval(a, c, b),
    "z not narrowed": lambda a, b, c: independent_ratio(a, b, c),
    "z of a one-sided 95 %": lambda a, b, c: paired_ratio_interval(a, b, c, z=1.645),
}


def independent_ratio(a: int, b: int, c: int) -> tuple[float, float]:
    first, second = (binomtest(x, a + b + c).proportion_ci(0.95, method="wilson") for x in (a + b, a + c))
    return first.low / second.high, first.high / second.low


def test_the_ratio_of_a_published_example() -> None:
    assert paired_ratio_interval(*CAVO) == pytest.approx(CAVO_RATIO, abs=1e-4)


@pytest.mark.parametrize("mutant", RATIO_MUTANTS)
def test_the_published_ratio_catches_the_mutant(mutant: str) -> None:
    assert RATIO_MUTANTS[mutant](*CAVO) != pytest.approx(CAVO_RATIO, abs=1e-3)


@properties
@given(st.tuples(counts, counts, counts).filter(lambda cells: cells[0] + min(cells[1:]) > 0))
def test_the_ratio_mirrors_when_the_two_are_exchanged_and_holds_what_was_seen(cells: tuple[int, int, int]) -> None:
    a, b, c = cells
    lower, upper = paired_ratio_interval(a, b, c)
    assert paired_ratio_interval(a, c, b) == pytest.approx((1 / upper, 1 / lower), rel=1e-9)
    assert 0 < lower <= (a + b) / (a + c) * (1 + 1e-9)
    assert (a + b) / (a + c) <= upper * (1 + 1e-9)


@pytest.mark.parametrize(("n", "cells"), SCENARIOS)
def test_the_ratio_covers(n: int, cells: list[float]) -> None:
    repeats = 3_000
    drawn = np.random.default_rng(2).multinomial(n, cells, size=repeats)
    kinds, times = np.unique(drawn[:, :3], axis=0, return_counts=True)
    truth = (cells[0] + cells[1]) / (cells[0] + cells[2])
    inside = [lower <= truth <= upper for lower, upper in (paired_ratio_interval(*map(int, kind)) for kind in kinds)]
    assert times @ inside / repeats >= 0.94 - 3 * math.sqrt(0.94 * 0.06 / repeats)


@pytest.mark.parametrize(
    ("cells", "interval"), [((0, 0, 0), (0.0, math.inf)), ((0, 4, 0), (None, math.inf)), ((0, 0, 4), (0.0, None))]
)
def test_the_ratio_of_nothing_is_open(cells: tuple[int, int, int], interval: tuple[float | None, float | None]) -> None:
    for found, expected in zip(paired_ratio_interval(*cells), interval, strict=True):
        assert expected is None or found == expected
        assert found >= 0


@pytest.mark.parametrize("cells", [(-1, 2, 3), (math.nan, 1, 1), (math.inf, 1, 1)])
def test_the_ratio_refuses(cells: tuple[float, float, float]) -> None:
    with pytest.raises(ParityError, match="paired counts"):
        paired_ratio_interval(*cells)
