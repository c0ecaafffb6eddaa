"""The self-test: limits, NaN, and the batches that an engine takes; the runner is a table of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright.runtime.backends import Runner
from edgewright.runtime.bundle import Limits
from edgewright.runtime.device import self_test
from edgewright.runtime.device.kept import SelfTest
from edgewright.runtime.device.self_test import self_tested
from edgewright.runtime.errors import ParityError
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.specs import BatchProfile, EngineInfo, TensorSpec

Array = NDArray[np.float32]
IMAGES, CLASSES = 21, 5
STRICT = Limits(60.0, 1.0)
PREPROCESS = Preprocess((2, 2), None, (0.5,), (0.25,), colour="L")
INFO = EngineInfo(
    "tensorrt", "fp16", "sm87", (TensorSpec("x", (None, 1, 2, 2), "float32"),),
    (TensorSpec("y", (None, CLASSES), "float32"),), PREPROCESS, tuple("abcde"), "", "", 0, (),
)  # fmt: skip
PIXELS = np.random.default_rng(1).integers(0, 256, (IMAGES, 2, 2, 1)).astype(np.uint8)
WEIGHTS = np.random.default_rng(2).normal(size=(4, CLASSES))


def logits(images: Array) -> Array:
    """The "network": a matrix product."""
    return (images.reshape(len(images), 4).astype(np.float64) @ WEIGHTS).astype(np.float32)


REFERENCE = logits(np.moveaxis((PIXELS / 255 - 0.5) / 0.25, -1, 1).astype(np.float32))


class Table(Runner):
    """Gives what `answer` makes of a batch, and notes the batches."""

    def __init__(self, answer: Callable[[Array], Array] = logits) -> None:
        super().__init__(INFO.inputs, INFO.outputs)
        self.answer = answer
        self.batches: list[int] = []

    def infer_impl(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.batches.append(len(feeds["x"]))
        return {"y": self.answer(feeds["x"])}

    def close_impl(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "TIMED_SECONDS", 0.0)


def judged(runner: Runner, limits: Limits = STRICT, **changes: Any) -> SelfTest:
    return self_tested(runner, replace(INFO, **changes), PIXELS, REFERENCE, limits)


def test_the_same_network_passes() -> None:
    found = judged(Table())
    assert found.passed
    assert (found.images, found.agreement) == (IMAGES, 1.0)
    assert found.sqnr_db is not None
    assert found.sqnr_db > 100
    assert found.max_abs is not None
    assert found.max_abs < 1e-4
    assert found.latency_ms > 0
    assert "agrees on 100 %" in found.reason


def test_noise_is_measured() -> None:
    """Of an amplitude of 1 % the noise has 40 dB less energy."""
    found = judged(Table(lambda images: np.float32(1.01) * logits(images)), Limits(39.9, 1.0))
    assert found.sqnr_db == pytest.approx(40.0, abs=0.01)
    assert found.passed
    beyond = judged(Table(lambda images: np.float32(1.01) * logits(images)), Limits(40.1, 1.0))
    assert not beyond.passed
    assert beyond.reason == "the logits have 40.0 dB SQNR, at least 40.1 dB are needed"


def test_agreement_is_a_limit_of_its_own() -> None:
    def other_class(images: Array) -> Array:
        answer = logits(images)
        if len(images) == 16:  # the first of two batches of the golden images
            order = answer[0].argsort()
            answer[0, order[-2]] = answer[0, order[-1]] + np.float32(1e-3)
        return answer

    share = (IMAGES - 1) / IMAGES
    assert judged(Table(other_class), Limits(0.0, share)).passed
    found = judged(Table(other_class), Limits(0.0, share + 1e-6))
    assert not found.passed
    assert found.reason == "top-1 agrees on 95.24 % of the images, needed are 95.24 %"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("limits", [Limits(0.0, 0.0), Limits(-300.0, 0.0)])
def test_one_logit_that_is_not_finite_fails(value: float, limits: Limits) -> None:
    def broken(images: Array) -> Array:
        answer = logits(images)
        answer[-1, 2] = value
        return answer

    found = judged(Table(broken), limits)
    assert not found.passed
    assert found.reason == f"2 of {IMAGES} images give logits that are not finite"


def test_nothing_but_nan_fails() -> None:
    found = judged(Table(lambda images: np.full_like(logits(images), np.nan)), Limits(-300.0, 0.0))
    assert not found.passed
    assert (found.sqnr_db, found.max_abs, found.agreement) == (None, None, 0.0)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ParityError):
        judged(Table(lambda images: logits(images)[:, :3]))


@pytest.mark.parametrize(
    ("profile", "fixed", "golden", "timed"),
    [
        (None, None, [16, 5], 1),
        (BatchProfile(1, 8, 32), None, [16, 5], 1),
        (BatchProfile(1, 4, 8), None, [8, 8, 5], 1),
        (BatchProfile(8, 8, 8), None, [8, 8, 8], 8),
        (BatchProfile(20, 24, 32), None, [20, 20], 20),
        (BatchProfile(64, 64, 64), None, [64], 64),
        (BatchProfile(4, 4, 4), 4, [4, 4, 4, 4, 4, 4], 4),
    ],
)
def test_batches(profile: BatchProfile | None, fixed: int | None, golden: list[int], timed: int) -> None:
    """Within the profile, the last one filled up; the time is that of the smallest."""
    runner = Table()
    found = judged(runner, profile=profile, inputs=(TensorSpec("x", (fixed, 1, 2, 2), "float32"),))
    assert found.passed
    assert (found.images, found.agreement) == (IMAGES, 1.0)
    assert runner.batches[: len(golden)] == golden
    assert set(runner.batches[len(golden) :]) == {timed}
