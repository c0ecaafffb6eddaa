"""Whether what `spec.json` says fits together, and fits the files of the bundle."""

from __future__ import annotations

import math

from ..errors import BundleError
from ..specs import EngineInfo
from .manifest import Manifest
from .spec import BundledGraph, BundleSpec

__all__ = ["CPU_BACKEND", "check_engine", "check_spec"]

CPU_BACKEND = "onnxruntime"

PACK_AGAIN = "pack the bundle again"
PRECISIONS = {"tensorrt": ("fp32", "fp16", "int8"), "cpu": ("fp32", "int8")}


def check_spec(spec: BundleSpec, manifest: Manifest) -> None:
    """Raises `BundleError` naming the first thing that does not fit. The types were checked before."""
    _expect(spec.model == manifest.model, f"the model {spec.model!r}, the manifest {manifest.model!r}")
    channels, height, width = _image_shape(spec)
    classes = _classes(spec)
    _expect(len(spec.labels) == classes, f"{len(spec.labels)} labels for {classes} classes")
    _check_golden(spec, manifest, pixels=channels * height * width, classes=classes)
    _expect(bool(spec.graphs), "no graph")
    names = [(graph.dialect, graph.precision) for graph in spec.graphs]
    _expect(len(set(names)) == len(names), "two graphs of one dialect and precision")
    for graph in spec.graphs:
        _check_graph(graph, manifest)


def check_engine(info: EngineInfo, graph: BundledGraph, spec: BundleSpec) -> None:
    """Raises `BundleError` naming what `info` says otherwise than the bundle does of its CPU engine `graph`.

    The backend above all: it decides what loads the file, and an engine of TensorRT, native code, is never carried.
    """
    expected = {
        "backend": CPU_BACKEND,
        "precision": graph.precision,
        "target": None,
        "inputs": (spec.input,),
        "outputs": (spec.output,),
        "preprocess": spec.preprocess,
        "labels": spec.labels,
    }
    for name, value in expected.items():
        if getattr(info, name) != value:
            raise BundleError(f"the description of {graph.path} differs from the bundle in its {name}", PACK_AGAIN)


def _image_shape(spec: BundleSpec) -> tuple[int, int, int]:
    shape, made = spec.input.shape, spec.preprocess.input_shape
    _expect(spec.input.dtype == "float32", f"an input of {spec.input.dtype}, expected float32")
    _expect(
        len(shape) == 4 and shape[0] is None and shape[1:] == made,
        f"an input of shape {list(shape)}, and a preprocessing that makes {made}",
    )
    assert made is not None
    return made


def _classes(spec: BundleSpec) -> int:
    shape = spec.output.shape
    _expect(spec.output.dtype == "float32", f"an output of {spec.output.dtype}, expected float32")
    _expect(len(shape) == 2 and shape[0] is None, f"an output of shape {list(shape)}, expected (None, classes)")
    classes = shape[1]
    _expect(classes is not None and classes >= 2, f"{classes} classes, expected at least 2")
    assert classes is not None
    return classes


def _check_golden(spec: BundleSpec, manifest: Manifest, *, pixels: int, classes: int) -> None:
    golden = spec.golden
    _expect(golden.images >= 1, f"{golden.images} golden inputs")
    for path, size in ((golden.pixels, pixels), (golden.logits, 4 * classes)):
        found, expected = manifest.entry(path).bytes, golden.images * size
        _expect(found == expected, f"{golden.images} golden inputs, for which {path} would have {expected} bytes")


def _check_graph(graph: BundledGraph, manifest: Manifest) -> None:
    name = f"the {graph.dialect} graph in {graph.precision}"
    _expect(graph.precision in PRECISIONS.get(graph.dialect, ()), f"{name}, which nothing here can build")
    _expect(graph.path.endswith(".onnx"), f"{name} in {graph.path}, which is no ONNX file")
    manifest.entry(graph.path)
    if graph.dialect == "cpu":
        manifest.entry(f"{graph.path.removesuffix('.onnx')}.json")
    limits = graph.limits
    _expect(math.isfinite(limits.sqnr_db), f"an SQNR of {limits.sqnr_db} as the limit of {name}")
    _expect(0 <= limits.agreement <= 1, f"an agreement of {limits.agreement} as the limit of {name}")


def _expect(fits: bool, words: str) -> None:
    if not fits:
        raise BundleError(f"spec.json says {words}", PACK_AGAIN)
