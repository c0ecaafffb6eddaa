"""`compare` against a plain loop over images, and what must be refused."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cosine as cosine_distance

from edgewright.runtime import logits as logits_module
from edgewright.runtime.errors import ParityError
from edgewright.runtime.intervals import PairedCounts, newcombe_paired_interval, wilson_interval
from edgewright.runtime.parity import SQNR_LIMIT_DB, Parity, compare
from one_hot import one_hot, parity_of

properties = settings(derandomize=True, deadline=None, max_examples=60)
CONTRACT_FIELDS = {
    *("source", "images", "top1", "top5", "agreement", "delta", "loss_ci95", "max_abs", "cosine", "sqnr_db"),
}


def logits(seed: int, images: int = 200, classes: int = 10, noise: float = 0.6) -> tuple[Any, Any, Any]:
    """Reference and candidate, float32 `[images, classes]`, and labels that the reference mostly gets right."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    reference = random.normal(size=(images, classes)) + 2.0 * np.eye(classes)[labels]
    candidate = reference + noise * random.normal(size=reference.shape)
    return reference.astype(np.float32), candidate.astype(np.float32), labels


def ranking(row: NDArray[Any]) -> list[int]:
    """Classes from best to worst by Python's stable sort; a row with NaN or infinity has none."""
    values = [float(value) for value in row]
    return sorted(range(len(values)), key=lambda index: -values[index]) if all(map(math.isfinite, values)) else []


# --- compare -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "classes", "seed"), [(200, 10, 0), (57, 3, 1), (1, 2, 2), (300, 40, 3)])
def test_counts_equal_a_plain_loop(images: int, classes: int, seed: int) -> None:
    reference, candidate, labels = logits(seed, images, classes, noise=1.5)
    candidate[::7, 0] = np.nan
    cells, agreeing, hits = [0, 0, 0, 0], 0, {"reference1": 0, "reference5": 0, "engine1": 0, "engine5": 0}
    for row, other, label in zip(reference, candidate, labels, strict=True):
        first, second = ranking(row), ranking(other)
        right, also_right = first[0] == label, second[:1] == [label]
        cells[2 * (not right) + (not also_right)] += 1
        agreeing += second[:1] == first[:1]
        hits["reference1"] += right
        hits["reference5"] += label in first[:5]
        hits["engine1"] += also_right
        hits["engine5"] += label in second[:5]
    found = compare(reference, candidate, labels)
    assert found.pairs == PairedCounts(*cells)
    assert found.agreement * images == pytest.approx(agreeing)
    assert found.reference_top1 == hits["reference1"] / images
    assert found.reference_top5 == hits["reference5"] / images
    assert found.top1 == hits["engine1"] / images
    assert found.top5 == hits["engine5"] / images
    assert found.nonfinite == len(candidate[::7])
    assert found.loss_ci95 == newcombe_paired_interval(*cells)
    assert found.agreement_ci95 == wilson_interval(agreeing, images)


@properties
@given(st.integers(1, 12), st.integers(2, 7), st.integers(0, 10_000))
def test_ties_rank_by_index_on_both_sides(images: int, classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    reference, candidate = random.integers(0, 3, (2, images, classes))  # three values: many ties
    labels = random.integers(0, classes, images)
    found = compare(reference, candidate, labels)
    assert found.top1 == np.mean([ranking(row)[0] == label for row, label in zip(candidate, labels, strict=True)])
    assert found.top5 == np.mean([label in ranking(row)[:5] for row, label in zip(candidate, labels, strict=True)])
    same = [ranking(row)[0] == ranking(other)[0] for row, other in zip(reference, candidate, strict=True)]
    assert found.agreement == np.mean(same)


def test_logit_figures_equal_scipy_and_the_definition() -> None:
    reference, candidate, labels = logits(4)
    found = compare(reference, candidate, labels)
    wide, other = reference.astype(np.float64), candidate.astype(np.float64)
    cosines = [1 - cosine_distance(a, b) for a, b in zip(wide, other, strict=True)]
    assert found.max_abs == np.abs(wide - other).max()
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-12)
    assert found.sqnr_db == pytest.approx(20 * np.log10(np.linalg.norm(wide) / np.linalg.norm(wide - other)), abs=1e-9)


def test_sqnr_of_a_known_noise() -> None:
    reference = np.full((5, 4), 10.0)
    assert compare(reference, reference + 1.0, None).sqnr_db == pytest.approx(20.0)
    assert compare(reference, 2 * reference, None).sqnr_db == pytest.approx(0.0)
    assert compare(reference, -reference, None).cosine == pytest.approx(-1.0)


def test_the_figures_see_the_difference_of_float32_neighbours() -> None:
    reference, _, labels = logits(5)
    found = compare(reference, np.nextafter(reference, np.float32(np.inf)), labels)
    assert found.max_abs is not None
    assert found.sqnr_db is not None
    assert 0 < found.max_abs < 1e-6
    assert 130 < found.sqnr_db < 170  # float32 has a resolution of 2⁻²⁴, 144 dB


def test_equal_logits() -> None:
    reference, _, labels = logits(6)
    found = compare(reference, reference.copy(), labels)
    assert (found.delta, found.loss, found.agreement, found.max_abs, found.mcnemar_p) == (0, 0, 1, 0, 1)
    assert found.sqnr_db == SQNR_LIMIT_DB
    assert found.cosine == pytest.approx(1.0, abs=1e-15)
    assert found.cosine is not None
    assert found.cosine <= 1
    assert found.agreement_ci95[1] == 1.0


@pytest.mark.parametrize(
    ("reference", "candidate", "cosine", "sqnr"),
    [
        ([[0, 0]], [[0, 0]], 1.0, SQNR_LIMIT_DB),
        ([[0, 0]], [[1, 0]], 0.0, -SQNR_LIMIT_DB),
        ([[1, 0]], [[0, 0]], 0.0, 0.0),
    ],
)
def test_zero_logits(reference: Any, candidate: Any, cosine: float, sqnr: float) -> None:
    found = compare(np.array(reference), np.array(candidate), None)
    assert (found.cosine, found.sqnr_db) == (cosine, sqnr)


def test_largest_float32_logits_do_not_overflow() -> None:
    largest = np.finfo(np.float32).max
    found = compare(np.full((3, 4), largest), np.full((3, 4), -largest), None)
    assert found.nonfinite == 0
    assert found.sqnr_db == pytest.approx(20 * math.log10(0.5))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_an_image_with_a_nonfinite_logit_is_wrong(value: float) -> None:
    reference = one_hot([0, 1, 2, 1]).astype(np.float64)
    candidate = reference.copy()
    candidate[2, 2] = value  # argmax of NaN and of infinity is 2, the right class: still wrong
    found = compare(reference, candidate, np.array([0, 1, 2, 1]))
    assert found.nonfinite == 1
    assert found.pairs == PairedCounts(3, 1, 0, 0)
    assert (found.top1, found.top5, found.agreement) == (0.75, 0.75, 0.75)
    assert (found.max_abs, found.sqnr_db) == (0, SQNR_LIMIT_DB)  # of the other images
    assert compare(reference, candidate, None).agreement == 0.75


def test_an_engine_with_nothing_but_nan() -> None:
    reference, _, labels = logits(7, images=1_000)
    found = compare(reference, np.full_like(reference, np.nan), labels)
    assert (found.top1, found.top5, found.agreement, found.nonfinite) == (0, 0, 0, 1_000)
    assert (found.max_abs, found.cosine, found.sqnr_db) == (None, None, None)
    json.dumps(found.to_json(), allow_nan=False)


def test_no_image_right() -> None:
    wrong = compare(one_hot([1, 1]), one_hot([1, 2]), np.array([0, 0]))
    assert wrong.pairs == PairedCounts(0, 0, 0, 2)
    assert (wrong.loss, wrong.mcnemar_p) == (0, 1)


def test_delta_is_engine_minus_reference_and_loss_the_reverse() -> None:
    found = parity_of(90, 6, 1, 3)
    assert found.delta == -0.05
    assert found.loss == 0.05
    assert found.reference_top1 == 0.96
    assert found.top1 == 0.91
    assert found.loss_ci95[0] <= 0.05 <= found.loss_ci95[1]
    assert found.loss_ci95 == newcombe_paired_interval(90, 6, 1, 3)
    assert found.loss_ci95 != newcombe_paired_interval(90, 1, 6, 3)  # the mutant that exchanges the two
    assert found.mcnemar_p == pytest.approx(2 * 8 / 2**7)


def test_without_labels_the_loss_is_the_disagreement() -> None:
    reference, candidate, _ = logits(8)
    found = compare(reference, candidate, None, source="simulation")
    accuracy = (found.reference_top1, found.reference_top5, found.top1, found.top5, found.delta)
    assert accuracy == (None,) * 5
    assert (found.source, found.labelled, found.pairs, found.mcnemar_p) == ("simulation", False, None, None)
    assert found.loss == pytest.approx(1 - found.agreement)
    assert found.loss_ci95 == wilson_interval(found.disagreeing, found.images)
    assert found.loss_ci95 == pytest.approx((1 - found.agreement_ci95[1], 1 - found.agreement_ci95[0]))


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate, labels = logits(9, images=101)
    candidate[50] = np.inf
    whole = compare(reference, candidate, labels)
    for elements in (1, 70, 1_000):
        monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", elements)
        assert compare(reference, candidate, labels) == whole


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate, labels = logits(10, images=10_000, classes=100)
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 1 << 14)
    tracemalloc.start()
    compare(reference, candidate, labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < reference.size * 8 / 3  # one float64 copy of the logits would be 8 MB


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64])
def test_every_real_dtype_is_taken_and_inputs_stay_as_they_are(dtype: type) -> None:
    reference: NDArray[Any] = one_hot([0, 1, 2]).astype(dtype)
    candidate: NDArray[Any] = one_hot([0, 2, 2]).astype(dtype)
    copies = reference.copy(), candidate.copy()
    assert compare(reference, candidate, np.array([0, 1, 2], np.uint8)).top1 == pytest.approx(2 / 3)
    assert (reference == copies[0]).all()
    assert (candidate == copies[1]).all()


def test_a_nonfinite_candidate_is_not_changed() -> None:
    candidate = np.array([[np.nan, 1.0], [0.0, 1.0]])
    compare(np.eye(2), candidate, None)
    assert np.isnan(candidate[0, 0])


@pytest.mark.parametrize(
    ("reference", "candidate", "labels", "message"),
    [
        (np.ones((4, 3)), np.ones((4, 2)), None, r"shape \[4, 3\], the engine \[4, 2\]"),
        (np.ones((4, 3)), np.ones((3, 3)), None, r"compare the same images"),
        (np.ones((0, 3)), np.ones((0, 3)), None, r"shape \[0, 3\], expected"),
        (np.ones((4, 0)), np.ones((4, 0)), None, r"shape \[4, 0\], expected"),
        (np.ones((4, 1)), np.ones((4, 1)), None, r"shape \[4, 1\], expected"),  # one class: always "right"
        (np.ones(4), np.ones(4), None, r"shape \[4\], expected"),
        (np.ones((4, 3), complex), np.ones((4, 3)), None, "reference are complex128"),
        (np.ones((4, 3)), np.ones((4, 3), bool), None, "engine are bool"),
        (np.array([[0, 1], [0, np.nan]]), np.ones((2, 2)), None, "reference has a NaN or infinite logit on image 1"),
        (np.array([[0, np.inf], [0, 1]]), np.ones((2, 2)), None, "reference has a NaN or infinite logit on image 0"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([0, 3]), "image 1 has label 3, expected 0 to 2"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([-1, 0]), "image 0 has label -1"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([0, 1, 2]), r"int64 of shape \[3\], expected an integer for each"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([[0], [1]]), r"shape \[2, 1\]"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([0.0, 1.0]), "labels are float64"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([True, False]), "labels are bool"),
    ],
)
def test_compare_refuses(reference: Any, candidate: Any, labels: Any, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        compare(reference, candidate, labels)


def test_the_image_that_is_named_is_counted_over_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 6)
    reference = np.ones((50, 3))
    reference[37, 1] = np.nan
    with pytest.raises(ParityError, match="image 37"):
        compare(reference, np.ones((50, 3)), None)


# --- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_json_round_trip(labelled: bool) -> None:
    reference, candidate, labels = logits(11)
    candidate[3] = np.inf
    found = compare(reference, candidate, labels if labelled else None)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(content) > CONTRACT_FIELDS
    assert content == found.to_json()
    assert Parity.from_json(content) == found
    assert Parity.from_json({**content, "added_later": 1}) == found
    assert Parity.from_json(content).loss == found.loss


def test_json_of_equal_logits_has_no_infinity() -> None:
    content = compare(np.eye(3), np.eye(3), np.arange(3)).to_json()
    assert json.loads(json.dumps(content, allow_nan=False))["sqnr_db"] == SQNR_LIMIT_DB
