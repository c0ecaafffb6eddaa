"""The training set of `--finetune`: what is in it, its order, and what it may not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgewright import finetuning, ladder
from edgewright.calibration.image_set import ImageSet
from edgewright.finetuning import BATCH, shuffled, training_images
from edgewright.learned import finetune
from edgewright.pipeline import Options, Pipeline
from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import Preprocess
from tiny_network import LABELS, write_images

Array = NDArray[Any]

PLAIN = Preprocess((2, 2), None, (0.0,), (1 / 255,), colour="L")
"""Gives the pixels as they are."""


def numbered(count: int, *, labelled: bool = True) -> ImageSet:
    """Images whose four pixels are their own number, below 256."""
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 2, 2)).copy()
    return ImageSet.from_array("numbered", pixels, np.arange(count) * 3 if labelled else None)


def one_pass(images: ImageSet, number: int, seed: int = 5) -> tuple[list[int], list[int | None], list[int]]:
    """The numbers of the images, their labels, the sizes of the batches."""
    numbers: list[int] = []
    labels: list[int | None] = []
    sizes = []
    for batch, known in shuffled(images, PLAIN, seed)(number):
        assert batch.shape[1:] == (1, 2, 2)
        sizes.append(len(batch))
        numbers += np.rint(batch[:, 0, 0, 0]).astype(int).tolist()
        labels += [None] * len(batch) if known is None else known.tolist()
    return numbers, labels, sizes


# --- The order --------------------------------------------------------------------------------------------------------


def test_every_image_comes_once_in_a_pass_with_its_label() -> None:
    numbers, labels, sizes = one_pass(numbered(2 * BATCH), 0)
    assert sorted(numbers) == list(range(2 * BATCH))
    assert labels == [3 * number for number in numbers]
    assert sizes == [BATCH, BATCH]
    assert numbers != sorted(numbers)


def test_each_pass_has_an_order_of_its_own_that_the_seed_decides() -> None:
    images = numbered(BATCH)
    first, second = one_pass(images, 0)[0], one_pass(images, 1)[0]
    assert first != second
    assert one_pass(images, 0)[0] == first
    assert one_pass(images, 0, seed=6)[0] != first


def test_what_fills_no_batch_waits_for_another_pass() -> None:
    images = numbered(BATCH + 40)
    passes = [one_pass(images, number) for number in range(8)]
    assert all(sizes == [BATCH] for _, _, sizes in passes)
    assert all(len(set(numbers)) == BATCH for numbers, _, _ in passes)
    assert {number for numbers, _, _ in passes for number in numbers} == set(range(BATCH + 40))


@pytest.mark.parametrize("count", [1, BATCH - 1])
def test_few_images_are_one_small_batch(count: int) -> None:
    numbers, _, sizes = one_pass(numbered(count), 0)
    assert (sorted(numbers), sizes) == (list(range(count)), [count])


def test_images_without_labels_come_without_labels() -> None:
    _, labels, _ = one_pass(numbered(BATCH, labelled=False), 0)
    assert labels == [None] * BATCH


# --- What a person names ----------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_the_models_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "blue", 2, seed=1)
    write_images(tmp_path / "red", 1, seed=2)
    found = training_images(str(tmp_path), LABELS)
    assert found.labels is not None
    assert found.labels.tolist() == [LABELS.index("blue")] * 2 + [LABELS.index("red")]
    (tmp_path / "red").rename(tmp_path / "purple")
    with pytest.raises(DataError, match="'purple'"):
        training_images(str(tmp_path), LABELS)


def test_fashion_mnist_is_its_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, classes = np.zeros((3, 28, 28), np.uint8), np.asarray([9, 0, 4], np.uint8)
    monkeypatch.setattr(finetuning, "fashion_mnist_training", lambda: (pixels, classes))
    found = training_images("fashion-mnist", tuple("abcdefghij"))
    assert found.labels is not None
    assert found.labels.tolist() == [9, 0, 4]
    with pytest.raises(DataError, match="Fashion-MNIST has 10 classes, the model 4"):
        training_images("fashion-mnist", LABELS)


def test_naming_the_images_imports_no_library(tmp_path: Path) -> None:
    """A run in which nothing changed names them too."""
    write_images(tmp_path, 1, seed=1)
    check = (
        "import sys; from edgewright.finetuning import training_images; "
        "training_images(sys.argv[1], ()); "
        "print(*sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- The last rung, on the tiny network -------------------------------------------------------------------------------


class Trained:
    """The rung alone, for three batches; what it was taught with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.labels: list[Array | None] = []
        train, settings = finetune.finetuned, finetune.FinetuneSettings
        self.answers = iter([False])  # what the ranges give is not enough, what comes next is

        def watched(reference: Any, quantizer: Any, batches: Any, **options: Any) -> Any:
            self.labels += [labels for _, labels in batches(0)]
            return train(reference, quantizer, batches, **options)

        monkeypatch.setattr(finetune, "finetuned", watched)
        monkeypatch.setattr(finetune, "FinetuneSettings", lambda **given: settings(steps=3, **given))
        monkeypatch.setattr(ladder, "RUNGS", ladder.RUNGS[-1:])
        monkeypatch.setattr(ladder.Ladder, "meets", lambda *_: next(self.answers, True))


@pytest.fixture
def quantized(build_dir: Path, images: Any) -> Any:
    """Makes the INT8 graph of the tiny network in the test's copy of the finished build folder."""

    def make(folder: Path, **options: Any) -> Pipeline:
        given = {"build_dir": build_dir, "calibration": images.calibration, "evaluation": images.evaluation}
        pipeline = Pipeline(
            Options("tiny", **{**given, "threads": 1, "method": "minmax", **options}, finetune=str(folder))
        )
        with pipeline.workspace.locked():
            pipeline.quantized("cpu")
        return pipeline

    return make


def rungs_of(pipeline: Pipeline) -> list[str]:
    plan = json.loads(pipeline.workspace.path("plan-cpu.json").read_text())
    return [rung["name"] for rung in plan["rungs"]]


def test_images_with_labels_teach_these_too(monkeypatch: pytest.MonkeyPatch, quantized: Any, tmp_path: Path) -> None:
    for index, label in enumerate(LABELS):
        write_images(tmp_path / "training" / label, 3, seed=50 + index)
    trained = Trained(monkeypatch)
    pipeline = quantized(tmp_path / "training")
    assert rungs_of(pipeline) == ["ranges", "fine-tuning"]
    (labels,) = trained.labels
    assert labels is not None
    assert sorted(labels.tolist()) == sorted(3 * list(range(len(LABELS))))
    again = quantized(tmp_path / "training")
    assert all(run.cached for run in again.runs)
    write_images(tmp_path / "training" / LABELS[0], 4, seed=60)
    trained.answers = iter([False])
    other = quantized(tmp_path / "training")
    assert {run.name: run.changed for run in other.runs if not run.cached} == {"quantize cpu": ("training",)}


def test_images_without_labels_teach_what_fp32_says(
    monkeypatch: pytest.MonkeyPatch, quantized: Any, tmp_path: Path
) -> None:
    write_images(tmp_path / "training", 9, seed=70)
    trained = Trained(monkeypatch)
    assert rungs_of(quantized(tmp_path / "training")) == ["ranges", "fine-tuning"]
    assert trained.labels == [None]


def test_a_training_image_that_is_evaluated_too_is_refused(quantized: Any, images: Any) -> None:
    with pytest.raises(DataError, match="60 of 60 evaluation images"):
        quantized(images.evaluation)
