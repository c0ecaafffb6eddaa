"""Training a network of the registry: the checkpoint says what it is for, and is the same however often it is made."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from command import Command
from edgewright import train
from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.cli_train import train as train_command
from edgewright.console import _DelayedBar
from edgewright.curve import CurveRow
from edgewright.export.models import FASHION_MNIST_LABELS, MODELS
from edgewright.export.weights import load_into, read_checkpoint
from edgewright.fit import _Bar
from edgewright.learned.numerics import MOST_THREADS
from edgewright.recipes import LARGEST_SEED, recipe_of, trainable
from edgewright.runtime.errors import DataError, DeviceError, EdgewrightError, ModelError, WorkspaceError
from edgewright.train import LARGEST_SIZE, Training, train_checkpoint

SEEN = fashion_mnist_calibration().subset(np.arange(256))
TESTED = fashion_mnist_test().subset(np.arange(150))
RECIPE = recipe_of("lenet_bn", epochs=3, batch_size=32)


class StopError(Exception):
    pass


def use_few_images(patch: pytest.MonkeyPatch) -> None:
    """256 training and 150 test images instead of all."""
    split = np.stack([np.asarray(image) for image in SEEN]), SEEN.labels
    patch.setattr(train, "fashion_mnist_training", lambda folder: split)
    patch.setattr(train, "fashion_mnist_test", lambda: TESTED)


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_images(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A finished training of `lenet_bn`; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        return train_checkpoint("lenet_bn", tmp_path_factory.mktemp("made") / "net.safetensors", recipe=RECIPE)


def state_of(path: Path) -> dict[str, Tensor]:
    return read_checkpoint(path).state


def assert_same_state(one: Path, other: Path) -> None:
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def facts_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def without_seconds(rows: Sequence[CurveRow]) -> list[CurveRow]:
    return [replace(row, seconds=0.0) for row in rows]


# What is written


def test_the_accuracy_is_that_of_the_float16_values_through_the_preprocessing_of_the_runtime(made: Training) -> None:
    with safe_open(made.checkpoint, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    checkpoint = read_checkpoint(made.checkpoint)
    model = MODELS["lenet_bn"].build(10).eval()
    load_into(model, checkpoint.state, "it")
    assert checkpoint.preprocess is not None
    with torch.inference_mode():
        predicted = model(torch.from_numpy(checkpoint.preprocess.batch(TESTED))).argmax(1).numpy()
    assert made.top1 == (predicted == TESTED.labels).mean()
    assert made.top1 > 0.4


def test_the_checkpoint_describes_itself(made: Training) -> None:
    checkpoint, facts = read_checkpoint(made.checkpoint), facts_of(made.checkpoint)
    assert checkpoint.preprocess == MODELS["lenet_bn"].task.preprocess
    assert checkpoint.labels == FASHION_MNIST_LABELS
    assert json.loads(facts["recipe"])["batch_size"] == 32
    assert facts["start"] == made.start == "fresh weights"


def test_the_curve_is_in_the_files_beside_it(made: Training) -> None:
    rows = list(csv.DictReader(made.curve_csv.read_text().splitlines()))
    assert [float(row["test_top1"]) for row in rows] == [row.test_top1 for row in made.curve]
    assert [int(row["images"]) for row in rows] == [256, 512, 768]
    assert made.seconds == made.curve[-1].seconds > 0
    assert f"lenet_bn, Fashion-MNIST at 28×28: {100 * made.curve[-1].test_top1:.2f} %" in made.curve_svg.read_text()


def test_the_same_seed_gives_the_same_values_and_another_does_not(made: Training, tmp_path: Path) -> None:
    same = train_checkpoint("lenet_bn", tmp_path / "same.safetensors", recipe=RECIPE)
    assert_same_state(same.checkpoint, made.checkpoint)
    assert facts_of(same.checkpoint) == facts_of(made.checkpoint)
    assert without_seconds(same.curve) == without_seconds(made.curve)
    other = train_checkpoint("lenet_bn", tmp_path / "other.safetensors", recipe=replace(RECIPE, seed=1))
    with pytest.raises(AssertionError):
        assert_same_state(other.checkpoint, made.checkpoint)


@pytest.mark.parametrize("stop_at", [9, 24])
def test_an_interrupted_training_goes_on_to_the_same_checkpoint(made: Training, tmp_path: Path, stop_at: int) -> None:
    """8 steps an epoch: stopped right after the first epoch, and in the very last step."""
    path, state_file = tmp_path / "net.safetensors", tmp_path / "state.pt"

    def stop(done: int, total: int, text: str) -> None:
        assert total == 24
        if done == stop_at:
            raise StopError

    with pytest.raises(StopError):
        train_checkpoint("lenet_bn", path, recipe=RECIPE, state_file=state_file, progress=stop)
    assert not path.exists()
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 1 + (stop_at - 1) // 8
    seen: list[int] = []
    resumed = train_checkpoint(
        "lenet_bn",
        path,
        recipe=RECIPE,
        state_file=state_file,
        progress=lambda done, total, text: seen.append(done),
    )
    assert seen[0] == 8 * ((stop_at - 1) // 8) + 1
    assert_same_state(resumed.checkpoint, made.checkpoint)
    assert facts_of(path) == facts_of(made.checkpoint)
    assert without_seconds(resumed.curve) == without_seconds(made.curve)
    assert resumed.top1 == made.top1
    assert not state_file.exists()


def test_another_size_becomes_part_of_the_preprocessing(tmp_path: Path) -> None:
    recipe = recipe_of("fashion_densenet", epochs=1, batch_size=42)
    training = train_checkpoint("fashion_densenet", tmp_path / "net.safetensors", recipe=recipe, size=32)
    preprocess = read_checkpoint(training.checkpoint).preprocess
    assert preprocess == MODELS["fashion_densenet"].task.preprocess.with_size(32)
    assert preprocess.input_shape == (1, 32, 32)


def test_a_checkpoint_with_other_classes_is_the_start(tmp_path: Path, made: Training) -> None:
    given = tmp_path / "seven.pth"
    torch.save(MODELS["lenet_bn"].build(7).state_dict(), given)
    first = train_checkpoint("lenet_bn", tmp_path / "a.safetensors", recipe=RECIPE, start=str(given))
    assert first.start.endswith("fresh since it has 7 classes")
    again = train_checkpoint("lenet_bn", tmp_path / "b.safetensors", recipe=RECIPE, start=str(made.checkpoint))
    assert again.start == str(made.checkpoint)
    assert again.curve[0].loss < made.curve[0].loss  # it had learned something before


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "efficientnet_lite0"}, ModelError, "no training recipe for efficientnet_lite0; train one of "),
        ({"name": "lenett"}, ModelError, "unknown model 'lenett'.*lenet"),
        ({"start": "lite0"}, ModelError, "lenet cannot start from lite0"),
        ({"start": "nowhere.pth"}, ModelError, "no weights file nowhere.pth"),
        ({"device": "tpu"}, DeviceError, "unknown device 'tpu'"),
        ({"size": 0}, DataError, "size is 0 pixels, expected from 1 to 4096"),
        ({"size": 4097}, DataError, "size is 4097 pixels, expected from 1 to 4096"),
        ({"size": 32}, ModelError, "cannot take images of 32×32 pixels"),
        ({"path": Path("net.pth")}, WorkspaceError, r"net\.pth would be a safetensors file"),
        ({"path": Path(__file__) / "net.safetensors"}, WorkspaceError, "cannot write .*test_train.py/net.csv"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    tmp_path: Path, arguments: dict[str, Any], error: type[EdgewrightError], message: str
) -> None:
    given: dict[str, Any] = {"name": "lenet", "path": tmp_path / "net.safetensors", **arguments}
    seen: list[int] = []
    with pytest.raises(error, match=message):
        train_checkpoint(**given, progress=lambda done, total, text: seen.append(done))
    assert seen == []
    assert not list(tmp_path.iterdir())


# The command


def test_the_command_trains_and_says_what_came_out(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "out" / "net.safetensors"
    options = ("--epochs", 1, "--batch-size", 32, "--optimizer", "sgd", "--learning-rate", 0.1, "--weight-decay", 0)
    others = ("--label-smoothing", 0.1, "--augment", "--seed", 3, "--threads", 1, "--from", "none")
    done = command(
        "train", "lenet", "--output", path, "--build-dir", tmp_path / "build", *options, *others, "--json"
    )  # fmt: skip
    assert done.code == 0, done.err
    recipe = json.loads(facts_of(path)["recipe"])
    assert recipe | {"optimizer": "sgd", "batch_size": 32, "peak_learning_rate": 0.1, "weight_decay": 0.0} == recipe
    assert recipe | {"label_smoothing": 0.1, "augment": True, "seed": 3} == recipe
    document = done.document
    assert document.pop("seconds") > 0
    assert 0 <= document.pop("top1") <= 1
    assert document == {
        "schema": "edgewright.train/1",
        "model": "lenet",
        "path": str(path),
        "start": "fresh weights",
        "epochs": 1,
        "curve": {"csv": str(path.with_suffix(".csv")), "svg": str(path.with_suffix(".svg"))},
    }


def test_without_options_the_recipe_and_the_place_are_the_usual_ones(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def instead(name: str, path: Path, **arguments: Any) -> Training:
        given.update(arguments, name=name, path=path)
        return Training(path, 0.5, "x", (CurveRow(1, 1, 1.0, 1.0, 1.0, 1.0, 1.0),), path, path)

    monkeypatch.setattr(train, "train_checkpoint", instead)
    done = command("train", "--build-dir", tmp_path)
    assert done.code == 0, done.err
    assert "top-1 50.00 % on the 10,000 test images" in done.out
    assert given["recipe"] == recipe_of("mobilenet_effnet_b0")
    assert given["path"] == tmp_path / "mobilenet_effnet_b0" / "trained.safetensors"
    assert [given[word] for word in ("start", "size", "data", "device")] == [None, None, None, "cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("lenet", "--learning-rate", 0), "learning rate is 0.0"),
        (("lenet", "--label-smoothing", 1), "label smoothing is 1.0"),
        (("efficientnet_lite0",), f"train one of {', '.join(trainable())}"),
        (("lenet", "--from", "lite0"), "lenet cannot start from lite0"),
        (("lenet", "--device", "cuda"), "no CUDA GPU here; train with --device cpu"),
    ],
)
def test_the_command_refuses_in_one_line(
    command: Command, tmp_path: Path, options: Sequence[object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in command("train", *options, "--build-dir", tmp_path).error


@pytest.mark.parametrize(
    "options",
    [
        ("--epochs", 0),
        ("--optimizer", "adam"),
        ("--batch-size", 0),
        ("--size", 0),
        ("--size", LARGEST_SIZE + 1),
        ("--seed", -1),
        ("--seed", LARGEST_SEED + 1),
        ("--threads", MOST_THREADS + 1),
    ],
)
def test_the_command_refuses_values_out_of_range(command: Command, options: Sequence[object]) -> None:
    done = command("train", "lenet", *options)
    assert done.code == 2
    assert f"Invalid value for '{options[0]}'" in done.err


@pytest.mark.parametrize(
    ("option", "largest"), [("seed", LARGEST_SEED), ("size", LARGEST_SIZE), ("threads", MOST_THREADS)]
)
def test_the_command_takes_the_largest_values_of_the_library(option: str, largest: int) -> None:
    (given,) = (parameter for parameter in train_command.params if parameter.name == option)
    assert isinstance(given.type, click.IntRange)
    assert (given.type.min, given.type.max) == (1 if option == "size" else 0, largest)


# What is seen meanwhile


def widest_text(epochs: int) -> str:
    """Of the last epoch, with a loss of two digits, nothing wrong and 9,999 images a second."""
    texts: list[str] = []
    row = CurveRow(epochs - 1, 1, 1.0, 1.0, 1.0, test_top1=1.0, seconds=0.0)
    recipe = recipe_of("lenet", epochs=epochs, batch_size=9999)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 0.0)
        bar = _Bar(lambda done, total, text: texts.append(text), epochs - 1, recipe, 1, [row])
        patch.setattr(time, "monotonic", lambda: 1.0)
        bar.show(1, 12.345678, 1.0)
    return texts[0]


def test_the_widest_words_of_fewer_than_100_epochs_take_46_columns() -> None:
    assert widest_text(99) == "99/99 loss 12.35 train 100.0 test 100.0 9999/s"
    assert len(widest_text(99)) == 46


@pytest.mark.parametrize("epochs", [10, 100])
def test_the_bar_shrinks_before_its_words_wrap(epochs: int) -> None:
    widest = widest_text(epochs)
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = _DelayedBar(console, "train", len("train"))
    bar.move(19, 20, widest)
    bar.remove()
    with console.capture() as capture:
        console.print(bar._progress)
    (line,) = capture.get().splitlines()
    assert widest in line


def test_the_bar_says_how_it_stands(tmp_path: Path) -> None:
    texts: list[str] = []
    train_checkpoint(
        "lenet_bn",
        tmp_path / "net.safetensors",
        recipe=recipe_of("lenet_bn", epochs=2, batch_size=32),
        progress=lambda done, total, text: texts.append(text),
    )
    assert re.fullmatch(r"1/2 loss \d\.\d\d train \d+\.\d test – \d+k?/s", texts[0])
    assert re.fullmatch(r"2/2 loss \d\.\d\d train \d+\.\d test \d+\.\d \d+k?/s", texts[-1])
