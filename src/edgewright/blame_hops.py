"""The hops of a real model: its source, its graphs as the stages make them, and the engine where it can be run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgewright.blame import Hop, Kind
from edgewright.calibration.stream import batches
from edgewright.graphs import NVIDIA_DIALECTS
from edgewright.runtime.backends import BACKENDS, Backend
from edgewright.runtime.specs import OnnxArtifact

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgewright.pipeline import Pipeline

__all__ = ["backend_of", "hops_of", "rescaled", "simulation", "some_images"]

Batch = NDArray[np.float32]
EXPORTED, FOLDED, FP16, INT8, ENGINE = "exported ONNX", "folded", "FP16 simulation", "INT8 simulation", "engine"
KEEPING = ("ranges", "bias correction", "AdaRound", "mixed precision")
"""Rungs of the ladder after which the activations are still those of the folded graph, but for rounding."""


def backend_of(dialect: str) -> Backend:
    """The backend that reads the INT8 graphs of `dialect`."""
    return next(backend for backend in BACKENDS.values() if backend.dialect == dialect)


def some_images(pipeline: Pipeline, count: int) -> Batch:
    """At most `count` preprocessed calibration images, evenly spaced, `[N, C, H, W]`."""
    images = pipeline.graphs.calibration_images
    chosen = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64))
    subset = images.subset(chosen)
    (batch,) = batches(subset, pipeline.context.preprocess, len(subset))
    return batch


def hops_of(pipeline: Pipeline, dialect: str, images: Batch) -> tuple[tuple[Hop, ...], tuple[str, ...]]:
    """From the source to the INT8 engine of `dialect`, and what is missing, with the reason.

    The INT8 graph is held against the FP16 graph if its remainder is FP16, else against the folded one. The first of
    `images` goes through PyTorch once, which tells its activations.
    """
    threads = pipeline.context.options.threads
    exported, folded, half, quantized = (
        _loaded(pipeline, artifact)
        for artifact in (pipeline.exported, pipeline.folded, pipeline.half, pipeline.quantized(dialect))
    )
    half_remainder = dialect in NVIDIA_DIALECTS and pipeline.context.options.remainder == "fp16"
    graph_hop = functools.partial(_graph_hop, threads=threads)
    hops = (
        _source(pipeline, exported, images),
        graph_hop(EXPORTED, "exact", exported),
        graph_hop(FOLDED, "exact", folded),
        graph_hop(FP16, "fp16", simulation(half)),
        graph_hop(
            INT8,
            "int8",
            simulation(quantized),
            before=FP16 if half_remainder else FOLDED,
            quantized=quantized,
            histograms=pipeline.graphs.folded_and_table()[1].histograms,
            incomparable=rescaled(pipeline, dialect),
        ),
    )
    engine, note = _engine(pipeline, dialect)
    return (*hops, *engine), (note,) if note else ()


def _source(pipeline: Pipeline, exported: ir.Model, images: Batch) -> Hop:
    """PyTorch with its activations, or the ONNX file that a person gave, whose tensors may have other names."""
    if pipeline.context.source.onnx is not None:
        return Hop("ONNX file", "source", pipeline.graphs.reference())
    from edgewright.blame_torch import TorchActivations

    activations = TorchActivations(pipeline.graphs.reference_module, exported, images)
    return Hop("PyTorch", "source", pipeline.graphs.reference(), activations=activations, tensors=activations.tensors)


def _graph_hop(name: str, kind: Kind, graph: ir.Model, *, threads: int, **more: Any) -> Hop:
    from edgewright.optimize.segments import logits_of

    return Hop(name, kind, functools.partial(logits_of, graph, threads=threads), graph=graph, **more)


def _engine(pipeline: Pipeline, dialect: str) -> tuple[tuple[Hop, ...], str]:
    """The INT8 engine, or why there is none to be run here."""
    backend = backend_of(dialect)
    targets: tuple[str | None, ...] = pipeline.context.options.targets if backend.targets else (None,)
    absences = {target: backend.absence() or backend.cannot_run(target) for target in targets}
    target = next((target for target, absence in absences.items() if absence is None), targets[0])
    absence = absences[target]
    if absence is not None:
        return (), f"no engine: {absence.reason}; the last hop is its graph, simulated"
    row = next(row for row in pipeline.engines.rows if row.precision == "int8" and row.target == target)
    if row.info is None:
        return (), f"no engine: {row.reason}"
    return (Hop(ENGINE, "engine", functools.partial(pipeline.proof.engine_answers, row), before=INT8),), ""


def rescaled(pipeline: Pipeline, dialect: str) -> str:
    """Why the activations of the INT8 graph are others than those of the folded graph, or ""."""
    facts = next(run.facts for run in reversed(pipeline.runs) if run.name == f"quantize {dialect}")
    changing = [rung["name"] for rung in facts.get("rungs", ()) if rung["taken"] and rung["name"] not in KEEPING]
    return f"its weights and activations were changed on purpose ({', '.join(changing)})" if changing else ""


def simulation(graph: ir.Model) -> ir.Model:
    """An FP16 or INT8 graph as onnxruntime runs it on this CPU."""
    from edgewright.optimize.simulate import signed_to_unsigned, simulate_fp16

    return signed_to_unsigned(simulate_fp16(graph))


def _loaded(pipeline: Pipeline, artifact: OnnxArtifact) -> ir.Model:
    import onnx_ir as ir

    return ir.load(pipeline.workspace.path(artifact.path))
