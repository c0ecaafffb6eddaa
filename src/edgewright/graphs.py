"""The stages that make graphs in floating point, and what INT8 is made of: export → fold → calibrate → cast to FP16.

Each property makes its stage and those before it, or reuses what has not changed. torch and onnx are imported only
where a stage is really made.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewright.calibration.datasets import check_disjoint, image_folder
from edgewright.calibration.division import held_back
from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.image_set import ImageSet
from edgewright.calibration.stream import batches
from edgewright.context import GRAPH_LIBRARIES, RunContext
from edgewright.export.conventions import Infer
from edgewright.export.entries import ModelSource
from edgewright.memory import keep_freed_memory
from edgewright.runtime.errors import DataError, ModelError
from edgewright.runtime.files import read_json, sha256_of, sha256_of_file, write_bytes, write_json
from edgewright.runtime.specs import OnnxArtifact, TensorSpec
from edgewright.workspace import StageRun, library_versions, source_hash

__all__ = ["CALIBRATION_FILE", "NVIDIA_DIALECTS", "Graphs"]

CODE = "graphs.py"
CHECK_SEED = 21
DECODED_BYTES = 1 << 28
"""Of calibration images that are kept decoded while layers and ranges are tried on them."""
MOST_DECODED = 512
DECODED_AT_ONCE = 32
MODEL_FILE, FOLDED_FILE, CALIBRATION_FILE = "model.onnx", "folded.onnx", "calibration.json"
NVIDIA_DIALECTS = ("tensorrt", "rtx")  # `optimize/dialects.py` imports onnx, a run in which nothing changed must not
FOLDING_FILES = ("edits", "fold_batchnorm", "passes", "recognize_batchnorm", "verify")
CALIBRATION_FILES = (
    *("channels", "collect", "division", "glimpse", "image_checks", "nonfinite", "observers", "ranges", "sessions"),
    "stream",
)
PLAN_SCHEMA = "edgewright.plan/1"


class Graphs:
    """The graphs of one run, and the images that they are calibrated with."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._options = context.options
        self._workspace = context.workspace

    @functools.cached_property
    def reference_module(self) -> Any:
        """The PyTorch model."""
        return self._context.source.module()

    def reference(self) -> Infer:
        """The source itself: the PyTorch model, or the ONNX file that a person gave."""
        source = self._context.source
        if source.onnx is not None:
            from edgewright.export.from_onnx import reference_of

            return reference_of(source.onnx, fingerprint=source.fingerprint, quantized=source.quantized)
        from edgewright.export.reference import torch_reference

        keep_freed_memory()
        return torch_reference(self.reference_module)

    @functools.cached_property
    def exported(self) -> OnnxArtifact:
        """The ONNX graph of the source, equal to it, batch normalization visible."""
        source, opset, input_shape = self._context.source, self._options.opset, self._context.input_shape

        def make() -> Mapping[str, Any]:
            content = self._exported_content()
            write_bytes(self._workspace.path(MODEL_FILE), content)
            (image,), (logits,) = _interface(content)
            artifact = OnnxArtifact(
                path=MODEL_FILE,
                sha256=sha256_of(content),
                opset=opset,
                inputs=(image,),
                outputs=(logits,),
                labels=_labels(source, logits),
            )
            return artifact.to_json()

        parts = {
            "model": self._options.model,
            "weights": source.fingerprint,
            "input": str(input_shape),
            "labels": "in the weights" if callable(source.labels) else json.dumps(source.labels),
            "opset": str(opset),
            "export code": source_hash("export", "runtime/preprocess.py"),
            "libraries": library_versions("torch", "torchvision", "timm", *GRAPH_LIBRARIES),
        }
        return OnnxArtifact.from_json(self._stage("export", parts, (MODEL_FILE,), make).facts)

    def _exported_content(self) -> bytes:
        source, opset, input_shape = self._context.source, self._options.opset, self._context.input_shape
        if source.onnx is not None:
            from edgewright.export.from_onnx import import_onnx

            return import_onnx(
                source.onnx, input_shape, opset=opset, fingerprint=source.fingerprint, quantized=source.quantized
            )
        from edgewright.export.to_onnx import export_onnx

        return export_onnx(self.reference_module, input_shape, opset=opset)

    @functools.cached_property
    def folded(self) -> OnnxArtifact:
        """The exported graph with its batch normalization folded into the convolutions; a quantized one as it is."""
        before = self.exported
        if self._context.source.quantized:
            return before

        def make() -> Mapping[str, Any]:
            import onnx_ir as ir

            from edgewright.optimize.fold_batchnorm import fold_batchnorm
            from edgewright.optimize.recognize_batchnorm import recognize_batchnorm
            from edgewright.optimize.verify import check_equivalent

            model = ir.load(self._workspace.path(before.path))
            recognized = recognize_batchnorm(model)
            folded = fold_batchnorm(recognized.model)
            proto = ir.to_proto(folded.model)
            rng = np.random.default_rng(CHECK_SEED)
            images = rng.standard_normal((2, *self._context.input_shape), np.float32)
            difference = check_equivalent(ir.to_proto(model), proto, feeds={before.inputs[0].name: images})
            content = proto.SerializeToString()
            write_bytes(self._workspace.path(FOLDED_FILE), content)
            return {
                "artifact": replace(before, path=FOLDED_FILE, sha256=sha256_of(content)).to_json(),
                "folded": folded.changed,
                "skipped": [vars(skip) for skip in (*recognized.skipped, *folded.skipped)],
                "difference": difference,
            }

        parts = {
            "graph": before.sha256,
            "labels": json.dumps(before.labels),
            "fold code": source_hash(*(f"optimize/{file}.py" for file in FOLDING_FILES)),
            "libraries": library_versions(*GRAPH_LIBRARIES),
        }
        return OnnxArtifact.from_json(self._stage("fold", parts, (FOLDED_FILE,), make).facts["artifact"])

    @functools.cached_property
    def calibrated(self) -> str:
        """SHA-256 of `calibration.json`: a histogram of every activation over the calibration images, labels unseen.

        A quarter of the images is held back, to check what the others chose.
        """
        if self._context.source.quantized:
            raise ModelError(
                f"{self._options.model} came quantized: there is nothing left to calibrate",
                "edgewright engine builds it as it is",
            )
        preprocess, graph, images = self._context.preprocess, self.folded, self.calibration_images
        identity = {
            "graph": graph.sha256,
            "images": images.identity,
            "preprocessing": json.dumps(preprocess.to_json()),
            "calibration code": source_hash(
                *(f"calibration/{file}.py" for file in CALIBRATION_FILES),
                *(f"optimize/{file}.py" for file in ("calibration_warnings", "dead_channels", "expected_images")),
                "runtime/preprocess.py",
            ),
            "libraries": library_versions("onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow"),
        }

        def make() -> Mapping[str, Any]:
            import onnx_ir as ir

            from edgewright.calibration.collect import batch_size, collect
            from edgewright.calibration.glimpse import Glimpse
            from edgewright.optimize.calibration_warnings import calibration_warnings

            model = ir.load(self._workspace.path(graph.path))
            choosing = images.subset(np.flatnonzero(~held_back(len(images))))
            glimpse = Glimpse(len(choosing))
            table = collect(
                model,
                glimpse.watched(batches(choosing, preprocess, batch_size(model))),
                identity=identity,
                threads=self._options.threads,
                progress=lambda done: self._context.observer.progressed("calibrate", done, len(choosing)),
            )
            write_json(self._workspace.path(CALIBRATION_FILE), table.to_json())
            trained = self._context.source.trained
            warnings = calibration_warnings(
                ir.load(self._workspace.path(self.exported.path)) if trained else None,
                model,
                preprocess,
                glimpse.images,
                table,
                given=len(images),
                threads=self._options.threads,
            )
            return {"images": table.samples, "tensors": len(table.histograms), "notes": list(warnings)}

        self._stage("calibrate", identity, (CALIBRATION_FILE,), make)
        return sha256_of_file(self._workspace.path(CALIBRATION_FILE))

    @functools.cached_property
    def half(self) -> OnnxArtifact:
        """The folded graph in FP16, for NVIDIA's targets."""
        parts = self.rewriting_parts()
        graph, file, plan_file = self.folded, "fp16.onnx", "plan-fp16.json"

        def make() -> Mapping[str, Any]:
            from edgewright.optimize.dialects import half_graph

            result = half_graph(*self.folded_and_table())
            decisions = [vars(decision) for decision in result.decisions]
            write_json(self._workspace.path(plan_file), {"schema": PLAN_SCHEMA, "decisions": decisions})
            return {
                "artifact": replace(graph, path=file, sha256=self.written(file, result.model)).to_json(),
                "casts": result.casts,
                "nodes": len(decisions),
                "fp32": [decision for decision in decisions if decision["precision"] == "fp32"],
            }

        run = self._stage("cast fp16", parts, (file, plan_file), make)
        return OnnxArtifact.from_json(run.facts["artifact"])

    @functools.cached_property
    def calibration_images(self) -> ImageSet:
        """Disjoint from the evaluation images, without labels."""
        folder = self._options.calibration
        images = self.shipped(fashion_mnist_calibration, "calibration") if folder is None else image_folder(folder)
        if self._options.evaluation is not None or self._context.source.data is not None:
            check_disjoint(images, self.evaluation_images, allow_overlap=self._options.allow_overlap)
        return replace(images, labels=None)  # ranges are chosen without labels, so their change changes nothing

    @property
    def decoded_calibration(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Calibration images `[N, C, H, W]`: those that choose, and those that are held back.

        At most 512 and 256 MiB of them, evenly spaced. Of fewer than four images none is held back, and all do both.
        """
        images = self.calibration_images
        checks = held_back(len(images))
        most = max(4, min(MOST_DECODED, DECODED_BYTES // (4 * math.prod(self._context.input_shape))))
        step = -(-len(images) // most)
        chosen = [np.flatnonzero(~checks)[::step], np.flatnonzero(checks)[::step]]
        parts = [self._decoded(images.subset(part)) for part in chosen if len(part)]
        return parts[0], parts[-1]

    def _decoded(self, images: ImageSet) -> NDArray[np.float32]:
        return np.concatenate(list(batches(images, self._context.preprocess, DECODED_AT_ONCE)))

    @functools.cached_property
    def evaluation_images(self) -> ImageSet:
        """They only judge."""
        folder = self._options.evaluation
        if folder is None:
            return self.shipped(fashion_mnist_test, "evaluation")
        return image_folder(folder, self.exported.labels)

    def check_images(self, *, calibration: bool) -> None:
        """Says before the slow stages what is wrong with the images, those for calibration if they will be used.

        Raises `DataError`, or `ModelError` for a network whose output is no vector of logits.
        """
        if not self.exported.labels:
            shape = "×".join(str(side) for side in self.exported.outputs[0].shape[1:])
            raise ModelError(
                f"{self._options.model} gives features {shape}, no logits, so that no accuracy can be judged",
                "edgewright build makes its engines",
            )
        if len(self.exported.labels) < 2:
            raise ModelError(
                f"{self._options.model} gives a single logit, so that there is no class to choose",
                "let it give two, the second 0: edgewright build makes engines of either",
            )
        if calibration and self._options.calibration is None:
            self.shipped(fashion_mnist_calibration, "calibration")
        _ = self.evaluation_images

    def shipped(self, images: Callable[[], ImageSet], use: str) -> ImageSet:
        """The images that come with the model's weights. Raises `DataError` if there are none."""
        if self._context.source.data == "fashion_mnist":
            return images()
        raise DataError(
            f"{self._options.model} with weights {self._options.weights!r} brings no {use} images of its own",
            f"give --{use} DIR with photographs like those it will see; random data is never used",
        )

    def rewriting_parts(self) -> dict[str, str]:
        """Of the key of every stage that rewrites the folded graph by what was measured."""
        return {
            "calibration": self.calibrated,
            "graph": self.folded.sha256,
            "rewriting code": source_hash("optimize", "calibration/observers.py", "calibration/ranges.py"),
            "libraries": library_versions(*GRAPH_LIBRARIES),
        }

    def folded_and_table(self) -> tuple[Any, Any]:
        """The folded `ir.Model` and its `CalibrationTable`."""
        import onnx_ir as ir

        from edgewright.calibration.collect import CalibrationTable

        content = read_json(self._workspace.path(CALIBRATION_FILE))
        return ir.load(self._workspace.path(self.folded.path)), CalibrationTable.from_json(content)

    def written(self, file: str, model: Any) -> str:
        """Checks and writes a graph; its SHA-256."""
        import onnx
        import onnx_ir as ir

        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        content = proto.SerializeToString()
        write_bytes(self._workspace.path(file), content)
        return sha256_of(content)

    def _stage(
        self, name: str, parts: Mapping[str, str], outputs: tuple[str, ...], make: Callable[[], Mapping[str, Any]]
    ) -> StageRun:
        return self._context.stage(name, parts, outputs, make, code=CODE)


def _interface(content: bytes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a serialized graph of float32 tensors; a dynamic axis is None."""
    import onnx

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        sides = value.type.tensor_type.shape.dim
        return TensorSpec(value.name, tuple(None if side.dim_param else side.dim_value for side in sides), "float32")

    graph = onnx.load_from_string(content).graph
    return tuple(map(spec, graph.input)), tuple(map(spec, graph.output))


def _labels(source: ModelSource, output: TensorSpec) -> tuple[str, ...]:
    """A name for each class; none for a map of features. Raises `ModelError` if their number is another one."""
    if len(output.shape) != 2:
        return ()
    classes, known = output.shape[1] or 0, source.class_names()
    names = known if known is not None else tuple(f"class {index}" for index in range(classes))
    if len(names) != classes:
        raise ModelError(f"{source.name} has {classes} classes, but {len(names)} labels", "correct the labels")
    return names
