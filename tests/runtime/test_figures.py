"""The figures beside top-1 against plain loops over images, with planted faults; and what they leave out."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from edgewright.runtime import logits as logits_module
from edgewright.runtime.errors import ParityError
from edgewright.runtime.figures import (
    CALIBRATION_BINS,
    CalibrationError,
    ClassLoss,
    ConfusionChange,
    Crossing,
    Figures,
    expected_calibration_error,
    further_figures,
)
from edgewright.runtime.intervals import newcombe_paired_interval
from one_hot import one_hot

NAMES = ("ant", "bee", "cat")


def some(seed: int, images: int = 400, classes: int = 6, noise: float = 1.0) -> tuple[Any, Any, Any]:
    """Reference and engine, float32 `[images, classes]`, and labels that the reference mostly gets right."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    reference = 1.5 * random.normal(size=(images, classes)) + 2.0 * np.eye(classes)[labels]
    return (
        reference.astype(np.float32),
        (reference + noise * random.normal(size=reference.shape)).astype(np.float32),
        labels,
    )


def plain_calibration_error(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Guo et al. 2017, equation 3, bin by bin and image by image."""
    total = 0.0
    for m in range(1, CALIBRATION_BINS + 1):
        accuracies, confidences = [], []
        for row, label in zip(softmax(logits.astype(np.float64), axis=1), labels, strict=True):
            if (m - 1) / CALIBRATION_BINS < max(row) <= m / CALIBRATION_BINS:
                accuracies.append(float(list(row).index(max(row)) == label))
                confidences.append(max(row))
        if accuracies:
            total += len(accuracies) / len(labels) * abs(np.mean(accuracies) - np.mean(confidences))
    return float(total)


# --- Expected calibration error ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_the_calibration_error_equals_a_plain_loop(seed: int) -> None:
    reference, engine, labels = some(seed)
    found = further_figures(reference, engine, labels).calibration_error
    assert found is not None
    assert found.reference == pytest.approx(plain_calibration_error(reference, labels), abs=1e-12)
    assert found.engine == pytest.approx(plain_calibration_error(engine, labels), abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "right", "error"),
    [
        ([1.0] * 4, [True] * 4, 0.0),
        ([1.0] * 4, [True, True, True, False], 0.25),  # always sure, right on three of four
        ([0.8] * 5, [True] * 4 + [False], 0.0),
        ([0.9] * 2 + [0.3] * 2, [True, False, True, False], 0.5 * 0.4 + 0.5 * 0.2),
        ([0.95, 0.89], [False, True], 0.5 * 0.95 + 0.5 * 0.11),  # two bins: one error does not cancel the other
        ([0.94, 0.95], [True, False], 0.445),  # one bin: |1/2 − 0.945|
    ],
)
def test_the_calibration_error_of_known_confidences(confidence: list[float], right: list[bool], error: float) -> None:
    assert expected_calibration_error(np.array(confidence), np.array(right)) == pytest.approx(error, abs=1e-12)


def test_the_upper_edge_belongs_to_a_bin() -> None:
    edge = 1 / 3  # 5/15: with confidences of this and of the bin below it makes one error, in bins of its own two
    errors = [expected_calibration_error(np.array([edge, other]), np.array([True, False])) for other in (0.3, 0.35)]
    assert errors == pytest.approx([abs(1 - edge - 0.3) / 2, (1 - edge + 0.35) / 2])


def test_logits_times_a_factor_change_the_confidences_alone() -> None:
    """What temperature scaling, done backwards, does: no prediction changes, and the engine is overconfident."""
    reference, _, labels = some(4, images=2_000)
    found = further_figures(reference, 5 * reference, labels)
    assert found.calibration_error is not None
    assert found.calibration_error.engine is not None
    assert found.calibration_error.engine > found.calibration_error.reference + 0.05
    assert found.confusion_changes == ()
    assert found.worst_class is not None
    assert found.worst_class.reference_right == found.worst_class.right


# --- Crossings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_crossings_equal_a_plain_loop(seed: int) -> None:
    reference, engine, _ = some(seed)
    for found in further_figures(reference, engine, None).crossings:
        rose = fell = 0
        for row, other in zip(reference, engine, strict=True):
            before = max(math.exp(x) for x in row) / sum(math.exp(x) for x in row)
            after = max(math.exp(x) for x in other) / sum(math.exp(x) for x in other)
            rose += before < found.threshold <= after
            fell += after < found.threshold <= before
        assert (found.rose * len(reference), found.fell * len(reference)) == pytest.approx((rose, fell))
        assert 0 < rose < len(reference)


def test_equal_logits_cross_nothing() -> None:
    reference, _, labels = some(2)
    assert further_figures(reference, reference, labels).crossings == (Crossing(0.5, 0, 0), Crossing(0.9, 0, 0))


# --- Classes and confusion ---------------------------------------------------------------------------------------


def test_the_class_that_loses_most_is_named() -> None:
    labels = np.array([0] * 4 + [1] * 10 + [2] * 2)
    engine = labels.copy()
    engine[[0, 4, 5]] = 2  # an ant of four, two bees of ten
    found = further_figures(one_hot(labels.tolist()), one_hot(engine.tolist()), labels, NAMES).worst_class
    assert found == ClassLoss(0, "ant", 4, 4, 3, newcombe_paired_interval(3, 1, 0, 0))


def test_a_class_that_gains_is_not_the_worst_and_of_equals_the_larger_is() -> None:
    labels = np.array([0] * 4 + [1] * 10 + [2] * 20)
    reference = labels.copy()
    reference[0] = 1
    found = further_figures(one_hot(reference.tolist()), one_hot(labels.tolist()), labels).worst_class
    assert found is not None
    assert (found.index, found.label, found.images) == (2, "", 20)
    assert (found.reference_right, found.right) == (20, 20)


def test_a_class_without_images_is_not_the_worst() -> None:
    labels = np.array([1, 1])
    found = further_figures(one_hot([1, 1]), one_hot([0, 0]), labels, NAMES).worst_class
    assert found == ClassLoss(1, "bee", 2, 2, 0, newcombe_paired_interval(0, 2, 0, 0))


def test_confusion_changes_equal_two_counters() -> None:
    reference, engine, labels = some(7, images=900, classes=7)
    before = Counter(zip(labels.tolist(), reference.argmax(1).tolist(), strict=True))
    after = Counter(zip(labels.tolist(), engine.argmax(1).tolist(), strict=True))
    cells = [cell for cell in before.keys() | after.keys() if cell[0] != cell[1]]
    cells = sorted(cells, key=lambda cell: (-abs(after[cell] - before[cell]), cell))
    found = further_figures(reference, engine, labels).confusion_changes
    assert [(change.true, change.predicted, change.reference, change.engine) for change in found] == [
        (*cell, before[cell], after[cell]) for cell in cells[:10]
    ]


def test_the_changed_cells_are_named_and_the_diagonal_is_left_out() -> None:
    labels = np.array([0, 0, 0, 1, 2])
    found = further_figures(one_hot([0, 0, 1, 1, 2]), one_hot([2, 2, 1, 1, 2]), labels, NAMES).confusion_changes
    assert found == (ConfusionChange(0, "ant", 2, "cat", 0, 2),)


# --- What is left out --------------------------------------------------------------------------------------------


def test_without_labels_only_the_confidences_are_compared() -> None:
    reference, engine, _ = some(8)
    found = further_figures(reference, engine, None, NAMES)
    assert found == Figures(None, None, found.crossings, ())
    assert any(each.rose or each.fell for each in found.crossings)


def test_an_image_that_is_not_finite_is_wrong_and_counts_nowhere_else() -> None:
    reference, engine, labels = some(9)
    kept = np.arange(len(labels)) >= 40
    engine[~kept] = np.nan
    labels[:40], reference[:40] = 3, np.eye(6)[3] * 9
    found, rest = (
        further_figures(reference, engine, labels),
        further_figures(reference[kept], engine[kept], labels[kept]),
    )
    assert found.calibration_error is not None
    assert rest.calibration_error is not None
    assert found.calibration_error.engine == pytest.approx(rest.calibration_error.engine)
    assert found.crossings[0].rose * len(labels) == pytest.approx(rest.crossings[0].rose * kept.sum())
    assert found.confusion_changes == rest.confusion_changes
    assert found.worst_class is not None
    assert found.worst_class.index == 3


def test_an_engine_with_nothing_but_nan() -> None:
    reference, engine, labels = some(10)
    found = further_figures(reference, np.full_like(engine, np.nan), labels)
    assert found.calibration_error is not None
    assert found.calibration_error.reference == pytest.approx(plain_calibration_error(reference, labels))
    assert found.calibration_error.engine is None
    assert found.worst_class is not None
    assert found.worst_class.right == 0
    json.dumps(found.to_json(), allow_nan=False)


def test_large_logits_do_not_overflow() -> None:
    largest = np.finfo(np.float32).max
    found = further_figures(np.array([[largest, -largest]]), np.array([[-largest, largest]]), np.array([0]))
    assert found.crossings == (Crossing(0.5, 0, 0), Crossing(0.9, 0, 0))
    assert found.calibration_error == CalibrationError(0, 1)


def test_chunks_do_not_change_the_result_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, engine, labels = some(11, images=5_000, classes=100)
    whole = further_figures(reference, engine, labels)
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 1 << 14)
    tracemalloc.start()
    assert further_figures(reference, engine, labels) == whole
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < reference.size * 8 / 3  # one float64 copy of the logits would be 4 MB


def test_inputs_stay_as_they_are() -> None:
    reference, engine, labels = (array.astype(np.float64) for array in some(12))
    copies = reference.copy(), engine.copy()
    further_figures(reference, engine, labels.astype(np.int64))
    assert (reference == copies[0]).all()
    assert (engine == copies[1]).all()


@pytest.mark.parametrize(
    ("reference", "engine", "labels", "message"),
    [
        (np.ones((4, 3)), np.ones((4, 2)), None, "shape"),
        (np.array([[0, np.nan]]), np.ones((1, 2)), None, "reference has a NaN"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([0, 3]), "image 1 has label 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(reference: Any, engine: Any, labels: Any, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        further_figures(reference, engine, labels)
