"""What a backend is: it says whether it is here, builds an engine, reads back what was built, and opens it to run.

The base classes own the lifecycle and the checks; a backend fills in the abstract methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..audit import audited, deviations, shares_of_work
from ..errors import BuildError, EngineError
from ..files import sha256_of
from ..preprocess import Preprocess
from ..specs import BatchProfile, EngineInfo, Kernel, LayerPrecision, PlannedLayer, TensorSpec
from .runner import Runner

__all__ = ["Absence", "Backend", "BuildRequest", "Built", "Compiled", "KernelTime"]

NAMED_LAYERS = 5
"""As many layers an error names; a silent fallback usually hits all of them."""


@dataclass(frozen=True)
class Absence:
    """Why a backend cannot be used here: a fixed word, a sentence, and what would help."""

    reason_code: str
    reason: str
    hint: str


@dataclass(frozen=True)
class BuildRequest:
    """What to build: a graph that already holds its precision (FP32, FP16 types, or explicit Q/DQ), for one target.

    * onnx: the serialized graph
    * precision: "fp32", "fp16", "bf16" or "int8"; "bf16" alone is no matter of the graph but of the backend's options
    * planned: what each convolution and matrix product of the graph is to run in; what was built is held against it
    * target: the GPU architecture ("sm86"), None on a CPU or for the GPU of this machine
    * profile: batch sizes; workspace: the most scratch memory a GPU layer may take, in bytes, None for all there is
    * dla: the DLA core of a Jetson to run on, None for the GPU
    * timing_cache: what an earlier build on the same device measured
    """

    onnx: bytes
    precision: str
    planned: tuple[PlannedLayer, ...]
    target: str | None = None
    profile: BatchProfile = field(default_factory=BatchProfile)
    workspace: int | None = None
    dla: int | None = None
    timing_cache: bytes = b""


@dataclass(frozen=True)
class Compiled:
    """What a backend made of a graph.

    * engine: the bytes that `Backend.open` takes
    * kernels: read back from the engine
    * profile: the batch sizes it takes, None for any
    * timing_cache: to be given to the next build on this device; empty where there is none
    * dla: the DLA core that it is for, None for none
    """

    engine: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kernels: tuple[Kernel, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    profile: BatchProfile | None = None
    timing_cache: bytes = b""
    dla: int | None = None


@dataclass(frozen=True)
class Built:
    """An engine that passed the audit: what was compiled, and the planned layers with the precision they run in."""

    compiled: Compiled
    layers: tuple[LayerPrecision, ...]

    def info(
        self,
        backend: str,
        precision: str,
        target: str | None,
        *,
        preprocess: Preprocess,
        labels: tuple[str, ...],
        onnx_sha256: str,
    ) -> EngineInfo:
        """What stands beside the engine; `onnx_sha256` is that of the graph it was built from."""
        compiled = self.compiled
        return EngineInfo(
            backend=backend,
            precision=precision,
            target=target,
            inputs=compiled.inputs,
            outputs=compiled.outputs,
            preprocess=preprocess,
            labels=labels,
            onnx_sha256=onnx_sha256,
            engine_sha256=sha256_of(compiled.engine),
            bytes=len(compiled.engine),
            layers=self.layers,
            kernels=compiled.kernels,
            profile=compiled.profile,
            versions=compiled.versions,
            dla=compiled.dla,
        )


@dataclass(frozen=True)
class KernelTime:
    """What one kernel takes in a run of one image; `milliseconds` is the median, or where that is unknown the mean."""

    kernel: Kernel
    milliseconds: float


class Backend(ABC):
    """One way to build and run engines.

    * name: as in the contract; precisions: what it can be asked for
    * dialect: which of the quantized graphs it reads ("cpu", "openvino", "rtx", "tensorrt")
    * suffix: of its engine files
    * targets: the GPU architectures it can be asked for; empty where an engine is for this machine
    * version_bound: whether an engine runs only with the version of the library that built it
    * providers: what its library can be told to run on; empty where there is no choice
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    dialect: ClassVar[str]
    suffix: ClassVar[str]
    targets: ClassVar[tuple[str, ...]] = ()
    version_bound: ClassVar[bool] = False
    providers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def absence(self) -> Absence | None:
        """None if this backend can build here, else why not."""

    def unsupported(self, precision: str, target: str | None) -> Absence | None:
        """None if it can build `precision` for `target`, else why not; asked only where the backend is not absent."""
        return None

    def cannot_run(self, target: str | None = None) -> Absence | None:
        """None if an engine that was built for `target` can be run here, else why not."""
        return self.absence()

    def device(self) -> str:
        """What engines run on here, if that is not the processor: the GPU's architecture ("sm86"); "" if none is."""
        return ""

    @abstractmethod
    def version(self) -> str:
        """The version of the backend's library, without loading it."""

    @abstractmethod
    def compile(self, request: BuildRequest) -> Compiled:
        """Compiles the graph and reads back what was made of it. Raises `BuildError`."""

    @abstractmethod
    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        """Loads an engine from memory; `threads` is the number of CPU threads, 0 for all cores.

        `provider` is one of `providers`, "" for the first; `dla` is the DLA core that the engine was built for. Raises
        `EngineError` if the engine does not load, or the provider is not here.
        """

    def engine_of(self, graph: bytes) -> bytes:
        """A serialized FP32 graph as an engine that `open` takes, as it is: nothing is built or audited.

        Raises `EngineError` if this backend runs only what it has built.
        """
        raise EngineError(f"{self.name} does not run an ONNX file", "build an engine of it: edgewright engine")

    def kernel_times(
        self, engine: bytes, planned: tuple[PlannedLayer, ...], *, threads: int, runs: int
    ) -> tuple[KernelTime, ...]:
        """The kernels of `engine` in the order in which they run, timed over `runs` runs of one image of zeros.

        Nothing where the library does not time them. Raises `EngineError` if the engine does not load.
        """
        return ()

    def build(self, request: BuildRequest) -> Built:
        """Builds an engine in which every planned layer runs in its planned precision, as read back from it.

        Raises `BuildError` if the backend is absent or refuses, or if a layer runs in another precision than planned:
        an engine that is silently FP32 does not leave.
        """
        absence = self.absence() or self.unsupported(request.precision, request.target)
        if absence is not None:
            raise BuildError(absence.reason, absence.hint)
        if request.precision not in self.precisions:
            raise BuildError(f"{self.name} cannot build {request.precision}", f"choose one of {self.precisions}")
        compiled = self.compile(request)
        layers = audited(request.planned, compiled.kernels)
        wrong = deviations(layers)
        if wrong:
            named = ", ".join(f"{layer.name} ({layer.requested} → {layer.actual})" for layer in wrong[:NAMED_LAYERS])
            more = f" and {len(wrong) - NAMED_LAYERS} more" if len(wrong) > NAMED_LAYERS else ""
            planned, found = shares_of_work(layers, request.precision)
            raise BuildError(
                f"{self.name} runs {100 * found:.1f} % of the work in {request.precision}, planned were "
                f"{100 * planned:.1f} %: {named}{more}",
                "change the plan or the target; such an engine is not kept",
            )
        return Built(compiled, layers)
