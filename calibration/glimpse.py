"""Some of the images that pass by, kept for a second look, so that they need not be decoded twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Glimpse"]

Batch = NDArray[np.float32]

MOST_IMAGES = 64
MOST_BYTES = 1 << 26


class Glimpse:
    """At most 64 of `total` images, 64 MiB, evenly spread, as they come out of `watched`; mutable."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._kept: list[Batch] = []

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same `batches` `[N, C, H, W]`, one after the other."""
        start = 0
        for batch in batches:
            count = max(1, min(MOST_IMAGES, self._total, MOST_BYTES // max(1, batch[0].nbytes)))
            step = self._total / count
            chosen = [i for i in range(len(batch)) if (start + i) // step != (start + i - 1) // step]
            self._kept.append(batch[chosen].copy())
            start += len(batch)
            yield batch

    @property
    def images(self) -> Batch:
        """What was kept, `[K, C, H, W]`. Raises `ValueError` if nothing has passed by."""
        return np.concatenate(self._kept)
