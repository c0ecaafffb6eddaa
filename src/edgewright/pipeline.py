"""The stages in order: export → fold → calibrate → cast, place, quantize → build → prove.

A facade over the stages: each property or method makes its stage and those before it, or reuses what has not changed.
A run in which nothing changed imports neither torch nor onnx and takes a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgewright.context import VERDICT_NEEDS, Options, RunContext
from edgewright.engines import Engines
from edgewright.graphs import Graphs
from edgewright.int8 import Int8Graphs
from edgewright.outcome import EngineRow, Outcome, Reference, conclusion, target_choices
from edgewright.proof import Proof
from edgewright.runtime.parity import compare
from edgewright.runtime.specs import OnnxArtifact
from edgewright.workspace import Observer, StageRun, Workspace

__all__ = ["Options", "Pipeline"]


class Pipeline:
    """One model in one build folder. Call the methods inside `workspace.locked()`.

    `context`, `graphs`, `int8`, `engines` and `proof` are its parts, for what is made of more than one of them.
    """

    def __init__(self, options: Options, observer: Observer | None = None) -> None:
        self.context = RunContext(options, observer)
        self.graphs = Graphs(self.context)
        self.int8 = Int8Graphs(self.context, self.graphs)
        self.engines = Engines(self.context, self.graphs, self.int8)
        self.proof = Proof(self.context, self.graphs, self.engines)

    @property
    def workspace(self) -> Workspace:
        """The build folder."""
        return self.context.workspace

    @property
    def runs(self) -> list[StageRun]:
        """The stages that were made or reused so far."""
        return self.context.runs

    @property
    def exported(self) -> OnnxArtifact:
        """The ONNX graph of the source."""
        return self.graphs.exported

    @property
    def folded(self) -> OnnxArtifact:
        """The graph without batch normalization."""
        return self.graphs.folded

    @property
    def calibrated(self) -> str:
        """SHA-256 of `calibration.json`."""
        return self.graphs.calibrated

    @property
    def half(self) -> OnnxArtifact:
        """The graph in FP16, for NVIDIA's targets."""
        return self.graphs.half

    @property
    def dialects(self) -> tuple[str, ...]:
        """Those of the INT8 graphs that the backends of this run read."""
        return self.engines.dialects

    def quantized(self, dialect: str) -> OnnxArtifact:
        """The graph with explicit Q/DQ in `dialect`."""
        return self.int8.quantized(dialect).artifact

    @property
    def built(self) -> tuple[EngineRow, ...]:
        """A row for every engine: built, or skipped or failed with its reason."""
        return self.engines.rows

    @property
    def judged(self) -> tuple[EngineRow, ...]:
        """A row for every engine, run or simulated beside the source on the evaluation images; none is timed."""
        self.context.ask_for(VERDICT_NEEDS)
        self.graphs.check_images(calibration=self.engines.need_calibration)
        built = self.engines.rows
        _ = self.proof.reference  # before the engines: PyTorch and the backends' threads do not mix well
        return tuple(self.proof.judged(row) for row in built)

    def prove(self) -> Outcome:
        """Runs every engine and the PyTorch model on the same evaluation images, and times the engines in turns.

        Engines for a device that is not here are simulated where that says something.
        """
        judged, source = self.judged, self.context.source
        expected, images = self.proof.reference, self.graphs.evaluation_images
        latencies = self.proof.latencies([row for row in judged if row.ran])
        rows = tuple(replace(row, latency=latencies.get(str(row.path))) for row in judged)
        own = compare(expected, expected, images.labels)
        verdict, recommended = conclusion(rows)
        return Outcome(
            model=self.context.options.model,
            weights=source.weights,
            verdict=verdict,
            recommended=recommended,
            stages=tuple(self.context.runs),
            reference=Reference(
                own.top1, own.top5, own.images, own.labelled, "PyTorch" if source.onnx is None else "ONNX file"
            ),
            rows=rows,
            targets=target_choices(rows),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        """What a person should know: of the source, and of what the stages noticed and decided."""
        if self.context.source.note:
            yield self.context.source.note
        for run in self.context.runs:
            yield from run.facts.get("notes", ())
