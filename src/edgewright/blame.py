"""Which step on the way from PyTorch to the engine loses the accuracy, and in which layer.

The same images go through all of them. What a hop loses is measured against the hop that it was made from, so that
nobody answers for another's loss. Inside a guilty hop every layer is given what the hop before has in front of it
(`optimize/layer_errors.py`): the layer that makes something else of it is at fault, not those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.parity import Parity, compare

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgewright.calibration.ranges import Histogram
    from edgewright.optimize.layer_errors import Activations

__all__ = ["ALLOWED", "Allowed", "Blame", "Hop", "Kind", "Origin", "Step", "blame"]

Batch = NDArray[np.float32]
Kind = Literal["source", "exact", "fp16", "int8", "engine"]
RGB = 3
LOOKED_AT = 8
"""Images whose activations are looked at for the layer: what is wrong with a layer is wrong on every image."""


@dataclass(frozen=True)
class Allowed:
    """What a kind of hop may lose.

    * agreement: a hop is guilty if the 95 % interval of its agreement ends below
    * sqnr_db: of the logits, a hop below is guilty; None if the agreement alone decides
    * own_sqnr_db: of a layer given right inputs; a layer below diverges
    """

    agreement: float
    sqnr_db: float | None
    own_sqnr_db: float


ALLOWED: dict[Kind, Allowed] = {
    # Float32 sums in another order stay below 1e-5 (`export/conventions.py`); 80 dB is an amplitude of 1e-4.
    "exact": Allowed(1.0, 80.0, 80.0),
    # Rounding to FP16 leaves 2**-11 of an amplitude, 66 dB; where a layer's sums cancel it may be a tenth of that.
    "fp16": Allowed(0.99, None, 40.0),
    # The ladder's aim is an agreement of 0.99. A layer of 8-bit inputs and weights has some 30 to 50 dB.
    "int8": Allowed(0.98, None, 20.0),
    # The integers are the graph's own; kernels round the rest in another order, or in BF16.
    "engine": Allowed(0.98, None, 20.0),
}


@dataclass(frozen=True)
class Hop:
    """One form of the network.

    * run: logits `[N, classes]` of preprocessed images `[N, C, H, W]`
    * before: name of the hop that it was made from; None for the one in front of it in the list
    * graph: what `run` runs, if its activations can be read
    * quantized: the same with its Q/DQ as it was written, of a hop of kind "int8"; histograms: what the calibration saw
      of the activations, by which its scales are judged
    * activations: gives activations by name, of a hop without a graph; tensors: which ones
    * incomparable: why its activations do not compare with those of the hop before, or ""; then no layer is looked for
    """

    name: str
    kind: Kind
    run: Callable[[Batch], Batch]
    before: str | None = None
    graph: ir.Model | None = None
    quantized: ir.Model | None = None
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    activations: Callable[[Sequence[str]], Activations] | None = None
    tensors: tuple[str, ...] = ()
    incomparable: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a guilty hop diverges first; `what` is wrong there is a sentence's end.

    * layer, operator: a node of the hop's graph, "input" for the images themselves
    * tensor: the activation or weight that is wrong
    * own_sqnr_db: of what the layer gives for right inputs, None if something else gave it away
    """

    layer: str
    operator: str
    tensor: str
    own_sqnr_db: float | None
    what: str


@dataclass(frozen=True)
class Step:
    """A hop beside the one it was made from.

    * parity: of their logits, None if the hop before gives no finite ones
    * origin: of a guilty hop, None if no layer stands out; note: why there is none, or ""
    """

    hop: str
    kind: Kind
    before: str
    parity: Parity | None
    guilty: bool
    origin: Origin | None = None
    note: str = ""


@dataclass(frozen=True)
class Blame:
    """All hops but the source; `images` is how many they were compared on."""

    steps: tuple[Step, ...]
    images: int

    @property
    def guilty(self) -> tuple[Step, ...]:
        """The guilty hops, the most guilty first: by the images that they decide otherwise, then by SQNR."""
        return tuple(sorted((step for step in self.steps if step.guilty), key=_innocence))


def blame(
    hops: Sequence[Hop],
    images: Batch,
    *,
    threads: int = 0,
    progress: Callable[[str, int, int], None] = lambda hop, done, total: None,
) -> Blame:
    """Each of `hops` on `images` `[N, C, H, W]` beside the one that it was made from; the first is the source.

    `threads` is that of onnxruntime; `progress` is told which hop runs now, and how many of how many are done.
    Raises `ParityError` if the source gives NaN or infinite logits, or hops give logits of other shapes.
    """
    logits: dict[str, Batch] = {}
    steps: list[Step] = []
    for index, hop in enumerate(hops):
        progress(hop.name, index, len(hops))
        logits[hop.name] = hop.run(images)
        if index == 0:
            compare(logits[hop.name], logits[hop.name], None)  # says so if it is not finite
            continue
        before = next(other for other in hops if other.name == (hop.before or hops[index - 1].name))
        steps.append(_step(before, hop, logits, images, threads))
    return Blame(tuple(steps), len(images))


def _step(before: Hop, hop: Hop, logits: dict[str, Batch], images: Batch, threads: int) -> Step:
    finite = np.isfinite(logits[before.name]).all(axis=1)
    if not finite.any():
        note = f"{before.name}, which it was made from, gives no finite logits"
        return Step(hop.name, hop.kind, before.name, None, False, note=note)
    images, expected = images[finite], logits[before.name][finite]
    parity = compare(expected, logits[hop.name][finite], None)
    guilty = _is_guilty(parity, hop.kind)
    fault = _scale_fault(before, hop, wasteful_only=not guilty)
    if fault is not None:
        return Step(hop.name, hop.kind, before.name, parity, True, fault)
    if not guilty:
        return Step(hop.name, hop.kind, before.name, parity, False)
    if _is_swapped(hop, expected, images):
        what = "it is fed BGR instead of RGB: with its channels swapped it agrees"
        return Step(hop.name, hop.kind, before.name, parity, True, Origin("input", "", "input", None, what))
    if hop.graph is None or hop.incomparable or not (before.graph is not None or before.activations is not None):
        note = f"{hop.incomparable or 'its activations cannot be read'}; swapped channels do not explain it"
        return Step(hop.name, hop.kind, before.name, parity, True, note=note)
    origin = _origin(before, hop, images[_evenly_spaced(len(images))], threads)
    note = "" if origin is not None else "no layer stands out: each loses a little"
    return Step(hop.name, hop.kind, before.name, parity, True, origin, note)


def _is_guilty(parity: Parity, kind: Kind) -> bool:
    allowed = ALLOWED[kind]
    too_noisy = allowed.sqnr_db is not None and (parity.sqnr_db is None or parity.sqnr_db < allowed.sqnr_db)
    return too_noisy or parity.nonfinite > 0 or parity.agreement_ci95[1] < allowed.agreement


def _innocence(step: Step) -> tuple[float, float]:
    assert step.parity is not None
    return step.parity.agreement, step.parity.sqnr_db or 0.0


def _is_swapped(hop: Hop, expected: Batch, images: Batch) -> bool:
    """Whether `hop` is innocent once it is given the channels in the opposite order."""
    if images.shape[1] != RGB:
        return False
    swapped = hop.run(np.ascontiguousarray(images[:, ::-1]))
    return not _is_guilty(compare(expected, swapped, None), hop.kind)


def _evenly_spaced(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64))


def _origin(before: Hop, hop: Hop, images: Batch, threads: int) -> Origin | None:
    """The layer of `hop` that makes something else of what `before` has in front of it.

    The first that does; with eight bits every layer does, and it is the one that does most.
    """
    from edgewright.optimize.layer_errors import activations_of, layer_outputs, own_errors
    from edgewright.optimize.segments import values_by_name

    assert hop.graph is not None
    tensors = _shared(before, hop)
    if hop.kind == "int8":
        outputs = set(layer_outputs(hop.graph).values())
        tensors = [name for name in tensors if name in outputs]  # so that each rounding belongs to a layer
    if before.graph is not None:
        expected = activations_of(before.graph, tensors, threads=threads)
    else:
        assert before.activations is not None
        expected = before.activations(tensors)
    errors = own_errors(expected, hop.graph, images, tensors, threads=threads)
    limit = ALLOWED[hop.kind].own_sqnr_db
    diverging = [name for name in tensors if errors[name] < limit]
    if not diverging:
        return None
    first = min(diverging, key=lambda name: errors[name]) if hop.kind == "int8" else diverging[0]
    node = _layer_of(values_by_name(hop.graph)[first], hop.kind)
    return Origin(str(node.name), node.op_type, first, errors[first], _what(hop.kind, errors[first]))


def _layer_of(value: ir.Value, kind: Kind) -> ir.Node:
    """The node that has `value` to answer for: not those that only pass on what it gave, which FP16 rounds later."""
    from edgewright.optimize.simulate import VALUE_KEEPING

    innocent = ("Cast",) if kind == "exact" else ("Cast", *VALUE_KEEPING)
    node = value.producer()
    assert node is not None
    while node.op_type in innocent and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        if before is None:
            break
        node = before
    return node


def _what(kind: Kind, own_sqnr_db: float) -> str:
    if own_sqnr_db <= -300 and kind == "fp16":
        return "it gives NaN or infinite values: beyond 65504 FP16 overflows"
    if kind == "int8":
        return f"eight bits leave it {own_sqnr_db:.0f} dB, the least of all layers"
    return f"given the same input it gives something else: {own_sqnr_db:.0f} dB"


def _scale_fault(before: Hop, hop: Hop, *, wasteful_only: bool) -> Origin | None:
    """The first wrong scale. One that wastes bits is a fault however well it goes on these images."""
    from edgewright.optimize.scale_faults import scale_faults

    if before.graph is None or hop.quantized is None or hop.incomparable:
        return None
    faults = scale_faults(before.graph, hop.quantized, hop.histograms)
    fault = next((fault for fault in faults if fault.wastes_bits or not wasteful_only), None)
    if fault is None:
        return None
    what = f"the scale of {fault.tensor} is {fault.ratio:.2g} times the best, which costs {fault.lost_db:.0f} dB"
    return Origin(fault.layer, fault.operator, fault.tensor, None, what)


def _shared(before: Hop, hop: Hop) -> list[str]:
    """Activations that both have, in the order of `hop`."""
    from edgewright.optimize.layer_errors import shared_tensors
    from edgewright.optimize.segments import values_by_name

    assert hop.graph is not None
    if before.graph is not None:
        return list(shared_tensors(before.graph, hop.graph))
    known = set(before.tensors)
    return [name for name in values_by_name(hop.graph) if name in known]
