"""The networks whose engines are compared, folded, at 224 × 224; nothing that is compared depends on their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from quantizers import folded_model, folded_resnet50

from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.optimize.fold_batchnorm import fold_batchnorm

__all__ = ["NETWORKS", "SHAPE", "noise"]

SHAPE = (3, 224, 224)
SEED = 6


def noise(count: int) -> NDArray[np.float32]:
    """Images `[count, 3, 224, 224]`."""
    return np.random.default_rng(SEED).standard_normal((count, *SHAPE), np.float32)


def _mobilenet_v2() -> ir.Model:
    import torch
    from torchvision.models import mobilenet_v2

    torch.manual_seed(SEED)
    return _folded(mobilenet_v2(weights=None).eval())


def _b0() -> ir.Model:
    return _folded(resolve("mobilenet_effnet_b0").module())


def _folded(network: Any) -> ir.Model:
    return fold_batchnorm(ir.from_proto(onnx.load_from_string(export_onnx(network, SHAPE)))).model


NETWORKS: dict[str, Callable[[], ir.Model]] = {
    "Lite0": functools.partial(folded_model, "efficientnet_lite0"),
    "B0": _b0,
    "ResNet-50": folded_resnet50,
    "MobileNetV2": _mobilenet_v2,
}
