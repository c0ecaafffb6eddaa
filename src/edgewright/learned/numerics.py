"""The settings of PyTorch under which what is learned can be repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from edgewright.runtime.errors import DataError

__all__ = ["MOST_THREADS", "numerics"]

MOST_THREADS = 1024  # far more than help a training; PyTorch would start however many are asked for


@contextlib.contextmanager
def numerics(threads: int = 0) -> Iterator[None]:
    """The settings under which a training can be repeated; 0 threads are as many as PyTorch takes by itself.

    Denormal numbers, which vanishing gradients become, slow a CPU down tenfold and change nothing: they are zero.
    Raises `DataError` for a number of threads that no machine has.
    """
    if not 0 <= threads <= MOST_THREADS:
        raise DataError(f"threads is {threads}, expected from 0 to {MOST_THREADS}")
    before, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or before)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = deterministic
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)
