"""Which layers have channels that are always 0 behind their ReLU, or always one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgewright.calibration.collect import CalibrationTable
from edgewright.calibration.image_checks import FEWEST_IMAGES
from edgewright.calibration.observers import clamp_limits
from edgewright.optimize.plan import COMPUTE_OPERATORS, clamped_output

__all__ = ["StillChannels", "dead_channel_warning", "still_channels"]

CHANNELS_FIRST = ("Conv", "ConvTranspose", "Gemm")
"""Layers whose output channels are axis 1 whatever the rank; a MatMul's are the last."""
SHOWN = 3


@dataclass(frozen=True)
class StillChannels:
    """The channels of one layer that have one value over all calibration images.

    * dead: how many are 0 behind the layer's ReLU; constant: how many are any other value, or 0 without a ReLU
    * channels: how many the layer has
    """

    layer: str
    dead: int
    constant: int
    channels: int


def still_channels(model: ir.Model, table: CalibrationTable) -> tuple[StillChannels, ...]:
    """The layers of folded `model` with such channels, in their order, as `table` has measured them."""
    found = []
    for node in model.graph:
        if node.op_type not in COMPUTE_OPERATORS:
            continue
        result = clamped_output(node)
        if node.op_type not in CHANNELS_FIRST and (result.shape is None or result.shape.rank() != 2):
            continue
        still = table.constant_channels.get(str(result.name), {})
        producer = result.producer()
        clamped = producer is not None and clamp_limits(producer) is not None
        dead = sum(value == 0.0 for value in still.values()) if clamped else 0
        if still and result.shape is not None and isinstance(result.shape[1], int):
            found.append(StillChannels(str(node.name), dead, len(still) - dead, result.shape[1]))
    return tuple(found)


def dead_channel_warning(layers: Sequence[StillChannels], images: int) -> str:
    """One sentence for all of them, the worst first, or "".

    Also "" if they were seen on fewer than `FEWEST_IMAGES` `images`: on those many channels rest that live.
    """
    if not layers or images < FEWEST_IMAGES:
        return ""
    worst = sorted(layers, key=lambda layer: -(layer.dead + layer.constant) / layer.channels)
    shown = ", ".join(f"{one.layer} ({one.dead + one.constant} of {one.channels})" for one in worst[:SHOWN])
    more = ", …" if len(layers) > SHOWN else ""
    constant = sum(layer.constant for layer in layers)
    kind = "constant" if not any(layer.dead for layer in layers) else "dead or constant" if constant else "dead"
    subject = "1 layer has" if len(layers) == 1 else f"{len(layers)} layers have"
    return f"{subject} {kind} channels over {images} images: {shown}{more}; they cost time and do no harm"
