"""Ours and, on the same graph and images, onnxruntime's own static quantizer as its documentation recommends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from edgewright.calibration.collect import BATCH_SIZE, collect
from edgewright.calibration.ranges import silu
from edgewright.export.models import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.plan import plan_for_cpu
from edgewright.optimize.quantize import quantize_for_cpu

__all__ = ["SETTINGS", "folded_model", "quantize_ourselves", "quantize_with_onnxruntime"]

Batch = NDArray[np.float32]

PEER_BATCH = 32

SETTINGS: dict[str, dict[str, Any]] = {
    "U8 min-max": {"activation_type": QuantType.QUInt8, "calibrate_method": CalibrationMethod.MinMax},
    "U8 entropy": {"activation_type": QuantType.QUInt8, "calibrate_method": CalibrationMethod.Entropy},
    "U8 percentile": {"activation_type": QuantType.QUInt8, "calibrate_method": CalibrationMethod.Percentile},
    "S8 min-max": {
        "activation_type": QuantType.QInt8,
        "calibrate_method": CalibrationMethod.MinMax,
        "extra_options": {"ActivationSymmetric": True},
    },
}


def folded_model(name: str) -> ir.Model:
    """The registry's network with its default weights, exported and folded."""
    source = resolve(name)
    assert source.preprocess.input_shape is not None
    exported = onnx.load_from_string(export_onnx(source.build(), source.preprocess.input_shape))
    return fold_batchnorm(ir.from_proto(exported)).model


def quantize_ourselves(folded: ir.Model, images: Batch) -> bytes:
    """Calibrates and quantizes as the pipeline does, from decoded images `[N, C, H, W]`."""
    batches = (images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE))
    table = collect(folded, batches, identity={})
    plan = plan_for_cpu(folded, table.histograms)
    ranges = table.ranges("mse", plan.activations, dict.fromkeys(plan.silu_inputs, silu))
    content: bytes = ir.to_proto(quantize_for_cpu(folded, plan, ranges)).SerializeToString()
    return content


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Batch) -> None:
        self._batches: Iterator[Batch] = (
            images[start : start + PEER_BATCH] for start in range(0, len(images), PEER_BATCH)
        )

    def get_next(self) -> dict[str, Batch] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def quantize_with_onnxruntime(source: Path, target: Path, images: Batch, setting: str = "U8 min-max") -> None:
    """Writes the Q/DQ graph with per-channel weights that onnxruntime makes of `source`."""
    quantize_static(
        str(source),
        str(target),
        _Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        **SETTINGS[setting],
    )
