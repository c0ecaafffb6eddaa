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

from edgewright.calibration.collect import LARGEST_BATCH, CalibrationTable, collect
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.ladder import Aim, CalibrationImages, Climb, Ladder
from edgewright.optimize.dialects import quantized_graph
from edgewright.optimize.fold_batchnorm import fold_batchnorm

__all__ = [
    "FOR_TENSORRT",
    "SETTINGS",
    "calibrated",
    "climbed",
    "folded_model",
    "folded_resnet50",
    "quantize_ourselves",
    "quantize_with_modelopt",
    "quantize_with_onnxruntime",
    "serialized",
]

Batch = NDArray[np.float32]

DEFAULT_AIM = Aim()
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
FOR_TENSORRT: dict[str, Any] = {
    "activation_type": QuantType.QInt8,
    "calibrate_method": CalibrationMethod.MinMax,
    "extra_options": {"ActivationSymmetric": True, "QuantizeBias": False},  # TensorRT refuses an int32 bias
}


def folded_model(name: str) -> ir.Model:
    """The registry's network with its default weights, exported and folded."""
    source = resolve(name)
    assert source.input_shape is not None
    exported = onnx.load_from_string(export_onnx(source.module(), source.input_shape))
    return fold_batchnorm(ir.from_proto(exported)).model


def folded_resnet50(seed: int = 5) -> ir.Model:
    """The ResNet-50 of torchvision, folded; seeded weights, batch normalization far from the identity."""
    import torch
    from torchvision.models import resnet50

    torch.manual_seed(seed)
    network = resnet50(weights=None).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.2, generator=generator)
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return fold_batchnorm(ir.from_proto(onnx.load_from_string(export_onnx(network, (3, 224, 224))))).model


def quantize_ourselves(folded: ir.Model, images: Batch) -> bytes:
    """Ranges and Q/DQ without any repair, from decoded images `[N, C, H, W]`."""
    return serialized(quantized_graph("cpu", folded, calibrated(folded, images)).model)


def climbed(folded: ir.Model, images: Batch, dialect: str, aim: Aim = DEFAULT_AIM) -> Climb:
    """As the pipeline does: ranges from three quarters of `images` `[N, C, H, W]`, as much repair as is needed."""
    divided = CalibrationImages.divided(images)
    return Ladder(folded, calibrated(folded, divided.choosing), divided, aim).climb(dialect)


def calibrated(folded: ir.Model, images: Batch) -> CalibrationTable:
    """One pass over decoded images `[N, C, H, W]`."""
    return collect(folded, (images[i : i + LARGEST_BATCH] for i in range(0, len(images), LARGEST_BATCH)), identity={})


def serialized(model: ir.Model) -> bytes:
    """The ONNX file's content."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def quantize_with_modelopt(source: Path, target: Path, images: Batch) -> None:
    """Writes the Q/DQ graph that NVIDIA's Model Optimizer makes of `source`; it has to be installed."""
    from modelopt.onnx.quantization import quantize

    quantize(str(source), calibration_data={"images": images}, output_path=str(target), calibration_method="entropy")


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Batch) -> None:
        self._batches: Iterator[Batch] = (
            images[start : start + PEER_BATCH] for start in range(0, len(images), PEER_BATCH)
        )

    def get_next(self) -> dict[str, Batch] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def quantize_with_onnxruntime(
    source: Path, target: Path, images: Batch, setting: dict[str, Any] = SETTINGS["U8 min-max"]
) -> None:
    """Writes the Q/DQ graph with per-channel weights that onnxruntime makes of `source`."""
    quantize_static(
        str(source),
        str(target),
        _Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        **setting,
    )
