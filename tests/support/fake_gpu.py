"""A fake of TensorRT and of a GPU, for what is done around them on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgewright.runtime.backends import Absence, Backend, BuildRequest, Compiled, Runner
from edgewright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from edgewright.runtime.cuda.driver import Device
from edgewright.runtime.specs import Kernel
from toy_bundle import toy_files

__all__ = ["ORIN", "Bundles", "FakeGpu"]

ORIN = Device("Orin", "sm87", "12.6", integrated=True, memory=8 << 30)
Bundles = Callable[..., Path]
"""Makes toy bundles: `bundles(name, files=…, version=…)`."""


@dataclass
class FakeGpu(Backend):
    """A fake of TensorRT: an engine is a graph with a word before it, and runs in onnxruntime on the processor.

    * marks: the word of each build; graph: what is "built" instead of the one asked for
    """

    name = "tensorrt"
    precisions = ("fp32", "fp16", "int8")
    dialect = "tensorrt"
    suffix = ".plan"
    missing: Absence | None = None
    marks: list[str] = field(default_factory=lambda: ["first", "second", "third", "fourth"])
    graph: bytes = field(default_factory=lambda: toy_files()["graphs/fp32.onnx"])
    release: str = "10.3.0"
    requests: list[BuildRequest] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    cores: list[int | None] = field(default_factory=list)

    def absence(self) -> Absence | None:
        return self.missing

    def version(self) -> str:
        return self.release

    def compile(self, request: BuildRequest) -> Compiled:
        self.requests.append(request)
        compiled = OnnxRuntimeBackend().compile(replace(request, onnx=self.graph, precision="fp32"))
        kernels = tuple(Kernel(layer.name, "", (layer.name,), layer.precision) for layer in request.planned)
        word = self.marks.pop(0).encode()
        return replace(
            compiled,
            engine=word + b"|" + self.graph,
            kernels=kernels,
            profile=request.profile,
            timing_cache=word,
            dla=request.dla,
        )

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        self.loaded.append(engine)
        self.cores.append(dla)
        return OnnxRuntimeBackend().open(engine.partition(b"|")[2], threads=threads)
