"""The stage that builds engines: for each backend, precision and target one row of the table."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgewright.context import Options, RunContext
from edgewright.graphs import NVIDIA_DIALECTS, Graphs
from edgewright.int8 import Int8Graphs
from edgewright.outcome import REPORT_FILES, EngineRow
from edgewright.runtime.audit import shares_of_work
from edgewright.runtime.backends import BACKENDS, Absence, Backend, BuildRequest
from edgewright.runtime.engine_files import ENGINES_FOLDER
from edgewright.runtime.errors import BuildError, CalibrationError, QuantizationError
from edgewright.runtime.files import read_json, write_bytes, write_json
from edgewright.runtime.specs import EngineInfo, OnnxArtifact, PlannedLayer
from edgewright.workspace import machine, source_hash

__all__ = ["NOTHING_TO_GAIN", "Engines", "planned_in"]

CODE = "engines.py"
NOTHING_TO_GAIN = Absence(
    "nothing_to_gain",
    "no layer of this network can be INT8 there, or gains by it",
    "the plan says why for each of them",
)

ALREADY_QUANTIZED = Absence(
    "already_quantized", "the graph came quantized and is taken as it is", "give the float graph for other engines"
)

NO_DLA = Absence("target_unsupported", "a DLA is part of a Jetson", "take the backend tensorrt there")


class Engines:
    """The engines of one run."""

    def __init__(self, context: RunContext, graphs: Graphs, int8: Int8Graphs) -> None:
        self._context = context
        self._graphs = graphs
        self._int8 = int8
        self._combinations = tuple(_combinations(context.options))
        if not self._combinations:
            raise BuildError(
                "no backend builds that: backends, precisions and targets that were asked for do not meet",
                "see edgewright engine --help",
            )

    @property
    def need_calibration(self) -> bool:
        """Whether any engine that can be built here needs measured ranges."""
        return not self._context.source.quantized and any(
            precision in ("fp16", "int8") and backend.absence() is None for backend, precision, _ in self._combinations
        )

    @property
    def dialects(self) -> tuple[str, ...]:
        """Those of the INT8 graphs that the backends of this run read."""
        return tuple(dict.fromkeys(backend.dialect for backend, _, _ in self._combinations))

    @functools.cached_property
    def rows(self) -> tuple[EngineRow, ...]:
        """A row for every engine that was asked for: built, or skipped or failed with its reason."""
        _ = self._context.preprocess
        _ = self._graphs.folded  # what goes wrong up to here is no matter of one engine: it ends the run
        return tuple(self._row(*combination) for combination in self._combinations)

    def graph(self, backend: str, precision: str) -> OnnxArtifact:
        """The graph that an engine is built from: precision lives in it, but for bf16, which is a backend's option."""
        if self._context.source.quantized:
            return self._graphs.exported
        if precision == "fp16":
            return self._graphs.half
        if precision == "int8":
            return self._int8.quantized(BACKENDS[backend].dialect).artifact
        return self._graphs.folded

    def _row(self, backend: Backend, precision: str, target: str | None) -> EngineRow:
        row = EngineRow(backend.name, precision, target, "skipped", "", "")
        absence = backend.absence() or backend.unsupported(precision, target)
        if self._context.options.dla is not None and target is not None:
            absence = NO_DLA
        if absence is None and self._context.source.quantized:
            absence = self._quantized_absence(backend, precision)
        if absence is not None:
            return _without(row, absence)
        stem = f"{ENGINES_FOLDER}/{'-'.join(word for word in (backend.name, precision, target) if word)}"
        files = f"{stem}{backend.suffix}", f"{stem}.json"
        try:
            graph = self.graph(backend.name, precision)
            remainder = "fp32"
            if precision == "int8" and not self._context.source.quantized:
                quantized = self._int8.quantized(backend.dialect)
                if not quantized.int8_layers:
                    self._forget(files)
                    return _without(row, NOTHING_TO_GAIN)
                remainder = quantized.remainder
            info = self._built(backend, precision, target, graph, files, remainder)
        except (CalibrationError, QuantizationError) as error:
            self._forget(files)
            return replace(row, status="failed", reason_code="quantization_failed", reason=str(error))
        except BuildError as error:
            return replace(row, status="failed", reason_code="build_failed", reason=str(error))
        return replace(row, status="built_not_run", reason_code="not_evaluated", path=files[0], info=info)

    def _quantized_absence(self, backend: Backend, precision: str) -> Absence | None:
        """Why a graph that came quantized makes no such engine, or None."""
        if precision != "int8":
            return ALREADY_QUANTIZED
        if backend.dialect not in NVIDIA_DIALECTS:
            return None
        import onnx_ir as ir

        from edgewright.optimize.already_quantized import nvidia_refusal

        reason = nvidia_refusal(backend.dialect, ir.load(self._context.workspace.path(self._graphs.exported.path)))
        return replace(ALREADY_QUANTIZED, reason=reason) if reason else None

    def _forget(self, files: tuple[str, str]) -> None:
        """Removes an engine of an earlier graph, and the report that may recommend it."""
        workspace = self._context.workspace
        if any(workspace.path(file).exists() for file in files):
            workspace.forget(*REPORT_FILES, *files)

    def _built(
        self,
        backend: Backend,
        precision: str,
        target: str | None,
        graph: OnnxArtifact,
        files: tuple[str, str],
        remainder: str,
    ) -> EngineInfo:
        options, workspace = self._context.options, self._context.workspace
        timing_file = f"{ENGINES_FOLDER}/{backend.name}.timing"

        def make() -> Mapping[str, Any]:
            workspace.forget(*REPORT_FILES)  # they recommend an engine that this one replaces
            content = workspace.path(graph.path).read_bytes()
            timing_cache = workspace.path(timing_file)
            built = backend.build(
                BuildRequest(
                    content,
                    precision,
                    planned_in(content, precision, remainder),
                    target,
                    options.profile,
                    options.workspace,
                    options.dla,
                    timing_cache.read_bytes() if timing_cache.is_file() else b"",
                )
            )
            info = built.info(
                backend.name,
                precision,
                target,
                preprocess=self._context.preprocess,
                labels=graph.labels,
                onnx_sha256=graph.sha256,
            )
            write_bytes(workspace.path(files[0]), built.compiled.engine)
            write_json(workspace.path(files[1]), info.to_json())
            if built.compiled.timing_cache:
                write_bytes(timing_cache, built.compiled.timing_cache)
            return {"actual": info.actual_precision, "share": shares_of_work(info.layers, precision)[1]}

        parts = {
            "graph": graph.sha256,
            "remainder": remainder,
            "preprocessing": json.dumps(self._context.preprocess.to_json()),
            "labels": json.dumps(graph.labels),
            "machine": machine(),
            "backend": f"{backend.name} {backend.version()}",
            "device": backend.device() if target is None else "",
            "build code": source_hash("runtime/backends", "runtime/specs.py", "runtime/audit.py", "optimize/work.py"),
        }
        if backend.dialect in NVIDIA_DIALECTS:
            parts["build options"] = f"{options.profile}, workspace {options.workspace}, DLA {options.dla}"
        name = " ".join(word for word in ("build", backend.name, precision, target) if word)
        self._context.stage(name, parts, files, make, code=CODE)
        return EngineInfo.from_json(read_json(workspace.path(files[1])))


def _combinations(options: Options) -> Iterator[tuple[Backend, str, str | None]]:
    """The backends, precisions and targets of a run, in the order of its table."""
    for name, backend in BACKENDS.items():
        if name not in (options.backends or BACKENDS):
            continue
        for target in [word for word in options.targets if word in backend.targets] if backend.targets else [None]:
            for precision in backend.precisions:
                if precision in (options.precisions or backend.precisions):
                    yield backend, precision, target


def _without(row: EngineRow, absence: Absence) -> EngineRow:
    return replace(row, reason_code=absence.reason_code, reason=f"{absence.reason}; {absence.hint}")


def planned_in(graph: bytes, precision: str, remainder: str = "fp32") -> tuple[PlannedLayer, ...]:
    """What each layer of a serialized graph is to run in; BF16 is no matter of the graph, but of the backend's options.

    `remainder`: what the FP32 layers of an INT8 graph run in, "fp32" or "bf16".
    """
    import onnx
    import onnx_ir as ir

    from edgewright.optimize.work import planned_layers

    layers = planned_layers(ir.from_proto(onnx.load_from_string(graph)))
    if precision == "bf16" or (precision == "int8" and remainder == "bf16"):
        return tuple(replace(layer, precision="bf16") if layer.precision == "fp32" else layer for layer in layers)
    return layers
