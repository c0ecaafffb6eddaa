"""A build folder made by hand, with engines for onnxruntime, and what they answer."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgewright.runtime import EngineInfo, Preprocess
from edgewright.runtime.choice import REPORT_FILE
from edgewright.runtime.engine_files import ENGINES_FOLDER
from edgewright.runtime.files import sha256_of, write_json
from edgewright.runtime.specs import LayerPrecision, TensorSpec

__all__ = [
    "INPUT",
    "LABELS",
    "OUTPUT",
    "PREPROCESS",
    "engine",
    "expected_logits",
    "normal",
    "photograph",
    "put_engine",
    "put_report",
]

Array = NDArray[Any]

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox")
PREPROCESS = Preprocess((10, 8), (8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
INPUT = TensorSpec("image", (None, 3, 8, 8), "float32")
OUTPUT = TensorSpec("logits", (None, 6), "float32")


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def engine(weights: str = "w") -> bytes:
    """A graph: logits = image @ `normal(weights, 192, 6) / 10`."""
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 19]> agraph (float[N, 3, 8, 8] image) => (float[N, 6] logits)
        { f = Flatten (image) logits = Gemm (f, w) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(weights, 192, 6) / 10, "w"))
    content: bytes = proto.SerializeToString()
    return content


def put_engine(
    folder: Path,
    precision: str = "fp32",
    backend: str = "onnxruntime",
    content: bytes | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Writes an engine and its description into a build folder; the path of the engine."""
    content = engine(precision) if content is None else content
    path = folder / ENGINES_FOLDER / f"{backend}-{precision}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    info = EngineInfo(
        backend=backend,
        precision=precision,
        target=None,
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        preprocess=PREPROCESS,
        labels=LABELS,
        onnx_sha256=sha256_of(content),
        engine_sha256=sha256_of(content),
        bytes=len(content),
        layers=(LayerPrecision("head", "Gemm", precision, precision, 1152, "head"),),
        versions=versions or {},
    )
    write_json(path.with_suffix(".json"), info.to_json())
    return path


def put_report(folder: Path, precision: str | None) -> None:
    """A report that recommends the engine of that precision, or none."""
    recommended = {
        "backend": "onnxruntime", "precision": precision, "path": f"{ENGINES_FOLDER}/onnxruntime-{precision}.onnx"
    }  # fmt: skip
    write_json(folder / REPORT_FILE, {"recommended": recommended if precision else None})


def photograph(seed: int = 0, size: tuple[int, int] = (9, 12)) -> NDArray[np.uint8]:
    """Noise, uint8 `[H, W, 3]`."""
    return np.random.default_rng([5, seed]).integers(0, 256, (*size, 3), np.uint8)


def expected_logits(weights: str, batch: Array) -> Array:
    """Float64 `[N, 6]`, by numpy."""
    return np.asarray(batch.reshape(len(batch), -1).astype(np.float64) @ (normal(weights, 192, 6) / 10), np.float64)
