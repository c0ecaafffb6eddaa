"""Streams images through the folded graph once and keeps a histogram of every activation.

The graph itself reduces each activation to a few numbers per image (`observers.py`), so memory is that of one batch,
however many images there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgewright.calibration.channels import ChannelExtremes
from edgewright.calibration.nonfinite import check_weights, nonfinite_error
from edgewright.calibration.observers import Seen, observer_outputs, with_observers
from edgewright.calibration.ranges import (
    AUTO,
    METHODS,
    Histogram,
    Range,
    Transfer,
    best_range,
    mse_range,
    symmetric,
    symmetric_mse_range,
)
from edgewright.calibration.sessions import cpu_session
from edgewright.runtime.errors import CalibrationError

__all__ = ["LARGEST_BATCH", "CalibrationTable", "Tally", "WatchedGraph", "batch_size", "collect"]

LARGEST_BATCH = 8
NOT_FINITE = "holds NaN or infinite values"
BATCH_BYTES = 1 << 31
"""Of all activations of a batch, which onnxruntime may hold at the same time; an EfficientNet-B7 has 3 GB an image."""


@dataclass(frozen=True)
class CalibrationTable:
    """What was measured, and everything that identifies it.

    * identity: SHA-256 of the graph, identity of the images, preprocessing, versions: by name, in words
    * samples: number of images
    * histograms: per activation tensor of the graph
    * constant_channels: per tensor that has any, the channels (axis 1) of one value in all images, and that value
    """

    identity: Mapping[str, str]
    samples: int
    histograms: Mapping[str, Histogram]
    constant_channels: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def ranges(
        self,
        method: str,
        names: Iterable[str] | None = None,
        transfers: Mapping[str, Transfer] | None = None,
        *,
        signed: bool = False,
    ) -> dict[str, Range]:
        """A range by `method`, one of `METHODS` or `AUTO`, for each tensor or those in `names`.

        `transfers` names tensors that only an elementwise function reads; "mse" and `AUTO` measure behind it.
        `signed` ranges are symmetric, for S8 with zero-point 0.
        Raises `CalibrationError` for another method, or a tensor that was not measured.
        """
        if method != AUTO and method not in METHODS:
            raise CalibrationError(f"unknown range method {method!r}", f"choose one of {', '.join((AUTO, *METHODS))}")
        wanted = self.histograms if names is None else {name: self._histogram(name) for name in names}
        return {
            name: _range_by(method, histogram, (transfers or {}).get(name), signed=signed)
            for name, histogram in wanted.items()
        }

    def _histogram(self, name: str) -> Histogram:
        if name not in self.histograms:
            raise CalibrationError(f"activation {name} was not measured", "calibrate this graph again")
        return self.histograms[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return {
            "schema": "edgewright.calibration/1",
            "identity": dict(self.identity),
            "samples": self.samples,
            "tensors": {name: histogram.to_json() for name, histogram in self.histograms.items()},
            "constant_channels": {name: list(found.items()) for name, found in self.constant_channels.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CalibrationTable:
        """The inverse of `to_json`."""
        histograms = {name: Histogram.from_json(tensor) for name, tensor in content["tensors"].items()}
        constant = {
            name: {int(channel): float(value) for channel, value in found}
            for name, found in content.get("constant_channels", {}).items()  # tables of before have none
        }
        return cls(content["identity"], content["samples"], histograms, constant)


def _range_by(method: str, histogram: Histogram, transfer: Transfer | None, *, signed: bool) -> Range:
    if method == AUTO:
        return best_range(histogram, transfer, signed=signed)
    if signed:
        chosen = symmetric_mse_range(histogram) if method == "mse" else symmetric(METHODS[method](histogram))
    elif method == "mse":
        chosen = mse_range(histogram, transfer).with_zero()
    else:
        chosen = METHODS[method](histogram).with_zero()
    return replace(chosen, method=method)


def batch_size(model: ir.Model) -> int:
    """How many images to pass through `model` at once, 1 to 8, so that its activations fit into 2 GiB if they can."""
    shapes = [output.shape for node in model.graph for output in node.outputs if output.shape is not None]
    elements = sum(math.prod(side for side in shape[1:] if isinstance(side, int)) for shape in shapes)
    return min(LARGEST_BATCH, max(1, BATCH_BYTES // max(1, 4 * elements)))


def collect(
    model: ir.Model,
    batches: Iterable[NDArray[np.float32]],
    *,
    identity: Mapping[str, str],
    threads: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> CalibrationTable:
    """One pass over `batches` (float32 `[N, C, H, W]`) through `model`; `progress` is told the images done so far.

    `threads` is onnxruntime's number of threads, 0 for all cores.
    Raises `CalibrationError` without images, or where a weight is NaN or an activation not finite, naming the layer.
    """
    watched = WatchedGraph(model, threads=threads)
    tally = Tally(watched.names)
    for batch in batches:
        tally.add(watched(batch, tally.samples + 1))
        progress(tally.samples)
    return tally.table(identity)


class WatchedGraph:
    """A graph that says of each activation what a `Tally` needs, for one batch after the other.

    * names: of all float activations with a batch axis, in the order of the graph
    """

    def __init__(self, model: ir.Model, *, threads: int = 0) -> None:
        """Raises `CalibrationError` if a weight is NaN."""
        check_weights(model)
        self._model = model
        observed, self.names, self._clamped = with_observers(model)
        self._session = cpu_session(observed, threads=threads)
        self._watched = [name for name in self.names if name not in self._clamped]
        self._outputs = [output for name in self._watched for output in observer_outputs(name)]
        (self._input,) = (str(value.name) for value in model.graph.inputs)

    def __call__(self, batch: NDArray[np.float32], first: int) -> dict[str, Seen]:
        """What was seen of `batch` `[N, C, H, W]`, whose first image is the `first`-th, counted from 1.

        Raises `CalibrationError` where an activation is not finite, naming the layer.
        """
        if not np.isfinite(batch).all():
            raise nonfinite_error(self._model, batch, first, self._input, NOT_FINITE)
        results = iter(self._session.run(self._outputs, {self._input: batch}))
        seen: dict[str, Seen] = {name: (next(results), next(results), next(results)) for name in self._watched}
        seen |= {name: clamp.applied_to(seen[clamp.source]) for name, clamp in self._clamped.items()}
        for name, parts in seen.items():
            if not all(np.isfinite(part).all() for part in parts):
                raise nonfinite_error(self._model, batch, first, name, NOT_FINITE)
        return seen


class Tally:
    """What was seen of activations so far; mutable."""

    def __init__(self, names: Iterable[str]) -> None:
        self.samples = 0
        self._histograms = {name: Histogram.empty() for name in names}
        self._channels = {name: ChannelExtremes() for name in self._histograms}

    def add(self, seen: Mapping[str, Seen]) -> None:
        """What a `WatchedGraph` gave for a batch."""
        for name, (low, high, samples) in seen.items():
            self._histograms[name].add(samples, float(low.min()), float(high.max()))
            self._channels[name].add(low, high)
        self.samples += len(next(iter(seen.values()))[0])

    def table(self, identity: Mapping[str, str]) -> CalibrationTable:
        """All of it. Raises `CalibrationError` if nothing was seen."""
        if not self.samples:
            raise CalibrationError(
                "there are no calibration images", "give --calibration DIR; random data is never used"
            )
        constant = {name: values for name, extremes in self._channels.items() if (values := extremes.constant())}
        return CalibrationTable(dict(identity), self.samples, self._histograms, constant)
