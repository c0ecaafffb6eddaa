"""The stages in order: export → fold → calibrate → quantize → build → prove.

Each method makes its stage and those before it, or reuses what has not changed, and returns what the next one needs.
torch and onnx are imported only where a stage is really made, so a run in which nothing changed takes a second.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.calibration.datasets import check_disjoint, image_folder
from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.stream import batches
from edgewright.export.models import ModelSource, resolve
from edgewright.outcome import EngineRow, Outcome, Reference, conclusion
from edgewright.runtime.backends import BACKENDS, Backend, BuildRequest
from edgewright.runtime.errors import (
    BuildError,
    CalibrationError,
    DataError,
    EngineError,
    ModelError,
    QuantizationError,
)
from edgewright.runtime.files import read_json, sha256_of, sha256_of_file, write_bytes, write_json
from edgewright.runtime.latency import Latency, measure_interleaved
from edgewright.runtime.parity import DEFAULT_BUDGET, STATUS_OF_VERDICT, compare, judge
from edgewright.runtime.session import ENGINES_FOLDER, REPORT_FILE
from edgewright.runtime.specs import EngineInfo, OnnxArtifact, TensorSpec
from edgewright.workspace import Observer, StageRun, Workspace, library_versions, source_hash

__all__ = ["Options", "Pipeline"]

EVALUATION_BATCH = 32
LATENCY_BATCH = 1
LATENCY_SECONDS = 10.0
LATENCY_RUNS = 200
CHECK_SEED = 21
MODEL_FILE, FOLDED_FILE, CALIBRATION_FILE = "model.onnx", "folded.onnx", "calibration.json"
GRAPH_LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


Infer = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Logits `[N, classes]` of a preprocessed batch `[N, C, H, W]`."""


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    * weights: "default", another name of the registry, "random" or a file
    * calibration, evaluation: folders of images; None is what ships with the project, where it does
    * method: of the activation ranges; budget: largest loss of top-1, a fraction
    * threads: of the engines, 0 for all cores
    """

    model: str
    weights: str = "default"
    build_dir: Path = Path("build")
    opset: int = 19
    calibration: Path | None = None
    evaluation: Path | None = None
    allow_overlap: bool = False
    method: str = "mse"
    budget: float = DEFAULT_BUDGET
    threads: int = 0


class Pipeline:
    """One model in one build folder. Call the methods inside `workspace.locked()`."""

    def __init__(self, options: Options, observer: Observer | None = None) -> None:
        self.options = options
        self.source: ModelSource = resolve(options.model, options.weights)
        shape = self.source.preprocess.input_shape
        if shape is None:
            raise ModelError(f"{options.model} has no fixed input size", "give its preprocessing a crop")
        self.input_shape: tuple[int, int, int] = shape
        for folder in (options.calibration, options.evaluation):
            if folder is not None:
                image_folder(folder)  # says before the first stage what is wrong without knowing the labels
        self.observer = observer or Observer()
        self.workspace = Workspace(options.build_dir / options.model, self.observer)
        self.runs: list[StageRun] = []
        self._quantized: dict[str, OnnxArtifact] = {}

    @functools.cached_property
    def exported(self) -> OnnxArtifact:
        """The ONNX graph of the PyTorch model, equal to it, batch normalization visible."""
        preprocess = self.source.preprocess

        def make() -> Mapping[str, Any]:
            from edgewright.export.to_onnx import INPUT_NAME, OUTPUT_NAME, export_onnx

            content = export_onnx(self._reference_module, self.input_shape, opset=self.options.opset)
            labels = self.source.labels()
            write_bytes(self.workspace.path(MODEL_FILE), content)
            artifact = OnnxArtifact(
                path=MODEL_FILE,
                sha256=sha256_of(content),
                opset=self.options.opset,
                inputs=(TensorSpec(INPUT_NAME, (None, *self.input_shape), "float32"),),
                outputs=(TensorSpec(OUTPUT_NAME, (None, len(labels)), "float32"),),
                preprocess=preprocess,
                labels=labels,
            )
            return artifact.to_json()

        parts = {
            "model": self.options.model,
            "weights": self.source.fingerprint,
            "preprocessing": json.dumps(preprocess.to_json()),
            "opset": str(self.options.opset),
            "export code": source_hash("export", "runtime/preprocess.py"),
            "libraries": library_versions("torch", "torchvision", *GRAPH_LIBRARIES),
        }
        return OnnxArtifact.from_json(self._stage("export", parts, (MODEL_FILE,), make).facts)

    @functools.cached_property
    def folded(self) -> OnnxArtifact:
        """The exported graph with its batch normalization folded into the convolutions."""
        before = self.exported

        def make() -> Mapping[str, Any]:
            import onnx_ir as ir

            from edgewright.optimize.fold_batchnorm import fold_batchnorm
            from edgewright.optimize.passes import run_passes
            from edgewright.optimize.verify import check_equivalent

            model = ir.load(self.workspace.path(before.path))
            result = run_passes(model, (fold_batchnorm,))
            proto = ir.to_proto(result.model)
            images = np.random.default_rng(CHECK_SEED).standard_normal((2, *self.input_shape), np.float32)
            difference = check_equivalent(ir.to_proto(model), proto, feeds={before.inputs[0].name: images})
            content = proto.SerializeToString()
            write_bytes(self.workspace.path(FOLDED_FILE), content)
            return {
                "artifact": replace(before, path=FOLDED_FILE, sha256=sha256_of(content)).to_json(),
                "folded": result.changed,
                "skipped": [vars(skip) for skip in result.skipped],
                "difference": difference,
            }

        parts = {
            "graph": before.sha256,
            "preprocessing": json.dumps(before.preprocess.to_json()),
            "labels": json.dumps(before.labels),
            "fold code": source_hash("optimize/passes.py", "optimize/fold_batchnorm.py", "optimize/verify.py"),
            "libraries": library_versions(*GRAPH_LIBRARIES),
        }
        return OnnxArtifact.from_json(self._stage("fold", parts, (FOLDED_FILE,), make).facts["artifact"])

    @functools.cached_property
    def calibrated(self) -> str:
        """SHA-256 of `calibration.json`: a histogram of every activation over the calibration images, labels unseen."""
        graph = self.folded
        images = self._calibration_images
        identity = {
            "graph": graph.sha256,
            "images": images.identity,
            "preprocessing": json.dumps(graph.preprocess.to_json()),
            "calibration code": source_hash(
                *(f"calibration/{file}.py" for file in ("collect", "observers", "ranges", "stream")),
                "runtime/preprocess.py",
            ),
            "libraries": library_versions("onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow"),
        }

        def make() -> Mapping[str, Any]:
            import onnx_ir as ir

            from edgewright.calibration.collect import BATCH_SIZE, collect

            table = collect(
                ir.load(self.workspace.path(graph.path)),
                batches(images, graph.preprocess, BATCH_SIZE),
                identity=identity,
                threads=self.options.threads,
                progress=lambda done: self.observer.progressed("calibrate", done, len(images)),
            )
            write_json(self.workspace.path(CALIBRATION_FILE), table.to_json())
            return {"images": table.samples, "tensors": len(table.histograms)}

        self._stage("calibrate", identity, (CALIBRATION_FILE,), make)
        return sha256_of_file(self.workspace.path(CALIBRATION_FILE))

    def quantized(self, dialect: str) -> OnnxArtifact:
        """The folded graph with explicit Q/DQ in `dialect`."""
        if dialect not in self._quantized:
            self._quantized[dialect] = self._quantize(dialect)
        return self._quantized[dialect]

    def _quantize(self, dialect: str) -> OnnxArtifact:
        graph, calibration = self.folded, self.calibrated
        file, plan_file = f"int8-{dialect}.onnx", f"plan-{dialect}.json"

        def make() -> Mapping[str, Any]:
            import onnx
            import onnx_ir as ir

            from edgewright.calibration.collect import CalibrationTable
            from edgewright.calibration.ranges import silu
            from edgewright.optimize.plan import COMPUTE_OPERATORS, plan_for_cpu
            from edgewright.optimize.quantize import quantize_for_cpu

            model = ir.load(self.workspace.path(graph.path))
            table = CalibrationTable.from_json(read_json(self.workspace.path(CALIBRATION_FILE)))
            plan = plan_for_cpu(model, table.histograms)
            ranges = table.ranges(self.options.method, plan.activations, dict.fromkeys(plan.silu_inputs, silu))
            proto = ir.to_proto(quantize_for_cpu(model, plan, ranges))
            onnx.checker.check_model(proto, full_check=True)
            content = proto.SerializeToString()
            write_bytes(self.workspace.path(file), content)
            write_json(self.workspace.path(plan_file), plan.to_json())
            compute = [decision for decision in plan.decisions if decision.operator in COMPUTE_OPERATORS]
            return {
                "artifact": replace(graph, path=file, sha256=sha256_of(content)).to_json(),
                "int8_layers": sum(decision.precision == "int8" for decision in compute),
                "layers": len(compute),
            }

        parts = {
            "graph": graph.sha256,
            "calibration": calibration,
            "method": self.options.method,
            "quantize code": source_hash(
                "optimize/plan.py", "optimize/quantize.py", "calibration/observers.py", "calibration/ranges.py"
            ),
            "libraries": library_versions(*GRAPH_LIBRARIES),
        }
        run = self._stage("quantize", parts, (file, plan_file), make)
        return OnnxArtifact.from_json(run.facts["artifact"])

    @functools.cached_property
    def built(self) -> tuple[EngineRow, ...]:
        """A row for every engine: built, or skipped or failed with its reason."""
        return tuple(
            self._built_row(backend, precision) for backend in BACKENDS.values() for precision in backend.precisions
        )

    def prove(self) -> Outcome:
        """Runs every engine and the PyTorch model on the same evaluation images, and times the engines in turns."""
        if self.options.calibration is None:
            self._shipped(fashion_mnist_calibration, "calibration")
        images = self._evaluation_images  # before the slow stages, so that what is wrong with the images is said early
        built = self.built
        expected = self._reference_logits(images)
        judged = [row if row.info is None else self._judged(row, expected, images) for row in built]
        latencies = self._latencies([row for row in judged if row.parity is not None])
        rows = tuple(replace(row, latency=latencies.get(str(row.path))) for row in judged)
        own = compare(expected, expected, images.labels)
        verdict, recommended = conclusion(rows)
        notes = (self.source.note,) if self.source.note else ()
        return Outcome(
            model=self.options.model,
            weights=self.source.weights,
            verdict=verdict,
            recommended=recommended,
            stages=tuple(self.runs),
            reference=Reference(own.top1, own.top5, own.images, own.labelled),
            rows=rows,
            notes=notes,
        )

    def _stage(
        self, name: str, parts: Mapping[str, str], outputs: Sequence[str], make: Callable[[], Mapping[str, Any]]
    ) -> StageRun:
        run = self.workspace.stage(name, {**parts, "pipeline code": source_hash("pipeline.py")}, outputs, make)
        self.runs.append(run)
        return run

    @functools.cached_property
    def _reference_module(self) -> Any:
        return self.source.build()

    @functools.cached_property
    def _calibration_images(self) -> ImageSet:
        folder = self.options.calibration
        images = self._shipped(fashion_mnist_calibration, "calibration") if folder is None else image_folder(folder)
        if self.options.evaluation is not None or self.source.data is not None:
            check_disjoint(images, self._evaluation_images, allow_overlap=self.options.allow_overlap)
        return replace(images, labels=None)  # ranges are chosen without labels, so their change changes nothing

    @functools.cached_property
    def _evaluation_images(self) -> ImageSet:
        folder = self.options.evaluation
        if folder is None:
            return self._shipped(fashion_mnist_test, "evaluation")
        return image_folder(folder, self.exported.labels)

    def _shipped(self, images: Callable[[], ImageSet], use: str) -> ImageSet:
        if self.source.data == "fashion_mnist":
            return images()
        raise DataError(
            f"{self.options.model} with weights {self.options.weights!r} brings no {use} images of its own",
            f"give --{use} DIR with photographs like those it will see; random data is never used",
        )

    def _built_row(self, backend: Backend, precision: str) -> EngineRow:
        absence = backend.absence()
        if absence is not None:
            reason = f"{absence.reason}; {absence.hint}"
            return EngineRow(backend.name, precision, None, "skipped", absence.reason_code, reason)
        stem = f"{ENGINES_FOLDER}/{backend.name}-{precision}"
        file, description = f"{stem}{backend.suffix}", f"{stem}.json"
        graph = self.folded
        try:
            if precision != "fp32":
                graph = self.quantized(backend.dialect)
        except (CalibrationError, QuantizationError) as error:
            self.workspace.forget(REPORT_FILE, file, description)  # an engine of an earlier graph
            return EngineRow(backend.name, precision, None, "failed", "quantization_failed", str(error))

        def make() -> Mapping[str, Any]:
            self.workspace.forget(REPORT_FILE)  # it recommends an engine that this one replaces
            built = backend.build(BuildRequest(self.workspace.path(graph.path).read_bytes(), precision))
            info = EngineInfo(
                backend=backend.name,
                precision=precision,
                target=None,
                inputs=built.inputs,
                outputs=built.outputs,
                preprocess=graph.preprocess,
                labels=graph.labels,
                onnx_sha256=graph.sha256,
                engine_sha256=sha256_of(built.engine),
                bytes=len(built.engine),
                layers=built.layers,
                versions=built.versions,
            )
            write_bytes(self.workspace.path(file), built.engine)
            write_json(self.workspace.path(description), info.to_json())
            return {"actual": info.actual_precision}

        parts = {
            "graph": graph.sha256,
            "preprocessing": json.dumps(graph.preprocess.to_json()),
            "labels": json.dumps(graph.labels),
            "machine": machine(),
            "backend": f"{backend.name} {backend.version()}",
            "build code": source_hash("runtime/backends", "runtime/specs.py"),
        }
        try:
            self._stage(f"build {backend.name} {precision}", parts, (file, description), make)
        except BuildError as error:
            return EngineRow(backend.name, precision, None, "failed", "build_failed", str(error))
        info = EngineInfo.from_json(read_json(self.workspace.path(description)))
        return EngineRow(backend.name, precision, None, "built_not_run", "not_evaluated", "", file, info)

    def _reference_logits(self, images: ImageSet) -> NDArray[np.float32]:
        def infer(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            import torch

            with torch.inference_mode():
                pixels = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last)
                logits: NDArray[np.float32] = self._reference_module(pixels).numpy()
            return logits

        parts = {
            "weights": self.source.fingerprint,
            "model": self.options.model,
            "reference code": source_hash("export/zoo", "export/weights.py", "export/models.py"),
            "libraries": library_versions("torch"),
        }
        return self._logits("reference", parts, images, lambda: contextlib.nullcontext(infer), threads=0)

    def _judged(self, row: EngineRow, expected: NDArray[np.float32], images: ImageSet) -> EngineRow:
        assert row.info is not None
        backend, info = BACKENDS[row.backend], row.info
        name = info.inputs[0].name

        @contextlib.contextmanager
        def opened() -> Iterator[Infer]:
            engine = self.workspace.path(str(row.path)).read_bytes()
            with backend.open(engine, threads=self.options.threads) as runner:
                yield lambda batch: next(iter(runner.infer({name: batch}).values()))

        parts = {
            "graph": info.onnx_sha256,
            "backend": f"{row.backend} {backend.version()}",
            "backend code": source_hash("runtime/backends"),
        }
        try:
            logits = self._logits(f"verify {row.backend} {row.precision}", parts, images, opened)
        except EngineError as error:
            return replace(row, status="failed", reason_code="run_failed", reason=str(error))
        parity = compare(expected, logits, images.labels)
        verdict = judge(parity, self.options.budget)
        return replace(
            row,
            status=STATUS_OF_VERDICT[verdict.word],
            reason_code=verdict.word,
            reason=verdict.sentence,
            parity=parity,
            verdict=verdict,
        )

    def _logits(
        self,
        stage: str,
        parts: Mapping[str, str],
        images: ImageSet,
        opened: Callable[[], AbstractContextManager[Infer]],
        threads: int | None = None,
    ) -> NDArray[np.float32]:
        """Logits `[N, classes]` of what `opened` gives on all evaluation images, kept as an artefact."""
        file = f"logits/{stage.removeprefix('verify ').replace(' ', '-')}.npy"
        preprocess = self.source.preprocess

        def make() -> Mapping[str, Any]:
            results: list[NDArray[np.float32]] = []
            done = 0
            with opened() as infer:
                for batch in batches(images, preprocess, EVALUATION_BATCH):
                    results.append(infer(batch))
                    done += len(batch)
                    self.observer.progressed(stage, done, len(images))
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate(results))
            write_bytes(self.workspace.path(file), buffer.getvalue())
            return {"images": done}

        identified = {
            **parts,
            "images": replace(images, labels=None).identity,  # logits do not depend on labels
            "preprocessing": json.dumps(preprocess.to_json()),
            "machine": machine(),
            "threads": str(self.options.threads if threads is None else threads),
            "evaluation code": source_hash("calibration/stream.py", "runtime/preprocess.py"),
            "image libraries": library_versions("numpy", "pillow"),
        }
        self._stage(stage, identified, (file,), make)
        logits: NDArray[np.float32] = np.load(self.workspace.path(file), allow_pickle=False)
        return logits

    def _latencies(self, rows: Sequence[EngineRow]) -> dict[str, Latency]:
        """By the path of the engine."""
        if not rows:
            return {}
        threads = self.options.threads or os.cpu_count() or 1

        def make() -> Mapping[str, Any]:
            rng = np.random.default_rng(CHECK_SEED)
            image = rng.standard_normal((LATENCY_BATCH, *self.input_shape), np.float32)
            runs: dict[str, Callable[[], object]] = {}
            with contextlib.ExitStack() as stack:
                for row in rows:
                    assert row.info is not None
                    engine = self.workspace.path(str(row.path)).read_bytes()
                    runner = stack.enter_context(BACKENDS[row.backend].open(engine, threads=threads))
                    runs[str(row.path)] = functools.partial(runner.infer, {row.info.inputs[0].name: image})
                measured = measure_interleaved(
                    runs,
                    batch=LATENCY_BATCH,
                    threads=threads,
                    budget_seconds=LATENCY_SECONDS,
                    min_runs=10,
                    max_runs=LATENCY_RUNS,
                )
            return {path: latency.to_json() for path, latency in measured.items()}

        parts = {
            **{f"graph of {row.path}": row.info.onnx_sha256 for row in rows if row.info is not None},
            "backends": ", ".join(f"{row.backend} {BACKENDS[row.backend].version()}" for row in rows),
            "machine": machine(),
            "threads": str(threads),
            "latency code": source_hash("runtime/latency.py", "runtime/backends"),
        }
        facts = self._stage("latency", parts, (), make).facts
        return {path: Latency.from_json(latency) for path, latency in facts.items()}


def machine() -> str:
    """The processor and its number of cores, which engines' numbers and speed depend on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the platform's name has to do
    return f"{model}, {os.cpu_count()} cores"
