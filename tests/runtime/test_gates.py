"""The gates against their own definitions, published intervals and samples of known shares; and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from edgewright.runtime.errors import ParityError
from edgewright.runtime.gates import (
    DEFAULT_BUDGET,
    MOST_IMAGES,
    Gate,
    MaxDrop,
    MinAgreement,
    MinRatio,
    MinSqnr,
    budget_of,
    check_labelled,
    gates_of,
    judge,
)
from edgewright.runtime.intervals import newcombe_paired_interval, paired_ratio_interval, wilson_interval
from edgewright.runtime.parity import Parity, compare
from edgewright.runtime.verdict import STATUS_OF_VERDICT, Finding
from one_hot import one_hot, parity_of, unlabelled

properties = settings(derandomize=True, deadline=None, max_examples=60)
ORDER = ["fail", "inconclusive", "pass"]
Table = tuple[int, int, int, int]


def drop(parity: Parity, budget: float = DEFAULT_BUDGET) -> Finding:
    return MaxDrop(budget).finding(parity)


# --- The budget --------------------------------------------------------------------------------------------------


def test_pass_fail_and_inconclusive() -> None:
    assert drop(parity_of(9_280, 30, 25, 665)).word == "pass"
    assert drop(parity_of(9_000, 300, 20, 680)).word == "fail"
    assert drop(parity_of(280, 3, 2, 15)).word == "inconclusive"
    assert drop(parity_of(1, 0, 0, 0)).word == "inconclusive"


def test_an_engine_with_nothing_but_nan_fails() -> None:
    reference = one_hot([0, 1, 2] * 300)
    verdict = judge(
        compare(reference, np.full_like(reference, np.nan), np.tile(np.arange(3), 300)), [MaxDrop(), MinSqnr(10)]
    )
    assert [finding.word for finding in verdict.findings] == ["fail", "fail"]
    assert verdict.findings[1].value is None
    assert verdict.sentence.endswith("; no image has finite logits, no dB, minimum 10")


GUESSED = "not clearly better than guessing (10 %): the labels may be in another order than its classes"


def shifted(candidate: NDArray[np.float64] | None = None) -> Parity:
    """A reference that is always right, and an engine beside it, with labels in another order of the ten classes."""
    classes = np.arange(1_000) % 10
    reference = np.eye(10)[classes]
    return compare(reference, reference if candidate is None else candidate, (classes + 1) % 10)


@pytest.mark.parametrize("gate", [MaxDrop(), MinRatio(0.99)], ids=["max_drop", "min_ratio"])
def test_labels_that_do_not_fit_are_no_pass(gate: Gate) -> None:
    noise = np.random.default_rng(0).normal(size=(1_000, 10))
    for parity in (shifted(), shifted(noise)):
        found = gate.finding(parity)
        assert (found.word, found.images_needed) == ("inconclusive", None)
        assert found.claim == f"the reference is right on 0.00 % of the images, {GUESSED}"
    assert MinAgreement(0.9).finding(shifted()).word == "pass"  # which asks for no labels
    assert MinAgreement(0.9).finding(shifted(noise)).word == "fail"


@pytest.mark.parametrize(
    ("right", "images", "classes", "guessing"),
    [
        (119, 1_000, 10, False),  # Wilson's lower bound is 0.1004
        (118, 1_000, 10, True),  # 0.0995
        (100, 1_000, 10, True),
        (0, 1_000, 10, True),
        (3, 4, 2, True),
        (4, 4, 2, False),
        (0, 3, 2, False),  # not even three right ones of three would be clear
        (1, 1, 10, False),
        (0, 1, 10, True),
    ],
)
def test_guessing_is_what_wilson_cannot_tell_from_chance(right: int, images: int, classes: int, guessing: bool) -> None:
    answers = np.array([0] * right + [1] * (images - right))
    logits = np.eye(classes)[answers]
    labels = np.zeros(images, np.int64)
    assert compare(logits, logits, labels).guessing is guessing
    assert not compare(logits, logits, None).guessing
    known = binomtest(right, images).proportion_ci(method="wilson").low > 1 / classes
    possible = binomtest(images, images).proportion_ci(method="wilson").low > 1 / classes
    assert guessing is bool(possible and not known)


def test_what_fails_fails_with_any_labels() -> None:
    answers = np.repeat([0, 1], [110, 890])
    reference, engine = np.eye(10)[answers], np.eye(10)[np.ones(1_000, np.int64)]
    assert compare(reference, engine, np.zeros(1_000, np.int64)).guessing
    assert drop(compare(reference, engine, np.zeros(1_000, np.int64))).word == "fail"


def test_the_budget_is_half_a_point_unless_said() -> None:
    found = parity_of(9_280, 30, 25, 665)
    assert judge(found) == judge(found, [MaxDrop(0.005)])
    assert DEFAULT_BUDGET == 0.005


def test_the_bounds_decide_and_equality_passes() -> None:
    found = parity_of(9_000, 100, 40, 860)
    lower, upper = found.loss_ci95
    assert drop(found, upper).word == "pass"
    assert drop(found, math.nextafter(upper, 0)).word == "inconclusive"
    assert drop(found, lower).word == "inconclusive"  # the lower bound must be above the budget
    assert drop(found, math.nextafter(lower, 0)).word == "fail"


cells = st.tuples(st.integers(0, 900), st.integers(0, 30), st.integers(0, 30), st.integers(0, 200)).filter(sum)
budgets = st.floats(0, 0.2)


@properties
@given(cells, budgets)
def test_the_finding_holds_what_the_comparison_says(table: Table, budget: float) -> None:
    parity = parity_of(*table)
    found = drop(parity, budget)
    assert (found.value, found.ci95, found.limit, found.gate) == (parity.loss, parity.loss_ci95, budget, "max_drop")


@properties
@given(cells, budgets, budgets)
def test_a_finding_is_monotone_in_the_budget(table: Table, budget: float, other: float) -> None:
    found = parity_of(*table)
    strict, lax = sorted((budget, other))
    assert ORDER.index(drop(found, strict).word) <= ORDER.index(drop(found, lax).word)


@properties
@given(cells, budgets)
def test_images_needed_decide_and_one_fewer_do_not(table: Table, budget: float) -> None:
    found = parity_of(*table)
    finding = drop(found, budget)

    def decides(images: int) -> bool:
        a, b, c, d = (count * (images / found.images) for count in table)
        lower, upper = newcombe_paired_interval(a, b, c, d)
        return upper <= budget or lower > budget

    if finding.word != "inconclusive" or found.guessing:
        assert finding.images_needed is None
    elif finding.images_needed is None:
        assert not decides(MOST_IMAGES) or found.loss == budget
    else:
        assert found.images < finding.images_needed <= MOST_IMAGES
        assert decides(finding.images_needed)
        assert not decides(finding.images_needed - 1)
        assert not decides(max(found.images, round(finding.images_needed * 0.99) - 1))


@properties
@given(st.integers(0, 2_000), st.integers(0, 40), budgets)
def test_images_needed_without_labels(agreeing: int, disagreeing: int, budget: float) -> None:
    if agreeing + disagreeing == 0:
        return
    needed = drop(unlabelled(agreeing, disagreeing), budget).images_needed
    if needed is None:
        return
    share = disagreeing / (agreeing + disagreeing)

    def decides(images: int) -> bool:
        lower, upper = wilson_interval(share * images, images)
        return upper <= budget or lower > budget

    assert decides(needed + 1)
    assert not decides(needed - 1)


def test_images_needed_for_real_decide() -> None:
    """A sample with the same shares and as many images as asked for is decided."""
    finding = drop(parity_of(920, 7, 3, 70), 0.001)
    assert finding.word == "inconclusive"
    assert finding.images_needed is not None
    factor = math.ceil(finding.images_needed / 1_000)
    assert newcombe_paired_interval(920 * factor, 7 * factor, 3 * factor, 70 * factor)[0] > 0.001


def test_no_realistic_number_of_images() -> None:
    equal = drop(parity_of(900, 10, 5, 85), 0.005)  # the loss is the budget
    assert (equal.word, equal.images_needed) == ("inconclusive", None)
    close = drop(parity_of(900, 10, 5, 85), 0.00501)
    assert (close.word, close.images_needed) == ("inconclusive", None)
    assert close.claim == "no realistic number of images would decide a budget of 0.501"
    assert drop(unlabelled(90, 10), 0.1).images_needed is None


# --- The other gates ---------------------------------------------------------------------------------------------


def test_the_ratio_is_judged_by_its_interval() -> None:
    parity = parity_of(9_000, 100, 40, 860)
    lower, upper = paired_ratio_interval(9_000, 40, 100)
    assert MinRatio(lower).finding(parity).word == "pass"
    assert MinRatio(math.nextafter(lower, 1)).finding(parity).word == "inconclusive"
    assert MinRatio(upper).finding(parity).word == "inconclusive", "the upper bound must be below the limit"
    assert MinRatio(math.nextafter(upper, 1)).finding(parity).word == "fail"
    found = MinRatio(0.99).finding(parity)
    assert found.value == 9_040 / 9_100
    assert found.ci95 == (lower, upper)


def test_a_ratio_and_the_budget_that_it_comes_to_agree() -> None:
    """(1 − ratio) · top-1 of the reference is the budget of the same condition, but for the methods."""
    random = np.random.default_rng(3)
    agreeing = total = 0
    for _ in range(20):
        parity = parity_of(9_000, int(random.integers(40, 140)), 40, 800)
        words = MinRatio(0.99).finding(parity).word, drop(parity, 0.01 * (parity.reference_top1 or 0)).word
        agreeing, total = agreeing + (words[0] == words[1]), total + 1
        assert set(words) != {"pass", "fail"}
    assert agreeing >= 0.95 * total


@pytest.mark.parametrize(
    ("parity", "value", "ci95"),
    [
        (parity_of(0, 0, 3, 2), None, (0.25, None)),
        (parity_of(0, 3, 0, 2), 0.0, None),
        (parity_of(0, 0, 0, 5), None, (0.0, None)),
    ],
)
def test_a_ratio_of_nothing(parity: Parity, value: float | None, ci95: Any) -> None:
    found = MinRatio(0.99).finding(parity)
    assert found.value == value
    assert found.word != "pass"
    json.dumps(found.to_json(), allow_nan=False)
    if ci95 is not None:
        assert found.ci95 is not None
        assert found.ci95[1] == ci95[1]


def test_the_agreement_is_judged_by_wilson() -> None:
    parity = unlabelled(9_869, 131)
    expected = binomtest(9_869, 10_000).proportion_ci(0.95, method="wilson")
    found = MinAgreement(0.98).finding(parity)
    assert found.ci95 == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (found.word, found.value) == ("pass", 0.9869)
    assert MinAgreement(0.987).finding(parity).word == "inconclusive"
    assert MinAgreement(0.99).finding(parity).word == "fail"


@properties
@given(st.integers(50, 2_000), st.integers(0, 60), st.sampled_from([0.9, 0.95, 0.99, 0.999]))
def test_images_needed_for_an_agreement(agreeing: int, disagreeing: int, limit: float) -> None:
    found = MinAgreement(limit).finding(unlabelled(agreeing, disagreeing))
    if found.images_needed is None:
        return
    share = agreeing / (agreeing + disagreeing)

    def decides(images: int) -> bool:
        lower, upper = wilson_interval(min(share * images, images), images)
        return lower >= limit or upper < limit

    assert decides(found.images_needed + 1)
    assert not decides(found.images_needed - 1)


def test_sqnr_is_measured_and_has_no_interval() -> None:
    reference = np.full((5, 4), 10.0)
    parity = compare(reference, reference + 1.0, None)  # 20 dB
    assert [MinSqnr(limit).finding(parity).word for limit in (19.99, 20.0, 20.01)] == ["pass", "pass", "fail"]
    assert MinSqnr(20.0).finding(parity).ci95 is None
    assert MinSqnr(20.04).finding(parity).claim == "SQNR of the logits 20.0 dB, minimum 20.04"
    assert MinSqnr(20.0).finding(parity).claim == "SQNR of the logits 20.0 dB, minimum 20"


def test_sqnr_is_told_as_among_the_figures_unless_that_crosses_the_limit() -> None:
    parity = replace(compare(np.ones((5, 4)), np.zeros((5, 4)), None), sqnr_db=19.98)
    claims = [MinSqnr(limit).finding(parity).claim for limit in (10, 20)]
    assert claims == ["SQNR of the logits 20.0 dB, minimum 10", "SQNR of the logits 19.98 dB, minimum 20"]


# --- All gates together ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(Gate):
    """A gate that says what it is told to."""

    word: Any = "pass"
    name = "fixed"
    aim = None

    def finding(self, parity: Parity) -> Finding:
        return Finding(self.name, self.limit, None, None, self.word, f"says {self.word}")


@pytest.mark.parametrize(
    ("words", "verdict", "claim"),
    [
        (["pass"], "pass", "says pass"),
        (["pass", "pass"], "pass", "says pass; says pass"),
        (["pass", "inconclusive"], "inconclusive", "says inconclusive"),
        (["inconclusive", "fail", "pass"], "fail", "says fail"),
        (["fail", "inconclusive", "fail"], "fail", "says fail; says fail"),
    ],
)
def test_the_verdict_is_that_of_the_worst_gate_and_names_it(words: list[Any], verdict: str, claim: str) -> None:
    found = judge(parity_of(5, 0, 0, 0), [Fixed(0, word) for word in words])
    assert (found.word, found.claim) == (verdict, claim)
    assert found.sentence == f"{verdict.upper()}: {claim}"
    assert STATUS_OF_VERDICT[found.word] == {"pass": "verified", "fail": "over_budget"}.get(verdict, "undecided")


def test_options_become_gates() -> None:
    assert gates_of() == (MaxDrop(0.005),)
    assert gates_of(max_drop=1) == (MaxDrop(0.01),)
    assert gates_of(min_ratio=0.99) == (MinRatio(0.99),), "MLPerf's form takes the place of the default budget"
    assert gates_of(max_drop=0.5, min_ratio=0.99) == (MaxDrop(0.005), MinRatio(0.99))
    assert gates_of(min_sqnr=20, min_agreement=0.9) == (MaxDrop(0.005), MinAgreement(0.9), MinSqnr(20)), "never without"


@pytest.mark.parametrize(
    ("gates", "budget"),
    [
        (gates_of(), 0.005),
        (gates_of(max_drop=2.0), 0.02),
        (gates_of(min_ratio=0.999), 0.001),
        (gates_of(max_drop=0.05, min_ratio=0.99), 0.0005),
        (gates_of(min_agreement=0.998), 0.001),
        (gates_of(min_sqnr=60), 0.005),
        ((MinSqnr(60),), 0.005),
    ],
)
def test_quantization_aims_at_what_all_gates_allow(gates: tuple[Gate, ...], budget: float) -> None:
    assert budget_of(gates) == pytest.approx(budget)


@pytest.mark.parametrize("limit", [-0.001, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("gate", [MaxDrop, MinRatio, MinAgreement])
def test_a_limit_that_is_no_share_is_refused(gate: Callable[[float], Gate], limit: float) -> None:
    with pytest.raises(ParityError, match="expected a fraction from 0 to 1"):
        gate(limit)


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_a_limit_that_is_no_number_of_decibels_is_refused(limit: float) -> None:
    with pytest.raises(ParityError, match="expected decibels"):
        MinSqnr(limit)


def test_a_ratio_without_labels_is_refused() -> None:
    for refused in (
        lambda: judge(unlabelled(5, 0), gates_of(min_ratio=0.99)),
        lambda: check_labelled(gates_of(min_ratio=0.99), labelled=False),
    ):
        with pytest.raises(
            ParityError, match="min_ratio compares accuracies, and the evaluation images have no labels"
        ):
            refused()
    check_labelled(gates_of(min_agreement=0.9, min_sqnr=5), labelled=False)
    check_labelled(gates_of(min_ratio=0.99), labelled=True)


def test_no_gates_are_refused() -> None:
    with pytest.raises(ParityError, match="no gate"):
        judge(unlabelled(5, 0), [])
