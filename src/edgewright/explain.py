"""What eight bits do to each layer of a network, and why: gathered for a person, and as the document.

Nothing here knows labels: errors are those against the FP32 network, on calibration images.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.errors import QuantizationError
from edgewright.runtime.parity import Parity, compare

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgewright.calibration.ranges import Histogram, Range
    from edgewright.optimize.dialects import Quantizer
    from edgewright.optimize.plan import Decision

__all__ = [
    "ExplainedLayer",
    "Explanation",
    "InputRange",
    "check_layer",
    "explain",
    "explain_document",
    "explained_layers",
    "input_ranges",
    "layer_document",
    "with_effects",
]

Batch = NDArray[np.float32]
Progress = Callable[[int, int], None]
STEPS = 255  # of eight bits


@dataclass(frozen=True)
class InputRange:
    """What the integers of a layer's input cover, beside what was seen of it.

    * low, high, method: the range, and what chose it; minimum, maximum: of all values that were seen
    * saturation: share of the sampled values that lie outside the range, by more than half a step
    """

    tensor: str
    low: float
    high: float
    method: str
    minimum: float
    maximum: float
    saturation: float


@dataclass(frozen=True)
class ExplainedLayer:
    """One convolution or matrix product.

    * tensor: what it gives, behind its ReLU or ReLU6
    * precision, reason: what the plan has it run in, and why
    * sqnr_db: of its tensor in the quantized graph against the FP32 graph, all errors before it included
    * own_sqnr_db: the same if the layers before it had no error
    * spread: widest by narrowest range of the output channels of its weight, None if the weight is computed
    * input: None if it does not read integers
    * in_float: the logits if this layer alone is left in float, None if that was not measured
    """

    name: str
    operator: str
    tensor: str
    precision: str
    reason: str
    macs: int
    sqnr_db: float
    own_sqnr_db: float
    spread: float | None
    input: InputRange | None
    in_float: Parity | None = None


@dataclass(frozen=True)
class Explanation:
    """All layers in their order; `logits`: of the quantized graph beside those of the FP32 graph."""

    dialect: str
    images: int
    logits: Parity
    layers: tuple[ExplainedLayer, ...]

    @property
    def worst_first(self) -> tuple[ExplainedLayer, ...]:
        """By their own errors: what a layer inherits says where it stands, not what is wrong with it."""
        return tuple(sorted(self.layers, key=lambda layer: layer.own_sqnr_db))


def explain(
    quantizer: Quantizer, images: Batch, *, threads: int = 0, progress: Progress = lambda done, total: None
) -> Explanation:
    """Every layer of `quantizer.model` on calibration images `[N, C, H, W]`; `progress` is told how many are done."""
    from edgewright.optimize.segments import logits_of

    reference, candidate = quantizer.model, quantizer.runnable()
    layers = explained_layers(
        reference,
        candidate,
        quantizer.plan.decisions,
        input_ranges(quantizer.ranges, quantizer.table.histograms),
        images,
        threads=threads,
        progress=progress,
    )
    expected = logits_of(reference, images, threads=threads)
    parity = compare(expected, logits_of(candidate, images, threads=threads), None, source="simulation")
    return Explanation(quantizer.dialect, len(images), parity, layers)


def explained_layers(
    reference: ir.Model,
    candidate: ir.Model,
    decisions: Iterable[Decision],
    ranges: Mapping[str, InputRange],
    images: Batch,
    *,
    threads: int = 0,
    progress: Progress = lambda done, total: None,
) -> tuple[ExplainedLayer, ...]:
    """The layers of a quantized graph beside the same of its FP32 graph, as far as both compute the same tensor.

    * candidate: as onnxruntime runs it on this CPU; decisions: of its plan
    * ranges: by the names of the activations; images: `[N, C, H, W]`, of which `progress` is told how many are done
    """
    from edgewright.optimize.layer_errors import layer_errors, layer_outputs, shared_tensors
    from edgewright.optimize.work import macs

    shared = {*shared_tensors(reference, candidate)}
    outputs = {layer: tensor for layer, tensor in layer_outputs(reference).items() if tensor in shared}
    tensors = list(dict.fromkeys(outputs.values()))
    errors = layer_errors(
        reference, candidate, images, tensors, threads=threads, progress=lambda done: progress(done, len(images))
    )
    decided = {decision.node: decision for decision in decisions if decision.node in outputs}
    layers = []
    for node in reference.graph:
        decision = decided.get(str(node.name))
        if decision is None:
            continue
        tensor, integer = outputs[decision.node], decision.precision == "int8"
        layers.append(
            ExplainedLayer(
                name=decision.node,
                operator=node.op_type,
                tensor=tensor,
                precision=decision.precision,
                reason=decision.reason,
                macs=macs(node),
                sqnr_db=errors[tensor].sqnr_db,
                own_sqnr_db=errors[tensor].own_sqnr_db,
                spread=_spread(node),
                input=ranges.get(str(node.inputs[0].name)) if integer and node.inputs[0] is not None else None,
            )
        )
    return tuple(layers)


def with_effects(
    explanation: Explanation,
    quantizer: Quantizer,
    images: Batch,
    layers: Sequence[str],
    *,
    threads: int = 0,
    progress: Progress = lambda done, total: None,
) -> Explanation:
    """`explanation` with what leaving each of `layers` in float brings, as far as they are INT8."""
    from edgewright.optimize.segments import logits_of
    from edgewright.optimize.sensitivity import sensitivities

    expected = logits_of(quantizer.model, images, threads=threads)
    measured = sensitivities(quantizer, expected, images, layers=layers, threads=threads, progress=progress)
    effects = {each.node: each.only_kept for each in measured}
    return replace(
        explanation,
        layers=tuple(replace(layer, in_float=effects.get(layer.name)) for layer in explanation.layers),
    )


def check_layer(name: str, known: Sequence[str]) -> str:
    """The layer that `name` means: itself, or the only one whose module it is.

    Raises `QuantizationError` with the nearest names if there is none.
    """
    from edgewright.optimize.stages import module_of

    meant = [layer for layer in known if name in (layer, module_of(layer))]
    if len(meant) == 1:
        return meant[0]
    near = meant or difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known[:3])
    raise QuantizationError(f"there is no layer {name!r}", f"did you mean {', '.join(near)}?")


def explain_document(explanation: Explanation, model: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The document `edgewright.explain/1`, the worst layer first; `detail` is added for a layer that is asked for.

    `notes`: what the stages before it noticed.
    """
    return {
        "schema": "edgewright.explain/1",
        "model": model,
        "dialect": explanation.dialect,
        "images": explanation.images,
        "logits": _fidelity(explanation.logits),
        "layers": [layer_document(layer) for layer in explanation.worst_first],
        "notes": list(notes),
    }


def layer_document(layer: ExplainedLayer) -> dict[str, Any]:
    """One layer as the document has it."""
    return {
        **{name: value for name, value in vars(layer).items() if name not in ("input", "in_float")},
        "input": None if layer.input is None else vars(layer.input),
        "in_float": None if layer.in_float is None else _fidelity(layer.in_float),
    }


def _fidelity(parity: Parity) -> Mapping[str, float | None]:
    return {"agreement": parity.agreement, "sqnr_db": parity.sqnr_db}


def _spread(node: Any) -> float | None:
    from edgewright.optimize.channel_ranges import channel_magnitudes

    magnitudes = channel_magnitudes(node)
    if magnitudes is None or not magnitudes.any():
        return None
    return float(magnitudes.max() / magnitudes[magnitudes > 0].min())


def input_ranges(ranges: Mapping[str, Range], histograms: Mapping[str, Histogram]) -> dict[str, InputRange]:
    """Each activation's range beside what was seen of it."""
    return {
        tensor: InputRange(
            tensor,
            interval.low,
            interval.high,
            interval.method,
            histograms[tensor].minimum,
            histograms[tensor].maximum,
            _saturation(histograms[tensor], interval.low, interval.high),
        )
        for tensor, interval in ranges.items()
        if tensor in histograms
    }


def _saturation(histogram: Histogram, low: float, high: float) -> float:
    """Values within half a step of the range are rounded, not cut off: what SiLU gives crowds at its minimum."""
    values, counts = histogram.occupied()
    half = (high - low) / (2 * STEPS)
    return float(counts[(values < low - half) | (values > high + half)].sum() / max(1.0, counts.sum()))
