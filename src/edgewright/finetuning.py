"""The training set that a person names for `--finetune`, and the training on it.

torch and onnx are imported only where it really trains: a run in which nothing changed asks for the images too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgewright.calibration.datasets import image_folder
from edgewright.calibration.fashion_mnist import CLASSES, FASHION_MNIST, fashion_mnist_training
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.stream import batches
from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgewright.optimize.dialects import Quantizer
    from edgewright.rungs import Finetune, Progress

__all__ = ["finetuning", "training_images"]

BATCH = 64


def training_images(words: str, labels: tuple[str, ...]) -> ImageSet:
    """Fashion-MNIST's 60,000 training images, or those of a folder; `labels` are the model's.

    Raises `DataError` if there are none, or if their classes are not the model's.
    """
    if words == FASHION_MNIST:
        if len(labels) != CLASSES:
            raise DataError(
                f"Fashion-MNIST has {CLASSES} classes, the model {len(labels)}", "name a folder of its own images"
            )
        images, classes = fashion_mnist_training()
        return ImageSet.from_array("Fashion-MNIST training", images, classes.astype(np.int64))
    return image_folder(Path(words), labels)


def finetuning(
    reference: ir.Model, images: ImageSet, preprocess: Preprocess, *, seed: int, threads: int = 0
) -> Finetune:
    """What trains a Quantizer's graph on `images`, taught by folded FP32 `reference`; `seed` is of their order.

    On a GPU where PyTorch finds one, else on `threads` of the CPU, 0 for as many as PyTorch takes by itself.
    """

    def train(quantizer: Quantizer, left_out: Mapping[str, str], progress: Progress) -> ir.Model:
        import torch

        from edgewright.learned.finetune import FinetuneSettings, finetuned

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return finetuned(
            reference,
            quantizer,
            shuffled(images, preprocess, seed),
            settings=FinetuneSettings(device=device, threads=threads),
            left_out=left_out,
            progress=lambda done, total, loss: progress(done, total, f"fine-tuning, {_decibels(loss):.1f} dB"),
        )

    return train


def shuffled(
    images: ImageSet, preprocess: Preprocess, seed: int
) -> Callable[[int], Iterator[tuple[NDArray[np.float32], NDArray[np.int64] | None]]]:
    """Batches of all images, in another order in each pass; the last, smaller one is left out unless it is the only."""

    def one_pass(number: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64] | None]]:
        order = np.random.default_rng((seed, number)).permutation(len(images))
        order = order[: max(len(order) // BATCH * BATCH, min(len(order), BATCH))]
        mixed = images.subset(order)
        for start, batch in zip(range(0, len(order), BATCH), batches(mixed, preprocess, BATCH), strict=True):
            yield batch, None if mixed.labels is None else mixed.labels[start : start + BATCH]

    return one_pass


def _decibels(noise: float) -> float:
    """Of the logits, from their noise-to-signal ratio."""
    return -10 * math.log10(max(noise, 1e-30))
