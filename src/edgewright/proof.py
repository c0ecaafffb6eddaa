"""The stages that prove: every engine beside the PyTorch model on the same images, and the engines timed in turns.

An engine for a GPU that is not here is not run. Its graph's numerics are, on the CPU: FP16 and INT8 are simulated
(`optimize/simulate.py`), and what comes of that is said to come from a simulation.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.stream import batches
from edgewright.context import GRAPH_LIBRARIES, RunContext
from edgewright.engines import Engines
from edgewright.export.conventions import Infer, Logits
from edgewright.graphs import Graphs
from edgewright.outcome import EngineRow
from edgewright.runtime.backends import BACKENDS, Runner, backend_named
from edgewright.runtime.errors import EngineError
from edgewright.runtime.figures import further_figures
from edgewright.runtime.files import write_bytes
from edgewright.runtime.gates import judge
from edgewright.runtime.latency import Latency, measure_interleaved
from edgewright.runtime.parity import Source, compare
from edgewright.runtime.specs import OnnxArtifact
from edgewright.runtime.verdict import STATUS_OF_VERDICT
from edgewright.workspace import library_versions, machine, source_hash

__all__ = ["Proof"]

CODE = "proof.py"
REFERENCE_BATCH = 128
"""Images that PyTorch takes at once; on two cores it needs half the time of batches of 32."""
ENGINE_BATCH = 32
USUAL_PIXELS = 224 * 224
"""Of larger images fewer are taken at once, by PyTorch and by engines, or their activations would not fit."""
KEPT_BYTES = 1 << 29
"""Evaluation images that fit are decoded once for all engines; more are decoded for each."""
LATENCY_BATCH = 1
LATENCY_SECONDS = 10.0
LATENCY_RUNS = 200
SEED = 21
REFERENCE_CODE = (  # what decides which network it is, but for its weights, and runs it
    "export/zoo",
    *(
        f"export/{file}.py"
        for file in (
            *("entries", "factories", "from_onnx", "models", "onnx_files", "onnx_header", "onnx_session"),
            *("random_weights", "reference", "released", "resolve", "timm_models", "torchvision_models"),
            *("user_code", "weights"),
        )
    ),
)
SIMULATED = ("fp16", "int8")


class Proof:
    """What the engines of one run are worth."""

    def __init__(self, context: RunContext, graphs: Graphs, engines: Engines) -> None:
        self._context = context
        self._graphs = graphs
        self._engines = engines
        self._kept: list[NDArray[np.float32]] = []
        self._simulated: dict[str, Logits] = {}

    @functools.cached_property
    def reference(self) -> Logits:
        """Logits of the source itself on the evaluation images."""
        parts = {
            "weights": self._context.source.fingerprint,
            "model": self._context.options.model,
            "input": str(self._context.input_shape),
            "reference code": source_hash(*REFERENCE_CODE),
            "libraries": library_versions("torch", "torchvision", "timm", "onnxruntime"),
        }
        return self._logits(
            "reference", "reference", parts, lambda: contextlib.nullcontext(self._graphs.reference()), threads=0
        )

    def judged(self, row: EngineRow) -> EngineRow:
        """The row with its parity and verdict, as far as it can be run or simulated here."""
        if row.info is None:
            return row
        absence = BACKENDS[row.backend].cannot_run(row.target)
        try:
            if absence is None:
                return self._compared(row, self._engine_logits(row), "engine")
            if row.precision in SIMULATED:
                return self._compared(row, self._simulated_logits(row), "simulation")
        except EngineError as error:
            return replace(row, status="failed", reason_code="run_failed", reason=str(error))
        return replace(row, reason_code=absence.reason_code, reason=f"{absence.reason}; {absence.hint}")

    def engine_answers(self, row: EngineRow, images: NDArray[np.float32]) -> Logits:
        """Logits `[N, classes]` of an engine that runs here, on preprocessed images `[N, C, H, W]`."""
        opened = functools.partial(self._opened, row, self._context.options.threads)
        with _inferring(opened, self._at_once(ENGINE_BATCH)) as infer:
            return infer(images)

    def simulated_answers(self, graph: OnnxArtifact, images: NDArray[np.float32]) -> Logits:
        """The same of a graph's numerics in FP32, FP16 or INT8, run on the CPU."""
        with _inferring(functools.partial(self._simulation, graph), self._at_once(ENGINE_BATCH)) as infer:
            return infer(images)

    def latencies(self, rows: Sequence[EngineRow]) -> dict[str, Latency]:
        """Of the engines that run here, by their paths, measured in turns."""
        if not rows:
            return {}
        threads = self._context.options.threads or os.cpu_count() or 1

        def make() -> Mapping[str, Any]:
            rng = np.random.default_rng(SEED)
            image = rng.standard_normal((LATENCY_BATCH, *self._context.input_shape), np.float32)
            runs: dict[str, Callable[[], object]] = {}
            with contextlib.ExitStack() as stack:
                for row in rows:
                    assert row.info is not None
                    runner = stack.enter_context(self._opened(row, threads))
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
            **{f"engine {row.path}": row.info.engine_sha256 for row in rows if row.info is not None},
            "backends": ", ".join(_backend_here(row.backend) for row in rows),
            "machine": machine(),
            "threads": str(threads),
            "latency code": source_hash("runtime/latency.py", "runtime/backends"),
        }
        facts = self._context.stage("latency", parts, (), make, code=CODE).facts
        return {path: Latency.from_json(latency) for path, latency in facts.items()}

    def _compared(self, row: EngineRow, logits: Logits, source: Source) -> EngineRow:
        engine = source == "engine"
        labels = self._graphs.evaluation_images.labels
        parity = compare(self.reference, logits, labels, source=source)
        verdict = judge(parity, self._context.options.gates)
        names = self._graphs.exported.labels
        return replace(
            row,
            status=STATUS_OF_VERDICT[verdict.word] if engine else "simulated",
            reason_code=verdict.word,
            reason=verdict.sentence if engine else f"its numerics were simulated on the CPU: {verdict.sentence}",
            parity=parity,
            verdict=verdict,
            figures=further_figures(self.reference, logits, labels, names),
        )

    def _engine_logits(self, row: EngineRow) -> Logits:
        assert row.info is not None
        profile = row.info.profile
        size = self._at_once(ENGINE_BATCH)
        size = size if profile is None else min(size, profile.maximum)
        parts = {
            "engine": row.info.engine_sha256,
            "backend": _backend_here(row.backend),
            "backend code": source_hash("runtime/backends"),
        }
        words = " ".join(word for word in (row.backend, row.precision, row.target) if word)
        threads = self._context.options.threads
        opened = functools.partial(_inferring, functools.partial(self._opened, row, threads), size)
        return self._logits(f"verify {words}", words.replace(" ", "-"), parts, opened, threads=threads)

    def _simulated_logits(self, row: EngineRow) -> Logits:
        """One simulation serves all targets whose engines are built from the same graph."""
        graph = self._engines.graph(row.backend, row.precision)
        if graph.path not in self._simulated:
            self._simulated[graph.path] = self._simulate(graph)
        return self._simulated[graph.path]

    def _simulate(self, graph: OnnxArtifact) -> Logits:
        stem = graph.path.removesuffix(".onnx")
        threads = self._context.options.threads
        parts = {
            "graph": graph.sha256,
            "simulation code": source_hash("optimize/simulate.py", "runtime/backends/onnxruntime_backend.py"),
            "libraries": library_versions(*GRAPH_LIBRARIES),
        }
        opened = functools.partial(self._simulation, graph)
        inferring = functools.partial(_inferring, opened, self._at_once(ENGINE_BATCH))
        return self._logits(f"simulate {stem}", f"simulated-{stem}", parts, inferring, threads=threads)

    def _simulation(self, graph: OnnxArtifact) -> Runner:
        import onnx_ir as ir

        from edgewright.optimize.simulate import signed_to_unsigned, simulate_fp16

        simulation = signed_to_unsigned(simulate_fp16(ir.load(self._context.workspace.path(graph.path))))
        content = ir.to_proto(simulation).SerializeToString()
        return backend_named("onnxruntime").open(content, threads=self._context.options.threads)

    def _opened(self, row: EngineRow, threads: int) -> Runner:
        assert row.info is not None
        engine = self._context.workspace.path(str(row.path)).read_bytes()
        return BACKENDS[row.backend].open(engine, threads=threads, dla=row.info.dla)

    def _logits(
        self,
        stage: str,
        stem: str,
        parts: Mapping[str, str],
        opened: Callable[[], AbstractContextManager[Infer]],
        *,
        threads: int,
    ) -> Logits:
        """Logits `[N, classes]` of what `opened` gives on all evaluation images, kept as an artefact."""
        file = f"logits/{stem}.npy"
        images, preprocess = self._graphs.evaluation_images, self._context.preprocess

        def make() -> Mapping[str, Any]:
            results: list[Logits] = []
            done = 0
            with opened() as infer:
                for batch in self._decoded(images):
                    results.append(infer(batch))
                    done += len(batch)
                    self._context.observer.progressed(stage, done, len(images))
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate(results))
            write_bytes(self._context.workspace.path(file), buffer.getvalue())
            return {"images": done}

        identified = {
            **parts,
            "images": replace(images, labels=None).identity,  # logits do not depend on labels
            "preprocessing": json.dumps(preprocess.to_json()),
            "machine": machine(),
            "threads": str(threads),
            "evaluation code": source_hash("calibration/stream.py", "runtime/preprocess.py"),
            "image libraries": library_versions("numpy", "pillow"),
        }
        self._context.stage(stage, identified, (file,), make, code=CODE)
        logits: Logits = np.load(self._context.workspace.path(file), allow_pickle=False)
        return logits

    def _at_once(self, most: int) -> int:
        """`most` images, or as many larger ones as have the same number of pixels."""
        _, height, width = self._context.input_shape
        return max(1, min(most, most * USUAL_PIXELS // (height * width)))

    def _decoded(self, images: ImageSet) -> Iterable[NDArray[np.float32]]:
        """The preprocessed images in batches; decoded as a whole before they are used, and only once, if they fit.

        Threads that decode beside PyTorch's would keep those waiting for each other: on two cores the reference then
        takes half as long again.
        """
        stream = batches(images, self._context.preprocess, self._at_once(REFERENCE_BATCH))
        if 4 * int(np.prod(self._context.input_shape)) * len(images) > KEPT_BYTES:
            return stream
        self._kept = self._kept or list(stream)
        return self._kept


def _backend_here(name: str) -> str:
    """The backend, its version, and the device that it runs on if that is not the processor."""
    backend = BACKENDS[name]
    return " ".join(word for word in (name, backend.version(), backend.device()) if word)


@contextlib.contextmanager
def _inferring(opened: Callable[[], Runner], size: int) -> Iterator[Infer]:
    """A runner as a function of batches of any size, of which it takes `size` images at once."""
    with opened() as runner:
        name, output = runner.inputs[0].name, runner.outputs[0].name

        def infer(batch: NDArray[np.float32]) -> Logits:
            parts = [runner.infer({name: batch[start : start + size]}) for start in range(0, len(batch), size)]
            return np.concatenate([part[output] for part in parts])

        yield infer
