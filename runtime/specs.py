"""The types that flow between the stages, plain data without behaviour; JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import BuildError
from .preprocess import Preprocess

__all__ = ["BatchProfile", "EngineInfo", "Kernel", "LayerPrecision", "OnnxArtifact", "PlannedLayer", "TensorSpec"]


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
    * labels: one for each class; empty if the output is no vector of logits but a map of features
    """

    path: str
    sha256: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
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
            labels=tuple(content["labels"]),
        )


@dataclass(frozen=True)
class PlannedLayer:
    """A convolution or matrix product of the graph: what it is to run in, and how much work it is.

    * name: of the node; operator: its ONNX operator
    * precision: "fp32", "fp16", "bf16" or "int8"
    * macs: multiply-accumulates for one image
    * aliases: other names that a backend may give it: of its output tensor, and of the activation that is fused into it
    """

    name: str
    operator: str
    precision: str
    macs: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """What an engine launches once per run, read back from it.

    * name, kind: in the backend's own words, such as "correlation" or "QLinearConv"
    * sources: the nodes of the graph that were fused into it, as far as the backend says
    * precision: of the data that it computes with
    * bytes_read: activations and weights, at batch 1; bytes_written: activations; None where the backend does not say
    * computes: it runs the convolution or matrix product among its sources; False where the backend does not say
    """

    name: str
    kind: str
    sources: tuple[str, ...]
    precision: str
    bytes_read: int | None = None
    bytes_written: int | None = None
    computes: bool = False

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Kernel:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**content, "sources": tuple(content["sources"])})


@dataclass(frozen=True)
class LayerPrecision:
    """One planned layer beside what was built for it.

    * requested, actual: precisions; actual is "missing" if no kernel says that it runs this layer
    * macs: multiply-accumulates for one image
    * kernel: the name of the kernel that runs it, "" if there is none
    """

    name: str
    operator: str
    requested: str
    actual: str
    macs: int
    kernel: str


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes that an engine with a dynamic batch is built for; it is tuned for `optimum`."""

    minimum: int = 1
    optimum: int = 8
    maximum: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise BuildError(
                f"the batch sizes {self.minimum}, {self.optimum}, {self.maximum} are not in order",
                "give 1 ≤ minimum ≤ optimum ≤ maximum",
            )


@dataclass(frozen=True)
class EngineInfo:
    """What stands in the JSON file beside an engine.

    * precision: the one asked for ("fp32", "fp16", "bf16", "int8")
    * target: the GPU architecture ("sm86") or None on a CPU
    * layers: what was really built, per planned convolution and matrix product
    * kernels: everything that the engine launches
    * profile: the batch sizes it was built for, None for any
    * dla: the DLA core that it was built for, None for none
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
    kernels: tuple[Kernel, ...] = ()
    profile: BatchProfile | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    dla: int | None = None

    @property
    def actual_precision(self) -> dict[str, int]:
        """Number of compute layers per precision, such as `{"int8": 49, "fp32": 33}`."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.actual] = counts.get(layer.actual, 0) + 1
        return counts

    @property
    def listed_batch(self) -> int:
        """The batch that the bytes of the kernels are for: 1, but for an engine that takes one batch size alone."""
        fixed = self.profile is not None and self.profile.minimum == self.profile.maximum
        return self.profile.minimum if fixed and self.profile is not None else 1

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return {"schema": "edgewright.engine-info/2", **asdict(self)}

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
            kernels=tuple(Kernel.from_json(kernel) for kernel in content["kernels"]),
            profile=None if content["profile"] is None else BatchProfile(**content["profile"]),
            versions=dict(content["versions"]),
            dla=content.get("dla"),  # engines of before have none
        )
