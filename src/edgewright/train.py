"""Training of the checkpoints that ship with the project: Fashion-MNIST, on a CPU, within an hour.

The network starts from EfficientNet-Lite0's ImageNet weights (equal shapes outside squeeze-and-excitation) and is
trained by AdamW on one one-cycle schedule (Smith & Topin 2018) while the image size grows (progressive learning,
Tan & Le 2021, EfficientNetV2): early epochs need no detail and cost a quarter. What is kept is the exponential moving
average of the weights after the last step. The test images are looked at once, after the last step: no epoch, no
hyperparameter of a run is chosen by them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgewright.calibration.fashion_mnist import fashion_mnist_test, fashion_mnist_training
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.stream import batches as image_batches
from edgewright.export.models import MODELS, Weights, resolve
from edgewright.export.weights import initialize_from_lite0, load_into, read_checkpoint, save_checkpoint
from edgewright.export.zoo.mbconv import EfficientNet, StochasticDepth
from edgewright.runtime.errors import DataError, ModelError
from edgewright.runtime.files import sha256_of, write_bytes
from edgewright.runtime.preprocess import Preprocess
from edgewright.workspace import source_hash

__all__ = ["Phase", "Recipe", "train", "train_checkpoint"]

EVALUATION_BATCH = 100


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


def train_checkpoint(
    name: str,
    path: Path,
    *,
    data: Path | None = None,
    state_file: Path | None = None,
    recipe: Recipe | None = None,
    progress: Progress = lambda done, total, text: None,
) -> float:
    """Trains network `name` on Fashion-MNIST and writes it to `path` as float16 safetensors.

    `data` is a folder with the idx files, or None to look in the usual places. Returns top-1 on the 10,000 test images,
    a fraction, of the float16 values that were written. Raises `ModelError` for a network without such a recipe,
    `DataError` if the data are missing.
    """
    recipe = recipe or Recipe()
    weights = _fashion_mnist_weights(name)
    images, labels = fashion_mnist_training(data)
    torch.manual_seed(recipe.seed)
    model = MODELS[name].build(weights.classes)
    assert isinstance(model, EfficientNet), "the networks of the registry with these weights are of this family"
    initialize_from_lite0(model)
    with _denormals_as_zero():
        trained = train(
            model, weights.preprocess, images, labels, recipe=recipe, state_file=state_file, progress=progress
        )
    save_checkpoint(path, trained, weights.preprocess, weights.labels(), recipe=json.dumps(asdict(recipe)))
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    load_into(trained, read_checkpoint(path).state, str(path))
    return top1(trained, weights.preprocess, fashion_mnist_test())


def top1(model: nn.Module, preprocess: Preprocess, images: ImageSet) -> float:
    """Share of labelled `images` whose most probable class is right."""
    assert images.labels is not None
    predicted: list[NDArray[np.int64]] = []
    with torch.inference_mode():
        for batch in image_batches(images, preprocess, EVALUATION_BATCH):
            predicted.append(model(torch.from_numpy(batch)).argmax(1).numpy())
    return float((np.concatenate(predicted) == images.labels).mean())


def _fashion_mnist_weights(name: str) -> Weights:
    resolve(name)  # an unknown name is refused with the nearest ones
    for weights in MODELS[name].weights.values():
        if weights.data == "fashion_mnist":
            return weights
    able = [other for other, entry in MODELS.items() if any(w.data == "fashion_mnist" for w in entry.weights.values())]
    raise ModelError(f"there is no training recipe for {name}", f"train one of {', '.join(able)}")


@contextlib.contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """Denormal numbers, which vanishing gradients become, slow the CPU down tenfold and change nothing."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


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


class _Trainee:
    """The network with everything that changes while it learns; saved and loaded together."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int, identity: str) -> None:
        self.recipe = recipe
        self.identity = identity
        self.model = model.train().to(memory_format=torch.channels_last)
        average: Any = get_ema_multi_avg_fn  # untyped in torch
        self.averaged = AveragedModel(self.model, multi_avg_fn=average(recipe.ema_decay), use_buffers=True)
        self.optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.peak_learning_rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.peak_learning_rate, total_steps=steps, pct_start=recipe.warmup_share
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)

    def step(self, x: Tensor, targets: Tensor) -> tuple[float, int]:
        """One update on float32 `[N, C, H, W]` and labels `[N]`: the loss, and how many were right before it."""
        logits = self.model(x)
        loss = self.loss(logits, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.averaged.update_parameters(self.model)
        return float(loss.item()), int((logits.argmax(1) == targets).sum())

    def save(self, file: Path, epochs_done: int) -> None:
        """Writes the state, whole or not at all."""
        content = {name: part.state_dict() for name, part in self._parts().items()}
        buffer = io.BytesIO()
        torch.save({**content, "identity": self.identity, "epochs_done": epochs_done}, buffer)
        write_bytes(file, buffer.getvalue())

    def resume(self, file: Path) -> int:
        """Loads a state of the same training and returns the epochs it has done; 0 if there is none."""
        if not file.exists():
            return 0
        try:
            content = torch.load(file, weights_only=True)
        except Exception as error:  # torch.load raises whatever damaged bytes lead to
            raise DataError(f"{file} cannot be loaded ({type(error).__name__})", "remove it to start again") from error
        if not isinstance(content, dict) or content.get("identity") != self.identity:
            return 0
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        return int(content["epochs_done"])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "averaged": self.averaged,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }


def train(
    model: nn.Module,
    preprocess: Preprocess,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    recipe: Recipe,
    state_file: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> nn.Module:
    """Trains `model` on grey `images` `[N, H, W]` with integer `labels` `[N]`; returns the averaged model.

    With `state_file`, the state is saved there after every epoch, and a run with the same recipe, images, initial
    weights and code goes on from it.
    Raises `DataError` if there are fewer images than one batch or the loss stops being finite.
    """
    if len(images) < recipe.batch_size:
        raise DataError(
            f"{len(images)} training images are fewer than one batch of {recipe.batch_size}", "give more images"
        )
    _set_stochastic_depth(model, recipe.stochastic_depth)
    steps = len(images) // recipe.batch_size
    trainee = _Trainee(model, recipe, steps * recipe.epochs, _identity(model, recipe, preprocess, images, labels))
    done = trainee.resume(state_file) if state_file is not None else 0
    sizes = [phase.size for phase in recipe.phases for _ in range(phase.epochs)]
    pixels: dict[int, Tensor] = {}
    targets = torch.from_numpy(labels)
    for epoch in range(done, recipe.epochs):
        size = sizes[epoch]
        if size not in pixels:
            pixels = {size: torch.from_numpy(resized(images, preprocess, size))}
        title = f"epoch {epoch + 1}/{recipe.epochs}, {size} px"
        tell = functools.partial(_tell, progress, epoch * steps, recipe.epochs * steps, title)
        _train_epoch(trainee, pixels[size], targets, preprocess, seed=recipe.seed * 1000 + epoch, tell=tell)
        if state_file is not None:
            trainee.save(state_file, epoch + 1)
    result: nn.Module = trainee.averaged.module
    return result.eval()


def _identity(
    model: nn.Module,
    recipe: Recipe,
    preprocess: Preprocess,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> str:
    """SHA-256 of everything that decides what a training gives."""
    weights = (value.detach().numpy().tobytes() for value in model.state_dict().values())
    code = source_hash("train.py", "export/zoo", "runtime/preprocess.py")
    return sha256_of([repr((recipe, preprocess, code)).encode(), images.tobytes(), labels.tobytes(), *weights])


def _train_epoch(
    trainee: _Trainee,
    pixels: Tensor,
    targets: Tensor,
    preprocess: Preprocess,
    *,
    seed: int,
    tell: Callable[[int, float, float], None],
) -> None:
    """One pass; its random numbers depend on `seed` alone, so that a resumed run repeats what it would have been."""
    recipe = trainee.recipe
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    mean_loss, right = 0.0, 0
    for step, index in enumerate(batches(len(pixels), recipe.batch_size, generator), 1):
        x = normalized(augmented(pixels[index], recipe.crop_share, generator), preprocess)
        loss, hits = trainee.step(x, targets[index])
        if not math.isfinite(loss):
            raise DataError(f"the loss became {loss} in step {step}", "lower the learning rate or look at the data")
        mean_loss += (loss - mean_loss) / step
        right += hits
        tell(step, mean_loss, right / (step * recipe.batch_size))


def _tell(progress: Progress, before: int, total: int, title: str, step: int, loss: float, accuracy: float) -> None:
    """One line that fits 80 columns; the accuracy is that of the training images, as they come."""
    progress(before + step, total, f"{title}, loss {loss:.2f}, top-1 {accuracy:.3f}")


def _set_stochastic_depth(model: nn.Module, deepest: float) -> None:
    """Drop probabilities that rise linearly with depth up to just below `deepest` (Huang et al. 2016)."""
    branches = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    for index, branch in enumerate(branches):
        branch.drop_probability = deepest * index / len(branches)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    exempt = [p for p in model.parameters() if p.ndim <= 1]  # biases and batch norm: decay would only rescale
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
