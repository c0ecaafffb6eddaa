"""The training loop: one optimizer, one one-cycle schedule, one test after every epoch; it can be stopped and resumed.

What decides the random numbers of an epoch is its seed alone, and the state of everything else is saved after each
epoch, so that a resumed training gives the very weights that it would have given in one go (on a CPU, with the same
number of threads).
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgewright.curve import CurveRow
from edgewright.export.zoo.mbconv import StochasticDepth
from edgewright.recipes import Recipe
from edgewright.runtime.errors import DataError, DeviceError, ModelError
from edgewright.runtime.files import sha256_of, write_bytes
from edgewright.runtime.preprocess import Preprocess
from edgewright.training_data import Pixels, augmented, batches, normalized, square_size, top1
from edgewright.workspace import source_hash

__all__ = ["CODE", "Fitted", "LabelledImages", "Progress", "device_named", "fit"]

MOMENTUM = 0.9  # of SGD, Nesterov's form; usual since Sutskever et al. 2013
DEVICES = ("cpu", "cuda")
CODE = (
    "train.py",
    "fit.py",
    "learned/numerics.py",
    "training_data.py",
    "recipes.py",
    "export/zoo",
    "runtime/preprocess.py",
)
"""The sources that decide what a training gives."""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, a few words) as training goes on."""


@dataclass(frozen=True)
class LabelledImages:
    """Grey `images`, uint8 `[N, H, W]`, and `labels`, int64 `[N]`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Fitted:
    """A trained network in evaluation mode, and how it came about: one row for each epoch."""

    model: nn.Module
    curve: tuple[CurveRow, ...]


def fit(
    model: nn.Module,
    preprocess: Preprocess,
    training: LabelledImages,
    test: LabelledImages,
    *,
    recipe: Recipe,
    device: torch.device | None = None,
    state_file: Path | None = None,
    progress: Progress = lambda done, total, text: None,
    after_epoch: Callable[[Sequence[CurveRow]], None] = lambda rows: None,
) -> Fitted:
    """Trains `model` for `preprocess`, whose size must be fixed and square.

    The `test` images are measured after every epoch for the curve alone: nothing is chosen by them, and the weights
    after the last epoch are what is returned. With `state_file`, the state is saved there after every epoch, and a run
    with the same recipe, images, initial weights, device and code goes on from it. `after_epoch` is called with the
    curve so far, and once before the first epoch with what there is.
    Raises `DataError` if there are too few images for the recipe or the loss stops being finite, `ModelError` if the
    network cannot take images of this size.
    """
    device = device or torch.device("cpu")
    steps = _steps_per_epoch(len(training.images), recipe)
    final_size = square_size(preprocess)
    sizes = [max(1, round(final_size * scale)) for scale in recipe.scales]
    for size in sorted({*sizes, final_size}):
        _check_size(model, preprocess, size)
    _set_stochastic_depth(model, recipe.stochastic_depth)
    identity = _identity(model, recipe, preprocess, training, test, device)
    trainee = _Trainee(model.to(device), recipe, steps * recipe.epochs, identity)
    if state_file is not None:
        trainee.resume(state_file)
    after_epoch(trainee.curve)
    tested, test_labels = Pixels(test.images, preprocess, final_size, device), torch.from_numpy(test.labels)
    trained: Pixels | None = None
    labels = torch.from_numpy(training.labels).to(device)
    for epoch in range(len(trainee.curve), recipe.epochs):
        if trained is None or sizes[epoch] != sizes[epoch - 1]:
            trained = Pixels(training.images, preprocess, sizes[epoch], device)
        bar = _Bar(progress, epoch, recipe, steps, trainee.curve)
        with _explained(recipe):
            loss, accuracy = _train_epoch(trainee, trained, labels, preprocess, recipe.seed * 1000 + epoch, bar)
            test_accuracy = top1(trainee.result(), preprocess, tested, test_labels)
        trainee.curve.append(
            CurveRow(
                epoch=epoch + 1,
                images=(epoch + 1) * steps * recipe.batch_size,
                learning_rate=trainee.learning_rate,
                loss=loss,
                train_top1=accuracy,
                test_top1=test_accuracy,
                seconds=bar.seconds,
            )
        )
        if state_file is not None:
            trainee.save(state_file)
        after_epoch(trainee.curve)
    return Fitted(trainee.result(), tuple(trainee.curve))


def device_named(name: str) -> torch.device:
    """The device "cpu" or "cuda". Raises `DeviceError` if it is unknown, or PyTorch cannot use it here."""
    if name not in DEVICES:
        raise DeviceError(f"unknown device {name!r}", f"choose from {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "PyTorch finds no CUDA GPU here", "train with --device cpu, or install the driver and a PyTorch with CUDA"
        )
    return torch.device(name)


class _Trainee:
    """The network with everything that changes while it learns; saved and loaded together."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int, identity: str) -> None:
        self.recipe = recipe
        self.identity = identity
        self.curve: list[CurveRow] = []
        self.model = model.train().to(memory_format=torch.channels_last)
        self.averaged = _averaged(self.model, recipe.ema_decay)
        self.optimizer = _optimizer(self.model, recipe)
        self.schedule = OneCycleLR(
            self.optimizer,
            recipe.peak_learning_rate,
            total_steps=steps,
            pct_start=recipe.warmup_share,
            cycle_momentum=recipe.optimizer == "adamw",  # SGD keeps its 0.9
        )
        self.learning_rate = 0.0  # of the last step
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)

    def step(self, x: Tensor, targets: Tensor) -> tuple[float, int]:
        """One update on float32 `[N, C, H, W]` and labels `[N]`: the loss, and how many were right before it."""
        logits = self.model(x)
        loss = self.loss(logits, targets)
        loss.backward()
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return float(loss.item()), int((logits.argmax(1) == targets).sum())

    def result(self) -> nn.Module:
        """The network to keep, in evaluation mode: the averaged one if the recipe wants an average."""
        model: nn.Module = self.model if self.averaged is None else self.averaged.module
        return model.eval()

    def save(self, file: Path) -> None:
        """Writes the state, whole or not at all."""
        content = {name: part.state_dict() for name, part in self._parts().items()}
        rows = [asdict(row) for row in self.curve]
        buffer = io.BytesIO()
        torch.save({**content, "identity": self.identity, "curve": rows}, buffer)
        write_bytes(file, buffer.getvalue())

    def resume(self, file: Path) -> None:
        """Loads a state of the same training; leaves everything as it is if there is none."""
        if not file.exists():
            return
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever damaged bytes lead to
            raise DataError(f"{file} cannot be loaded ({type(error).__name__})", "remove it to start again") from error
        if not isinstance(content, dict) or content.get("identity") != self.identity:
            return
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        self.curve = [CurveRow(**row) for row in content["curve"]]

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts if self.averaged is None else {**parts, "averaged": self.averaged}


class _Bar:
    """Says after every step how the epoch stands, in 46 columns or fewer below 100 epochs and a loss of 100."""

    def __init__(self, progress: Progress, epoch: int, recipe: Recipe, steps: int, curve: Sequence[CurveRow]) -> None:
        self._progress = progress
        self._done, self._total = epoch * steps, recipe.epochs * steps
        self._title = f"{epoch + 1}/{recipe.epochs}"
        self._test = f"{100 * curve[-1].test_top1:.1f}" if curve else "–"
        self._seconds_before = curve[-1].seconds if curve else 0.0
        self._batch_size = recipe.batch_size
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent in epochs since the start of the training."""
        return self._seconds_before + time.monotonic() - self._began

    def show(self, step: int, loss: float, accuracy: float) -> None:
        """After `step` steps of this epoch with this mean loss and this share of right answers."""
        rate = step * self._batch_size / max(time.monotonic() - self._began, 1e-9)
        speed = f"{rate:.0f}/s" if rate < 9999.5 else f"{rate / 1000:.0f}k/s"
        text = f"{self._title} loss {loss:.2f} train {100 * accuracy:.1f} test {self._test} {speed}"
        self._progress(self._done + step, self._total, text)


def _train_epoch(
    trainee: _Trainee, pixels: Pixels, labels: Tensor, preprocess: Preprocess, seed: int, bar: _Bar
) -> tuple[float, float]:
    """One pass: mean loss and share of right answers.

    Its random numbers depend on `seed` alone, so that a resumed run repeats what it would have been.
    """
    recipe = trainee.recipe
    trainee.model.train()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    mean_loss, right, accuracy = 0.0, 0, 0.0
    for step, index in enumerate(batches(len(pixels), recipe.batch_size, generator), 1):
        batch = pixels[index]
        if recipe.augment:
            batch = augmented(batch, recipe.crop_share, generator)
        loss, hits = trainee.step(normalized(batch, preprocess), labels[index.to(labels.device)])
        if not math.isfinite(loss):
            raise DataError(f"the loss became {loss} in step {step}", "lower the learning rate or look at the data")
        mean_loss += (loss - mean_loss) / step
        right += hits
        accuracy = right / (step * recipe.batch_size)
        bar.show(step, mean_loss, accuracy)
    return mean_loss, accuracy


@contextlib.contextmanager
def _explained(recipe: Recipe) -> Iterator[None]:
    """Says what PyTorch's errors in the middle of a training mean."""
    smaller = f"the memory does not suffice for batches of {recipe.batch_size}", "take a smaller --batch-size or --size"
    try:
        yield
    except torch.OutOfMemoryError:
        raise DeviceError(*smaller) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the CPU's allocator, which has no class for it
            raise
        raise DeviceError(*smaller) from None
    except ValueError as error:  # of batch normalization, whose variance needs two values
        raise DataError(
            f"the network cannot be trained in batches of {recipe.batch_size} ({error})", "take larger batches"
        ) from None


def _steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Full batches in one pass. Raises `DataError` if there are too few for a batch or a schedule."""
    steps = images // recipe.batch_size
    if steps == 0:
        raise DataError(
            f"{images} training images are fewer than one batch of {recipe.batch_size}", "take a smaller --batch-size"
        )
    if steps * recipe.epochs * recipe.warmup_share <= 1:
        raise DataError(
            f"{steps * recipe.epochs} steps are too few for a schedule that rises and falls", "take smaller batches"
        )
    return steps


def _check_size(model: nn.Module, preprocess: Preprocess, size: int) -> None:
    """Raises `ModelError` if the network cannot take images of this size: an early error instead of a deep one."""
    blank = torch.zeros((1, len(preprocess.mean), size, size))
    try:
        with torch.inference_mode():
            model.eval()(blank)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the network cannot take images of {size}×{size} pixels ({reason})", "choose another --size"
        ) from None


def _identity(
    model: nn.Module,
    recipe: Recipe,
    preprocess: Preprocess,
    training: LabelledImages,
    test: LabelledImages,
    device: torch.device,
) -> str:
    """SHA-256 of everything that decides what a training gives."""
    weights = (value.detach().cpu().numpy().tobytes() for value in model.state_dict().values())
    images = (array.tobytes() for part in (training, test) for array in (part.images, part.labels))
    words = repr((recipe, preprocess, device.type, torch.__version__, source_hash(*CODE)))
    return sha256_of([words.encode(), *images, *weights])


def _averaged(model: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    average: Any = get_ema_multi_avg_fn  # untyped in torch
    return AveragedModel(model, multi_avg_fn=average(decay), use_buffers=True)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = _parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.peak_learning_rate, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate)


def _set_stochastic_depth(model: nn.Module, deepest: float) -> None:
    """Drop probabilities that rise linearly with depth up to just below `deepest` (Huang et al. 2016)."""
    branches = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    for index, branch in enumerate(branches):
        branch.drop_probability = deepest * index / len(branches)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and batch norm, which have one axis that counts, are exempt: decay would only rescale them."""
    decayed = [p for p in model.parameters() if sum(side > 1 for side in p.shape) > 1]
    exempt = [p for p in model.parameters() if sum(side > 1 for side in p.shape) <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
