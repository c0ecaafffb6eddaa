"""The graphs that the benchmarks quantize, and our own quantizers; others' are in `peers.py`."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.collect import LARGEST_BATCH, CalibrationTable, collect
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.ladder import Aim, CalibrationImages, Climb, Ladder
from edgewright.optimize.dialects import quantized_graph
from edgewright.optimize.fold_batchnorm import fold_batchnorm

__all__ = [
    "calibrated",
    "climbed",
    "folded_model",
    "folded_resnet50",
    "quantize_ourselves",
    "serialized",
]

Batch = NDArray[np.float32]

DEFAULT_AIM = Aim()


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
