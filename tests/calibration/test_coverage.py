"""Classes that are missing, few, or only predicted."""

from __future__ import annotations

import numpy as np
import pytest

from edgewright.calibration.coverage import coverage, predicted_coverage
from edgewright.calibration.findings import OK, WARNING

LABELS = ("shirt", "shoe", "bag", "coat")


def test_all_classes_are_there() -> None:
    finding = coverage(np.arange(40) % 4, LABELS)
    assert (finding.verdict, finding.evidence) == (OK, ("40 images of 4 of the 4 classes",))
    assert finding.figures["counts"] == [10] * 4


def test_a_missing_class_and_a_rare_one_are_named() -> None:
    finding = coverage(np.repeat([0, 1, 3], [20, 20, 1]), LABELS)
    assert finding.verdict == WARNING
    assert finding.evidence[1:] == ("no image of 1 class: bag", "few images of 1 class: coat (1)")
    assert (finding.figures["missing"], finding.figures["few"]) == (["bag"], ["coat (1)"])


def test_fewer_images_than_classes_cannot_show_all() -> None:
    finding = coverage(np.array([0, 1]), LABELS)
    assert finding.verdict == OK
    assert finding.evidence[0].endswith("too few images to show all")


def test_predictions_are_said_to_be_predictions() -> None:
    logits = np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    assert predicted_coverage(logits, LABELS).verdict == OK
    finding = predicted_coverage(logits[np.arange(40) % 4 != 2], LABELS)
    assert finding.verdict == WARNING
    assert finding.evidence == (
        "no labels; the network predicts 3 of its 4 classes for 30 images",
        "none is predicted as bag",
    )


@pytest.mark.parametrize(("images", "verdict"), [(1, OK), (3, WARNING)])
def test_one_prediction_for_all_is_suspicious_though_they_are_few(images: int, verdict: str) -> None:
    finding = predicted_coverage(np.eye(4, dtype=np.float32)[[1] * images], LABELS)
    assert finding.verdict == verdict
    assert finding.evidence[1:] == (("all are predicted as shoe",) if verdict == WARNING else ())
