"""Placement by the compiler's listing: where INT8 costs TensorRT-RTX neither kernels nor bytes.

TensorRT-RTX builds without a GPU, so nothing can be timed; but it lists every kernel with the bytes that it reads and
writes. A convolution of batch 1 is bound by these, and a pair of Q/DQ that no kernel absorbs is a kernel of its own
with the traffic of a whole tensor. So FP16 and INT8 are compiled, the layers at which INT8 lists more are left out, and
that is repeated until the whole INT8 engine has at most the kernels and the bytes of FP16; if no layer is left, none is
INT8.

It begins with what the rules of `plan_for_rtx` allow. Begun with all that NVIDIA's rules for TensorRT allow, it ends
with less: on EfficientNet-Lite0 and MobileNetV2 with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from edgewright.optimize.dialects import Quantizer, half_graph
from edgewright.optimize.plan import NOTHING_LEFT_OUT
from edgewright.optimize.work import planned_layers
from edgewright.runtime.audit import Traffic, audited, deviations, in_words, traffic
from edgewright.runtime.backends import Backend, BuildRequest
from edgewright.runtime.errors import BuildError
from edgewright.runtime.specs import Kernel, LayerPrecision

__all__ = ["ListedPlacement", "placed_by_listing"]

MOST_ROUNDS = 6
QUANTIZE_ENDING = "::quantize"
"""How `optimize/qdq.py` ends the names of the nodes that quantize."""


@dataclass(frozen=True)
class ListedPlacement:
    """Where INT8 costs nothing on any of the targets.

    * left_out: layers that are to stay in FP16, and why
    * half, int8: by target what the engines need at batch 1; `int8` is empty if no layer is left
    * builds: how many engines were compiled to find out
    """

    left_out: Mapping[str, str]
    half: Mapping[str, Traffic]
    int8: Mapping[str, Traffic]
    builds: int

    @property
    def remainder(self) -> str:
        """What the layers that are left out run in."""
        return "fp16"

    @property
    def chosen(self) -> str:
        """What was taken, in the words of `placement.Placement`."""
        if not self.int8:
            return "FP16"
        return "placed" if self.left_out else "all INT8"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file that a person can read."""
        return {"schema": "edgewright.placement-rtx/1", **asdict(self)}


@dataclass(frozen=True)
class _Listing:
    """What one compilation listed."""

    kernels: tuple[Kernel, ...]
    layers: tuple[LayerPrecision, ...]

    @property
    def traffic(self) -> Traffic:
        found = traffic(self.kernels)
        if found is None:
            raise BuildError("the compiler does not list what its kernels read and write", "leave the placement out")
        return found


def placed_by_listing(
    quantizer: Quantizer,
    backend: Backend,
    targets: Sequence[str],
    *,
    left_out: Mapping[str, str] = NOTHING_LEFT_OUT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ListedPlacement:
    """Which layers should stay in FP16 so that INT8 needs no more kernels and bytes than FP16 for any of `targets`.

    `left_out` stay there in any case. Targets for which `backend` builds no INT8 are passed over. `progress` is told
    the rounds done, each one engine a target, and their largest number. Raises `BuildError` if FP16 cannot be built.
    """
    possible = [target for target in targets if backend.unsupported("int8", target) is None]
    plain = half_graph(quantizer.model, quantizer.table).model
    half = {target: _listed(backend, plain, "fp16", target) for target in possible}
    progress(1, 1 + MOST_ROUNDS)
    stay = dict(left_out)
    for done in range(1, 1 + MOST_ROUNDS):
        layers = tuple(layer for layer in quantizer.layers if layer not in stay)
        if not layers:
            return ListedPlacement(stay, _traffic(half), {}, done * len(possible))
        graph = quantizer.quantized(stay).model
        int8 = {target: _listed(backend, graph, "int8", target) for target in possible}
        costly = dict(found for target in possible for found in _costly(layers, half[target], int8[target], target))
        progress(1 + done, 1 + MOST_ROUNDS)
        if not costly:
            return ListedPlacement(stay, _traffic(half), _traffic(int8), (1 + done) * len(possible))
        stay |= costly
    reason = f"INT8 still cost more than FP16 when others had been left out {MOST_ROUNDS} times"
    stay |= dict.fromkeys((layer for layer in quantizer.layers if layer not in stay), reason)
    return ListedPlacement(stay, _traffic(half), {}, (1 + MOST_ROUNDS) * len(possible))


def _traffic(listings: Mapping[str, _Listing]) -> dict[str, Traffic]:
    return {target: listing.traffic for target, listing in listings.items()}


def _listed(backend: Backend, graph: ir.Model, precision: str, target: str) -> _Listing:
    """Compiled without the audit: a layer that runs in another precision than planned is left out, not an error."""
    planned = planned_layers(graph)
    compiled = backend.compile(BuildRequest(ir.to_proto(graph).SerializeToString(), precision, planned, target))
    return _Listing(compiled.kernels, audited(planned, compiled.kernels))


def _costly(layers: Sequence[str], half: _Listing, int8: _Listing, target: str) -> Iterator[tuple[str, str]]:
    """Those of `layers` that do not run in INT8, or else those at which INT8 lists more than FP16, and why."""
    elsewhere = {layer.name: layer.actual for layer in deviations(int8.layers) if layer.name in layers}
    if elsewhere:
        yield from ((name, f"the compiler runs it in {actual} for {target}") for name, actual in elsewhere.items())
        return
    if int8.traffic.at_most(half.traffic):
        return
    before, after = _by_layer(layers, half.kernels), _by_layer(layers, int8.kernels)
    for layer in layers:
        if not after[layer].at_most(before[layer]):
            yield (
                layer,
                (
                    f"INT8 costs more here for {target}: {in_words(after[layer])} against {in_words(before[layer])} "
                    "up to the next layer that could be INT8"
                ),
            )


def _by_layer(layers: Sequence[str], kernels: Sequence[Kernel]) -> dict[str, Traffic]:
    """What is listed for each layer and all that follows it up to the next; a quantization counts for the next."""
    groups: dict[str, list[Kernel]] = {layer: [] for layer in layers}
    current, for_the_next = "", list[Kernel]()
    for kernel in kernels:
        running = next((source for source in kernel.sources if source in groups), "")
        if running and kernel.computes:
            current = running
            groups[current] += for_the_next
            for_the_next = []
        quantizes = bool(kernel.sources) and all(source.endswith(QUANTIZE_ENDING) for source in kernel.sources)
        (groups[current] if current and not quantizes else for_the_next).append(kernel)
    return {layer: traffic(group) or Traffic(0, 0, 0) for layer, group in groups.items()}
