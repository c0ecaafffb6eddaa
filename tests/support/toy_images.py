"""A separable set of tiny grey pictures, and a network that learns it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edgewright.fit import LabelledImages
from edgewright.runtime.preprocess import Preprocess

__all__ = ["PREPROCESS", "toy_net", "toy_set"]

PREPROCESS = Preprocess((8, 8), None, (0.5,) * 3, (0.25,) * 3)


def toy_set(count: int = 96, seed: int = 3) -> LabelledImages:
    """8×8 pixels; a bright upper half is class 0, a bright lower half class 1."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 60, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 150
    return LabelledImages(images, labels.astype(np.int64))


def toy_net(dropout: float = 0.1) -> nn.Module:
    """Seeded weights; dropout, so that the random numbers of the training matter."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32, 2),
    )
