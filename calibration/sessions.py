"""onnxruntime on the CPU, for graphs that are calibrated."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

__all__ = ["cpu_session"]


def cpu_session(model: ir.Model, *, threads: int = 0, optimized: bool = True) -> Any:
    """A session for `model`; `threads` is onnxruntime's number, 0 for all cores. Not `optimized`, nothing is fused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
