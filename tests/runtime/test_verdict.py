"""The verdict in words: what is written is true, and never contradicts what it says of."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.runtime.gates import Gate, MaxDrop, MinAgreement, MinRatio, judge
from edgewright.runtime.intervals import newcombe_paired_interval
from edgewright.runtime.parity import Parity
from one_hot import parity_of, unlabelled

properties = settings(derandomize=True, deadline=None, max_examples=60)
cells = st.tuples(st.integers(0, 900), st.integers(0, 30), st.integers(0, 30), st.integers(0, 200)).filter(sum)
budgets = st.floats(0, 0.2)
Table = tuple[int, int, int, int]


@pytest.mark.parametrize(
    ("gate", "parity", "sentence"),
    [
        (MaxDrop(), parity_of(9_359, 73, 46, 522), "PASS: loses at most 0.49 points (95 %), budget 0.5"),
        (MaxDrop(), parity_of(9_400, 0, 100, 500), "PASS: gains at least 0.80 points (95 %), budget 0.5"),
        (MaxDrop(), parity_of(9_000, 300, 20, 680), "FAIL: loses at least 2.45 points (95 %), budget 0.5"),
        (MaxDrop(0.001), parity_of(920, 7, 3, 70), "INCONCLUSIVE: about 4,500 images would decide a budget of 0.1"),
        (MaxDrop(), unlabelled(9_990, 10), "PASS: differs on at most 0.19 % of the images (95 %), budget 0.5 %"),
        (MaxDrop(), unlabelled(9_000, 1_000), "FAIL: differs on at least 9.42 % of the images (95 %), budget 0.5 %"),
        (MaxDrop(), unlabelled(99, 1), "INCONCLUSIVE: about 770 images would decide a budget of 0.5 %"),
        (
            MinRatio(0.99),
            parity_of(9_359, 73, 46, 522),
            "PASS: keeps at least 99.48 % of the reference's top-1 (95 %), minimum 99",
        ),
        (
            MinRatio(0.999),
            parity_of(9_000, 300, 20, 680),
            "FAIL: keeps at most 97.37 % of the reference's top-1 (95 %), minimum 99.9",
        ),
        (
            MinRatio(0.999),
            parity_of(9_359, 73, 46, 522),
            "INCONCLUSIVE: about 15,000 images would decide a ratio of 0.999",
        ),
        (
            MinAgreement(0.98),
            unlabelled(9_869, 131),
            "PASS: agrees on at least 98.44 % of the images (95 %), minimum 98",
        ),
        (
            MinAgreement(0.99),
            unlabelled(9_869, 131),
            "FAIL: agrees on at most 98.90 % of the images (95 %), minimum 99",
        ),
        (
            MinAgreement(0.99),
            unlabelled(99, 1),
            "INCONCLUSIVE: no realistic number of images would decide an agreement of 0.99",
        ),
    ],
)
def test_sentence(gate: Gate, parity: Parity, sentence: str) -> None:
    assert judge(parity, [gate]).sentence == sentence


@pytest.mark.parametrize(
    ("upper", "budget", "words"),
    [
        (0.0031, 0.005, "at most 0.31 points"),
        (0.003101, 0.005, "at most 0.32 points"),  # outwards
        (-0.000001, 0.005, "loses at most 0.00 points"),
        (0.00494, 0.00494, "at most 0.494 points"),  # as many digits as keep it within the budget
    ],
)
def test_a_bound_is_rounded_outwards(monkeypatch: pytest.MonkeyPatch, upper: float, budget: float, words: str) -> None:
    monkeypatch.setattr(MaxDrop, "_interval", lambda gate, parity, images: (-0.01, upper))
    assert words in MaxDrop(budget).finding(parity_of(5, 0, 0, 0)).claim


@properties
@given(cells, budgets)
def test_a_claim_never_contradicts_its_finding(table: Table, budget: float) -> None:
    found = MaxDrop(budget).finding(parity_of(*table))
    if found.word == "inconclusive":
        return
    written = float(found.claim.split(" points")[0].split()[-1]) / 100
    if "gains" in found.claim:
        written = -written
    assert found.ci95 is not None
    lower, upper = found.ci95
    assert upper is not None
    if found.word == "pass":
        assert upper - 1e-9 <= written <= budget + 1e-9
    else:
        assert budget - 1e-9 <= written <= lower + 1e-9


@properties
@given(cells, st.floats(0.5, 1.0))
def test_a_claim_of_a_share_never_contradicts_its_finding(table: Table, limit: float) -> None:
    parity = parity_of(*table)
    for gate in (MinRatio(limit), MinAgreement(limit)):
        found = gate.finding(parity)
        if found.word == "inconclusive":
            continue
        written = float(found.claim.split(" %")[0].split()[-1]) / 100
        lower, upper = found.ci95 or (0, None)
        if found.word == "pass":
            assert limit - 1e-9 <= written <= lower + 1e-9
        else:
            assert upper is not None
            assert upper - 1e-9 <= written <= limit + 1e-9


def test_the_document_of_a_finding() -> None:
    document = judge(parity_of(9_359, 73, 46, 522)).findings[0].to_json()
    assert document == {
        "gate": "max_drop",
        "limit": 0.005,
        "value": 0.0027,
        "ci95": list(newcombe_paired_interval(9_359, 73, 46, 522)),
        "verdict": "pass",
        "claim": "loses at most 0.49 points (95 %), budget 0.5",
        "images_needed": None,
    }
