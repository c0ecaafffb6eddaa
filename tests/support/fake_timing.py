"""A fake backend on which every layer takes the time that a test gives it, by a clock that only it advances."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.backends import Absence, Backend, BuildRequest, Compiled, KernelTime, Runner
from edgewright.runtime.errors import BuildError
from edgewright.runtime.specs import Kernel, PlannedLayer, TensorSpec

__all__ = ["FakeBackend", "Milliseconds"]


@dataclass(frozen=True)
class Milliseconds:
    """What one layer takes, by precision."""

    fp32: float
    int8: float
    bf16: float = 100.0
    fp16: float = 100.0


class FakeBackend(Backend):
    """Runs nothing. Layers stand in a row; a tensor between two of them that differ is converted in `conversion` ms."""

    name = "fake"
    precisions = ("fp32", "fp16", "bf16", "int8")
    dialect = "cpu"
    suffix = ".fake"

    def __init__(
        self, layers: Mapping[str, Milliseconds], conversion: float = 0.0, *, bf16: bool = False, lists: bool = True
    ) -> None:
        self._layers, self._conversion, self._bf16, self._lists = layers, conversion, bf16, lists
        self.refused: set[frozenset[str]] = set()
        self.now = 0
        self.built: list[dict[str, str]] = []

    def clock(self) -> int:
        return self.now

    def absence(self) -> Absence | None:
        return None

    def unsupported(self, precision: str, target: str | None) -> Absence | None:
        return Absence("precision_unsupported", "no BF16", "") if precision == "bf16" and not self._bf16 else None

    def version(self) -> str:
        return "0"

    def compile(self, request: BuildRequest) -> Compiled:
        precisions = {layer.name: layer.precision for layer in request.planned}
        if frozenset(name for name, word in precisions.items() if word == "int8") in self.refused:
            raise BuildError("the fake refuses these layers")
        self.built.append(precisions)
        kernels = tuple(timed.kernel for timed in self._kernels(precisions, request.planned))
        spec = TensorSpec("x", (None, 32, 8, 8), "float32")
        return Compiled(json.dumps(precisions).encode(), (spec,), (spec,), kernels)

    def kernel_times(
        self, engine: bytes, planned: tuple[PlannedLayer, ...], *, threads: int, runs: int
    ) -> tuple[KernelTime, ...]:
        return tuple(self._kernels(json.loads(engine), planned)) if self._lists else ()

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        precisions = json.loads(engine)
        planned = tuple(PlannedLayer(name, "Conv", precision, 1) for name, precision in precisions.items())
        return _FakeRunner(self, sum(timed.milliseconds for timed in self._kernels(precisions, planned)))

    def _kernels(self, precisions: Mapping[str, str], planned: tuple[PlannedLayer, ...]) -> Iterator[KernelTime]:
        tensor, before = "x", ""
        for layer in planned:
            precision = precisions[layer.name]
            if precision == "int8" and before != "int8":
                yield _conversion(f"{tensor}::quantize", "QuantizeLinear", self._conversion)
            if before == "int8" and precision != "int8":
                yield _conversion(f"{tensor}::dequantize", "DequantizeLinear", self._conversion)
            took = getattr(self._layers[layer.name], precision)
            yield KernelTime(Kernel(layer.name, "Conv", (layer.name,), precision, computes=True), took)
            tensor, before = layer.aliases[-1] if layer.aliases else "", precision


class _FakeRunner(Runner):
    """Advances the clock instead of running."""

    def __init__(self, backend: FakeBackend, milliseconds: float) -> None:
        spec = TensorSpec("x", (None, 32, 8, 8), "float32")
        super().__init__((spec,), (spec,))
        self._backend, self._nanoseconds = backend, round(1e6 * milliseconds)

    def infer_impl(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
        self._backend.now += self._nanoseconds
        return dict(feeds)

    def sibling_impl(self) -> _FakeRunner:
        raise NotImplementedError

    def close_impl(self) -> None:
        pass


def _conversion(name: str, kind: str, milliseconds: float) -> KernelTime:
    return KernelTime(Kernel(name, kind, (), "fp32"), milliseconds)
