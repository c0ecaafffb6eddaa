"""Training: a tiny network learns a separable toy set; a stopped run goes on to the very same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.export.zoo.mbconv import StochasticDepth, mobilenet_effnet_b0
from edgewright.runtime.errors import DataError, ModelError
from edgewright.runtime.preprocess import Preprocess
from edgewright.train import (
    Phase,
    Recipe,
    _set_stochastic_depth,
    augmented,
    normalized,
    resized,
    train,
    train_checkpoint,
)

PREPROCESS = Preprocess((8, 8), None, (0.5,) * 3, (0.25,) * 3)
RECIPE = Recipe(phases=(Phase(4, 1), Phase(8, 2)), batch_size=16, peak_learning_rate=1e-2)


def toy_set(count: int = 96) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bright upper half is class 0, bright lower half class 1."""
    rng = np.random.default_rng(3)
    labels = np.arange(count) % 2
    images = rng.integers(0, 60, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 150
    return images, labels.astype(np.int64)


def toy_net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 2),
    )


class StopError(Exception):
    pass


def test_a_toy_set_is_learned_and_the_result_is_in_evaluation_mode() -> None:
    images, labels = toy_set()
    model = train(toy_net(), PREPROCESS, images, labels, recipe=replace(RECIPE, phases=(Phase(8, 25),), ema_decay=0.9))
    assert not model.training
    with torch.inference_mode():
        predicted = model(normalized(torch.from_numpy(images), PREPROCESS)).argmax(1).numpy()
    assert (predicted == labels).mean() > 0.95


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    images, labels = toy_set()
    whole = train(toy_net(), PREPROCESS, images, labels, recipe=RECIPE)
    state_file = tmp_path / "state.pt"

    def stop_in_second_epoch(done: int, total: int, text: str) -> None:
        if "epoch 2" in text:
            raise StopError

    with pytest.raises(StopError):
        train(
            toy_net(), PREPROCESS, images, labels, recipe=RECIPE, state_file=state_file, progress=stop_in_second_epoch
        )
    seen: list[str] = []
    resumed = train(
        toy_net(),
        PREPROCESS,
        images,
        labels,
        recipe=RECIPE,
        state_file=state_file,
        progress=lambda d, t, x: seen.append(x),
    )
    assert not any("epoch 1" in text for text in seen)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_another_recipe_starts_again(tmp_path: Path) -> None:
    images, labels = toy_set()
    state_file = tmp_path / "state.pt"
    train(toy_net(), PREPROCESS, images, labels, recipe=RECIPE, state_file=state_file)
    seen: list[str] = []
    train(
        toy_net(), PREPROCESS, images, labels, recipe=replace(RECIPE, seed=1), state_file=state_file,
        progress=lambda done, total, text: seen.append(text),
    )  # fmt: skip
    assert any("epoch 1" in text for text in seen)


@pytest.mark.parametrize("changed", ["images", "labels", "initial weights"])
def test_another_training_starts_again(tmp_path: Path, changed: str) -> None:
    images, labels = toy_set()
    state_file = tmp_path / "state.pt"
    train(toy_net(), PREPROCESS, images, labels, recipe=RECIPE, state_file=state_file)
    net = toy_net()
    if changed == "initial weights":
        with torch.no_grad():
            next(net.parameters()).add_(1.0)
    seen: list[str] = []
    train(
        net,
        PREPROCESS,
        255 - images if changed == "images" else images,
        1 - labels if changed == "labels" else labels,
        recipe=RECIPE,
        state_file=state_file,
        progress=lambda done, total, text: seen.append(text),
    )
    assert any("epoch 1" in text for text in seen)


def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    images, labels = toy_set()
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(b"no zip archive")
    with pytest.raises(DataError, match=r"state\.pt cannot be loaded"):
        train(toy_net(), PREPROCESS, images, labels, recipe=RECIPE, state_file=state_file)


def test_too_few_images_and_a_diverging_loss_are_refused() -> None:
    images, labels = toy_set()
    with pytest.raises(DataError, match="fewer than one batch of 16"):
        train(toy_net(), PREPROCESS, images[:9], labels[:9], recipe=RECIPE)
    broken = toy_net()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="loss became nan"):
        train(broken, PREPROCESS, images, labels, recipe=RECIPE)


def test_only_networks_with_a_recipe_are_trained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no training recipe for efficientnet_lite0"):
        train_checkpoint("efficientnet_lite0", tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="mobilenet_effnet_b0"):
        train_checkpoint("mobilenet_efnet_b0", tmp_path / "x.safetensors")


def test_training_sees_the_numbers_of_the_runtime() -> None:
    """Training normalizes with torch, the runtime with numpy: equal to the last bit."""
    images, _ = toy_set(4)
    trained_on = normalized(torch.from_numpy(resized(images, PREPROCESS, 8)), PREPROCESS).numpy()
    np.testing.assert_array_equal(trained_on, PREPROCESS.batch(list(images)))


def test_augmentation_moves_each_image_by_at_most_the_margin_and_flips_it() -> None:
    dots = torch.zeros((200, 16, 16), dtype=torch.uint8)
    dots[:, 5, 8] = 255
    moved = augmented(dots, 1 / 8, torch.Generator().manual_seed(0)).numpy()
    rows, columns = np.nonzero(moved)[1:]
    assert len(rows) == 200
    assert set(rows) == set(range(3, 8))  # 5 ± 2
    assert set(columns) == {*range(6, 11), *range(5, 10)}  # 8 ± 2, and its mirror image 7 ± 2


def test_stochastic_depth_rises_with_depth() -> None:
    model = mobilenet_effnet_b0()
    _set_stochastic_depth(model, 0.05)
    rates = [module.drop_probability for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates[0] == 0.0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.05 * 15 / 16)
