"""ONNX Runtime on the CPU, for the comparison of a graph with what it was made from."""

from __future__ import annotations

from typing import Any

from edgewright.export.conventions import first_line
from edgewright.runtime.errors import EdgewrightError, ModelError

__all__ = ["cpu_session"]


def cpu_session(
    content: bytes,
    name: str,
    *,
    optimized: bool = False,
    failure: type[EdgewrightError] = ModelError,
    remedy: str = "give a graph of standard ONNX operators",
) -> Any:
    """A session for serialized ONNX that is called `name` in messages; not `optimized`, it runs what is written.

    It takes longer to make than to run: one serves all batches. Raises `failure` with `remedy` if there is none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what matters comes as an exception
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise failure(f"onnxruntime cannot load {name}: {first_line(error)}", remedy) from error
