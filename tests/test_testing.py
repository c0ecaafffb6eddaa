"""`assert_parity` on pairs with known answers, of arrays, functions, modules and engine files; and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgewright.runtime.errors import EngineError, ParityError
from edgewright.runtime.figures import further_figures
from edgewright.runtime.parity import compare
from edgewright.runtime.session import Session
from edgewright.testing import assert_parity
from edgewright.verdict_report import evidence_lines
from one_hot import one_hot
from toy_build import PREPROCESS, engine, expected_logits, normal, photograph, put_engine

LABELS = np.zeros(10_000, np.int64)


def losing(count: int) -> Any:
    """Logits that are wrong on so many of 10,000 images."""
    return one_hot([1] * count + [0] * (10_000 - count))


def test_within_the_budget_it_returns_the_figures() -> None:
    parity = assert_parity(losing(0), losing(20), LABELS)
    assert parity.delta == -0.002
    assert parity.images == 10_000


def test_beyond_the_budget_it_says_the_verdict_and_the_numbers() -> None:
    with pytest.raises(AssertionError) as failed:
        assert_parity(losing(0), losing(100), LABELS)
    lines = str(failed.value).splitlines()
    assert lines[0] == "FAIL: loses at least 0.81 points (95 %), budget 0.5"
    assert lines[1] == "  top-1        100.00 → 99.00 %, 100 lost, 0 gained, exact McNemar p 1.6e-30"
    assert any(line.startswith("  worst class  class 0: 100.00 → 99.00 % of 10,000 images") for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_long_name_of_the_worst_class_leaves_room_for_its_figures() -> None:
    labels = np.arange(20_000) % 2
    reference, engine = np.eye(2)[labels], np.eye(2)[labels]
    reference[:2000:2] = engine[2:5000:2] = [0, 1]
    figures = further_figures(reference, engine, labels, ("a name of many letters, a synonym", "b"))
    (line,) = (line for line in evidence_lines(compare(reference, engine, labels), figures) if "worst class" in line)
    assert len(line) <= 80
    assert line.startswith("  worst class  a name of ")
    assert "…: 90.00 → " in line


def test_too_few_images_fail_unless_they_may() -> None:
    with pytest.raises(AssertionError, match=r"INCONCLUSIVE: about .* images would decide a budget of 0\.5") as failed:
        assert_parity(losing(0)[:100], losing(0)[:100], LABELS[:100])
    assert "  worst class  none loses" in str(failed.value).splitlines()
    assert assert_parity(losing(0)[:100], losing(0)[:100], LABELS[:100], allow_inconclusive=True).delta == 0
    with pytest.raises(AssertionError, match="FAIL"):
        assert_parity(losing(0), losing(900), LABELS, allow_inconclusive=True)


@pytest.mark.parametrize(
    ("gates", "claim"),
    [
        ({"max_drop": 2.0, "min_agreement": 0.995}, "agrees on at most"),
        ({"min_ratio": 0.995}, "keeps at most"),
        ({"max_drop": 2.0, "min_sqnr": 60}, "SQNR of the logits"),
        ({"min_ratio": 0.999, "min_agreement": 0.995}, "of the reference's top-1 (95 %), minimum 99.9; agrees on"),
    ],
)
def test_every_gate_that_is_given_has_to_hold(gates: dict[str, Any], claim: str) -> None:
    with pytest.raises(AssertionError) as failed:
        assert_parity(losing(0), losing(100), LABELS, **gates)
    assert claim in str(failed.value).splitlines()[0]
    assert_parity(losing(0), losing(1), LABELS, max_drop=2.0, min_ratio=0.99, min_agreement=0.99, min_sqnr=10)


def test_without_labels_the_disagreement_is_judged() -> None:
    assert_parity(losing(0), losing(20))
    with pytest.raises(AssertionError, match="FAIL: differs on at least"):
        assert_parity(losing(0), losing(100))
    with pytest.raises(ParityError, match="no labels"):
        assert_parity(losing(0), losing(0), min_ratio=0.99)


def test_lists_and_tensors_are_taken() -> None:
    logits = [[1.0, 0.0], [0.0, 1.0]]
    tensor = torch.tensor(logits, requires_grad=True)
    assert assert_parity(logits, tensor, [0, 1], max_drop=100).agreement == 1


# --- What gives logits for images --------------------------------------------------------------------------------


class Doubled(torch.nn.Module):
    """Batch normalization that in training mode would give other logits, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(192), torch.nn.Dropout(0.9))
        self.head = torch.nn.Linear(192, 6, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(normal("fp32", 192, 6).T / 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) <= 32
        scores: torch.Tensor = self.head(self.layers(images)) * 2
        return scores


def test_a_module_is_run_in_inference_mode_and_left_as_it_was(tmp_path: Path) -> None:
    images, module = normal("images", 70, 3, 8, 8), Doubled()
    parity = assert_parity(
        lambda batch: 2 * expected_logits("fp32", batch), module, images=images, max_drop=20, min_sqnr=60
    )
    assert parity.images == 70
    assert module.training


def test_a_frozen_layer_stays_frozen() -> None:
    images, module = normal("images", 8, 3, 8, 8), Doubled()
    frozen = [*module.modules()][2].eval()
    assert module.training
    assert_parity(module, module, images=images, max_drop=80)
    assert (module.training, frozen.training) == (True, False)


def test_logits_of_half_the_bits_are_logits() -> None:
    logits = torch.from_numpy(losing(0)).to(torch.bfloat16)
    assert assert_parity(logits, losing(10), LABELS).images == 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"engine": {"logits": losing(0)}}, "the logits are a dict that is no array"),
        ({"engine": [[1.0, 2.0], [3.0]]}, "the logits are a list that is no array"),
        ({"images": Path("shoe.png")}, "images is a single image; put it into a list"),
        ({"images": "shoe.png"}, "images is a single image"),
        ({"images": []}, "there are no images"),
        ({"max_drop": 150}, "max_drop is 150 points, expected from 0 to 100; half a point is 0.5"),
    ],
)
def test_odd_arguments_are_explained(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ParityError, match=re.escape(said)):
        assert_parity(losing(0), **{"engine": losing(0), "labels": LABELS} | arguments)


def test_labels_in_another_order_are_no_pass() -> None:
    reference = np.eye(1_000)[np.arange(5_000) % 1_000]
    noise = np.random.default_rng(0).normal(size=reference.shape)
    labels = (np.arange(5_000) + 1) % 1_000
    with pytest.raises(AssertionError, match=r"INCONCLUSIVE: the reference is right on 0\.00 % .* guessing \(0\.1 %\)"):
        assert_parity(reference, noise, labels)


@pytest.mark.parametrize("rows", [1, 31, 33])
def test_an_answer_for_each_image_is_asked_of_a_function(rows: int) -> None:
    with pytest.raises(ParityError, match=rf"for a batch of 32 images the answer is \[{rows}, 2\]"):
        assert_parity(lambda batch: np.ones((rows, 2)), losing(0), images=normal("images", 64, 3, 4, 4))


def test_an_engine_file_and_a_build_folder_are_opened(tmp_path: Path) -> None:
    path, images = put_engine(tmp_path, "fp32"), normal("images", 40, 3, 8, 8)
    for each in (path, str(path), tmp_path):
        assert_parity(expected_logits("fp32", images), each, images=images, max_drop=20, min_sqnr=80)


def test_photographs_are_preprocessed_as_the_engine_says(tmp_path: Path) -> None:
    path, photographs = put_engine(tmp_path, "fp32"), [photograph(seed) for seed in range(40)]
    with Session.open(path) as session:
        batch = session.preprocess(photographs)
    assert (batch == PREPROCESS.batch(photographs)).all()
    assert_parity(lambda images: expected_logits("fp32", images), path, images=photographs, max_drop=20, min_sqnr=80)


def test_another_engine_is_told_apart(tmp_path: Path) -> None:
    path, images = put_engine(tmp_path, content=engine("other")), normal("images", 40, 3, 8, 8)
    with pytest.raises(AssertionError, match="FAIL: differs on at least"):
        assert_parity(expected_logits("fp32", images), path, images=images)


def test_what_has_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="the engine gives logits for images, and there are none; give images="):
        assert_parity(losing(0), lambda batch: batch)
    with pytest.raises(ParityError, match="neither side is an engine file"):
        assert_parity(losing(0), losing(0), images=["shoe.png"])
    with pytest.raises(EngineError, match="there is no engine"):
        assert_parity(losing(0), tmp_path / "none.onnx", images=normal("images", 4, 3, 8, 8))
    with pytest.raises(ParityError, match="compare the same images"):
        assert_parity(losing(0), losing(0)[1:])
