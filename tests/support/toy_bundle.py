"""A small bundle: a network of three layers with known logits, its graphs for TensorRT, and its engine for the CPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from numpy.typing import NDArray

from edgewright.runtime.bundle import BundledGraph, BundleSpec, GoldenSpec, Limits, write_bundle
from edgewright.runtime.files import sha256_of
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.specs import BatchProfile, EngineInfo, LayerPrecision, PlannedLayer, TensorSpec

__all__ = ["CPU_ENGINE", "LABELS", "PREPROCESS", "spec", "toy_bundle", "toy_files"]

LABELS = ("ant", "bee", "cat", "dog")
IMAGES, SIDE, HIDDEN = 64, 8, 16
PREPROCESS = Preprocess((SIDE, SIDE), None, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
INPUT = TensorSpec("x", (None, 3, SIDE, SIDE), "float32")
OUTPUT = TensorSpec("y", (None, len(LABELS)), "float32")
PROFILE = BatchProfile(1, 4, 8)
CPU_ENGINE = "engines/onnxruntime-fp32.onnx"

MEAN_LOGITS = np.asarray([0.9, 3.0, 5.8, -3.7], np.float32)  # taken off, so that each class is predicted

BODY = "[conv] c = Conv ({x}, {w}, b)  [relu] r = Relu (c)  [pool] p = ReduceMean <keepdims = 0> (r, axes)"
FLOAT = f"{BODY.format(x='x', w='w')}  [head] y = Gemm (p, u, d)"
HALF = f"""
[in] h = Cast <to = 10> (x)
{BODY.format(x="h", w="w")}  [head] g = Gemm (p, u, d)  [out] y = Cast <to = 1> (g)
"""
INT8 = f"""
[in] h = Cast <to = 10> (x)
[q] hq = QuantizeLinear (h, s, z)  [dq] hd = DequantizeLinear (hq, s, z)
[wdq] wd = DequantizeLinear <axis = 0> (w, ws, wz)
{BODY.format(x="hd", w="wd")}  [head] g = Gemm (p, u, d)  [out] y = Cast <to = 1> (g)
"""
WORK = {"conv": ("Conv", SIDE * SIDE * HIDDEN * 3), "head": ("Gemm", HIDDEN * len(LABELS))}


def toy_bundle(
    folder: Path,
    *,
    files: Mapping[str, bytes | None] | None = None,
    spec_changes: Mapping[str, Any] | None = None,
    version: int = 1,
    model: str = "toy",
    tools: Mapping[str, str] | None = None,
    signing_key: Path | None = None,
) -> Path:
    """Writes a valid bundle into `folder` (which must not exist) and returns it.

    `files` replaces files by their paths, or leaves them out where it says None; `spec_changes` replaces fields of
    `spec.json`, which for these need not be valid.
    """
    content = dict(toy_files(model))
    if spec_changes:
        document = json.loads(content["spec.json"])
        content["spec.json"] = json.dumps({**document, **spec_changes}).encode()
    for path, change in (files or {}).items():
        content.pop(path, None)
        if change is not None:
            content[path] = change
    with mock.patch("os.fsync"):  # which takes longer than all the rest
        write_bundle(
            folder, content, version=version, model=model, tools=tools or {"edgewright": "0"}, signing_key=signing_key
        )
    return folder


@functools.cache
def toy_files(model: str = "toy") -> Mapping[str, bytes]:
    """The files of the bundle, contents by path."""
    graphs = {f"graphs/{precision}.onnx": _graph(precision) for precision in ("fp32", "fp16", "int8")}
    engine = graphs["graphs/fp32.onnx"]
    pixels = _pixels()
    return {
        **graphs,
        CPU_ENGINE: engine,
        CPU_ENGINE.replace(".onnx", ".json"): json.dumps(_engine_info(engine).to_json()).encode(),
        "calibration.json": b"{}\n",
        "parity.json": b"{}\n",
        "golden/pixels.u8": pixels.tobytes(),
        "golden/logits.f32": _logits(PREPROCESS.normalize(pixels)).astype("<f4").tobytes(),
        "spec.json": json.dumps(spec(model).to_json()).encode(),
    }


def spec(model: str = "toy") -> BundleSpec:
    """What `spec.json` says."""
    limits = {"fp32": Limits(54.0, 62 / 64), "fp16": Limits(40.0, 62 / 64), "int8": Limits(15.0, 50 / 64)}
    graphs = [
        BundledGraph("tensorrt", precision, f"graphs/{precision}.onnx", _planned(precision), limits[precision])
        for precision in ("fp32", "fp16", "int8")
    ]
    cpu = BundledGraph("cpu", "fp32", CPU_ENGINE, _planned("fp32"), limits["fp32"])
    return BundleSpec(
        model=model,
        weights="0" * 64,
        input=INPUT,
        output=OUTPUT,
        preprocess=PREPROCESS,
        resized=PREPROCESS.fingerprint(),
        labels=LABELS,
        profile=PROFILE,
        graphs=(*graphs, cpu),
        golden=GoldenSpec(IMAGES, "golden/pixels.u8", "golden/logits.f32"),
    )


def _pixels() -> NDArray[np.uint8]:
    """Images of different colours, so that each class is predicted for some. Shape `[IMAGES, SIDE, SIDE, 3]`."""
    rng = np.random.default_rng(5)
    colours = rng.integers(0, 256, (IMAGES, 1, 1, 3))
    noise = rng.integers(-40, 41, (IMAGES, SIDE, SIDE, 3))
    return (colours + noise).clip(0, 255).astype(np.uint8)


def _logits(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """The forward pass in numpy: 1 × 1 convolution, ReLU, mean over the pixels, matrix product. Shape `[N, 4]`."""
    w, b, u, d = (array.astype(np.float64) for array in _weights())
    maps = np.einsum("nchw,oc->nohw", images.astype(np.float64), w[:, :, 0, 0]) + b[:, None, None]
    logits: NDArray[np.float64] = np.maximum(maps, 0).mean(axis=(2, 3)) @ u + d
    return logits


@functools.cache
def _weights() -> tuple[NDArray[np.float32], ...]:
    """Convolution `[HIDDEN, 3, 1, 1]` and its bias, matrix `[HIDDEN, 4]` and its bias."""
    rng = np.random.default_rng(3)
    shapes = ((HIDDEN, 3, 1, 1), (HIDDEN,), (HIDDEN, len(LABELS)), (len(LABELS),))
    w, b, u, d = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return w, b, u, d - MEAN_LOGITS


def _graph(precision: str) -> bytes:
    arrays: dict[str, NDArray[Any]] = dict(zip("wbud", _weights(), strict=True))
    if precision != "fp32":
        arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    if precision == "int8":
        scales = np.abs(arrays["w"]).max(axis=(1, 2, 3)) / np.float16(127)
        arrays["w"] = np.rint(arrays["w"] / scales[:, None, None, None]).clip(-127, 127).astype(np.int8)
        arrays |= {"ws": scales, "wz": np.zeros(HIDDEN, np.int8)}
        arrays |= {"s": np.asarray(1 / 32, np.float16), "z": np.asarray(0, np.int8)}
    arrays["axes"] = np.asarray([2, 3], np.int64)
    body = {"fp32": FLOAT, "fp16": HALF, "int8": INT8}[precision]
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 19]> toy '
        f"(float[N, 3, {SIDE}, {SIDE}] x) => (float[N, {len(LABELS)}] y) {{ {body} }}"
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def _planned(precision: str) -> tuple[PlannedLayer, ...]:
    """In INT8 the convolution alone."""
    rest = "fp16" if precision == "int8" else precision
    aliases = {"conv": ("c", "relu", "r"), "head": ("y" if precision == "fp32" else "g",)}
    return tuple(
        PlannedLayer(name, operator, precision if name == "conv" else rest, macs, aliases[name])
        for name, (operator, macs) in WORK.items()
    )


def _engine_info(engine: bytes) -> EngineInfo:
    layers = tuple(LayerPrecision(name, kind, "fp32", "fp32", macs, name) for name, (kind, macs) in WORK.items())
    return EngineInfo(
        backend="onnxruntime",
        precision="fp32",
        target=None,
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        preprocess=PREPROCESS,
        labels=LABELS,
        onnx_sha256=sha256_of(engine),
        engine_sha256=sha256_of(engine),
        bytes=len(engine),
        layers=layers,
        versions={"onnxruntime": "0"},
    )
