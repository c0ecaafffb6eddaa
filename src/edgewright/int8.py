"""The stages that make INT8 graphs: place (where INT8 pays on a target) → quantize (mended as the budget needs).

torch and onnx are imported only where a stage is really made.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgewright.calibration.calib_cache import CalibCache, read_calib_cache
from edgewright.calibration.datasets import check_disjoint
from edgewright.calibration.image_set import ImageSet, without
from edgewright.context import GRAPH_LIBRARIES, RunContext
from edgewright.graphs import NVIDIA_DIALECTS, Graphs
from edgewright.runtime.backends import Backend, backend_reading
from edgewright.runtime.files import sha256_of, write_json
from edgewright.runtime.specs import OnnxArtifact
from edgewright.workspace import library_versions, machine, source_hash

if TYPE_CHECKING:
    from edgewright.ladder import Ladder
    from edgewright.optimize.dialects import Quantizer
    from edgewright.optimize.placement import Placement
    from edgewright.optimize.placement_rtx import ListedPlacement
    from edgewright.rungs import Finetune

__all__ = ["Int8Graphs", "Placed", "QuantizedArtifact"]

CODE = "int8.py"
PLACING_SECONDS = 6.0
"""For the whole networks that take turns; each of two CPU backends spends them once per network and machine."""
PLACING_CODE = ("optimize", "runtime/backends", *(f"runtime/{file}.py" for file in ("audit", "intervals", "latency")))
LADDER_CODE = (
    *("ladder.py", "rungs.py", "frontier.py", "finetuning.py", "learned"),
    # which images a climb sees, and how far their logits are from FP32's
    *("graphs.py", "runtime/logits.py", "runtime/parity.py"),
    *(f"calibration/{file}.py" for file in ("calib_cache", "collect", "division", "observers", "ranges", "sessions")),
)


@dataclass(frozen=True)
class Placed:
    """Where INT8 pays on a target.

    * left_out: layers that are to stay in float, and why; remainder: what the backend runs them in
    """

    left_out: Mapping[str, str]
    remainder: str


@dataclass(frozen=True)
class QuantizedArtifact:
    """A quantized graph, and how it came about.

    * int8_layers, layers: how many of its convolutions and matrix products are INT8, and how many there are
    * remainder: what the others run in where the graph does not say it
    """

    artifact: OnnxArtifact
    int8_layers: int
    layers: int
    remainder: str


class Int8Graphs:
    """The graphs with Q/DQ of one run, by their dialects."""

    def __init__(self, context: RunContext, graphs: Graphs) -> None:
        self._context = context
        self._options = context.options
        self._workspace = context.workspace
        self._graphs = graphs
        self._made: dict[str, QuantizedArtifact] = {}

    def quantized(self, dialect: str) -> QuantizedArtifact:
        """The folded graph with explicit Q/DQ in `dialect`."""
        if dialect not in self._made:
            self._made[dialect] = self._quantize(dialect)
        return self._made[dialect]

    def placed(self, dialect: str) -> Placed:
        """Where INT8 pays; everywhere, if nothing can be measured here or nobody wants it to be."""
        backend = backend_reading(dialect)
        if self._options.placement == "rules" or backend.absence() is not None:
            return Placed({}, "fp32")
        file = f"placement-{dialect}.json"

        def make() -> Mapping[str, Any]:
            quantizer = self._quantizer(dialect)
            found = self._placement(dialect, quantizer, backend)
            write_json(self._workspace.path(file), found.to_json())
            return {
                "left_out": dict(found.left_out),
                "layers": len(quantizer.layers),
                "remainder": found.remainder,
                "chosen": found.chosen,
                "notes": _placement_notes(dialect, len(found.left_out), len(quantizer.layers), found.remainder),
            }

        parts = {
            "graph": self._graphs.folded.sha256,
            "calibration": self._graphs.calibrated,  # what could be measured can be INT8
            "backend": f"{backend.name} {backend.version()} {backend.device()}",
            "placing code": source_hash(*PLACING_CODE),
            "libraries": library_versions(*GRAPH_LIBRARIES, "networkx"),
        }
        if dialect in NVIDIA_DIALECTS:
            parts["remainder"] = self._options.remainder
        if dialect == "rtx":
            parts["targets"] = ", ".join(self._options.targets)
        else:
            parts |= {
                "machine": machine(),
                "threads": str(self._options.threads),
                "seed": str(self._options.seed),
            }
        facts = self._context.stage(f"place {dialect}", parts, (file,), make, code=CODE).facts
        return Placed(facts["left_out"], facts["remainder"])

    def _placement(self, dialect: str, quantizer: Quantizer, backend: Backend) -> Placement | ListedPlacement:
        """By the compiler's listing for TensorRT-RTX, by the clock elsewhere."""
        from edgewright.optimize.placement import placed
        from edgewright.optimize.placement_rtx import placed_by_listing

        options = self._options
        progress = functools.partial(self._context.observer.progressed, f"place {dialect}")
        if dialect == "rtx":
            targets = [target for target in options.targets if target in backend.targets]
            return placed_by_listing(quantizer, backend, targets, progress=progress)
        return placed(
            quantizer,
            backend,
            threads=options.threads,
            budget_seconds=PLACING_SECONDS,
            seed=options.seed,
            progress=progress,
        )

    def _quantize(self, dialect: str) -> QuantizedArtifact:
        graph, file, plan_file = self._graphs.folded, f"int8-{dialect}.onnx", f"plan-{dialect}.json"
        placed = self.placed(dialect)

        def make() -> Mapping[str, Any]:
            from edgewright.optimize.plan import COMPUTE_OPERATORS

            climb = self._ladder.climb(dialect, placed.left_out)
            quantized = climb.quantized
            write_json(self._workspace.path(plan_file), quantized.plan.to_json() | climb.to_json())
            return {
                "artifact": replace(graph, path=file, sha256=self._graphs.written(file, quantized.model)).to_json(),
                "int8_layers": quantized.int8_layers,
                "layers": sum(decision.operator in COMPUTE_OPERATORS for decision in quantized.plan.decisions),
                "left_out": dict(climb.left_out),
                "rungs": [
                    {
                        "name": rung.name,
                        "taken": rung.taken,
                        "note": rung.note,
                        "seconds": rung.seconds,
                        "sqnr_db": rung.choosing.sqnr_db,
                    }
                    for rung in climb.rungs
                ],
                "met": climb.met,
                "notes": [f"int8 {dialect}: {note}" for note in climb.notes],
            }

        parts = {
            **self._graphs.rewriting_parts(),
            "method": self._options.method,
            "placement": json.dumps(dict(placed.left_out), sort_keys=True),
            "budget": str(self._options.budget),
            "rescue": str(self._options.rescue),
            "seed": str(self._options.seed),
            "threads": str(self._options.threads),
            "ladder code": source_hash(*LADDER_CODE),
            "training": "" if self._training is None else self._training.identity,
            "learning libraries": library_versions("torch", "scipy"),
        }
        if dialect in NVIDIA_DIALECTS:
            parts["remainder"] = self._options.remainder
            parts["calibration cache"] = "" if self._cache is None else sha256_of(self._cache.to_text().encode())
        facts = self._context.stage(f"quantize {dialect}", parts, (file, plan_file), make, code=CODE).facts
        artifact = OnnxArtifact.from_json(facts["artifact"])
        return QuantizedArtifact(artifact, facts["int8_layers"], facts["layers"], placed.remainder)

    @functools.cached_property
    def _ladder(self) -> Ladder:
        """Shared by all dialects."""
        from edgewright.ladder import Aim, CalibrationImages, Ladder

        options = self._options
        model, table = self._graphs.folded_and_table()
        aim = Aim(
            options.budget,
            options.method,
            options.remainder,
            cache=self._cache,
            rescue=options.rescue and bool(self._graphs.exported.labels),  # a map of features has no answers
            finetune=self._finetune(model),
            threads=options.threads,
            seed=options.seed,
        )
        return Ladder(model, table, CalibrationImages(*self._graphs.decoded_calibration), aim, self._told)

    @functools.cached_property
    def _cache(self) -> CalibCache | None:
        file = self._options.calib_cache
        return None if file is None else read_calib_cache(file)

    @functools.cached_property
    def _training(self) -> ImageSet | None:
        """What `--finetune` names, but for calibration images, a quarter of which check it; none may judge later."""
        words = self._options.finetune
        if words is None:
            return None
        from edgewright.finetuning import training_images

        images = training_images(words, self._graphs.exported.labels)
        check_disjoint(images, self._graphs.evaluation_images, allow_overlap=self._options.allow_overlap)
        return without(images, self._graphs.calibration_images)

    def _finetune(self, model: Any) -> Finetune | None:
        if self._training is None:
            return None
        from edgewright.finetuning import finetuning

        options = self._options
        return finetuning(model, self._training, self._context.preprocess, seed=options.seed, threads=options.threads)

    def _told(self, done: int, total: int, rung: str) -> None:
        self._context.observer.progressed("quantize", done, total, rung)

    def _quantizer(self, dialect: str) -> Quantizer:
        from edgewright.optimize.dialects import Quantizer

        model, table = self._graphs.folded_and_table()
        return Quantizer(dialect, model, table, method="minmax", remainder=self._options.remainder)


def _placement_notes(dialect: str, left_out: int, layers: int, remainder: str) -> list[str]:
    if not left_out:
        return []
    where = f"{left_out} of {layers} layers stay in {remainder.upper()}, where INT8 does not pay"
    return [f"int8 {dialect}: {where}; plan-{dialect}.json has the reasons"]
