"""Training images as tensors: resized as the runtime does it, flipped and shifted at random, normalized, in batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.runtime.errors import DataError
from edgewright.runtime.preprocess import Preprocess

__all__ = ["Pixels", "augmented", "batches", "normalized", "resized", "square_size", "top1"]

EVALUATION_BATCH = 250
CACHED_BYTES = 1 << 30  # resized images beyond this are made batch by batch


class Pixels:
    """Grey images `[N, H, W]` at `size` × `size` pixels; `pixels[index]` gives uint8 `[n, size, size]` on `device`."""

    def __init__(self, images: NDArray[np.uint8], preprocess: Preprocess, size: int, device: torch.device) -> None:
        self._images, self._preprocess, self._size, self._device = images, preprocess, size, device
        cached = len(images) * size**2 <= CACHED_BYTES
        self._resized = torch.from_numpy(resized(images, preprocess, size)).to(device) if cached else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Tensor) -> Tensor:
        if self._resized is not None:
            return self._resized[index.to(self._device)]
        chosen = self._images[index.numpy()]
        return torch.from_numpy(resized(chosen, self._preprocess, self._size)).to(self._device)


def square_size(preprocess: Preprocess) -> int:
    """Height and width of the images in pixels. Raises `DataError` if they are not one fixed number."""
    if not isinstance(preprocess.resize, tuple) or preprocess.resize[0] != preprocess.resize[1] or preprocess.crop:
        raise DataError(
            f"training needs a resize to a square, found resize {preprocess.resize} and crop {preprocess.crop}",
            "give --size",
        )
    return preprocess.resize[0]


def resized(images: NDArray[np.uint8], preprocess: Preprocess, size: int) -> NDArray[np.uint8]:
    """Grey images `[N, H, W]` as `[N, size, size]`, by the resize that the runtime uses."""
    resize = preprocess.with_size(size)
    out = np.empty((len(images), size, size), np.uint8)
    for index, image in enumerate(images):
        out[index] = resize.pixels(image)[..., 0]
    return out


def augmented(batch: Tensor, crop_share: float, generator: torch.Generator) -> Tensor:
    """Random flip and random shift of each image in `batch`, uint8 `[N, H, W]`; borders are filled with black.

    The random numbers are drawn on the CPU, so that they are the same whatever device holds `batch`.
    """
    count, height, width = batch.shape
    margin = max(1, round(height * crop_share))
    flip = torch.rand(count, generator=generator) < 0.5
    batch = torch.where(flip[:, None, None].to(batch.device), batch.flip(2), batch)
    padded = nn.functional.pad(batch, (margin,) * 4)
    top = torch.randint(0, 2 * margin + 1, (count, 1), generator=generator) + torch.arange(height)
    left = torch.randint(0, 2 * margin + 1, (count, 1), generator=generator) + torch.arange(width)
    index = (torch.arange(count)[:, None, None], top[:, :, None], left[:, None, :])
    return padded[tuple(part.to(batch.device) for part in index)]


def normalized(batch: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 `[N, H, W]` as float32 `[N, C, H, W]`, channels last in memory, in the arithmetic of `Preprocess`.

    C is the number of channels that the network reads; each gets the same grey picture.
    """
    x = (batch.float() / 255.0)[:, None].expand(-1, len(preprocess.mean), -1, -1)
    mean = torch.tensor(preprocess.mean, device=batch.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocess.std, device=batch.device).view(1, -1, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors of full batches in a random order; the incomplete last one is left out."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def top1(model: nn.Module, preprocess: Preprocess, pixels: Pixels, labels: Tensor) -> float:
    """Share of the images whose most probable class is that in `labels`, int64 `[N]`; `model` is in evaluation mode."""
    hits = 0
    with torch.inference_mode():
        for index in torch.split(torch.arange(len(pixels)), EVALUATION_BATCH):
            predicted = model(normalized(pixels[index], preprocess)).argmax(1).cpu()
            hits += int((predicted == labels[index]).sum())
    return hits / len(pixels)
