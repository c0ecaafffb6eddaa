"""The stages that gather what the report shows beside the verdict: layers, kernel times, images that changed.

Nothing here chooses or judges. What fails leaves a gap in the report, and a note; it does not take the verdict away.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgewright.blame_hops import rescaled, simulation, some_images
from edgewright.breakdown import by_kind, by_stage, graph_stages, stage_names
from edgewright.context import GRAPH_LIBRARIES
from edgewright.engines import planned_in
from edgewright.gallery import Change, changes, effects, thumbnail
from edgewright.outcome import EngineRow, Outcome
from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.errors import EdgewrightError
from edgewright.runtime.files import read_json, sha256_of_file, write_bytes, write_json
from edgewright.workspace import library_versions, machine, source_hash

if TYPE_CHECKING:
    from edgewright.explain import ExplainedLayer
    from edgewright.pipeline import Pipeline

__all__ = ["GALLERY_FILE", "LABELS_FILE", "REFERENCE_FILE", "evidence_of"]

CODE = "evidence.py"
GALLERY_FILE, KERNELS_FILE = "gallery.json", "kernels.json"
REFERENCE_FILE, LABELS_FILE = "logits/reference.npy", "logits/labels.npy"
LAYER_IMAGES = 64  # calibration images on which layers are compared, as many as `edgewright explain` takes
KERNEL_RUNS = 40
SHOWN_IMAGES = 24
SLOWEST_KINDS = 12
LONGEST_REASON = 300  # of an error of a library, in letters


def evidence_of(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    """The fields of `edgewright.engine/1` that explain the rows of `outcome`, by their names."""
    notes: list[str] = []

    def attempted(what: str, gather: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return gather()
        except EdgewrightError as error:
            words = str(error)
        except Exception as error:  # whatever graph libraries raise, and faults of ours: the verdict stands without
            words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:LONGEST_REASON]}"
        notes.append(f"the report goes without {what}: {words}")
        return otherwise

    fields = {
        "calibration": attempted("calibration", lambda: _calibration(pipeline), None),
        "layers": attempted("layers", lambda: _layers(pipeline, outcome), {}),
        "breakdown": attempted("kernel times", lambda: _breakdown(pipeline, outcome), None),
        "changed": attempted("changed images", lambda: _changed(pipeline, outcome), None),
    }
    return fields | {"notes": [*outcome.notes, *notes]}


def _calibration(pipeline: Pipeline) -> dict[str, Any] | None:
    """Which images chose the ranges, and how; None where no engine needed any."""
    run = next((run for run in pipeline.runs if run.name == "calibrate"), None)
    if run is None:
        return None
    images = pipeline.graphs.calibration_images
    return {
        "name": images.name,
        "identity": images.identity,
        "given": len(images),
        "images": run.facts["images"],
        "tensors": run.facts["tensors"],
        "methods": {dialect: _methods(pipeline, dialect) for dialect in _dialects(pipeline)},
        "notes": list(run.facts["notes"]),
    }


def _dialects(pipeline: Pipeline) -> tuple[str, ...]:
    """Those whose INT8 graph was made in this run."""
    prefix = "quantize "
    return tuple(dict.fromkeys(run.name.removeprefix(prefix) for run in pipeline.runs if run.name.startswith(prefix)))


def _methods(pipeline: Pipeline, dialect: str) -> dict[str, int]:
    plan = read_json(pipeline.workspace.path(f"plan-{dialect}.json"))
    return dict(Counter(bounds["method"] or "unknown" for bounds in plan["ranges"].values()).most_common())


def _layers(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    """By dialect the layers of the INT8 graphs of which an engine was built."""
    built = {BACKENDS[row.backend].dialect for row in outcome.rows if row.precision == "int8" and row.info is not None}
    return {dialect: _layers_of(pipeline, dialect) for dialect in _dialects(pipeline) if dialect in built}


def _layers_of(pipeline: Pipeline, dialect: str) -> dict[str, Any]:
    file, name = f"layers-{dialect}.json", f"compare layers {dialect}"
    artifact, images = pipeline.quantized(dialect), pipeline.graphs.calibration_images
    changed_on_purpose = rescaled(pipeline, dialect)

    def make() -> Mapping[str, Any]:
        from edgewright.explain import layer_document

        layers = [layer_document(layer) for layer in _explained(pipeline, dialect, name)]
        for layer in layers:
            del layer["in_float"]
            if changed_on_purpose:
                layer |= {"sqnr_db": None, "own_sqnr_db": None}
        content = {"images": min(LAYER_IMAGES, len(images)), "note": changed_on_purpose, "layers": layers}
        write_json(pipeline.workspace.path(file), {"schema": "edgewright.layers/1", **content})
        return {"layers": len(layers)}

    parts = {
        "graphs": f"{pipeline.folded.sha256} {artifact.sha256}",
        "calibration": pipeline.calibrated,
        "images": images.identity,
        "preprocessing": json.dumps(pipeline.context.preprocess.to_json()),
        "comparison code": source_hash("explain.py", "blame_hops.py", "optimize", "calibration/ranges.py"),
        "libraries": library_versions(*GRAPH_LIBRARIES, "pillow"),
    }
    pipeline.context.stage(name, parts, (file,), make, code=CODE)
    found: dict[str, Any] = read_json(pipeline.workspace.path(file))
    return {field: value for field, value in found.items() if field != "schema"}


def _explained(pipeline: Pipeline, dialect: str, stage: str) -> tuple[ExplainedLayer, ...]:
    import onnx_ir as ir

    from edgewright.calibration.ranges import Range
    from edgewright.explain import explained_layers, input_ranges
    from edgewright.optimize.plan import Decision

    model, table = pipeline.graphs.folded_and_table()
    plan = read_json(pipeline.workspace.path(f"plan-{dialect}.json"))
    ranges = {tensor: Range(**bounds) for tensor, bounds in plan["ranges"].items()}
    return explained_layers(
        model,
        simulation(ir.load(pipeline.workspace.path(pipeline.quantized(dialect).path))),
        [Decision(**decision) for decision in plan["decisions"]],
        input_ranges(ranges, table.histograms),
        some_images(pipeline, LAYER_IMAGES),
        threads=pipeline.context.options.threads,
        progress=lambda done, total: pipeline.context.observer.progressed(stage, done, total),
    )


def _breakdown(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    """Per stage of the network what the graph of each engine holds, and what the kernels of those that ran take."""
    rows = [row for row in outcome.rows if row.ran and row.info is not None]

    def make() -> Mapping[str, Any]:
        import onnx_ir as ir

        from edgewright.optimize.summary import summary

        shape, path = pipeline.context.input_shape, pipeline.workspace.path
        whole = summary(ir.load(path(pipeline.folded.path)), shape)
        known = stage_names(whole)
        engines = {}
        for index, row in enumerate(rows):
            graph = pipeline.engines.graph(row.backend, row.precision).path
            engines[str(row.path)] = {
                "graph": [asdict(stage) for stage in graph_stages(summary(ir.load(path(graph)), shape), known)],
                **_timed(pipeline, row, graph, known),
            }
            pipeline.context.observer.progressed("time kernels", index + 1, len(rows))
        graph_of_fp32 = [asdict(stage) for stage in graph_stages(whole, known)]
        content = {"runs": KERNEL_RUNS, "graph": graph_of_fp32, "engines": engines}
        write_json(path(KERNELS_FILE), {"schema": "edgewright.kernels/1", **content})
        return {"engines": len(engines)}

    parts = {
        **{f"engine {row.path}": row.info.engine_sha256 for row in rows if row.info is not None},
        "graph": pipeline.folded.sha256,
        "backends": ", ".join(f"{row.backend} {BACKENDS[row.backend].version()}" for row in rows),
        "machine": machine(),
        "threads": str(pipeline.context.options.threads),
        "breakdown code": source_hash("breakdown.py", "runtime/backends", "optimize"),
        "libraries": library_versions(*GRAPH_LIBRARIES),
    }
    pipeline.context.stage("time kernels", parts, (KERNELS_FILE,), make, code=CODE)
    found: dict[str, Any] = read_json(pipeline.workspace.path(KERNELS_FILE))
    return {field: value for field, value in found.items() if field != "schema"}


def _timed(pipeline: Pipeline, row: EngineRow, graph: str, known: Mapping[str, str]) -> dict[str, Any]:
    """Kernel times by stage and kind; nothing where the backend does not time them."""
    assert row.info is not None
    planned = planned_in(pipeline.workspace.path(graph).read_bytes(), row.precision)
    engine = pipeline.workspace.path(str(row.path)).read_bytes()
    threads = pipeline.context.options.threads
    times = BACKENDS[row.backend].kernel_times(engine, planned, threads=threads, runs=KERNEL_RUNS)
    return {
        "stages": [asdict(share) for share in by_stage(times, known)],
        "kinds": [asdict(share) for share in by_kind(times)[:SLOWEST_KINDS]],
        "milliseconds": sum(time.milliseconds for time in times) if times else None,
    }


def _changed(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any] | None:
    """The images that the engine which the verdict is about answers otherwise than the reference."""
    row = outcome.decisive
    if row is None:
        return None
    logits_file = f"logits/{'-'.join(word for word in (row.backend, row.precision, row.target) if word)}.npy"
    images, preprocess = pipeline.graphs.evaluation_images, pipeline.context.preprocess
    names, path = pipeline.exported.labels, pipeline.workspace.path

    def make() -> Mapping[str, Any]:
        candidate = np.load(path(logits_file), allow_pickle=False)
        found = changes(pipeline.proof.reference, candidate, images.labels)
        shown = [
            {
                **_in_words(change, names),
                "name": Path(images.image_name(change.image)).name,
                "thumbnail": thumbnail(preprocess.pixels(images[change.image])),
            }
            for change in found[:SHOWN_IMAGES]
        ]
        content = {"engine": row.path, "total": len(found), **effects(found), "images": shown}
        write_json(path(GALLERY_FILE), {"schema": "edgewright.gallery/1", **content})
        if images.labels is not None:
            buffer = io.BytesIO()
            np.save(buffer, images.labels)
            write_bytes(path(LABELS_FILE), buffer.getvalue())
        return {"changed": len(found)}

    parts = {
        "engine": str(row.path),
        "logits": f"{sha256_of_file(path(REFERENCE_FILE))} {sha256_of_file(path(logits_file))}",
        "images": images.identity,
        "names": json.dumps(names),
        "preprocessing": json.dumps(preprocess.to_json()),
        "gallery code": source_hash("gallery.py", "runtime/preprocess.py"),
        "image libraries": library_versions("numpy", "pillow"),
    }
    outputs = (GALLERY_FILE,) if images.labels is None else (GALLERY_FILE, LABELS_FILE)
    if images.labels is None:
        pipeline.workspace.forget(LABELS_FILE)
    pipeline.context.stage("gallery", parts, outputs, make, code=CODE)
    found = read_json(path(GALLERY_FILE))
    shown = [{field: value for field, value in image.items() if field != "thumbnail"} for image in found["images"]]
    return {field: value for field, value in found.items() if field != "schema"} | {"images": shown}


def _in_words(change: Change, names: tuple[str, ...]) -> dict[str, Any]:
    def answer(index: int, probability: float | None) -> dict[str, Any]:
        return {"class": index, "label": names[index], "probability": probability}

    return {
        "image": change.image,
        "right": None if change.label is None else {"class": change.label, "label": names[change.label]},
        "reference": answer(change.reference.index, change.reference.probability),
        "engine": answer(change.engine.index, change.engine.probability),
        "effect": change.effect,
    }
