"""What an ONNX graph says of itself: its image input, its output, its labels, and whether it is a float classifier."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from edgewright.export.conventions import OPSETS
from edgewright.export.entries import InputShape
from edgewright.runtime.errors import ModelError

__all__ = [
    "Header",
    "ends_in_softmax",
    "foreign_domains",
    "header_of",
    "labels_of",
    "opset_of",
    "quantized_operators",
]

STANDARD_DOMAINS = ("", "ai.onnx")
# Before 7, broadcasting was said by attributes, and the converter knows few operators; onnxruntime 1.31 loads up to 26.
READ_OPSETS = range(7, 27)
QUANTIZED = re.compile(
    r"(Dynamic)?QuantizeLinear|DequantizeLinear|QLinear.*|.*Integer|.*Integer(ToFloat|Bias)|.*NBits|Q[A-Z].*"
)
COLOURS = (1, 3)
PASSING = ("Identity", "Dropout", "Flatten", "Reshape", "Squeeze")
"""Operators that only carry their first input on."""
LABEL_KEYS = ("names", "labels")  # Ultralytics writes "names": "{0: 'person', 1: 'bicycle', …}"
MAX_LABELS_LENGTH = 1 << 20
IMAGES = "a graph takes one batch of images, float32 [batch, channels, height, width]"


@dataclass(frozen=True)
class Header:
    """The one image input of a graph and its one output.

    * sides: (batch, channels, height, width) of the input; None where it is dynamic
    * classes: the length of the output's axis 1 if it is known
    """

    input_name: str
    output_name: str
    sides: tuple[int | None, int | None, int | None, int | None]
    classes: int | None

    @property
    def batch(self) -> int | None:
        """The only batch that the graph takes, or None if it takes any."""
        return self.sides[0]

    @property
    def input_shape(self) -> InputShape | None:
        """(C, H, W), or None if one of them is dynamic."""
        _, channels, height, width = self.sides
        return None if channels is None or height is None or width is None else (channels, height, width)


def header_of(proto: onnx.ModelProto, name: str, *, quantized: bool = False) -> Header:
    """The header of the model that is called `name` in messages.

    Raises `ModelError` if the opset is out of reach, if there is more than one input or output, if the input is no
    float32 NCHW batch, or if the graph is quantized already and that is not expected by `quantized`.
    """
    _refuse_opset(opset_of(proto), name)
    if not quantized:
        _refuse_quantized(proto, name)
    image, output = _only_input(proto.graph, name), _only_output(proto.graph, name)
    kind = image.type.tensor_type.elem_type
    if kind != onnx.TensorProto.FLOAT:
        found = onnx.TensorProto.DataType.Name(kind)
        raise ModelError(
            f"the input {image.name!r} of {name} is of type {found}, expected FLOAT",
            "give the graph with float32 images; --mean and --std say how bytes become floats",
        )
    batch, channels, height, width = _image_sides(image, name)
    classes = _sides(output)[1:2]
    return Header(image.name, output.name, (batch, channels, height, width), classes[0] if classes else None)


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators; 0 if the file says none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in STANDARD_DOMAINS), 0)


def labels_of(proto: onnx.ModelProto, classes: int | None) -> tuple[str, ...] | None:
    """The names of the classes from the model's metadata, in order, if there is one for each class."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    for key in LABEL_KEYS:
        labels = _parsed_labels(metadata.get(key, ""))
        if labels and classes in (None, len(labels)):
            return labels
    return None


def ends_in_softmax(proto: onnx.ModelProto) -> bool:
    """Whether the output holds probabilities."""
    producers = {output: node for node in proto.graph.node for output in node.output}
    node = producers.get(proto.graph.output[0].name)
    while node is not None and node.op_type in PASSING and node.input:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "Softmax"


def foreign_domains(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Domains of operators that are neither ONNX's nor defined in the file itself."""
    own = {(function.domain, function.name) for function in proto.functions}
    used = {node.domain for node in _nodes_of(proto) if (node.domain, node.op_type) not in own}
    return tuple(sorted(used.difference(STANDARD_DOMAINS)))


def _nodes_of(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes: of the graph, of its subgraphs and of the local functions."""
    yield from _nested(proto.graph.node)
    for function in proto.functions:
        yield from _nested(function.node)


def _nested(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nested(graph.node)


def _refuse_opset(opset: int, name: str) -> None:
    if opset not in READ_OPSETS:
        raise ModelError(
            f"{name} is of opset {opset}, expected {READ_OPSETS.start} … {READ_OPSETS.stop - 1}",
            f"export it with opset {OPSETS.start} … {OPSETS.stop - 1}",
        )


def quantized_operators(proto: onnx.ModelProto) -> Mapping[str, int]:
    """How many operators of each kind make, read or compute with integers, by name; none for a float graph."""
    return Counter(node.op_type for node in _nodes_of(proto) if QUANTIZED.fullmatch(node.op_type))


def _refuse_quantized(proto: onnx.ModelProto, name: str) -> None:
    found = quantized_operators(proto)
    if found:
        counts = ", ".join(f"{count} {operator}" for operator, count in found.items())
        raise ModelError(
            f"{name} is quantized already: it holds {counts}",
            "give the float graph, or --already-quantized pass to take it as it is",
        )


def _only_input(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    constant = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    inputs: list[onnx.ValueInfoProto] = [value for value in graph.input if value.name not in constant]
    if len(inputs) == 1:
        return inputs[0]
    found = ", ".join(value.name for value in inputs) or "none"
    raise ModelError(
        f"{name} has {len(inputs)} inputs ({found}), expected one",
        f"{IMAGES}: cut the others off with onnx.utils.extract_model, or make them constants",
    )


def _only_output(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    outputs: list[onnx.ValueInfoProto] = list(graph.output)
    if len(outputs) == 1:
        return outputs[0]
    found = ", ".join(value.name for value in outputs)
    raise ModelError(
        f"{name} has {len(outputs)} outputs ({found}), expected the logits alone",
        "cut the others off with onnx.utils.extract_model",
    )


def _image_sides(image: onnx.ValueInfoProto, name: str) -> tuple[int | None, ...]:
    sides = _sides(image)
    written = "[" + ", ".join("?" if side is None else str(side) for side in sides) + "]"
    if len(sides) != 4:
        raise ModelError(f"the input {image.name!r} of {name} has shape {written}", IMAGES)
    if sides[3] in COLOURS and sides[1] not in COLOURS:
        raise ModelError(
            f"the input {image.name!r} of {name} has shape {written}: channels come last (NHWC), expected NCHW",
            "convert it with channels first, as tf2onnx does with --inputs-as-nchw",
        )
    return sides


def _sides(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Lengths of the axes; None where one is dynamic, which old files also write as 0 or -1."""
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim)


def _parsed_labels(text: str) -> tuple[str, ...] | None:
    """A list of names or a dictionary from 0, 1, … to names, as JSON or as Python writes it."""
    if not text or len(text) > MAX_LABELS_LENGTH:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        try:
            content = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    if isinstance(content, dict):
        names = {str(key): value for key, value in content.items()}
        content = [names.get(str(index)) for index in range(len(names))]
    if not isinstance(content, list | tuple) or not all(isinstance(label, str) for label in content):
        return None
    return tuple(content)
