"""An existing ONNX file as the source of a run: the graph that the pipeline goes on with, and the FP32 reference.

The file itself, run by ONNX Runtime without optimizations, is what everything is compared with. What goes on is the
same graph as `to_onnx.py` would have written it: names, opset, constants computed, a dynamic batch axis. Both are run
on the same images before it is handed on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgewright.export.conventions import (
    CHECK_SEED,
    CHECKED_BATCHES,
    INPUT_NAME,
    OUTPUT_NAME,
    TOLERANCE,
    Infer,
    Logits,
    check_size,
    first_line,
    relative_difference,
)
from edgewright.export.entries import InputShape, ModelSource
from edgewright.export.onnx_files import load_onnx, read_onnx
from edgewright.export.onnx_header import (
    Header,
    ends_in_softmax,
    foreign_domains,
    header_of,
    labels_of,
    quantized_operators,
)
from edgewright.export.onnx_session import cpu_session
from edgewright.runtime.errors import ExportError, ModelError

if TYPE_CHECKING:
    from edgewright.export.resolve import ModelRequest

__all__ = ["check_request", "import_onnx", "onnx_source", "reference_of"]


PROBABILITIES = "the graph ends in Softmax: its outputs are probabilities, not logits (accuracy is the same)"


def check_request(request: ModelRequest) -> None:
    """Raises `ModelError` if `request` asks for weights or options, which no graph takes; the file is not read."""
    if request.weights != "default":
        raise ModelError(
            f"{request.model} takes no weights {request.weights!r}: a graph carries its own", "leave out --weights"
        )
    if request.options:
        raise ModelError(
            f"{request.model} takes no options ({', '.join(request.options)}): it is built already", "leave them out"
        )


def onnx_source(request: ModelRequest) -> ModelSource:
    """The source of `request.model`, the path of an ONNX file; what the file does not say is None.

    Raises `ModelError` if the file cannot be trusted or read, if its graph is not one from float32 images to one
    output, if it is quantized already and `request` does not pass that, or if weights or options are asked for.
    """
    check_request(request)
    path = Path(request.model)
    file = read_onnx(path)
    header = header_of(file.proto, str(path), quantized=request.already_quantized == "pass")
    if foreign_domains(file.proto):
        cpu_session(file.proto.SerializeToString(), str(path))
    return ModelSource(
        onnx=path,
        input_shape=header.input_shape,
        labels=labels_of(file.proto, header.classes),
        name=request.model,
        weights="in the graph",
        fingerprint=file.fingerprint,
        quantized=bool(quantized_operators(file.proto)),
        note=PROBABILITIES if ends_in_softmax(file.proto) else "",
    )


def import_onnx(
    path: Path, input_shape: InputShape, *, opset: int, fingerprint: str = "", quantized: bool = False
) -> bytes:
    """Serialized ONNX of the graph in `path`, in the form that `export_onnx` writes.

    Input "images" `[batch, C, H, W]` float32 with a dynamic batch, output "logits" `[batch, classes]` float32 (or
    `[batch, …]` features). Checked before it is returned: the ONNX checker, and on seeded images, in a batch of 1 and
    one of 5, outputs equal to those that the file itself gives for each image alone (or in the batch that it insists
    on). Raises `ModelError` for the file, also if its content has another `fingerprint` than the one given or its
    logits are not finite, which names the layer, and `ExportError` if it cannot be rewritten or the rewritten graph
    differs. `quantized`: it may hold integers already.
    """
    from edgewright.export.onnx_rewriting import rewritten  # brings onnxscript, which reading a header does not need

    proto = load_onnx(path, fingerprint=fingerprint)
    header = header_of(proto, str(path), quantized=quantized)
    for axis, (said, wanted) in enumerate(zip(header.sides[1:], input_shape, strict=True)):
        if said not in (None, wanted):
            raise ModelError(
                f"{path} takes images of {said} along {('channels', 'height', 'width')[axis]}, not {wanted}",
                "leave out --input-shape, or export the graph for that size",
            )
    check_size((max(CHECKED_BATCHES), *input_shape), str(path))
    session = cpu_session(proto.SerializeToString(), str(path))
    reference = _reference(session, header, str(path), at_once=header.batch or 1)
    content = rewritten(proto, header, input_shape, opset=opset)
    _check_equal(reference, content, header, input_shape, str(path))
    return content


def reference_of(path: Path, *, fingerprint: str = "", quantized: bool = False) -> Infer:
    """The FP32 reference: the file itself, run by ONNX Runtime without optimizations on one batch after the other.

    It takes any number of images; a graph with a fixed batch gets them in batches of that size, the last one filled
    up. Raises `ModelError` if the file or an image does not run, or if the content of the file has another
    `fingerprint` than the one given. `quantized`: it may hold integers already.
    """
    proto = load_onnx(path, fingerprint=fingerprint)
    header = header_of(proto, str(path), quantized=quantized)
    name = str(path)
    session = cpu_session(proto.SerializeToString(), name)
    whole = _reference(session, header, name, at_once=header.batch)
    one_by_one = _reference(session, header, name, at_once=1)

    def infer(images: NDArray[np.float32]) -> Logits:
        try:
            return whole(images)
        except ModelError:  # its batch axis is dynamic in name only
            if header.batch is not None or len(images) == 1:
                raise
            return one_by_one(images)

    return infer


def _reference(session: Any, header: Header, name: str, at_once: int | None) -> Infer:
    """The graph as a function; it sees `at_once` images at a time, or all that it is given."""

    def run(images: NDArray[np.float32]) -> Logits:
        try:
            (output,) = session.run([header.output_name], {header.input_name: images})
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise ModelError(
                f"{name} does not run on images of shape {list(images.shape)}: {first_line(error)}",
                "check the size of the images (--input-shape)",
            ) from error
        return _one_row_per_image(output, len(images), name)

    def infer(images: NDArray[np.float32]) -> Logits:
        step = at_once or len(images)
        parts = [images[start : start + step] for start in range(0, len(images), step)]
        return np.concatenate([run(_filled_up(part, step))[: len(part)] for part in parts])

    return infer


def _filled_up(images: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """`count` images, the last of them repeated where some are missing."""
    return np.concatenate([images, np.repeat(images[-1:], count - len(images), axis=0)])


def _one_row_per_image(output: Any, count: int, name: str) -> Logits:
    """`[N, classes]`; lone axes behind the classes go."""
    if not isinstance(output, np.ndarray) or output.dtype != np.float32 or output.ndim < 2 or len(output) != count:
        found = f"{output.dtype} {list(output.shape)}" if isinstance(output, np.ndarray) else type(output).__name__
        raise ModelError(
            f"the output of {name} is {found} for {count} images, expected float32 [{count}, classes]",
            "give a graph whose first output axis is the batch",
        )
    return output.reshape(output.shape[:2]) if set(output.shape[2:]) == {1} else output


def _check_equal(reference: Infer, content: bytes, header: Header, input_shape: InputShape, name: str) -> None:
    written = cpu_session(content, "the rewritten graph", failure=ExportError, remedy="choose another --opset")
    rng = np.random.default_rng(CHECK_SEED)
    for batch in CHECKED_BATCHES:
        images = rng.standard_normal((batch, *input_shape), np.float32)
        expected = reference(images)
        try:
            (found,) = written.run([OUTPUT_NAME], {INPUT_NAME: images})
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise _wrong_batch(header, batch, f"does not run: {first_line(error)}") from error
        if not np.isfinite(expected).all():
            raise _nonfinite(content, images, name)
        difference = relative_difference(expected, found)
        if not difference <= TOLERANCE:  # also true for NaN
            share = (
                f"differs from the file's own by {difference:.2g} of the largest logit, at most {TOLERANCE:g} expected"
            )
            raise _wrong_batch(header, batch, share)


def _nonfinite(content: bytes, images: NDArray[np.float32], name: str) -> ModelError:
    """Names the layer that gives NaN or infinity; the rewritten graph has all shapes, which the file may not have."""
    import onnx
    import onnx_ir as ir

    from edgewright.calibration.nonfinite import nonfinite_error

    cause = nonfinite_error(ir.from_proto(onnx.load_from_string(content)), images, 1, OUTPUT_NAME, "is not finite")
    return ModelError(f"{name} gives no finite logits: on random images {cause.message}", cause.remedy)


def _wrong_batch(header: Header, batch: int, happened: str) -> ExportError:
    if header.batch is not None and header.batch != batch:
        return ExportError(
            f"the graph works with a batch of {header.batch} only: a batch of {batch} {happened}",
            "export it with a dynamic batch axis",
        )
    return ExportError(
        f"the rewritten graph at batch {batch} {happened}",
        "look for operations that mix the images of a batch, or for random numbers",
    )
