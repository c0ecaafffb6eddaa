"""What others make of the same graph and the same images: NNCF, NVIDIA's ModelOpt, onnxruntime's quantizer.

Each works in a process of its own, since ModelOpt changes onnxruntime's quantizer for everybody in its process, and in
an environment of its own if there is one: `make peers-env`, or $EDGEWRIGHT_PEERS, the Python interpreter to use. This
file imports nothing of Edgewright, so that such an environment needs to hold nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACCURATE", "ON_CPU", "ON_TENSORRT", "PEERS", "PeerResult", "openvino_request", "peer_result"]

Batch = NDArray[np.float32]

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
INPUT = "images"
NOT_INSTALLED = 3


@dataclass(frozen=True)
class PeerResult:
    """Seconds of quantizing, `graph`, the ONNX or OpenVINO file that came out, and its logits `[N, classes]`."""

    seconds: float
    graph: Path
    logits: Batch | None


def peer_result(
    name: str, graph: bytes, calibration: Batch, folder: Path, judged: Batch | None = None
) -> PeerResult | None:
    """What `name`, one of `PEERS`, makes of an FP32 `graph`, with the logits of the `judged` images if there are any.

    None where it is not installed. All files go into `folder`. Raises `RuntimeError` with its last words if it fails.
    """
    (folder / "source.onnx").write_bytes(graph)
    np.save(folder / "calibration.npy", calibration)
    if judged is not None:
        np.save(folder / "judged.npy", judged)
    command = [_python(), str(Path(__file__).resolve()), name, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == NOT_INSTALLED:
        print(f"  {name} is not installed: not compared")
        return None
    if run.returncode:
        raise RuntimeError(f"{name} failed: {run.stderr[-600:]}")
    facts = json.loads((folder / "facts.json").read_text())
    logits = None if judged is None else np.load(folder / "logits.npy")
    return PeerResult(facts["seconds"], folder / facts["graph"], logits)


def _python() -> str:
    own = ROOT / ".venv-peers" / "bin" / "python"
    return os.environ.get("EDGEWRIGHT_PEERS") or (str(own) if own.exists() else sys.executable)


def _by_nncf(preset: str) -> Callable[[Path, Batch, Path], Path]:
    def quantizer(source: Path, images: Batch, folder: Path) -> Path:
        import nncf
        import openvino

        dataset = nncf.Dataset(images, lambda image: image[None])
        quantized = nncf.quantize(
            openvino.convert_model(source), dataset, subset_size=len(images), preset=nncf.QuantizationPreset[preset]
        )
        openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
        return folder / "nncf.xml"

    return quantizer


def _by_modelopt(**setting: Any) -> Callable[[Path, Batch, Path], Path]:
    def quantizer(source: Path, images: Batch, folder: Path) -> Path:
        from modelopt.onnx.quantization import quantize

        target = folder / "modelopt.onnx"
        quantize(
            str(source),
            calibration_data={INPUT: images},
            output_path=str(target),
            calibration_method="entropy",
            **setting,
        )
        return target

    return quantizer


def _by_onnxruntime(
    method: str, *, activations: str = "QUInt8", **extra_options: bool
) -> Callable[[Path, Batch, Path], Path]:
    def quantizer(source: Path, images: Batch, folder: Path) -> Path:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._parts = (images[start : start + 2 * BATCH] for start in range(0, len(images), 2 * BATCH))

            def get_next(self) -> dict[str, Batch] | None:
                part = next(self._parts, None)
                return None if part is None else {INPUT: part}

        target = folder / "onnxruntime.onnx"
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            extra_options=extra_options,
        )
        return target

    return quantizer


NNCF, MODELOPT, ONNXRUNTIME = "nncf", "modelopt.onnx.quantization", "onnxruntime.quantization"
PEERS: dict[str, tuple[str, Callable[[Path, Batch, Path], Path]]] = {
    "NNCF": (NNCF, _by_nncf("PERFORMANCE")),  # its default
    "NNCF mixed": (NNCF, _by_nncf("MIXED")),  # asymmetric activations: what it advises behind other than ReLU
    "ModelOpt": (MODELOPT, _by_modelopt(high_precision_dtype="fp32")),  # onnxruntime runs no FP16 on a CPU
    "ModelOpt for TensorRT": (MODELOPT, _by_modelopt()),
    "onnxruntime min-max": (ONNXRUNTIME, _by_onnxruntime("MinMax")),
    "onnxruntime entropy": (ONNXRUNTIME, _by_onnxruntime("Entropy")),
    "onnxruntime percentile": (ONNXRUNTIME, _by_onnxruntime("Percentile")),
    "onnxruntime S8 min-max": (ONNXRUNTIME, _by_onnxruntime("MinMax", activations="QInt8", ActivationSymmetric=True)),
    "onnxruntime for TensorRT": (
        ONNXRUNTIME,  # TensorRT refuses an int32 bias
        _by_onnxruntime("MinMax", activations="QInt8", ActivationSymmetric=True, QuantizeBias=False),
    ),
}
"""By name: the module that has to be there, and what writes the quantized graph."""
ACCURATE = ("NNCF", "NNCF mixed", "ModelOpt", "onnxruntime min-max", "onnxruntime percentile")
ON_CPU = ("NNCF", "NNCF mixed", "onnxruntime min-max")
ON_TENSORRT = ("ModelOpt for TensorRT", "onnxruntime for TensorRT")


def openvino_request(graph: Path, batch: int, threads: int, rest: str = "f32") -> Any:
    """What runs a quantized graph at one batch size; `rest`: what its other layers run in."""
    import openvino

    read = openvino.Core().read_model(graph)
    read.reshape([batch, *read.inputs[0].get_partial_shape()[1:]])
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": rest}
    return openvino.Core().compile_model(read, "CPU", settings).create_infer_request()


def _logits(graph: Path, images: Batch) -> Batch:
    if graph.suffix == ".xml":
        import openvino

        compiled = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        parts = [compiled(images[start : start + BATCH])[0] for start in range(0, len(images), BATCH)]
        return np.concatenate([part.copy() for part in parts])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {INPUT: images[start : start + BATCH]})[0] for start in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def main(name: str, folder: Path) -> int:
    """In the peer's own process; `NOT_INSTALLED` if it is not."""
    import importlib

    module, quantizer = PEERS[name]
    try:
        importlib.import_module(module)  # loading a library is not part of the work
    except ImportError:
        return NOT_INSTALLED
    images = np.load(folder / "calibration.npy")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        os.chdir(scratch)  # some of them leave files behind
        graph = quantizer(folder / "source.onnx", images, folder)
        os.chdir(folder)
    seconds = time.perf_counter() - began
    if (folder / "judged.npy").exists():
        np.save(folder / "logits.npy", _logits(graph, np.load(folder / "judged.npy")).astype(np.float32))
    (folder / "facts.json").write_text(json.dumps({"seconds": seconds, "graph": graph.name}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve()))
