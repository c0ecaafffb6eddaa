"""PyTorch → ONNX: a clean graph with a dynamic batch axis, BatchNormalization still visible, equal to PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.export.canonicalize import canonicalize
from edgewright.export.conventions import (
    BATCH_NAME,
    CHECK_SEED,
    CHECKED_BATCHES,
    INPUT_NAME,
    OUTPUT_NAME,
    TOLERANCE,
    check_opset,
    first_line,
    relative_difference,
)
from edgewright.export.onnx_session import cpu_session
from edgewright.runtime.errors import ExportError

__all__ = ["export_onnx"]

Sample = tuple[NDArray[np.float32], NDArray[np.float32]]


def export_onnx(model: nn.Module, input_shape: tuple[int, int, int], *, opset: int = 19) -> bytes:
    """Serialized ONNX of `model` in evaluation mode; input `[batch, C, H, W]` float32, output `[batch, classes]`.

    A network without its top gives features instead, `[batch, C', H', W']`.

    Checked before it is returned: the ONNX checker, shape inference, and outputs equal to PyTorch's on a seeded batch
    of 1 and one of 5. Raises `ExportError`.
    """
    check_opset(opset)
    samples = _samples(model.eval(), input_shape)  # first, since the exporter's words for what fails here are worse
    exported = _exported(model, input_shape, opset)
    canonicalize(exported)
    content: bytes = ir.to_proto(exported).SerializeToString()
    _check_structure(content)
    _check_equal(content, samples)
    return content


def _samples(model: nn.Module, input_shape: tuple[int, int, int]) -> list[Sample]:
    """Seeded images `[N, C, H, W]` for each batch size that is checked, and what `model` itself gives for them."""
    generator = torch.Generator().manual_seed(CHECK_SEED)
    samples: list[Sample] = []
    for batch in CHECKED_BATCHES:
        images = torch.randn((batch, *input_shape), generator=generator)
        samples.append((images.numpy(), _reference_logits(model, images)))
    return samples


def _exported(model: nn.Module, input_shape: tuple[int, int, int], opset: int) -> ir.Model:
    example = torch.zeros((2, *input_shape))  # a batch of 1 would be specialized to the constant 1
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                optimize=False,  # its optimizer folds BatchNorm before we could see it
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: torch.export.Dim(BATCH_NAME)},),
                verbose=False,
            )
    except Exception as error:  # the exporter raises what the model's own code and a dozen of its layers raise
        raise ExportError(
            f"torch.onnx.export could not export {type(model).__name__}: {first_line(error)}",
            "make forward() a function of tensors alone, without control flow that depends on their values",
        ) from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    exported: ir.Model = program.model
    written = exported.opset_imports.get("")
    if written != opset:
        raise ExportError(f"the exporter wrote opset {written} instead of {opset}", "choose another --opset")
    _name_batch(exported.graph)
    return exported


def _name_batch(graph: ir.Graph) -> None:
    """Torch 2.6 calls the dynamic axis s0, whatever name it was given."""
    shape = graph.inputs[0].shape
    given = shape[0] if shape is not None else 0
    if isinstance(given, int) or given.value == BATCH_NAME:
        return
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for axis, side in enumerate(value.shape or ()):
            if side == given and value.shape is not None:
                value.shape[axis] = ir.SymbolicDim(BATCH_NAME)


def _check_structure(content: bytes) -> None:
    try:
        onnx.checker.check_model(content)
        # What the checker's full_check would do too; here its result is used, so it is done once.
        inferred = onnx.shape_inference.infer_shapes(content, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {first_line(error)}") from error
    (output,) = inferred.graph.output
    dims = output.type.tensor_type.shape.dim
    if len(dims) < 2 or not dims[0].dim_param or any(dim.dim_param for dim in dims[1:]):
        shape = [dim.dim_param or dim.dim_value for dim in dims]
        raise ExportError(
            f"the output has shape {shape}, expected [batch, classes], or [batch, C, H, W] of features, with a dynamic "
            "batch and nothing else dynamic"
        )
    if output.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        found = onnx.TensorProto.DataType.Name(output.type.tensor_type.elem_type)
        raise ExportError(f"the output is of type {found}, expected FLOAT", "return the logits as float32")


def _check_equal(content: bytes, samples: Sequence[Sample]) -> None:
    session = cpu_session(
        content, "the exported graph", optimized=True, failure=ExportError, remedy="choose another --opset"
    )
    for images, expected in samples:
        batch = len(images)
        try:
            (found,) = session.run(None, {INPUT_NAME: images})
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise ExportError(
                f"onnxruntime cannot run the exported graph at batch {batch}: {first_line(error)}",
                "look for operations that depend on the batch",
            ) from error
        difference = relative_difference(expected, found)
        if not difference <= TOLERANCE:  # also true for NaN
            raise ExportError(
                f"the exported graph differs from PyTorch by {difference:.2g} of the largest logit at batch {batch}, "
                f"expected at most {TOLERANCE:g}",
                "look for operations that depend on the batch or on random numbers",
            )


def _reference_logits(model: nn.Module, images: torch.Tensor) -> NDArray[np.float32]:
    """What `model` itself gives for `images`, `[batch, classes]`."""
    try:
        with torch.inference_mode():
            logits = model(images)
    except Exception as error:  # whatever the model's own code raises
        raise ExportError(
            f"the model cannot run a batch of {len(images)}: {type(error).__name__}: {first_line(error)}",
            f"it has to take images of shape {list(images.shape)}, float32",
        ) from error
    if not isinstance(logits, torch.Tensor):
        many = f" of {len(logits)}" if isinstance(logits, tuple | list | dict) else ""
        raise ExportError(
            f"the model returns a {type(logits).__name__}{many}, expected one tensor of logits",
            "return the logits alone in evaluation mode",
        )
    array: NDArray[np.float32] = logits.numpy()
    return array


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's warnings, logs and prints; what matters comes as an exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # a dozen of torch's loggers print pages about a model that does not export
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
