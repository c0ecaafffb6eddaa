"""The two tasks of a child process: to build an engine, and to test one. Plain data in, plain data out.

Each opens and verifies the bundle itself, and goes on only if it is the one that the parent verified: the hash is
that of the very manifest, whose signature the parent has checked where one is required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backends import Backend, BuildRequest, backend_named
from ..bundle import Bundle, open_bundle
from ..bundle.spec import BundledGraph, BundleSpec
from ..engine_files import verified_bytes
from ..errors import BundleError, EngineError
from ..files import sha256_of, write_bytes
from ..specs import EngineInfo
from .identity import BuildSettings
from .memory import memory_here
from .self_test import self_tested

__all__ = ["STAGED_ENGINE", "STAGED_TIMING", "TASKS", "BuildTask", "SelfTestTask", "graph_for"]

STAGED_ENGINE, STAGED_TIMING = "engine", "timing"
BUNDLED_DIALECTS = {"cpu": "cpu", "tensorrt": "tensorrt", "rtx": "tensorrt"}
"""Which of a bundle's graphs a backend builds from, by the dialect that it reads; from none where it is not here."""


def graph_for(spec: BundleSpec, backend: Backend, precision: str) -> BundledGraph | None:
    """The graph that the backend builds from in that precision, None if the bundle has none."""
    return spec.graph(BUNDLED_DIALECTS.get(backend.dialect, ""), precision)


@dataclass(frozen=True)
class BuildTask:
    """Builds one engine into `staging`.

    * bundle: its folder; sha256: its hash
    * target: GPU architecture to name to the backend, None where it builds for the device here
    * architecture: of the GPU that the engine is for, None for a processor
    * timing: file with what earlier builds measured; it need not exist
    """

    bundle: str
    sha256: str
    backend: str
    precision: str
    target: str | None
    architecture: str | None
    settings: BuildSettings
    timing: str
    staging: str

    def to_json(self) -> dict[str, Any]:
        """The request to a child."""
        return {"task": "build", **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BuildTask:
        """The inverse of `to_json`."""
        return cls(**{**_without_task(content), "settings": BuildSettings.from_json(content["settings"])})

    def run(self) -> dict[str, Any]:
        """Writes the engine, and what was measured, and answers with the engine's description."""
        backend = backend_named(self.backend)
        with _the_bundle(self.bundle, self.sha256) as bundle:
            graph = _needed(graph_for(bundle.spec, backend, self.precision), self.backend, self.precision)
            content, spec = bundle.read(graph.path), bundle.spec
        built = backend.build(self._request(content, graph, spec))
        write_bytes(Path(self.staging) / STAGED_ENGINE, built.compiled.engine)
        if built.compiled.timing_cache:
            write_bytes(Path(self.staging) / STAGED_TIMING, built.compiled.timing_cache)
        info = built.info(
            self.backend,
            self.precision,
            self.architecture,
            preprocess=spec.preprocess,
            labels=spec.labels,
            onnx_sha256=sha256_of(content),
        )
        return {"info": info.to_json()}

    def _request(self, content: bytes, graph: BundledGraph, spec: BundleSpec) -> BuildRequest:
        timing = Path(self.timing)
        return BuildRequest(
            content,
            self.precision,
            graph.planned,
            self.target,
            self.settings.profile or spec.profile,
            self.settings.workspace or _default_workspace(self.architecture),
            self.settings.dla,
            timing.read_bytes() if timing.is_file() else b"",
        )


@dataclass(frozen=True)
class SelfTestTask:
    """Tests the engine in the file `engine`, which must be the one that `info` describes."""

    bundle: str
    sha256: str
    engine: str
    info: EngineInfo

    def to_json(self) -> dict[str, Any]:
        """The request to a child."""
        return {"task": "self-test", **asdict(self), "info": self.info.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SelfTestTask:
        """The inverse of `to_json`."""
        return cls(**{**_without_task(content), "info": EngineInfo.from_json(content["info"])})

    def run(self) -> dict[str, Any]:
        """Answers with the `SelfTest`. Raises `EngineError` if the file was changed, or is not loaded."""
        backend = backend_named(self.info.backend)
        with _the_bundle(self.bundle, self.sha256) as bundle:
            graph = _needed(graph_for(bundle.spec, backend, self.info.precision), backend.name, self.info.precision)
            golden = bundle.golden()
        engine = verified_bytes(Path(self.engine), self.info)
        with backend.open(engine, dla=self.info.dla) as runner:
            return asdict(self_tested(runner, self.info, golden.pixels, golden.logits, graph.limits))


# What a child process can be asked for.
TASKS: Mapping[str, type[BuildTask] | type[SelfTestTask]] = {"build": BuildTask, "self-test": SelfTestTask}


def _without_task(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "task"}


def _the_bundle(path: str, sha256: str) -> Bundle:
    bundle = open_bundle(Path(path))
    if bundle.sha256 != sha256:
        bundle.close()
        raise BundleError(f"{path} was exchanged for another bundle while it was built", "build it again")
    return bundle


def _needed(graph: BundledGraph | None, backend: str, precision: str) -> BundledGraph:
    if graph is None:
        raise EngineError(f"the bundle has no {precision} graph for {backend}")
    return graph


def _default_workspace(architecture: str | None) -> int | None:
    """Half of what is available where GPU and processor share the memory, TensorRT's own default elsewhere."""
    if architecture is None:
        return None
    from ..cuda import device_here

    memory = memory_here()
    return memory.available // 2 if device_here().integrated and memory is not None else None
