"""The types that flow between the stages, plain data without behaviour; JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .preprocess import Preprocess

__all__ = ["EngineInfo", "LayerPrecision", "OnnxArtifact", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph or an engine.

    * shape: `(None, 3, 64, 64)`; None is a dynamic axis
    * dtype: numpy's name, such as "float32"
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TensorSpec:
        """The inverse of `dataclasses.asdict`."""
        return cls(content["name"], tuple(content["shape"]), content["dtype"])


@dataclass(frozen=True)
class OnnxArtifact:
    """An ONNX file of the build folder and what it stands for.

    * path: relative to the build folder
    * sha256: of the file's content
    """

    path: str
    sha256: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: Preprocess
    labels: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> OnnxArtifact:
        """The inverse of `to_json`."""
        return cls(
            path=content["path"],
            sha256=content["sha256"],
            opset=content["opset"],
            inputs=tuple(TensorSpec.from_json(spec) for spec in content["inputs"]),
            outputs=tuple(TensorSpec.from_json(spec) for spec in content["outputs"]),
            preprocess=Preprocess.from_json(content["preprocess"]),
            labels=tuple(content["labels"]),
        )


@dataclass(frozen=True)
class LayerPrecision:
    """What one compute layer (convolution, matrix product) of a built engine really runs in, read back from it."""

    name: str
    operator: str
    precision: str


@dataclass(frozen=True)
class EngineInfo:
    """What stands in the JSON file beside an engine.

    * precision: the one asked for ("fp32", "fp16", "bf16", "int8")
    * layers: what was really built, per compute layer
    * target: the GPU architecture ("sm86") or None on a CPU
    * onnx_sha256: of the graph it was built from; engine_sha256: of the engine file
    * versions: the libraries it was built with
    """

    backend: str
    precision: str
    target: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: Preprocess
    labels: tuple[str, ...]
    onnx_sha256: str
    engine_sha256: str
    bytes: int
    layers: tuple[LayerPrecision, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def actual_precision(self) -> dict[str, int]:
        """Number of compute layers per precision, such as `{"int8": 49, "fp32": 33}`."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.precision] = counts.get(layer.precision, 0) + 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return {"schema": "edgewright.engine-info/1", **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EngineInfo:
        """The inverse of `to_json`."""
        return cls(
            backend=content["backend"],
            precision=content["precision"],
            target=content["target"],
            inputs=tuple(TensorSpec.from_json(spec) for spec in content["inputs"]),
            outputs=tuple(TensorSpec.from_json(spec) for spec in content["outputs"]),
            preprocess=Preprocess.from_json(content["preprocess"]),
            labels=tuple(content["labels"]),
            onnx_sha256=content["onnx_sha256"],
            engine_sha256=content["engine_sha256"],
            bytes=content["bytes"],
            layers=tuple(LayerPrecision(**layer) for layer in content["layers"]),
            versions=dict(content["versions"]),
        )
