"""Engine documents for the tests of the report: whole ones with known figures, and their small pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import edgewright
from edgewright.gallery import thumbnail
from edgewright.runtime.figures import further_figures
from edgewright.runtime.gates import MaxDrop, judge
from edgewright.runtime.latency import Latency
from edgewright.runtime.parity import compare

__all__ = ["HASH", "IMAGES", "SCHEMA_FILE", "engine", "report_document", "thumbnails"]

IMAGES = 2000
HASH = "ab" * 32
LAYERS = 60
SCHEMA_FILE = Path(edgewright.__file__).parent / "schemas" / "engine-1.schema.json"


def engine(
    backend: str, precision: str, *, lost: int, gained: int = 0, p50: float | None = 2.0, target: str | None = None
) -> dict[str, Any]:
    """A row whose engine loses and gains so many of 2,000 images, of which the reference gets all but 100 right."""
    labels = np.zeros(IMAGES, np.int64)
    reference, answers = np.tile([[2.0, 0.0]], (IMAGES, 1)), np.tile([[1.9, 0.1]], (IMAGES, 1))
    reference[:100], answers[:100] = [0.0, 2.0], [0.1, 1.9]
    answers[100 : 100 + lost] = [0.0, 1.0]
    answers[:gained] = [1.0, 0.0]
    parity = compare(reference, answers, labels, source="simulation" if target else "engine")
    verdict = judge(parity, [MaxDrop(0.02)])
    status = {"pass": "verified", "fail": "over_budget", "inconclusive": "undecided"}[verdict.word]
    samples = np.random.default_rng(lost).gamma(40.0, (p50 or 1.0) / 40.0, 200)
    return {
        "backend": backend,
        "precision": {"requested": precision, "actual": {precision: LAYERS}},
        "target": target,
        "path": f"engines/{backend}-{precision}{'-' + target if target else ''}.onnx",
        "bytes": {"fp32": 16_076_939, "fp16": 8_100_000}.get(precision, 6_258_503),
        "sha256": HASH,
        "status": "simulated" if target else status,
        "reason_code": verdict.word,
        "reason": verdict.sentence,
        "audit": {"share_planned": 0.9, "share_actual": 0.9, "kernels": 9, "bytes_read": 1, "bytes_written": 1},
        "parity": parity.to_json(),
        "gates": [finding.to_json() for finding in verdict.findings],
        "figures": further_figures(reference, answers, labels, ("coat", "shirt")).to_json(),
        "latency_ms": None if target or p50 is None else Latency.of(samples, batch=1, threads=2).to_json(),
    }


def report_document(model: str = "a_network", label: str = "coat", **changes: Any) -> dict[str, Any]:
    """A document with everything in it: engines that ran, are simulated and were skipped, layers, stages, changes."""
    engines = [
        engine("onnxruntime", "fp32", lost=0, p50=2.4),
        engine("onnxruntime", "int8", lost=9, gained=4, p50=1.6),
        engine("openvino", "bf16", lost=2, p50=1.5),
        engine("openvino", "int8", lost=12, gained=5, p50=1.2),
        engine("tensorrt-rtx", "int8", lost=6, target="sm86"),
    ]
    missing: dict[str, Any] = {
        "path": None,
        "bytes": None,
        "sha256": None,
        "audit": None,
        "parity": None,
        "latency_ms": None,
    }
    missing |= {"gates": [], "figures": None}
    skipped = {**engines[0], **missing, "backend": "tensorrt", "status": "skipped", "reason_code": "package_missing"}
    skipped |= {"precision": {"requested": "int8", "actual": {}}, "reason": "the package is not installed"}
    document = {
        "schema": "edgewright.engine/1",
        "model": model,
        "weights": "of nobody",
        "verdict": "pass",
        "recommended": {"backend": "openvino", "precision": "int8", "path": "engines/openvino-int8.onnx"},
        "stages": [{"name": "export", "seconds": 6.1, "cached": False, "key": "00ff", "changed": ["weights"]}],
        "reference": {"top1": 0.95, "top5": 0.999, "images": IMAGES, "labelled": True, "source": "PyTorch"},
        "engines": [*engines, skipped],
        "targets": {
            "sm86": {"backend": "tensorrt-rtx", "precision": "int8", "path": engines[4]["path"], "reason": "smaller"}
        },
        "notes": ["2 layers have constant channels"],
        "calibration": {
            **{"name": "images", "identity": HASH, "given": 64, "images": 48, "tensors": 90, "notes": ["few images"]},
            "methods": {"cpu": {"mse": 40, "minmax": 2}},
        },
        "layers": {"cpu": {"images": 48, "note": "", "layers": [_layer(index) for index in range(LAYERS)]}},
        "breakdown": _breakdown(),
        "changed": _changed(label),
        "provenance": {
            **{
                "command": "edgewright engine a_network",
                "made": "2026-11-22T12:00:00+00:00",
                "machine": "a CPU, 2 cores",
            },
            **{"system": "Linux", "python": "3.11", "versions": {"numpy": "2.0"}, "weights": HASH, "graph": HASH},
            "evaluation": {"name": "images", "identity": HASH, "images": IMAGES},
            "options": {"gates": {"max_drop": 0.02}, "budget": 0.02, "threads": 2},
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(document | changes))
    return plain


def thumbnails() -> dict[int, str]:
    """A picture for every changed image but one."""
    rng = np.random.default_rng(3)
    return {index: thumbnail(rng.integers(0, 255, (64, 64, 3), np.uint8)) for index in range(6)}


def _layer(index: int) -> dict[str, Any]:
    integer = index % 3 > 0
    bounds = {"tensor": f"t{index}", "low": -1.5, "high": 2.5, "method": "mse", "minimum": -2.0, "maximum": 3.0}
    return {
        **{"name": f"features.{index}.conv/Conv", "operator": "Conv", "tensor": f"t{index}", "macs": 1000 * index + 1},
        **{"precision": "int8" if integer else "fp32", "reason": "" if integer else "INT8 does not pay"},
        **{"sqnr_db": 20.0 + index % 30, "own_sqnr_db": 25.0 + index % 30 if integer else 300.0, "spread": 4.0},
        "input": {**bounds, "saturation": 0.001} if integer else None,
    }


def _breakdown() -> dict[str, Any]:
    def graph(weights: int) -> list[dict[str, Any]]:
        return [
            {"name": name, "parameters": 10, "macs": 10**6, "bytes_moved": 10**6, "weights": weights * (index + 1)}
            for index, name in enumerate(("stem", "features", "head"))
        ]

    spent = [{"name": name, "kernels": 3, "milliseconds": 0.4} for name in ("stem", "features", "head")]
    timed = {"graph": graph(10**5), "stages": spent, "kinds": spent[:2], "milliseconds": 1.2}
    untimed = {"graph": graph(4 * 10**5), "stages": [], "kinds": [], "milliseconds": None}
    engines = {"engines/openvino-int8.onnx": timed, "engines/onnxruntime-fp32.onnx": untimed}
    return {"runs": 40, "graph": graph(4 * 10**5), "engines": engines}


def _changed(label: str) -> dict[str, Any]:
    effects = ("lost", "gained", "other")
    images = [
        {
            **{"image": index, "name": f"{index:03}.png", "right": {"class": 0, "label": label}},
            "reference": {"class": 0, "label": label, "probability": 0.6},
            "engine": {"class": 1, "label": "shirt", "probability": None if index == 5 else 0.55},
            "effect": effects[index % 3],
        }
        for index in range(7)
    ]
    return {"engine": "engines/openvino-int8.onnx", "total": 17, "lost": 12, "gained": 5, "other": 0, "images": images}
