"""Were images shrunk without antialiasing? What is finer than the new pixels is then folded into high frequencies.

Photographs have little there, and a resize with antialiasing takes most of that away. Of a picture at the network's own
size the mean power above three quarters of the Nyquist frequency is compared with that from a quarter to a half.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIASED", "SMALLEST", "aliasing_evidence", "fine_share"]

ALIASED = 0.12
"""Median over the images.

Of 120 photographs shrunk to 64 … 224 pixels it is 0.03 … 0.04 by Pillow's bilinear filter, 0.05 … 0.06 by bicubic and
Lanczos, 0.08 … 0.09 by box, 0.07 as they come. Without antialiasing it is 0.20 … 0.22 (nearest, bicubic) or 0.13 … 0.19
(bilinear), shrunk to less than a half; at 0.78 of the size 0.12, 0.09 and 0.06: that cannot be told. Nor can it if
the images were enlarged or properly shrunk afterwards, which takes the folded frequencies' place away.
"""
SMALLEST = 48  # pixels; of smaller pictures objects are as fine as their pixels
FEWEST = 16
EMPTY = 1e-6


def fine_share(pixels: NDArray[np.uint8]) -> float:
    """Mean power at high by that at middle frequencies of `pixels` `[H, W, C]`, in grey, under a Hann window."""
    grey = pixels.astype(np.float64).mean(axis=2)
    height, width = grey.shape
    windowed = (grey - grey.mean()) * np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.rfft2(windowed)) ** 2
    frequency = 2 * np.maximum(np.abs(np.fft.fftfreq(height))[:, None], np.fft.rfftfreq(width))  # of Nyquist's
    middle = power[(frequency > 0.25) & (frequency <= 0.5)].mean()
    return float(power[frequency > 0.75].mean() / max(middle, EMPTY))


def aliasing_evidence(shown: Iterable[NDArray[np.uint8]]) -> tuple[float | None, str]:
    """The median `fine_share` of pictures `[H, W, C]`, None if too few of them can be judged, and a sentence or ""."""
    shares = [fine_share(pixels) for pixels in shown if min(pixels.shape[:2]) >= SMALLEST]
    if len(shares) < FEWEST:
        return None, ""
    median = float(np.median(shares))
    if median <= ALIASED:
        return median, ""
    return median, (
        f"the images look as if they had been shrunk without antialiasing: power at the highest frequencies is "
        f"{median:.2f} of that at middle ones, of photographs at most 0.1"
    )
