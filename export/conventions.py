"""What every graph that leaves the export stage has in common, whatever it was made from, and how that is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.errors import ExportError, ModelError

__all__ = [
    "BATCH_NAME",
    "CHECKED_BATCHES",
    "CHECK_SEED",
    "INPUT_NAME",
    "OPSETS",
    "OUTPUT_NAME",
    "TOLERANCE",
    "Infer",
    "Logits",
    "check_opset",
    "check_size",
    "first_line",
    "relative_difference",
]

Logits = NDArray[np.float32]
Infer = Callable[[NDArray[np.float32]], Logits]
"""Logits `[N, classes]` of a preprocessed batch `[N, C, H, W]`, both float32."""

OPSETS = range(18, 21)  # 19 brings FP16 scales for Q/DQ; the TensorRT 10.0 parser documents up to 20
INPUT_NAME = "images"
OUTPUT_NAME = "logits"
BATCH_NAME = "batch"
CHECKED_BATCHES = (1, 5)
"""The batch sizes at which a graph is compared with what it was made from."""
CHECK_SEED = 20
TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the largest logit: float32 with sums in another order stays below 1e-5."""
MAX_PIXELS = 1 << 26  # 8192 × 8192; Pillow takes an image of 89 million pixels for a decompression bomb
MAX_ELEMENTS = (1 << 31) - 1  # of one tensor in TensorRT, which counts them in 32 bits; 8 GiB in float32


def check_opset(opset: int) -> None:
    """Raises `ExportError` if graphs of that opset are not written."""
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported", f"choose one of {OPSETS.start} … {OPSETS.stop - 1}")


def check_size(sides: Sequence[int | None], name: str) -> None:
    """Raises `ModelError` if no image can be as large as the input `sides`, (N, C, H, W), of `name`; None is any."""
    lengths = [side or 1 for side in sides]
    if prod(lengths[2:]) > MAX_PIXELS or prod(lengths) > MAX_ELEMENTS:
        written = ", ".join("?" if side is None else str(side) for side in sides)
        raise ModelError(
            f"{name} takes an input of shape [{written}], expected at most {MAX_PIXELS} pixels in an image and "
            f"{MAX_ELEMENTS} numbers in all",
            "export the graph for images of the size that it was trained on",
        )


def relative_difference(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Largest |found − expected| as a share of the largest |expected|; infinite for another shape, NaN if any is."""
    if expected.shape != found.shape:
        return float("inf")
    scale = float(np.abs(expected).max()) or 1.0
    with np.errstate(invalid="ignore"):  # infinity minus infinity is the NaN that the caller looks for
        return float(np.abs(expected.astype(np.float64) - found).max() / scale)


def first_line(error: BaseException) -> str:
    """At most 300 characters of the first line that says something, of the error that was the first cause."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(root).__name__
