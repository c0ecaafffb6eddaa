"""A graph that came with integers in it: can NVIDIA's parsers read it as ONNX does?"""

from __future__ import annotations

import onnx_ir as ir

from edgewright.optimize.dialects import NVIDIA
from edgewright.optimize.lint import check
from edgewright.runtime.errors import QuantizationError

__all__ = ["nvidia_refusal"]


def nvidia_refusal(dialect: str, model: ir.Model) -> str:
    """Why the targets of `dialect`, "tensorrt" or "rtx", do not read quantized `model` as ONNX does, or ""."""
    try:
        for parser in NVIDIA[dialect].parsers:
            check(model, parser)
    except QuantizationError as error:
        return error.message
    return ""
