"""Training of the checkpoints that ship with the project: Fashion-MNIST, on a CPU, within an hour.

The network starts from EfficientNet-Lite0's ImageNet weights (equal shapes outside squeeze-and-excitation) and is
trained by AdamW on one one-cycle schedule (Smith & Topin 2018) while the image size grows (progressive learning,
Tan & Le 2021, EfficientNetV2): early epochs need no detail and cost a quarter. What is kept is the exponential moving
average of the weights after the last step. The test images are looked at once, after the last step: no epoch, no
hyperparameter of a run is chosen by them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import Preprocess

__all__ = ["Phase", "Recipe", "train"]


@dataclass(frozen=True)
class Phase:
    """`epochs` passes over the training images at `size` × `size` pixels."""

    size: int
    epochs: int


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training run; the defaults are those of the shipped checkpoint."""

    phases: tuple[Phase, ...] = (Phase(32, 2), Phase(48, 3), Phase(64, 4))
    batch_size: int = 64
    peak_learning_rate: float = 2e-3
    warmup_share: float = 0.2
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    stochastic_depth: float = 0.05
    crop_share: float = 1 / 16
    ema_decay: float = 0.998
    seed: int = 0

    @property
    def epochs(self) -> int:
        """Passes over the training images in all phases together."""
        return sum(phase.epochs for phase in self.phases)


Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, a sentence) as training goes on."""


def resized(images: NDArray[np.uint8], preprocess: Preprocess, size: int) -> NDArray[np.uint8]:
    """Grey images `[N, H, W]` as `[N, size, size]`, by the resize that the runtime uses."""
    resize = preprocess.with_size(size)
    out = np.empty((len(images), size, size), np.uint8)
    for index, image in enumerate(images):
        out[index] = resize.pixels(image)[..., 0]
    return out


def augmented(batch: Tensor, crop_share: float, generator: torch.Generator) -> Tensor:
    """Random flip and random shift of each image in `batch`, uint8 `[N, H, W]`; borders are filled with black."""
    count, height, width = batch.shape
    margin = max(1, round(height * crop_share))
    flip = torch.rand(count, generator=generator) < 0.5
    batch = torch.where(flip[:, None, None], batch.flip(2), batch)
    padded = nn.functional.pad(batch, (margin,) * 4)
    top = torch.randint(0, 2 * margin + 1, (count, 1), generator=generator) + torch.arange(height)
    left = torch.randint(0, 2 * margin + 1, (count, 1), generator=generator) + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], top[:, :, None], left[:, None, :]]


def normalized(batch: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 `[N, H, W]` as float32 `[N, 3, H, W]`, channels last in memory, in the arithmetic of `Preprocess`."""
    x = (batch.float() / 255.0)[:, None].expand(-1, len(preprocess.mean), -1, -1)
    mean = torch.tensor(preprocess.mean).view(1, -1, 1, 1)
    std = torch.tensor(preprocess.std).view(1, -1, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors of full batches in a random order; the incomplete last one is left out."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    exempt = [p for p in model.parameters() if p.ndim <= 1]  # biases and batch norm: decay would only rescale
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def train(
    model: nn.Module,
    preprocess: Preprocess,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    recipe: Recipe,
    checkpoint: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> nn.Module:
    """Trains `model` on grey `images` `[N, H, W]` with integer `labels` `[N]`; returns the averaged model.

    With `checkpoint`, the state is saved there after every epoch and a run with the same recipe goes on from it.
    Raises `DataError` if there are fewer images than one batch or the loss stops being finite.
    """
    if len(images) < recipe.batch_size:
        raise DataError(f"{len(images)} training images are fewer than one batch of {recipe.batch_size}; give more images")
    torch.manual_seed(recipe.seed)
    for module in model.modules():
        if hasattr(module, "drop_probability"):
            module.drop_probability *= recipe.stochastic_depth / 0.2
    model = model.train().to(memory_format=torch.channels_last)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
    steps_per_epoch = len(images) // recipe.batch_size
    total = steps_per_epoch * recipe.epochs
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.peak_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_learning_rate, total_steps=total, pct_start=recipe.warmup_share
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    sizes = [phase.size for phase in recipe.phases for _ in range(phase.epochs)]
    state = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    start = _resume(checkpoint, recipe, state)
    pixels: tuple[int, Tensor] = (0, torch.empty(0))
    targets = torch.from_numpy(labels)
    for epoch in range(start, recipe.epochs):
        generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
        torch.manual_seed(recipe.seed * 1000 + epoch)
        if pixels[0] != sizes[epoch]:
            pixels = (sizes[epoch], torch.from_numpy(resized(images, preprocess, sizes[epoch])))
        mean_loss, hits, began = 0.0, 0, time.monotonic()
        for step, index in enumerate(batches(len(images), recipe.batch_size, generator)):
            x = normalized(augmented(pixels[1][index], recipe.crop_share, generator), preprocess)
            logits = model(x)
            loss = loss_of(logits, targets[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            averaged.update_parameters(model)
            mean_loss += (loss.item() - mean_loss) / (step + 1)
            hits += int((logits.argmax(1) == targets[index]).sum())
            if not math.isfinite(mean_loss):
                raise DataError(f"the loss is {mean_loss} in epoch {epoch + 1}; lower the learning rate")
            seen = (step + 1) * recipe.batch_size
            progress(
                epoch * steps_per_epoch + step + 1,
                total,
                f"epoch {epoch + 1}/{recipe.epochs} at {sizes[epoch]} px: loss {mean_loss:.3f}, "
                f"training top-1 {hits / seen:.4f}, {time.monotonic() - began:.0f} s",
            )
        _save(checkpoint, recipe, state, epoch + 1)
    result: nn.Module = averaged.module
    return result.eval()


def _save(checkpoint: Path | None, recipe: Recipe, state: dict[str, Any], epochs_done: int) -> None:
    if checkpoint is None:
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    content = {name: part.state_dict() for name, part in state.items()}
    content |= {"recipe": repr(asdict(recipe)), "epochs_done": epochs_done}
    temporary = checkpoint.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(checkpoint)


def _resume(checkpoint: Path | None, recipe: Recipe, state: dict[str, Any]) -> int:
    if checkpoint is None or not checkpoint.exists():
        return 0
    content = torch.load(checkpoint, weights_only=True)
    if content["recipe"] != repr(asdict(recipe)):
        return 0
    for name, part in state.items():
        part.load_state_dict(content[name])
    return int(content["epochs_done"])
