"""Intervals and tests for proportions, paired proportions and medians: scalar arithmetic, no dependency.

Two classifiers see the same n images; the four cells count the images on which

                     second right   second wrong
    first right           a              b            p1 = (a + b) / n
    first wrong           c              d            p2 = (a + c) / n

Only b and c carry the difference p1 − p2 = (b − c) / n. Taking the two proportions for independent samples would make
the interval several times too wide.

Sources
* Wilson 1927 (J Am Stat Assoc 22:209): score interval of one proportion.
* Newcombe 1998 (Stat Med 17:2635-2650), method 10: interval of p1 − p2 for paired data.
* Bonett & Price 2006 (Stat Med 25:3039-3047), the hybrid Wilson score interval: interval of p1 / p2 for paired data.
* McNemar's exact test: binomial with probability ½ on the discordant pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ParityError

__all__ = [
    "Z95",
    "PairedCounts",
    "binomial_half_cdf",
    "mcnemar_exact_p",
    "newcombe_paired_interval",
    "paired_ratio_interval",
    "wilson_interval",
]

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution: two-sided 95 %
NEGLIGIBLE = 1e-18  # relative size below which a further term leaves a float64 sum of decreasing terms as it is


@dataclass(frozen=True)
class PairedCounts:
    """On how many images both are right, only the reference is, only the engine is, neither is."""

    both: int
    reference_only: int
    engine_only: int
    neither: int


def wilson_interval(successes: float, n: float, *, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of the proportion `successes / n`, without continuity correction.

    Counts may be fractions, for planning a sample. Raises `ParityError` unless 0 ≤ successes ≤ n and n > 0.
    """
    if not (0 < n < math.inf and 0 <= successes <= n):
        raise ParityError(f"{successes} successes among {n} have no proportion, expected 0 ≤ successes ≤ n and n > 0")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # exact at the ends, where rounding would leave 1e-17 or 1 + 1e-16
    lower = 0.0 if successes == 0 else max(0.0, min(centre - half, p))
    upper = 1.0 if successes == n else min(1.0, max(centre + half, p))
    return lower, upper


def newcombe_paired_interval(
    both: float, first_only: float, second_only: float, neither: float, *, z: float = Z95
) -> tuple[float, float]:
    """Interval of p1 − p2 for paired proportions: Newcombe 1998, method 10.

    Wilson's limits l1, u1, l2, u2 of the two proportions are squared and added, less what their correlation φ takes:

        lower = Δ − √(x² − 2φxy + y²), x = p1 − l1, y = u2 − p2
        upper = Δ + √(x² − 2φxy + y²), x = u1 − p1, y = p2 − l2

    φ is continuity-corrected towards 0 where it is positive (see `_corrected_phi`); method 8 is the same without that.
    Counts may be fractions, for planning a sample. Raises `ParityError` if a count is negative or all are 0.
    """
    counts = (both, first_only, second_only, neither)
    n = sum(counts)
    if not (min(counts) >= 0 and 0 < n < math.inf):
        raise ParityError(f"the paired counts are {counts}, expected none below 0 and not all 0")
    first, second = min(both + first_only, n), min(both + second_only, n)  # fractions: a sum may round above n
    (l1, u1), (l2, u2) = wilson_interval(first, n, z=z), wilson_interval(second, n, z=z)
    p1, p2, delta = first / n, second / n, (first_only - second_only) / n
    phi = _corrected_phi(*counts)
    lower = delta - _side(p1 - l1, u2 - p2, phi)
    upper = delta + _side(u1 - p1, p2 - l2, phi)
    return max(-1.0, lower), min(1.0, upper)  # inside already, but for rounding: δ ≤ x + y gives lower ≥ l1 − u2


def _side(x: float, y: float, phi: float) -> float:
    """√(x² − 2φxy + y²), written so that nothing cancels when φ is close to 1."""
    return math.sqrt((x - y) ** 2 + 2 * (1 - phi) * x * y)


def _corrected_phi(a: float, b: float, c: float, d: float) -> float:
    """Newcombe's φ: (ad − bc), less n/2 but not below 0 if positive, over √ of the product of the four marginals."""
    marginals = (a + b) * (c + d) * (a + c) * (b + d)
    if marginals == 0:
        return 0.0
    numerator = a * d - b * c
    if numerator > 0:
        numerator = max(numerator - (a + b + c + d) / 2, 0)
    return min(1.0, max(-1.0, numerator / math.sqrt(marginals)))


def paired_ratio_interval(both: float, first_only: float, second_only: float, *, z: float = Z95) -> tuple[float, float]:
    """Interval of p1 / p2 for paired proportions: Bonett & Price 2006, the hybrid Wilson score interval.

    Images on which neither is right say nothing about the ratio, so that n is a + b + c here. Wilson's limits of both
    proportions are taken at a z that their correlation has narrowed, and divided:

        k = A / (B + C), A² = (b + c + 2) / ((x1 + 1)(x2 + 1)), B² = (1 − (x1 + 1)/(n + 2)) / (x1 + 1), C² alike of x2
        lower = l1 / u2, upper = u1 / l2, where x1 = a + b, x2 = a + c

    The upper bound is infinite where the second is never right. Counts may be fractions, for planning a sample. Raises
    `ParityError` if a count is negative.
    """
    counts = (both, first_only, second_only)
    n = sum(counts)
    if not (min(counts) >= 0 and n < math.inf):
        raise ParityError(f"the paired counts are {counts}, expected none below 0")
    if n == 0:
        return 0.0, math.inf
    first, second = min(both + first_only, n), min(both + second_only, n)  # fractions: a sum may round above n
    correlated = math.sqrt((first_only + second_only + 2) / ((first + 1) * (second + 1)))
    z *= correlated / (_spread(first, n) + _spread(second, n))
    (l1, u1), (l2, u2) = wilson_interval(first, n, z=z), wilson_interval(second, n, z=z)
    return l1 / u2, u1 / l2 if l2 > 0 else math.inf


def _spread(count: float, n: float) -> float:
    """Standard error of log(count / n), with one success and two images more."""
    return math.sqrt((1 - (count + 1) / (n + 2)) / (count + 1))


def mcnemar_exact_p(first_only: int, second_only: int) -> float:
    """Two-sided exact McNemar test that p1 = p2, from the numbers of discordant pairs; 1.0 if there are none.

    p = min(1, 2 · P(X ≤ min(b, c))) with X binomial(b + c, ½). Raises `ParityError` if a count is negative.
    """
    if min(first_only, second_only) < 0:
        raise ParityError(f"the discordant counts are {first_only} and {second_only}, expected none below 0")
    return min(1.0, 2 * binomial_half_cdf(min(first_only, second_only), first_only + second_only))


def binomial_half_cdf(k: int, n: int) -> float:
    """P(X ≤ k) for X binomial(n, ½).

    The largest term is taken in log space, so n may be 10⁶; the relative error is that of lgamma, about 1e-15 · n.
    """
    if k < 0:
        return 0.0
    if k >= n:
        return 1.0
    if 2 * k >= n:  # sum the short tail: its terms decrease
        return 1.0 - binomial_half_cdf(n - k - 1, n)
    log_largest = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    total = term = 1.0
    for i in range(k, 0, -1):
        term *= i / (n - i + 1)  # C(n, i − 1) / C(n, i)
        total += term
        if term < NEGLIGIBLE * total:
            break
    return math.exp(log_largest) * total
