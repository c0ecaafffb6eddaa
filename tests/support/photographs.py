"""Pictures with the statistics of photographs: power falls with the square of the frequency, and they have colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["photographs"]

ROUGHNESS = 1.2  # amplitude by frequency, an exponent; Field 1987, "Relations between the statistics of natural images"


def photographs(count: int, seed: int = 1, height: int = 96, width: int = 128) -> NDArray[np.uint8]:
    """Warm ones, more red than blue, uint8 `[N, H, W, 3]`; without any power at the Nyquist frequency."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** -ROUGHNESS
    amplitude[np.maximum(abs(fy), fx) > 0.45] = 0
    noise = rng.normal(size=(count, 1, height, width)) + 0.3 * rng.normal(size=(count, 3, height, width))
    field = np.fft.irfft2(np.fft.rfft2(noise) * amplitude, (height, width))
    field /= field.std(axis=(1, 2, 3), keepdims=True)
    levels = 120 + rng.uniform(-20, 20, (count, 1, 1, 1)) + np.array([30, 0, -30])[:, None, None] + 45 * field
    pictures: NDArray[np.uint8] = np.clip(levels, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return pictures
