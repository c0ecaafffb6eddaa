"""What a bundle says about its files: plain data, read from `spec.json` after its hash was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..preprocess import Preprocess
from ..specs import BatchProfile, PlannedLayer, TensorSpec

__all__ = ["BundleSpec", "BundledGraph", "GoldenSpec", "Limits"]


@dataclass(frozen=True)
class Limits:
    """What an engine has to reach on the golden inputs.

    * sqnr_db: the least signal-to-quantization-noise ratio of its logits, as in `Parity`
    * agreement: the least share of images with the reference's top-1, 0…1
    """

    sqnr_db: float
    agreement: float


@dataclass(frozen=True)
class BundledGraph:
    """A graph from which engines are built on the device.

    * dialect: "tensorrt", or "cpu" for the graph of the CPU engine
    * precision: "fp32", "fp16" or "int8"; path: of the ONNX file in the bundle
    * planned: what each convolution and matrix product is to run in; the audit on the device holds the engine to it
    """

    dialect: str
    precision: str
    path: str
    planned: tuple[PlannedLayer, ...]
    limits: Limits


@dataclass(frozen=True)
class GoldenSpec:
    """The golden inputs and the reference's logits on them, both raw and little-endian, in row-major order.

    * pixels: file of uint8 `[images, H, W, C]`, resized and cropped, not normalized
    * logits: file of float32 `[images, classes]`
    """

    images: int
    pixels: str
    logits: str


@dataclass(frozen=True)
class BundleSpec:
    """What the device needs to know about the network.

    * input, output: of all the graphs; input shape `(None, C, H, W)`
    * resized: `Preprocess.fingerprint` where the bundle was packed
    * profile: batch sizes of GPU engines
    * weights: identity of the reference's weights
    """

    model: str
    weights: str
    input: TensorSpec
    output: TensorSpec
    preprocess: Preprocess
    resized: str
    labels: tuple[str, ...]
    profile: BatchProfile
    graphs: tuple[BundledGraph, ...]
    golden: GoldenSpec

    def graph(self, dialect: str, precision: str) -> BundledGraph | None:
        """The graph of that dialect and precision, None if the bundle has none."""
        found = (graph for graph in self.graphs if (graph.dialect, graph.precision) == (dialect, precision))
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return {"schema": "edgewright.bundle-spec/1", **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BundleSpec:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError on anything else."""
        return cls(
            model=content["model"],
            weights=content["weights"],
            input=TensorSpec.from_json(content["input"]),
            output=TensorSpec.from_json(content["output"]),
            preprocess=Preprocess.from_json(content["preprocess"]),
            resized=content["resized"],
            labels=tuple(content["labels"]),
            profile=BatchProfile(**content["profile"]),
            graphs=tuple(_graph(graph) for graph in content["graphs"]),
            golden=GoldenSpec(**content["golden"]),
        )


def _graph(content: Mapping[str, Any]) -> BundledGraph:
    planned = (PlannedLayer(**{**layer, "aliases": tuple(layer["aliases"])}) for layer in content["planned"])
    return BundledGraph(**{**content, "planned": tuple(planned), "limits": Limits(**content["limits"])})
