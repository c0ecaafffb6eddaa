"""The training loop: a toy set is learned, every step is the one of the textbook, a stopped run ends as a whole one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright import training_data
from edgewright.curve import CurveRow
from edgewright.export.zoo.lenet import lenet_bn_scratch
from edgewright.export.zoo.mbconv import StochasticDepth, mobilenet_effnet_b0
from edgewright.fit import LabelledImages, _parameter_groups, _set_stochastic_depth, device_named, fit
from edgewright.learned.numerics import numerics
from edgewright.recipes import Phase, Recipe
from edgewright.runtime.errors import DataError, DeviceError, ModelError
from edgewright.runtime.preprocess import Preprocess
from edgewright.training_data import Pixels, augmented, normalized, resized
from toy_images import PREPROCESS, toy_net, toy_set

RECIPE = Recipe(phases=(Phase(0.5, 1), Phase(1.0, 2)), batch_size=16, peak_learning_rate=1e-2)
TRAINING, TEST = toy_set(), toy_set(40, seed=4)


class StopError(Exception):
    pass


def without_seconds(rows: Sequence[CurveRow]) -> list[CurveRow]:
    return [replace(row, seconds=0.0) for row in rows]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


# What is learned


@pytest.mark.parametrize("changes", [{"optimizer": "adamw", "ema_decay": 0.9}, {"optimizer": "sgd", "ema_decay": None}])
def test_a_toy_set_is_learned_and_the_result_is_in_evaluation_mode(changes: dict[str, Any]) -> None:
    fitted = fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=replace(RECIPE, phases=(Phase(1.0, 25),), **changes))
    assert not any(module.training for module in fitted.model.modules())
    with torch.inference_mode():
        predicted = fitted.model(torch.from_numpy(PREPROCESS.batch(list(TEST.images)))).argmax(1).numpy()
    share = (predicted == TEST.labels).mean()
    assert share > 0.95
    assert fitted.curve[-1].test_top1 == pytest.approx(share, abs=0)
    assert fitted.curve[0].loss > 3 * fitted.curve[-1].loss > 0


def test_the_curve_counts_epochs_images_and_seconds() -> None:
    fitted = fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=replace(RECIPE, batch_size=20))
    assert [row.epoch for row in fitted.curve] == [1, 2, 3]
    assert [row.images for row in fitted.curve] == [80, 160, 240]  # 96 are four full batches of 20
    seconds = [row.seconds for row in fitted.curve]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_the_seconds_are_those_of_the_epochs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by 1 s in each step, 100 s in each resize of a set, and 1,000 s after each epoch."""
    now = 0.0

    def passing(seconds: float, give: Any = None) -> Any:
        nonlocal now
        now += seconds
        return give

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(training_data, "resized", lambda *given: passing(100.0, resized(*given)))
    fitted = fit(
        toy_net(),
        PREPROCESS,
        TRAINING,
        TEST,
        recipe=RECIPE,
        progress=lambda done, total, text: passing(1.0),
        after_epoch=lambda rows: passing(1000.0),
    )
    assert [row.seconds for row in fitted.curve] == [6.0, 12.0, 18.0]  # 96 images in batches of 16
    assert now == 4 * 1000 + 3 * 100 + 18  # the test images, and the training images in two sizes


def test_the_test_images_decide_nothing() -> None:
    fitted = fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=RECIPE)
    swapped = fit(toy_net(), PREPROCESS, TRAINING, LabelledImages(TEST.images, 1 - TEST.labels), recipe=RECIPE)
    assert_same_weights(fitted.model, swapped.model)
    for row, opposite in zip(fitted.curve, swapped.curve, strict=True):
        assert row.test_top1 == pytest.approx(1 - opposite.test_top1)


def test_an_epoch_sees_the_images_at_the_size_of_its_phase() -> None:
    seen: list[tuple[int, ...]] = []
    net = toy_net()
    net.register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape)) if module.training else None
    )
    fit(net, PREPROCESS, TRAINING, TEST, recipe=replace(RECIPE, batch_size=48, ema_decay=None))
    assert seen == [(48, 3, 4, 4)] * 2 + [(48, 3, 8, 8)] * 4


def test_both_sizes_of_cache_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=RECIPE)
    monkeypatch.setattr(training_data, "CACHED_BYTES", 0)
    assert Pixels(TRAINING.images, PREPROCESS, 8, torch.device("cpu"))._resized is None
    lazy = fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=RECIPE)
    assert_same_weights(cached.model, lazy.model)


# Every step

STEPS = 6
PEAK = 0.2
LINEAR = Recipe(
    phases=(Phase(1.0, STEPS),),
    optimizer="sgd",
    batch_size=len(TRAINING.images),
    peak_learning_rate=PEAK,
    warmup_share=0.5,
    weight_decay=0.1,
    label_smoothing=0.2,
    augment=False,
    ema_decay=None,
)


def linear_net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))


def one_cycle(step: int) -> float:
    """Smith & Topin's policy with torch's defaults: from peak/25 up, and down to peak/250,000, by cosines."""
    turn = LINEAR.warmup_share * STEPS - 1
    if step <= turn:
        low, share = PEAK / 25, step / turn
        return low + (PEAK - low) * (1 - math.cos(math.pi * share)) / 2
    low, share = PEAK / 25 / 1e4, (step - turn) / (STEPS - 1 - turn)
    return low + (PEAK - low) * (1 + math.cos(math.pi * share)) / 2


def sgd_by_hand() -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], list[float]]:
    """Weights and biases after each step, and the loss before it, in float64, from the formulas."""
    layer = linear_net()[1]
    assert isinstance(layer, nn.Linear)
    weight, bias = (value.detach().double().numpy().copy() for value in (layer.weight, layer.bias))
    x = PREPROCESS.batch(list(TRAINING.images)).reshape(len(TRAINING.images), -1).astype(np.float64)
    wanted = 0.8 * np.eye(2)[TRAINING.labels] + 0.2 / 2  # label smoothing: (1 − ε)·onehot + ε/K
    speeds = [np.zeros_like(weight), np.zeros_like(bias)]
    weights, biases, losses = [], [], []
    for step in range(STEPS):
        logits = x @ weight.T + bias
        logarithms = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(float(-(wanted * logarithms).sum(1).mean()))
        slope = (np.exp(logarithms) - wanted) / len(x)
        gradients = [slope.T @ x + 0.1 * weight, slope.sum(0)]  # the bias does not decay
        for index, gradient in enumerate(gradients):
            speeds[index] = 0.9 * speeds[index] + gradient
        weight = weight - one_cycle(step) * (gradients[0] + 0.9 * speeds[0])  # Nesterov
        bias = bias - one_cycle(step) * (gradients[1] + 0.9 * speeds[1])
        weights.append(weight)
        biases.append(bias)
    return weights, biases, losses


def test_sgd_takes_the_steps_of_the_formulas() -> None:
    weights, biases, losses = sgd_by_hand()
    fitted = fit(linear_net(), PREPROCESS, TRAINING, TEST, recipe=LINEAR)
    state = fitted.model.state_dict()
    np.testing.assert_allclose(state["1.weight"], weights[-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state["1.bias"], biases[-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([row.loss for row in fitted.curve], losses, rtol=1e-5)
    np.testing.assert_allclose([row.learning_rate for row in fitted.curve], [one_cycle(i) for i in range(STEPS)])


def test_the_average_is_that_of_all_steps() -> None:
    weights, _, _ = sgd_by_hand()
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.7 * expected + 0.3 * weight
    fitted = fit(linear_net(), PREPROCESS, TRAINING, TEST, recipe=replace(LINEAR, ema_decay=0.7))
    np.testing.assert_allclose(fitted.model.state_dict()["1.weight"], expected, rtol=1e-4, atol=1e-6)


def test_adamw_takes_the_steps_of_pytorch_with_its_one_cycle_scheduler() -> None:
    recipe = replace(LINEAR, optimizer="adamw", peak_learning_rate=0.01)
    fitted = fit(linear_net(), PREPROCESS, TRAINING, TEST, recipe=recipe)
    net = linear_net()
    weight, bias = net[1].parameters()
    optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=STEPS, pct_start=0.5)
    x, labels = torch.from_numpy(PREPROCESS.batch(list(TRAINING.images))), torch.from_numpy(TRAINING.labels)
    rates = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(net(x), labels, label_smoothing=0.2)
        loss.backward()
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    assert [row.learning_rate for row in fitted.curve] == pytest.approx(rates, rel=1e-7)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fitted.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_biases_and_normalization_do_not_decay_in_whatever_shape() -> None:
    """The written-out batch norm keeps its parameters as [1, C, 1, 1]."""
    model = lenet_bn_scratch()
    decayed, exempt = (group["params"] for group in _parameter_groups(model, 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {names[id(parameter)] for parameter in decayed} == {f"{layer}.weight" for layer in layers}
    assert len(decayed) + len(exempt) == len(names)


def test_stochastic_depth_rises_with_depth() -> None:
    model = mobilenet_effnet_b0()
    _set_stochastic_depth(model, 0.05)
    rates = [module.drop_probability for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates[0] == 0.0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.05 * 15 / 16)


# Interruption


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_a_stopped_run_goes_on_to_the_same_weights_and_curve(tmp_path: Path, ema_decay: float | None) -> None:
    recipe = replace(RECIPE, ema_decay=ema_decay)
    whole = fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=recipe)
    state_file = tmp_path / "state.pt"

    def stop_in_second_epoch(done: int, total: int, text: str) -> None:
        if text.startswith("2/3") and done == 9:
            raise StopError

    with pytest.raises(StopError):
        fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=recipe, state_file=state_file, progress=stop_in_second_epoch)
    seen: list[int] = []
    before: list[int] = []
    torch.manual_seed(99)  # whatever the random numbers of the new process
    resumed = fit(
        toy_net(),
        PREPROCESS,
        TRAINING,
        TEST,
        recipe=recipe,
        state_file=state_file,
        progress=lambda done, total, text: seen.append(done),
        after_epoch=lambda rows: before.append(len(rows)),
    )
    assert seen == list(range(7, 19))  # 6 steps an epoch; the first is not made again
    assert before == [1, 2, 3]
    assert_same_weights(resumed.model, whole.model)
    assert without_seconds(resumed.curve) == without_seconds(whole.curve)
    assert resumed.curve[0].seconds < resumed.curve[1].seconds


def starts_again(
    state_file: Path, net: nn.Module, training: LabelledImages, test: LabelledImages, **changes: Any
) -> bool:
    seen: list[int] = []
    fit(
        net, PREPROCESS, training, test, recipe=replace(RECIPE, **changes), state_file=state_file,
        progress=lambda done, total, text: seen.append(done),
    )  # fmt: skip
    return 1 in seen


@pytest.mark.parametrize("changed", ["nothing", "recipe", "images", "labels", "test images", "initial weights"])
def test_only_the_same_training_goes_on(tmp_path: Path, changed: str) -> None:
    state_file = tmp_path / "state.pt"
    fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=RECIPE, state_file=state_file)
    net, training, test = toy_net(), TRAINING, TEST
    if changed == "initial weights":
        with torch.no_grad():
            next(net.parameters()).add_(1.0)
    if changed == "images":
        training = replace(training, images=255 - training.images)
    if changed == "labels":
        training = replace(training, labels=1 - training.labels)
    if changed == "test images":
        test = replace(test, images=255 - test.images)
    changes = {"seed": 1} if changed == "recipe" else {}
    assert starts_again(state_file, net, training, test, **changes) == (changed != "nothing")


def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    state_file = tmp_path / "state.pt"
    state_file.write_bytes(b"no zip archive")
    with pytest.raises(DataError, match=r"state\.pt cannot be loaded"):
        fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=RECIPE, state_file=state_file)


def test_the_seed_decides() -> None:
    one, same = (fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=RECIPE) for _ in range(2))
    other = fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=replace(RECIPE, seed=1))
    assert_same_weights(one.model, same.model)
    with pytest.raises(AssertionError):
        assert_same_weights(one.model, other.model)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_largest_values_are_numbers_that_pytorch_takes(optimizer: str) -> None:
    """The rate and the decay are large enough to diverge, which is said; nothing overflows on the way."""
    huge = replace(RECIPE, optimizer=optimizer, seed=2**32 - 1)
    assert len(fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=huge).curve) == 3
    wild = replace(huge, peak_learning_rate=1e3, weight_decay=1e3)
    with pytest.raises(DataError, match="the loss became"):
        fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=wild)


# What is refused


def test_too_few_images_and_a_diverging_loss_are_refused() -> None:
    few = LabelledImages(TRAINING.images[:9], TRAINING.labels[:9])
    with pytest.raises(DataError, match="fewer than one batch of 16; take a smaller --batch-size"):
        fit(toy_net(), PREPROCESS, few, TEST, recipe=RECIPE)
    with pytest.raises(DataError, match="3 steps are too few for a schedule"):
        fit(toy_net(), PREPROCESS, TRAINING, TEST, recipe=replace(RECIPE, batch_size=96))
    broken = toy_net()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="loss became nan in step 1; lower the learning rate"):
        fit(broken, PREPROCESS, TRAINING, TEST, recipe=RECIPE)


@pytest.mark.parametrize("steps", [5, 6, 7, 11])
def test_the_shortest_schedules_work(steps: int) -> None:
    """torch's scheduler divides by zero where the warm-up is one step: 5 steps at a share of 0.2."""
    recipe = replace(LINEAR, phases=(Phase(1.0, steps),), warmup_share=0.2)
    if steps == 5:
        with pytest.raises(DataError, match="too few"):
            fit(linear_net(), PREPROCESS, TRAINING, TEST, recipe=recipe)
    else:
        assert len(fit(linear_net(), PREPROCESS, TRAINING, TEST, recipe=recipe).curve) == steps


def test_a_size_that_the_network_cannot_take_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(ModelError, match=r"cannot take images of 9×9 pixels .*; choose another --size"):
        fit(
            linear_net(), PREPROCESS.with_size(9), TRAINING, TEST, recipe=LINEAR,
            after_epoch=lambda rows: seen.append(len(rows)),
        )  # fmt: skip
    assert seen == []


@pytest.mark.parametrize(
    "preprocess", [Preprocess(8, (8, 8), (0.5,) * 3, (0.5,) * 3), Preprocess((8, 9), None, (0.5,) * 3, (0.5,) * 3)]
)
def test_only_square_images_without_a_crop(preprocess: Preprocess) -> None:
    with pytest.raises(DataError, match="needs a resize to a square"):
        fit(toy_net(), preprocess, TRAINING, TEST, recipe=RECIPE)


def test_batch_norm_over_one_value_is_explained() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.BatchNorm1d(2))
    with pytest.raises(DataError, match=r"cannot be trained in batches of 1 \(.*; take larger batches"):
        fit(net, PREPROCESS, TRAINING, TEST, recipe=replace(LINEAR, batch_size=1))


def test_an_unknown_or_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="unknown device 'tpu'; choose from cpu, cuda"):
        device_named("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA GPU here; train with --device cpu"):
        device_named("cuda")


@pytest.mark.gpu
def test_a_gpu_learns_the_same(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA GPU here")
    recipe, device = replace(RECIPE, phases=(Phase(0.5, 2), Phase(1.0, 10)), ema_decay=0.9), device_named("cuda")
    state_file = tmp_path / "state.pt"
    on_cpu = fit(toy_net(dropout=0.0), PREPROCESS, TRAINING, TEST, recipe=recipe)
    on_gpu = fit(
        toy_net(dropout=0.0), PREPROCESS, TRAINING, TEST, recipe=recipe, device=device, state_file=state_file
    )  # fmt: skip
    assert all(value.is_cuda for value in on_gpu.model.state_dict().values())
    assert on_gpu.curve[-1].test_top1 > 0.95
    assert on_gpu.curve[0].loss == pytest.approx(on_cpu.curve[0].loss, rel=0.02)  # the same images in the same order
    resumed = fit(
        toy_net(dropout=0.0), PREPROCESS, TRAINING, TEST, recipe=recipe, device=device, state_file=state_file
    )  # fmt: skip
    assert resumed.curve == on_gpu.curve


# What the network sees


def test_training_sees_the_numbers_of_the_runtime() -> None:
    """Training normalizes with torch, the runtime with numpy: equal to the last bit, for three channels and for one."""
    for preprocess in (PREPROCESS, Preprocess((8, 8), None, (0.286,), (0.353,), colour="L")):
        images = TRAINING.images[:4]
        trained_on = normalized(torch.from_numpy(resized(images, preprocess, 8)), preprocess).numpy()
        np.testing.assert_array_equal(trained_on, preprocess.batch(list(images)))


def test_augmentation_moves_each_image_by_at_most_the_margin_and_flips_it() -> None:
    dots = torch.zeros((200, 16, 16), dtype=torch.uint8)
    dots[:, 5, 8] = 255
    moved = augmented(dots, 1 / 8, torch.Generator().manual_seed(0)).numpy()
    rows, columns = np.nonzero(moved)[1:]
    assert len(rows) == 200
    assert set(rows) == set(range(3, 8))  # 5 ± 2
    assert set(columns) == {*range(6, 11), *range(5, 10)}  # 8 ± 2, and its mirror image 7 ± 2


@pytest.mark.parametrize("augment", [True, False])
def test_without_augmentation_every_image_is_seen_as_it_is_once_an_epoch(augment: bool) -> None:
    seen: list[NDArray[np.float32]] = []
    net = toy_net()
    net.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0].numpy()) if module.training else None)
    recipe = replace(RECIPE, phases=(Phase(1.0, 1),), augment=augment, ema_decay=None)
    fit(net, PREPROCESS, TRAINING, TEST, recipe=recipe)
    theirs = {image.tobytes() for image in PREPROCESS.batch(list(TRAINING.images))}
    assert len(seen) == len(theirs) == 96
    assert ({np.ascontiguousarray(image).tobytes() for image in seen} == theirs) == (not augment)


@pytest.mark.parametrize("threads", [-1, 1025, 10**20])
def test_a_number_of_threads_that_no_machine_has_is_refused(threads: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(DataError, match=f"threads is {threads}, expected from 0 to 1024"), numerics(threads):
        pass
    assert torch.get_num_threads() == before


def test_the_settings_are_restored() -> None:
    before = torch.get_num_threads()

    def interrupted() -> None:
        with numerics(threads=1):
            assert torch.get_num_threads() == 1
            assert torch.tensor([1e-39]).mul(1.0).item() == 0.0
            raise StopError

    with pytest.raises(StopError):
        interrupted()
    assert torch.get_num_threads() == before
    assert torch.tensor([1e-39]).mul(1.0).item() != 0.0
