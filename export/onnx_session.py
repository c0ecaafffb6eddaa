"""ONNX Runtime without optimizations: a graph is run as it is written."""

from __future__ import annotations

from typing import Any

import onnxruntime

from edgewright.export.conventions import first_line
from edgewright.runtime.errors import ModelError

__all__ = ["plain_session"]


def plain_session(content: bytes, name: str) -> Any:
    """A session on the CPU for serialized ONNX that is called `name` in messages. Raises `ModelError`."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what matters comes as an exception
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ModelError(
            f"onnxruntime cannot run {name}: {first_line(error)}", "give a graph of standard ONNX operators"
        ) from error
