"""The source itself, run: the FP32 that every engine is compared with."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.export.conventions import Infer, Logits

__all__ = ["torch_reference"]


def torch_reference(module: nn.Module) -> Infer:
    """`module`, in evaluation mode, as a function of arrays."""

    def infer(batch: NDArray[np.float32]) -> Logits:
        with torch.inference_mode(), redirect_stdout(sys.stderr):  # stdout belongs to the results
            pixels = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last)
            logits: Logits = module(pixels).numpy()
        return logits

    return infer
