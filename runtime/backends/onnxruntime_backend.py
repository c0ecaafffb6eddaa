"""onnxruntime. The engine file is the ONNX graph itself, which onnxruntime compiles when it is loaded.

Engines are built and judged on the CPU; onnxruntime-gpu can run them on a GPU (`onnxruntime_providers.py`).

What was really built is read from a profile of one run: onnxruntime records each kernel with the types of its inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BuildError, EngineError
from ..installed import installed_version
from ..specs import Kernel, PlannedLayer, TensorSpec
from .base import Absence, Backend, BuildRequest, Compiled, KernelTime
from .naming import layer_run_by
from .onnxruntime_providers import PROVIDERS, first_line, open_session
from .runner import Runner, check_dtypes

__all__ = ["OnnxRuntimeBackend"]

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")  # both install the import name onnxruntime
COMPUTE_WORDS = ("Conv", "Gemm", "MatMul")  # also in QLinearConv, FusedConv, QGemm, MatMulIntegerToFloat
TOKEN = re.compile(r"_token_\d+$")  # a number at random, where onnxruntime makes a name unique
KERNEL_SUFFIX = "_kernel_time"
ERRORS_ONLY = 3  # onnxruntime's log severity: 0 verbose … 4 fatal
PRECISION_OF_TYPE = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "uint8": "int8",
    "int8": "int8",
    "double": "fp64",
}
ELEMENT = re.compile(r"tensor\((\w+)\)")
DTYPE_OF_ELEMENT = {"float": "float32", "double": "float64"}
"""Where onnxruntime's word for a type is not numpy's."""


class OnnxRuntimeBackend(Backend):
    """FP32 and explicit-Q/DQ INT8 graphs on the CPU; on a GPU if that is asked for when an engine is opened."""

    name = "onnxruntime"
    precisions = ("fp32", "int8")
    dialect = "cpu"
    suffix = ".onnx"
    providers = PROVIDERS

    def absence(self) -> Absence | None:
        """The package is installed, or it is not."""
        if importlib.util.find_spec("onnxruntime") is not None:
            return None
        return Absence("package_missing", "the package onnxruntime is not installed", "pip install 'edgewright[cpu]'")

    def version(self) -> str:
        """Of whichever distribution brings the import name."""
        return installed_version(*DISTRIBUTIONS) or "unknown"

    def compile(self, request: BuildRequest) -> Compiled:
        """Compiles the graph once, runs one image of zeros, and reads the kernels off the profile."""
        try:
            session, events = _profiled(request.onnx, threads=0, runs=1)
        except EngineError as error:
            raise BuildError(f"onnxruntime refused the {request.precision} graph: {error.message}") from error
        inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
        return Compiled(
            request.onnx, inputs, outputs, _kernels(events, request.planned), {"onnxruntime": self.version()}
        )

    def kernel_times(
        self, engine: bytes, planned: tuple[PlannedLayer, ...], *, threads: int, runs: int
    ) -> tuple[KernelTime, ...]:
        """Medians, after one run more that is not counted."""
        _, profile = _profiled(engine, threads=threads, runs=1 + runs)
        events = _of_kernels(profile)
        microseconds = np.array([event["dur"] for event in events], np.float64).reshape(1 + runs, -1)
        medians = np.median(microseconds[1:], axis=0) / 1e3
        kernels = _kernels(events[: len(medians)], planned)  # the same in every run
        return tuple(KernelTime(kernel, float(time)) for kernel, time in zip(kernels, medians, strict=True))

    def engine_of(self, graph: bytes) -> bytes:
        """The graph itself."""
        return graph

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        """A session on the provider alone."""
        absence = self.absence()
        if absence is not None:
            raise EngineError(absence.reason, absence.hint)
        return OnnxRuntimeRunner(_session(engine, threads=threads, provider=provider))


class OnnxRuntimeRunner(Runner):
    """An onnxruntime session; its outputs are fresh arrays already."""

    def __init__(self, session: Any) -> None:
        super().__init__(_specs(session.get_inputs()), _specs(session.get_outputs()))
        check_dtypes((*self.inputs, *self.outputs))
        self._session = session

    def infer_impl(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """One run."""
        results = _run(self._session, feeds)
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def sibling_impl(self) -> OnnxRuntimeRunner:
        """The same session, which several threads may run."""
        return OnnxRuntimeRunner(self._session)

    def close_impl(self) -> None:
        """The session's memory goes with its last reference."""
        self._session = None


def _session(graph: bytes, *, threads: int, provider: str = "", profile: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ONLY
    # Threads that spin after a run take the cores from whatever runs next, another engine in a comparison above all.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return open_session(graph, options, provider)


def _run(session: Any, feeds: Mapping[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    try:
        results: list[NDArray[np.float32]] = session.run(None, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise EngineError(f"onnxruntime cannot run the graph: {first_line(error)}") from error
    return results


def _profiled(graph: bytes, *, threads: int, runs: int) -> tuple[Any, list[dict[str, Any]]]:
    """A session that has run `runs` images of zeros, and the events of its profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(graph, threads=threads, profile=Path(folder) / "profile")
        feeds = {
            spec.name: np.zeros([side or 1 for side in spec.shape], spec.dtype) for spec in _specs(session.get_inputs())
        }
        for _ in range(runs):
            _run(session, feeds)
        return session, json.loads(Path(session.end_profiling()).read_text())


def _of_kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("name", "").endswith(KERNEL_SUFFIX)]


@functools.cache
def _saturates() -> bool:
    """Whether U8 × S8 products would be added in 16 bits, with saturation: x86 without VNNI.

    Exact kernels take more than twice as long (measured on EfficientNet-Lite0), so they are taken only where needed.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not Linux: unknown, so be exact
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            value.name,
            tuple(side if isinstance(side, int) else None for side in value.shape),
            _dtype_of(value.type),
        )
        for value in values
    )


def _dtype_of(type_: str) -> str:
    """Numpy's name for "tensor(float)"; what is no tensor stays as it is."""
    element = ELEMENT.fullmatch(type_)
    return DTYPE_OF_ELEMENT.get(element[1], element[1]) if element else type_


def _kernels(events: list[dict[str, Any]], planned: tuple[PlannedLayer, ...]) -> tuple[Kernel, ...]:
    kernels: list[Kernel] = []
    for event in _of_kernels(events):
        name, details = TOKEN.sub("", event["name"].removesuffix(KERNEL_SUFFIX)), event.get("args", {})
        operator = details.get("op_name", "")
        types = details.get("input_type_shape") or [{}]
        kind = next(iter(types[0]), "unknown")
        computes = any(word in operator for word in COMPUTE_WORDS)
        kernels.append(
            Kernel(
                name=name,
                kind=operator,
                sources=layer_run_by(name, planned) if computes else (),
                precision=PRECISION_OF_TYPE.get(kind, kind),
                bytes_read=int(details.get("activation_size", 0)) + int(details.get("parameter_size", 0)),
                bytes_written=int(details.get("output_size", 0)),
                computes=computes,
            )
        )
    return tuple(kernels)
