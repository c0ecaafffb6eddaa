"""The source itself, run: the FP32 that every engine is compared with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = ["Infer", "torch_reference"]

Infer = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Logits `[N, classes]` of a preprocessed batch `[N, C, H, W]`."""


def torch_reference(module: nn.Module) -> Infer:
    """`module`, in evaluation mode, as a function of arrays."""

    def infer(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode(), redirect_stdout(sys.stderr):  # stdout belongs to the results
            pixels = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last)
            logits: NDArray[np.float32] = module(pixels).numpy()
        return logits

    return infer
