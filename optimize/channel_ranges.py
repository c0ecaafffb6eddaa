"""Ranges of single channels: of a layer's weight, and of what it gives on images."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.channels import ChannelExtremes
from edgewright.optimize.layer_errors import activations_of
from edgewright.optimize.plan import constant_weight
from edgewright.optimize.qdq import channel_axis

__all__ = ["channel_magnitudes", "constant_channels"]

IMAGES_AT_ONCE = 8


def channel_magnitudes(node: ir.Node) -> NDArray[np.float32] | None:
    """The largest magnitude in the weight of each output channel `[O]` of a convolution or matrix product.

    None if the weight is computed.
    """
    weight = constant_weight(node)
    if weight is None or weight.const_value is None:
        return None
    values = weight.const_value.numpy()
    axis = channel_axis(node, values.ndim)
    magnitudes: NDArray[np.float32] = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis))
    return magnitudes


def constant_channels(
    model: ir.Model, tensor: str, images: NDArray[np.float32], *, threads: int = 0
) -> dict[int, float]:
    """Channels, axis 1 of activation `tensor`, with one value throughout on `images` `[N, C, H, W]`, and that value."""
    extremes = ChannelExtremes()
    activations = activations_of(model, [tensor], threads=threads)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        values = activations(images[start : start + IMAGES_AT_ONCE])[tensor]
        flat = values.reshape(*values.shape[:2], -1)
        extremes.add(flat.min(axis=2), flat.max(axis=2))
    return extremes.constant()
