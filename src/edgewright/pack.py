"""The bundle of a proven model: graphs for the device, the CPU engine, and the golden inputs that engines answer for.

The same build folder gives the same bytes: nothing in a bundle is a time or a place.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.engines import NOTHING_TO_GAIN, planned_in
from edgewright.export.resolve import folder_name
from edgewright.graphs import CALIBRATION_FILE
from edgewright.outcome import EngineRow, Outcome
from edgewright.pipeline import Pipeline
from edgewright.report import engine_document
from edgewright.runtime.bundle import (
    ARCHIVE_SUFFIX,
    BUNDLE_SUFFIX,
    SPEC_FILE,
    BundledGraph,
    BundleSpec,
    Golden,
    GoldenSpec,
    Limits,
    open_bundle,
    write_archive,
    write_bundle,
)
from edgewright.runtime.bundle.keys import private_key
from edgewright.runtime.bundle.manifest import Manifest
from edgewright.runtime.bundle.opening import checked_spec
from edgewright.runtime.bundle.strict_json import spelled
from edgewright.runtime.bundle.writing import manifest_of, recover
from edgewright.runtime.errors import BuildError, BundleError, CalibrationError, QuantizationError, RollbackError
from edgewright.runtime.files import read_json
from edgewright.runtime.parity import compare
from edgewright.runtime.specs import OnnxArtifact

__all__ = ["LeftOut", "Packed", "golden_indices", "limits_of", "pack"]

DEVICE_PRECISIONS = ("fp32", "fp16", "int8")
GOLDEN_IMAGES = 64
GOLDEN_PIXELS, GOLDEN_LOGITS = "golden/pixels.u8", "golden/logits.f32"
NOISE_MARGIN_DB = 6.0  # 20 log10(2): the error may be twice as large
HIGHEST_SQNR_DB = 60.0
AGREEMENT_MARGIN = 2
TOOLS = (
    "edgewright", "torch", "torchvision", "timm", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "numpy", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """A graph that is not in the bundle, and why."""

    precision: str
    reason: str


@dataclass(frozen=True)
class Packed:
    """A bundle that was written.

    * archive: the same in one file, if that was asked for
    * sha256: of its manifest; signed_by: fingerprint of the key, None if it is not signed
    * bytes: of its files without the manifest
    """

    path: Path
    archive: Path | None
    sha256: str
    version: int
    signed_by: str | None
    bytes: int
    spec: BundleSpec
    left_out: tuple[LeftOut, ...]


def pack(
    pipeline: Pipeline,
    outcome: Outcome,
    *,
    version: int | None = None,
    signing_key: Path | None = None,
    archive: bool = False,
) -> Packed:
    """Writes MODEL.bundle into the build folder, and with `archive` MODEL.edgewright; whatever the verdict is.

    * outcome: of `pipeline.prove()`
    * version: by default that of the bundle which is there, or one more if anything in it differs; 1 if there is none

    Raises `BuildError` if there is no CPU engine or a graph has external data, `RollbackError` if `version` is below
    that of the bundle which is there, `SignatureError` if the key cannot be used.
    """
    name = folder_name(outcome.model)
    folder = pipeline.workspace.path(f"{name}{BUNDLE_SUFFIX}")
    archived = pipeline.workspace.path(f"{name}{ARCHIVE_SUFFIX}")
    files, left_out = _files(pipeline, outcome, name)
    tools = _tools()
    manifest = manifest_of(files, version=1, model=name, tools=tools)
    manifest = replace(manifest, version=_version(folder, manifest, version))
    spec = checked_spec(files[SPEC_FILE], manifest)
    pipeline.workspace.forget(archived.name)  # it holds what the folder held
    sha256 = write_bundle(
        folder, files, version=manifest.version, model=name, tools=tools, signing_key=signing_key, replace=True
    )
    if archive:
        write_archive(folder, archived)
    return Packed(
        path=folder,
        archive=archived if archive else None,
        sha256=sha256,
        version=manifest.version,
        signed_by=None if signing_key is None else private_key(signing_key).fingerprint,
        bytes=sum(map(len, files.values())),
        spec=spec,
        left_out=left_out,
    )


def golden_indices(images: int) -> NDArray[np.int64]:
    """Which of so many images are the golden ones: 64 evenly spaced, or all if there are fewer."""
    count = min(GOLDEN_IMAGES, images)
    return np.arange(count, dtype=np.int64) * images // count


def limits_of(reference: NDArray[Any], logits: NDArray[Any]) -> Limits:
    """What an engine has to reach, given what its graph's numerics give on the same images; both `[N, classes]`.

    The error may be twice as large (6 dB), and two images more may differ: a device rounds and adds in another order.
    Above 60 dB nothing but that order decides, so that more than 54 dB are never asked for. The SQNR is rounded down
    to a tenth. Raises `QuantizationError` if a logit is not finite.
    """
    parity = compare(reference, logits, None)
    if parity.nonfinite or parity.sqnr_db is None:
        raise QuantizationError(f"{parity.nonfinite} of {parity.images} golden inputs give no finite logits")
    sqnr_db = min(parity.sqnr_db, HIGHEST_SQNR_DB) - NOISE_MARGIN_DB
    agreeing = parity.images - parity.disagreeing - AGREEMENT_MARGIN
    return Limits(math.floor(10 * sqnr_db) / 10, max(0, agreeing) / parity.images)


@dataclass(frozen=True)
class _Part:
    """A graph of the bundle with its files, contents by path."""

    graph: BundledGraph
    files: Mapping[str, bytes]


def _files(pipeline: Pipeline, outcome: Outcome, name: str) -> tuple[dict[str, bytes], tuple[LeftOut, ...]]:
    """All files of the bundle, contents by path, and what is left out."""
    golden = _golden(pipeline)
    images = pipeline.context.preprocess.normalize(golden.pixels)
    parts = [_cpu_engine(pipeline, outcome, golden, images)]
    left_out: list[LeftOut] = []
    for precision in DEVICE_PRECISIONS:
        try:
            parts.append(_device_graph(pipeline, precision, golden, images))
        except (CalibrationError, QuantizationError) as error:
            left_out.append(LeftOut(precision, str(error)))
    files = {path: content for part in parts for path, content in part.files.items()}
    files |= {GOLDEN_PIXELS: golden.pixels.tobytes(), GOLDEN_LOGITS: golden.logits.astype("<f4").tobytes()}
    files[SPEC_FILE] = spelled(_spec(pipeline, name, [part.graph for part in parts], len(images)).to_json())
    files["parity.json"] = spelled(_parity(pipeline, outcome, name))
    files["calibration.json"] = spelled(_calibration(pipeline))
    return files, tuple(left_out)


def _golden(pipeline: Pipeline) -> Golden:
    """Evaluation images, which only judge, and the reference's logits on them."""
    images = pipeline.graphs.evaluation_images
    chosen = golden_indices(len(images))
    pixels = np.stack([pipeline.context.preprocess.pixels(image) for image in images.subset(chosen)])
    return Golden(pixels, pipeline.proof.reference[chosen])


def _device_graph(pipeline: Pipeline, precision: str, golden: Golden, images: NDArray[np.float32]) -> _Part:
    """A graph that TensorRT builds from. Raises `QuantizationError` if that would gain nothing or give no logits."""
    artifact = _artifact(pipeline, precision)
    content = _self_contained(pipeline.workspace.path(artifact.path).read_bytes(), artifact.path)
    limits = limits_of(golden.logits, pipeline.proof.simulated_answers(artifact, images))
    path = f"graphs/{precision}.onnx"
    return _Part(BundledGraph("tensorrt", precision, path, planned_in(content, precision), limits), {path: content})


def _artifact(pipeline: Pipeline, precision: str) -> OnnxArtifact:
    if precision == "fp32":
        return pipeline.folded
    if precision == "fp16":
        return pipeline.half
    quantized = pipeline.int8.quantized("tensorrt")
    if not quantized.int8_layers:
        raise QuantizationError(f"{NOTHING_TO_GAIN.reason} ({NOTHING_TO_GAIN.hint})")
    return quantized.artifact


def _cpu_engine(pipeline: Pipeline, outcome: Outcome, golden: Golden, images: NDArray[np.float32]) -> _Part:
    row = _cpu_row(outcome)
    assert row.path is not None
    assert row.info is not None
    content = _self_contained(pipeline.workspace.path(row.path).read_bytes(), row.path)
    limits = limits_of(golden.logits, pipeline.proof.engine_answers(row, images))
    path = f"engines/{row.backend}-{row.precision}.onnx"
    graph = BundledGraph("cpu", row.precision, path, planned_in(content, row.precision), limits)
    return _Part(graph, {path: content, path.replace(".onnx", ".json"): spelled(row.info.to_json())})


def _cpu_row(outcome: Outcome) -> EngineRow:
    """The fastest engine of onnxruntime that passed, or the FP32 one."""
    rows = [row for row in outcome.rows if row.backend == "onnxruntime" and row.info is not None]
    verified = [row for row in rows if row.status == "verified" and row.latency is not None]
    if verified:
        return min(verified, key=lambda row: row.latency.p50 if row.latency is not None else math.inf)
    for row in rows:
        if row.precision == "fp32":
            return row
    raise BuildError(
        f"{outcome.model} has no engine of onnxruntime, and a bundle carries one",
        "pip install 'edgewright[cpu]', and leave out --backend and --precision",
    )


def _spec(pipeline: Pipeline, name: str, graphs: Sequence[BundledGraph], images: int) -> BundleSpec:
    context, folded = pipeline.context, pipeline.folded
    return BundleSpec(
        model=name,
        weights=context.source.fingerprint,
        input=folded.inputs[0],
        output=folded.outputs[0],
        preprocess=context.preprocess,
        resized=context.preprocess.fingerprint(),
        labels=folded.labels,
        profile=context.options.profile,
        graphs=tuple(graphs),
        golden=GoldenSpec(images, GOLDEN_PIXELS, GOLDEN_LOGITS),
    )


def _parity(pipeline: Pipeline, outcome: Outcome, name: str) -> dict[str, Any]:
    """What the run that packed it found: the engine document but for times and places."""
    document = engine_document(outcome)
    return {
        "schema": "edgewright.parity/1",
        "model": name,
        "verdict": outcome.verdict,
        "budget": pipeline.context.options.budget,
        "gates": pipeline.context.options.limits,
        "images": pipeline.graphs.evaluation_images.identity,
        "reference": document["reference"],
        "engines": [{key: row[key] for key in row if key not in ("path", "latency_ms")} for row in document["engines"]],
    }


def _calibration(pipeline: Pipeline) -> dict[str, Any]:
    """What the ranges were measured with, and the hash of what was measured."""
    sha256 = pipeline.calibrated
    table = read_json(pipeline.workspace.path(CALIBRATION_FILE))
    return {
        "schema": "edgewright.calibration-identity/1",
        "sha256": sha256,
        "images": table["samples"],
        "identity": table["identity"],
    }


def _tools() -> dict[str, str]:
    """Installed versions by name."""
    found = {"python": platform.python_version()}
    for distribution in TOOLS:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def _version(folder: Path, manifest: Manifest, asked: int | None) -> int:
    """The version to give to what `manifest` lists, after that of the bundle in `folder`, if there is one."""
    recover(folder)
    if not folder.exists():
        return asked or 1
    try:
        with open_bundle(folder) as bundle:
            previous, content = bundle.version, bundle.documents[0]
    except BundleError as error:
        raise BundleError(
            f"the bundle that is there has no version to go on from: {error.message}",
            f"remove {folder} and give a --bundle-version above its own",
        ) from error
    if asked is None:
        same = replace(manifest, version=previous).serialized() == content
        return previous if same else previous + 1
    if asked < previous:
        raise RollbackError(
            f"--bundle-version {asked} is below {previous}, that of the bundle in {folder}",
            "devices that have it refuse to go back: give a higher one",
        )
    return asked


def _self_contained(content: bytes, name: str) -> bytes:
    """The graph as it is. Raises `BuildError` if it keeps a tensor in a file of its own."""
    import onnx

    from edgewright.export.onnx_files import tensors_of

    for tensor in tensors_of(onnx.load_from_string(content)):
        if onnx.external_data_helper.uses_external_data(tensor):
            raise BuildError(
                f"{name} keeps {tensor.name} in a file of its own, and a bundle's graphs hold all their data",
                "save the model with its data inside",
            )
    return content
