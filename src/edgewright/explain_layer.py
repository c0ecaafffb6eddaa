"""One layer in detail: the histogram of its input, the ranges that were in question, its channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgewright.calibration.ranges import Histogram
    from edgewright.optimize.dialects import Quantizer

__all__ = ["Candidate", "LayerDetail", "detail_document", "layer_detail"]

BARS = 24


@dataclass(frozen=True)
class Candidate:
    """A range that a method gives; `sqnr_db`: of the values that were seen, quantized over it."""

    method: str
    low: float
    high: float
    sqnr_db: float


@dataclass(frozen=True)
class LayerDetail:
    """What is known of one layer beside its `ExplainedLayer`.

    * edges `[K + 1]`, shares `[K]`: what share of its input's sampled values lies between two edges; empty if the
      input was not measured
    * candidates: the ranges of its input that were in question, the best first
    * widest, narrowest: largest magnitude in the weights of an output channel, None if they are computed; zero weights
      do not count
    * zero_channels: output channels whose weights are all 0
    * constant_channels: output channels that give one value on all images, and the value
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    candidates: tuple[Candidate, ...]
    widest: float | None
    narrowest: float | None
    channels: int | None
    zero_channels: tuple[int, ...]
    constant_channels: dict[int, float]


def layer_detail(quantizer: Quantizer, layer: str, images: NDArray[np.float32], *, threads: int = 0) -> LayerDetail:
    """Of the convolution or matrix product `layer`, on calibration images `[N, C, H, W]`."""
    from edgewright.optimize.channel_ranges import channel_magnitudes, constant_channels
    from edgewright.optimize.layer_errors import layer_outputs

    node = next(node for node in quantizer.model.graph if node.name == layer)
    tensor = str(node.inputs[0].name) if node.inputs[0] is not None else ""
    histogram = quantizer.table.histograms.get(tensor)
    edges, shares = ((), ()) if histogram is None else _bars(histogram)
    magnitudes = channel_magnitudes(node)
    used = None if magnitudes is None else magnitudes[magnitudes > 0]
    output = layer_outputs(quantizer.model)[layer]
    return LayerDetail(
        edges,
        shares,
        _candidates(quantizer, tensor) if tensor in quantizer.ranges else (),
        None if used is None or not used.size else float(used.max()),
        None if used is None or not used.size else float(used.min()),
        None if magnitudes is None else len(magnitudes),
        () if magnitudes is None else tuple(map(int, np.flatnonzero(magnitudes == 0))),
        constant_channels(quantizer.model, output, images, threads=threads),
    )


def detail_document(detail: LayerDetail) -> dict[str, Any]:
    """The field `detail` of the document."""
    return {
        "histogram": {"edges": list(detail.edges), "shares": list(detail.shares)},
        "candidates": [vars(candidate) for candidate in detail.candidates],
        "weights": {"channels": detail.channels, "widest": detail.widest, "narrowest": detail.narrowest},
        "zero_channels": list(detail.zero_channels),
        "constant_channels": [
            {"channel": channel, "value": value} for channel, value in detail.constant_channels.items()
        ],
    }


def _bars(histogram: Histogram) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values, counts = histogram.occupied()
    edges = np.linspace(histogram.minimum, max(histogram.maximum, np.nextafter(histogram.minimum, np.inf)), BARS + 1)
    found, _ = np.histogram(values, bins=edges, weights=counts)
    return tuple(map(float, edges)), tuple(float(share) for share in found / max(1.0, counts.sum()))


def _candidates(quantizer: Quantizer, tensor: str) -> tuple[Candidate, ...]:
    from edgewright.calibration.ranges import METHODS, silu, squared_error
    from edgewright.optimize.dialects import NVIDIA
    from edgewright.optimize.layer_errors import decibels

    values, counts = quantizer.table.histograms[tensor].occupied()
    transfer = silu if tensor in quantizer.plan.silu_inputs else None
    signal = float(counts @ (values if transfer is None else transfer(values)) ** 2)
    found = []
    for method in METHODS:
        transfers = {} if transfer is None else {tensor: transfer}
        interval = quantizer.table.ranges(method, [tensor], transfers, signed=quantizer.dialect in NVIDIA)[tensor]
        error = squared_error(values, counts, interval, transfer)
        found.append(Candidate(method, interval.low, interval.high, decibels(signal, error)))
    return tuple(sorted(found, key=lambda candidate: -candidate.sqnr_db))
