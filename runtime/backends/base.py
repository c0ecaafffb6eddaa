"""What a backend is: it says whether it is here, builds an engine, reads back what was built, and opens it to run.

The base classes own the lifecycle and the checks; a backend fills in the methods that end in `_impl`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BuildError, EngineError
from ..specs import LayerPrecision, TensorSpec

__all__ = ["Absence", "Backend", "BuildRequest", "Built", "Runner"]

RunnerType = TypeVar("RunnerType", bound="Runner")


@dataclass(frozen=True)
class Absence:
    """Why a backend cannot be used here: a fixed word, a sentence, and what would help."""

    reason_code: str
    reason: str
    hint: str


@dataclass(frozen=True)
class BuildRequest:
    """What to build: a graph that already holds its precision (FP32, or explicit Q/DQ), for one target.

    * onnx: the serialized graph
    * precision: what is expected of it, "fp32" or "int8"; checked against what was built
    * target: the GPU architecture ("sm86"), None on a CPU
    """

    onnx: bytes
    precision: str
    target: str | None = None


@dataclass(frozen=True)
class Built:
    """An engine and what it really is.

    * engine: the bytes that `Backend.open` takes
    * layers: the compute layers, with the precision read back from the engine
    """

    engine: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[LayerPrecision, ...]
    versions: Mapping[str, str] = field(default_factory=dict)


class Runner(ABC):
    """A loaded engine. Use it in a `with`, or close it."""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._closed = False

    def infer(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Outputs by name for inputs by name; new arrays, owned by the caller.

        Raises `EngineError` if a name, shape or dtype does not fit, or the engine is closed.
        """
        if self._closed:
            raise EngineError("the engine is closed", "open it again")
        return self.infer_impl({spec.name: _fitting(spec, feeds) for spec in self.inputs})

    def close(self) -> None:
        """Frees the engine's memory; closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self.close_impl()

    def __enter__(self: RunnerType) -> RunnerType:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def infer_impl(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """`infer` with checked, contiguous inputs."""

    @abstractmethod
    def close_impl(self) -> None:
        """Frees what the backend holds."""


class Backend(ABC):
    """One way to build and run engines.

    * name: as in the contract; precisions: what it can be asked for
    * dialect: which of the quantized graphs it reads ("cpu")
    * suffix: of its engine files
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    dialect: ClassVar[str]
    suffix: ClassVar[str]

    @abstractmethod
    def absence(self) -> Absence | None:
        """None if this backend can be used here, else why not."""

    @abstractmethod
    def version(self) -> str:
        """The version of the backend's library, without loading it."""

    @abstractmethod
    def build_impl(self, request: BuildRequest) -> Built:
        """Builds and reads back."""

    @abstractmethod
    def open(self, engine: bytes, *, threads: int = 0) -> Runner:
        """Loads an engine from memory; `threads` is the number of CPU threads, 0 for all cores.

        Raises `EngineError` if it does not load.
        """

    def build(self, request: BuildRequest) -> Built:
        """Builds an engine whose precision is what was asked for, as read back from it.

        Raises `BuildError` if the backend is absent or refuses, or if no layer runs in the requested precision.
        """
        absence = self.absence()
        if absence is not None:
            raise BuildError(absence.reason, absence.hint)
        if request.precision not in self.precisions:
            raise BuildError(f"{self.name} cannot build {request.precision}", f"choose one of {self.precisions}")
        built = self.build_impl(request)
        found = {layer.precision for layer in built.layers}
        if request.precision not in found:
            raise BuildError(
                f"{self.name} built no layer in {request.precision}: its {len(built.layers)} compute layers run in "
                f"{', '.join(sorted(found)) or 'nothing known'}",
                "look at the plan: was anything quantized?",
            )
        return built


def _fitting(spec: TensorSpec, feeds: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    if spec.name not in feeds:
        raise EngineError(f"input {spec.name!r} is missing; the engine needs it, given were {sorted(feeds)}")
    array = np.asarray(feeds[spec.name])
    fits = len(array.shape) == len(spec.shape) and all(
        wanted is None or wanted == given for wanted, given in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or array.size == 0:
        wanted = ", ".join("N" if side is None else str(side) for side in spec.shape)
        raise EngineError(f"input {spec.name!r} has shape {list(array.shape)}, expected [{wanted}]")
    if array.dtype != np.dtype(spec.dtype):
        raise EngineError(f"input {spec.name!r} is {array.dtype}, expected {spec.dtype}", "convert it with astype")
    return np.ascontiguousarray(array)
