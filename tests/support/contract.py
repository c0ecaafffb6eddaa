"""The JSON documents of docs/contract.md, written down a second time, and what a document has that differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["AUDIT_DOCUMENT", "BENCH_DOCUMENT", "ENGINE_DOCUMENT", "ERROR_DOCUMENT", "STAGE", "ByName", "differences"]

NUMBER, COUNTS = "number", "counts by name"


@dataclass(frozen=True)
class ByName:
    """An object with any names, whose values have one shape."""

    shape: Any


LATENCY = {"batch": int, "threads": int, "runs": int, "p50": NUMBER, "p90": NUMBER, "p99": NUMBER}
PARITY = {
    "source": ("engine", "simulation"),
    "images": int,
    "top1": (NUMBER, None),  # None without labels
    "top5": (NUMBER, None),
    "agreement": NUMBER,
    "delta": (NUMBER, None),
    "loss_ci95": [NUMBER],
    "max_abs": (NUMBER, None),  # None where no answer of the engine is finite
    "cosine": (NUMBER, None),
    "sqnr_db": (NUMBER, None),
}
STATUSES = ("verified", "over_budget", "undecided", "built_not_run", "simulated", "skipped", "failed")
ENGINE = {
    "backend": ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"),
    "precision": {"requested": ("fp32", "fp16", "bf16", "int8"), "actual": COUNTS},
    "target": (str, None),
    "path": (str, None),
    "bytes": (int, None),
    "status": STATUSES,
    "reason_code": str,
    "reason": str,
    "parity": (None, PARITY),
    "latency_ms": (None, LATENCY),
}
STAGE = {"name": str, "seconds": NUMBER, "cached": bool, "key": str, "changed": [str], "bytes": int}
ENGINE_DOCUMENT = {
    "schema": ("edgewright.engine/1",),
    "model": str,
    "verdict": ("pass", "fail", "inconclusive"),
    "recommended": (None, {"backend": str, "precision": str, "path": str}),
    "stages": [STAGE],
    "reference": {"top1": (NUMBER, None), "top5": (NUMBER, None), "images": int, "labelled": bool, "source": str},
    "engines": [ENGINE],
}
ERROR_DOCUMENT = {"schema": ("edgewright.error/1",), "error": str, "message": str, "remedy": str}

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
TRAFFIC = {"bytes_read": (int, None), "bytes_written": (int, None)}
AUDIT = {"share_planned": NUMBER, "share_actual": NUMBER, "kernels": int, **TRAFFIC}
GATE = {
    "gate": ("max_drop", "min_ratio", "min_agreement", "min_sqnr"),
    "limit": NUMBER,
    "value": (NUMBER, None),
    "ci95": ([(NUMBER, None)], None),
    "verdict": ("pass", "fail", "inconclusive"),
    "claim": str,
    "images_needed": (int, None),
}
FIGURES = {
    "worst_class": (
        None,
        {"index": int, "label": str, "images": int, "reference_right": int, "right": int, "loss_ci95": [NUMBER]},
    ),
    "calibration_error": (None, {"reference": NUMBER, "engine": (NUMBER, None)}),
    "crossings": [{"threshold": NUMBER, "rose": NUMBER, "fell": NUMBER}],
    "confusion_changes": [
        {"true": int, "true_label": str, "predicted": int, "predicted_label": str, "reference": int, "engine": int}
    ],
}
MORE: dict[str, dict[str, Any]] = {  # what we add to the contract, which allows it within a schema number
    "engine/1": {
        "weights": str,
        "notes": [str],
        "targets": ByName({"backend": str, "precision": PRECISIONS, "path": str, "reason": str}),
    },
    "engines[]": {"audit": (None, AUDIT), "gates": [GATE], "figures": (None, FIGURES), "sha256": (str, None)},
    "engines[].parity": {
        "labelled": bool,
        "reference_top1": (NUMBER, None),
        "reference_top5": (NUMBER, None),
        "agreement_ci95": [NUMBER],
        "pairs": (COUNTS, None),
        "mcnemar_p": (NUMBER, None),
        "nonfinite": int,
        "chance": (NUMBER, None),
    },
    "engines[].latency_ms": {"cv": NUMBER, "p50_ci95": [NUMBER], "quantiles": [NUMBER]},
}
EXPLAINING = ("calibration", "layers", "breakdown", "changed", "provenance")
"""Fields of an engine document that not every one has; `schemas/engine-1.schema.json` says what is in them."""
KERNEL = {
    "name": str, "kind": str, "sources": [str], "precision": str, "computes": bool, **TRAFFIC
}  # fmt: skip
LAYER = {
    "name": str, "operator": str, "requested": PRECISIONS, "actual": str, "macs": int, "kernel": str
}  # fmt: skip
AUDIT_DOCUMENT = {
    "schema": ("edgewright.audit/1",),
    "engine": str,
    "backend": str,
    "precision": {"requested": PRECISIONS, "actual": COUNTS},
    "target": (str, None),
    **AUDIT,
    "kernels": [KERNEL],
    "layers": [LAYER],
    "versions": ByName(str),
}
BENCH_CLOCKS = {
    "governor": (str, None),
    "cpu_mhz": (NUMBER, None),
    "cpu_max_mhz": (NUMBER, None),
    "turbo": (bool, None),
    "load": (NUMBER, None),
    "power_mode": (str, None),
    "gpu_mhz": (NUMBER, None),
    "gpu_range_mhz": (None, [NUMBER]),
    "unread": ByName(str),
}
BENCH_LATENCY = {
    **LATENCY, "min": NUMBER, "max": NUMBER, "mean": NUMBER, "p95": NUMBER, "cv": NUMBER, "p50_low": NUMBER,
    "p50_high": NUMBER,
}  # fmt: skip
BENCH_RESULT = {
    "path": str,
    "backend": str,
    "version": str,
    "precision": (*PRECISIONS, None),
    "sha256": str,
    "bytes": int,
    "input": [int],
    "why": str,
    "latency_ms": BENCH_LATENCY,
    "throughput": {"qps": NUMBER, "images_per_second": NUMBER},
    "stable": bool,
    "preprocessing": (None, {"image": [int], "p50_ms": NUMBER}),
}
BENCHED = {
    "path": str, "backend": str, "precision": (*PRECISIONS, None), "batch": int, "threads": int, "p50": NUMBER
}  # fmt: skip
BENCH_DOCUMENT = {
    "schema": ("edgewright.bench/1",),
    "machine": {"processor": str, "cores": int, "system": str, "board": str, "gpu": str},
    "clocks": {"before": BENCH_CLOCKS, "after": BENCH_CLOCKS},
    "seconds": NUMBER,
    "results": [BENCH_RESULT],
    "comparisons": [
        {
            "engine": BENCHED,
            "baseline": BENCHED,
            "ratio": NUMBER,
            "interval": [NUMBER],
            "confidence": NUMBER,
            "paired": bool,
            "rounds": (int, None),
            "unlike": [str],
        }
    ],
    "notes": [str],
}


def differences(document: Any, shape: Any, place: str = "") -> Iterator[str]:
    """Where `document` is not what the contract says: fields that miss or are unknown, and values of another kind."""
    if isinstance(shape, dict):
        if not isinstance(document, dict):
            yield f"{place} is {document!r}, not an object"
            return
        whole = shape | MORE.get("engine/1" if shape is ENGINE_DOCUMENT else place, {})
        yield from (f"{place}.{name} is missing" for name in sorted(whole.keys() - document.keys()))
        known = whole.keys() | (EXPLAINING if shape is ENGINE_DOCUMENT else ())
        yield from (f"{place}.{name} is unknown" for name in sorted(document.keys() - known))
        for name in whole.keys() & document.keys():
            yield from differences(document[name], whole[name], f"{place}.{name}".lstrip("."))
    elif isinstance(shape, ByName):
        if not isinstance(document, dict):
            yield f"{place} is {document!r}, not an object"
            return
        for name, item in document.items():
            yield from differences(item, shape.shape, f"{place}.{name}")
    elif isinstance(shape, list):
        if not isinstance(document, list):
            yield f"{place} is {document!r}, not a list"
            return
        for item in document:
            yield from differences(item, shape[0], f"{place}[]")
    elif isinstance(shape, tuple):
        found = [list(differences(document, each, place)) for each in shape]
        if all(found):
            yield from next((each for each in found if each[0].startswith(f"{place}.")), found[0])
    elif shape == NUMBER:
        if isinstance(document, bool) or not isinstance(document, int | float):
            yield f"{place} is {document!r}, not a number"
    elif shape == COUNTS:
        if not isinstance(document, dict) or not all(type(count) is int for count in document.values()):
            yield f"{place} is {document!r}, not counts by name"
    elif isinstance(shape, type):
        if type(document) is not shape:
            yield f"{place} is {document!r}, not {shape.__name__}"
    elif document != shape:
        yield f"{place} is {document!r}, not {shape!r}"
