"""The smallest set of layers to leave in float so that the rest may be INT8: greedy, and verified by running.

To first order the errors that layers cause in the logits are independent: the noise power of a network is the sum of
what its layers cause alone. Among sets of one cost, the best is then the one whose layers cause most noise for their
cost, which gives the order (the greedy rule for a fractional knapsack: Dantzig 1957). How many of them are needed is
not predicted but tried: the graph with this set in float runs on the images, in steps that double, then by bisection.
Last, each layer of the set goes back to INT8 where the others turn out to be enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.expected_flips import ExpectedFlips, expected_flips
from edgewright.optimize.plan import NOTHING_LEFT_OUT
from edgewright.optimize.segments import logits_of
from edgewright.optimize.sensitivity import LayerSensitivity, noise_power
from edgewright.optimize.work import planned_layers
from edgewright.runtime.parity import Parity, compare

__all__ = ["Latency", "MixedPlan", "MixedPoint", "smallest_float_set"]

Batch = NDArray[np.float32]


@dataclass(frozen=True)
class Latency:
    """Of one image through a candidate, and how it is known.

    * unit: "ms" if it was measured here, "of FP16" if it is modelled as a share of what all layers take in FP16
    """

    value: float
    unit: Literal["ms", "of FP16"]
    kind: Literal["measured", "modelled"]


@dataclass(frozen=True)
class MixedPoint:
    """A candidate that was run on the images.

    * float_layers: left in float beyond those that were left out before, in the graph's order
    * int8_share: of the multiply-accumulates of all convolutions and matrix products, those in INT8, 0 … 1
    * parity: beside the FP32 network, without labels; expected: what its errors do to the top-1
    """

    float_layers: tuple[str, ...]
    int8_share: float
    parity: Parity
    expected: ExpectedFlips
    latency: Latency | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file that a person can read."""
        return {
            "float_layers": list(self.float_layers),
            "int8_share": self.int8_share,
            "images": self.parity.images,
            "agreement": self.parity.agreement,
            "sqnr_db": self.parity.sqnr_db,
            "expected_flips": self.expected.share,
            "expected_loss": self.expected.loss,
            "latency": None if self.latency is None else asdict(self.latency),
        }


@dataclass(frozen=True)
class MixedPlan:
    """What was chosen, and what it was chosen from.

    * left_out: all layers that stay float, with the reason of each, for `Quantizer.quantized`
    * met: whether `chosen` meets the target; if not, it is the candidate with the least expected loss
    * before: with everything in INT8 that was not left out before
    * frontier: the candidates that no other beats, the one with the most work in INT8 first
    """

    left_out: Mapping[str, str]
    met: bool
    before: MixedPoint
    chosen: MixedPoint
    frontier: tuple[MixedPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file that a person can read."""
        return {
            "left_out": dict(self.left_out),
            "met": self.met,
            "before": self.before.to_json(),
            "chosen": self.chosen.to_json(),
            "frontier": [point.to_json() for point in self.frontier],
        }


def smallest_float_set(
    quantizer: Quantizer,
    sensitivities: Sequence[LayerSensitivity],
    reference_logits: NDArray[Any],
    images: Batch,
    meets: Callable[[MixedPoint], bool],
    *,
    left_out: Mapping[str, str] = NOTHING_LEFT_OUT,
    cost: Callable[[LayerSensitivity], float] = lambda layer: float(max(layer.macs, 1)),
    least_int8: float = 0.0,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, at_most: None,
) -> MixedPlan:
    """The layers to leave in float so that the candidate `meets` a target, as few and cheap ones as are found.

    * sensitivities: of the layers that may be left in float beyond `left_out`
    * reference_logits: `[N, classes]`, of the original FP32 network; images: `[N, C, H, W]`, decoded
    * meets: must rather hold the more layers are float
    * cost: of leaving one layer in float, above 0; by default its multiply-accumulates
    * least_int8: the share of the work of `sensitivities`' layers that stays in INT8 in any case, met or not
    * threads: of onnxruntime, 0 for all cores; progress: is told how many candidates have run, and how many at most
    """
    ranked = sorted(sensitivities, key=lambda layer: -noise_power(layer.only_quantized) / cost(layer))
    ranked = _while_worth(ranked, least_int8)
    trials = _Trials(quantizer, reference_logits, images, left_out, threads, progress)
    order = [layer.node for layer in ranked]
    trials.at_most = 2 * (len(order).bit_length() + 1)
    count = _smallest_prefix(len(order), lambda first: meets(trials.point(order[:first])))
    if count is None:
        chosen = min(trials.points, key=lambda point: (point.expected.loss, -point.int8_share))
    else:
        trials.at_most = len(trials.points) + count
        dearest_first = sorted(ranked[:count], key=lambda layer: -cost(layer))
        chosen = trials.point(_without_needless(dearest_first, lambda names: meets(trials.point(names))))
    reasons = _reasons(sensitivities)
    return MixedPlan(
        left_out={**left_out, **{name: reasons[name] for name in chosen.float_layers}},
        met=count is not None,
        before=trials.point(()),
        chosen=chosen,
        frontier=_frontier(trials.points),
    )


class _Trials:
    """Runs candidates, each once."""

    def __init__(
        self,
        quantizer: Quantizer,
        reference_logits: NDArray[Any],
        images: Batch,
        left_out: Mapping[str, str],
        threads: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._quantizer = quantizer
        self._reference = reference_logits
        self._images = images
        self._left_out = left_out
        self._threads = threads
        self._progress = progress
        self._points: dict[frozenset[str], MixedPoint] = {}
        self.at_most = 0

    @property
    def points(self) -> tuple[MixedPoint, ...]:
        """All candidates that were run."""
        return tuple(self._points.values())

    def point(self, names: Sequence[str]) -> MixedPoint:
        """The candidate with the layers `names` in float too."""
        key = frozenset(names)
        if key not in self._points:
            self._points[key] = self._run(key)
            self._progress(len(self._points), max(self.at_most, len(self._points)))
        return self._points[key]

    def _run(self, names: frozenset[str]) -> MixedPoint:
        left_out = {**self._left_out, **dict.fromkeys(names, "a candidate")}
        logits = logits_of(self._quantizer.runnable(left_out), self._images, threads=self._threads)
        return MixedPoint(
            float_layers=tuple(name for name in self._quantizer.layers if name in names),
            int8_share=_int8_share(self._quantizer, left_out),
            parity=compare(self._reference, logits, None, source="simulation"),
            expected=expected_flips(self._reference, logits),
        )


def _while_worth(ranked: Sequence[LayerSensitivity], least: float) -> list[LayerSensitivity]:
    """The first of `ranked` layers, as many as leave the share `least` of the work of all of them to the others."""
    total = sum(layer.macs for layer in ranked)
    spent = itertools.accumulate(layer.macs for layer in ranked)
    return [layer for layer, work in zip(ranked, spent, strict=True) if total - work >= least * total]


def _int8_share(quantizer: Quantizer, left_out: Mapping[str, str]) -> float:
    work = {layer.name: layer.macs for layer in planned_layers(quantizer.model)}
    in_int8 = sum(work[name] for name in quantizer.layers if name not in left_out)
    return in_int8 / max(sum(work.values()), 1)


def _smallest_prefix(length: int, meets: Callable[[int], bool]) -> int | None:
    """The smallest number that `meets`, 0 … `length`, if all above it do too; None if not even `length` does."""
    too_few, enough = -1, 0
    while not meets(enough):
        if enough == length:
            return None
        too_few, enough = enough, min(max(2 * enough, 1), length)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if meets(middle) else (middle, enough)
    return enough


def _without_needless(layers: Sequence[LayerSensitivity], meets: Callable[[Sequence[str]], bool]) -> list[str]:
    """The names of `layers`, less each, in turn, without which the rest still `meets`."""
    kept = [layer.node for layer in layers]
    for name in tuple(kept):
        rest = [other for other in kept if other != name]
        if meets(rest):
            kept = rest
    return kept


def _reasons(sensitivities: Sequence[LayerSensitivity]) -> dict[str, str]:
    """By the names of the layers, why each would stay float."""
    ranked = sorted(sensitivities, key=lambda layer: -noise_power(layer.only_quantized))
    return {layer.node: _reason(layer, rank, len(ranked)) for rank, layer in enumerate(ranked, start=1)}


def _reason(layer: LayerSensitivity, rank: int, layers: int) -> str:
    place = "most sensitive" if rank == 1 else f"sensitive, number {rank}"
    decibels = layer.only_quantized.sqnr_db
    effect = "makes logits infinite" if decibels is None else f"leaves {decibels:.1f} dB of logit SQNR"
    return f"{place} of {layers} layers: INT8 in it alone {effect}"


def _frontier(points: Sequence[MixedPoint]) -> tuple[MixedPoint, ...]:
    """Those of `points` that are more exact than all with more work in INT8."""
    found: list[MixedPoint] = []
    for point in sorted(points, key=lambda point: (-point.int8_share, noise_power(point.parity))):
        if not found or noise_power(point.parity) < noise_power(found[-1].parity):
            found.append(point)
    return tuple(found)
