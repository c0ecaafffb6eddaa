"""Proves that a rewritten graph still computes what it did: both are run, unoptimized, on the same batch.

    difference = max over outputs of  max |after − before| / max |before|

It is relative to the largest magnitude of each output rather than to each element: an element that happens to be
close to zero says nothing about the graph. ONNX Runtime runs both graphs without its own optimizations, since those
fold batch normalization too and would compare a graph with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgewright.runtime.errors import QuantizationError

__all__ = ["check_equivalent", "max_relative_difference"]

Model = bytes | onnx.ModelProto
Feeds = Mapping[str, NDArray[Any]]  # input name to array, as in `{"image": float32 [N, 3, H, W]}`

TOLERANCE = 1e-4  # folding the 49 normalizations of an EfficientNet-B0 measures 8e-7


def check_equivalent(before: Model, after: Model, *, feeds: Feeds, tolerance: float = TOLERANCE) -> float:
    """The measured difference, if it is at most `tolerance`.

    Raises `QuantizationError` if it is larger, a value is not finite, or names or shapes of outputs differ.
    """
    difference = max_relative_difference(before, after, feeds)
    if difference <= tolerance:
        return difference
    raise QuantizationError(
        f"the rewritten graph differs from the original by {difference:.3g} of the largest output, "
        f"expected at most {tolerance:.3g}",
        "run the passes one by one to find the one that broke it",
    )


def max_relative_difference(before: Model, after: Model, feeds: Feeds) -> float:
    """The largest difference of any output, relative to that output's largest magnitude in `before`.

    It is infinite where either graph yields a NaN or an infinity, or where `before` is all zeros and `after` is not.
    Raises `QuantizationError` if the names or the shapes of the outputs differ.
    """
    expected, actual = _outputs(before, feeds), _outputs(after, feeds)
    shapes = [{name: array.shape for name, array in outputs.items()} for outputs in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise QuantizationError(f"outputs changed from {shapes[0]} to {shapes[1]}")
    return max((_relative_difference(expected[name], actual[name]) for name in expected), default=0.0)


def _relative_difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Largest |actual − expected| / largest |expected|, computed in float64; infinite unless all is finite."""
    if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return float("inf")
    reference = expected.astype(np.float64)
    difference = float(np.max(np.abs(actual - reference), initial=0.0))
    if difference == 0.0:
        return 0.0
    largest = float(np.max(np.abs(reference)))
    return difference / largest if largest > 0.0 else float("inf")


def _outputs(model: Model, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """Output name to array."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # the order of summation must not depend on the machine
    content = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
