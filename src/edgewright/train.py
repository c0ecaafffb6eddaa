"""Training of a network of the registry on Fashion-MNIST, from its recipe to a checkpoint that describes itself.

A recipe (`recipes.py`) is one one-cycle schedule (Smith & Topin 2018) of AdamW or SGD. That of the shipped checkpoint
starts from EfficientNet-Lite0's ImageNet weights (equal shapes outside squeeze-and-excitation) and lets the image size
grow (progressive learning, Tan & Le 2021, EfficientNetV2): early epochs need no detail and cost a quarter. What it
keeps is the exponential moving average of the weights after the last step. No epoch and no hyperparameter of a run is
chosen by the test images.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from edgewright.calibration.fashion_mnist import fashion_mnist_test, fashion_mnist_training
from edgewright.calibration.image_set import ImageSet
from edgewright.curve import CurveRow, curve_files, write_curve
from edgewright.export.weights import load_into, read_checkpoint, save_checkpoint
from edgewright.fit import LabelledImages, Progress, device_named, fit
from edgewright.learned.numerics import numerics
from edgewright.recipes import Recipe, recipe_of, trainable_entry
from edgewright.runtime.errors import DataError, WorkspaceError
from edgewright.training_data import Pixels, square_size, top1
from edgewright.transfer import initialize

__all__ = ["LARGEST_SIZE", "Training", "train_checkpoint"]

LARGEST_SIZE = 4096  # pixels; of larger images a single batch fills the memory


@dataclass(frozen=True)
class Training:
    """What a training gave.

    * top1: on the 10,000 test images, a fraction, of the float16 values in `checkpoint`
    * start: what the weights were at first, in words
    * curve: a row for each epoch; curve_csv, curve_svg: where it stands
    """

    checkpoint: Path
    top1: float
    start: str
    curve: tuple[CurveRow, ...]
    curve_csv: Path
    curve_svg: Path

    @property
    def seconds(self) -> float:
        """Of all epochs, the tests after them included; resizing the images beforehand is not."""
        return self.curve[-1].seconds


def train_checkpoint(
    name: str,
    path: Path,
    *,
    recipe: Recipe | None = None,
    start: str | None = None,
    size: int | None = None,
    data: Path | None = None,
    device: str = "cpu",
    threads: int = 0,
    state_file: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Training:
    """Trains network `name` on Fashion-MNIST and writes it to `path` as float16 safetensors, the curve beside it.

    * recipe: by default the network's own; start: as in `transfer.initialize`
    * size: height and width of the images in pixels, by default what the network was published for; it becomes part of
      the preprocessing that `path` states
    * data: a folder with the idx files, or None to look in the usual places
    * device: "cpu" or "cuda"; threads: of the CPU, 0 for PyTorch's own choice
    * state_file: where an interrupted training is kept; it is removed at the end

    Raises `ModelError` for a network without a recipe or weights that do not fit, `DataError` if the data are missing
    or a value cannot be, `DeviceError` without such a device, `WorkspaceError` if `path` cannot be written.
    """
    entry = trainable_entry(name)
    recipe = recipe or recipe_of(name)
    chosen = device_named(device)
    if path.suffix != ".safetensors":
        raise WorkspaceError(f"the checkpoint {path} would be a safetensors file", "name it so: FILE.safetensors")
    if size is not None and not 1 <= size <= LARGEST_SIZE:
        raise DataError(f"size is {size} pixels, expected from 1 to {LARGEST_SIZE}")
    task = entry.task
    preprocess = task.preprocess if size is None else task.preprocess.with_size(size)
    pixels = square_size(preprocess)
    training, test = LabelledImages(*fashion_mnist_training(data)), _labelled(fashion_mnist_test())
    torch.manual_seed(recipe.seed)
    model = entry.build(task.classes)
    origin = initialize(name, model, start)
    title = f"{name}, Fashion-MNIST at {pixels}×{pixels}"
    labels = task.labels() if callable(task.labels) else task.labels
    with numerics(threads):
        fitted = fit(
            model,
            preprocess,
            training,
            test,
            recipe=recipe,
            device=chosen,
            state_file=state_file,
            progress=progress,
            after_epoch=lambda rows: write_curve(path, rows, title),
        )
        save_checkpoint(path, fitted.model.cpu(), preprocess, labels, recipe=json.dumps(asdict(recipe)), start=origin)
        load_into(fitted.model, read_checkpoint(path).state, str(path))
        tested = Pixels(test.images, preprocess, pixels, chosen)
        accuracy = top1(fitted.model.to(chosen), preprocess, tested, torch.from_numpy(test.labels))
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return Training(path, accuracy, origin, fitted.curve, *curve_files(path))


def _labelled(image_set: ImageSet) -> LabelledImages:
    """An `ImageSet` of grey arrays with labels as two arrays."""
    assert image_set.labels is not None
    return LabelledImages(np.stack([np.asarray(image) for image in image_set]), image_set.labels)
