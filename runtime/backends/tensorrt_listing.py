"""The kernels of a TensorRT engine, read from what TensorRT prints: the builder's log, or the engine inspector's JSON.

Both give each engine layer with its tensors; the log is what there is where the engine cannot be loaded, on a machine
without a GPU. Nothing here imports TensorRT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BuildError
from ..specs import Kernel

__all__ = ["kernels_of_inspector", "kernels_of_log"]

HEADING = "Layers:\n"
LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, StreamId: \d+, (?:EventId: \d+, )?Metadata: (?P<metadata>.*)"
)
TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dimensions>[-\d,]*)\], .*?Datatype: (?P<type>\w+), Format: [^}]*\}"
)
TENSOR_START = "{ Name: "
SOURCE = "[ONNX Layer: "
SOURCE_END = re.compile(r"[\x1e\x1f]|(?<=\])(?=\[ONNX Layer: )")  # the log has \x1f, the inspector \x1e
HOST_ONLY = ("shape_call", "ShapeHostToDeviceCopy", "signal", "wait")  # shapes and synchronization: no kernels
COMPUTE_WORDS = ("correlation", "conv", "gemm", "matrixmultiply", "matmul", "fusion")  # also in CaskGemmConvolution

TYPES: dict[str, tuple[str, int]] = {  # the precision it stands for, and bits
    "float": ("fp32", 32),
    "fp32": ("fp32", 32),
    "bfloat16": ("bf16", 16),
    "bf16": ("bf16", 16),
    "half": ("fp16", 16),
    "fp16": ("fp16", 16),
    "int8": ("int8", 8),
    "uint8": ("uint8", 8),
    "bool": ("bool", 8),
    "int32": ("int32", 32),
    "int64": ("int64", 64),
    "fp8": ("fp8", 8),
    "int4": ("int4", 4),
    "fp4": ("fp4", 4),
}
# In both forms: "Half", "Row major linear FP16 format", "Thirty-two wide channel vectorized row major Int8 format."
TYPE = re.compile(rf"\b({'|'.join(TYPES)})\b", re.IGNORECASE)
FLOATS = ("fp32", "bf16", "fp16")  # the widest first


@dataclass(frozen=True)
class Tensor:
    """A tensor that a layer reads or writes; `dimensions` has 1 for the dynamic batch."""

    name: str
    precision: str
    bits: int
    dimensions: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Their number, for one image."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int:
        """For one image."""
        return math.ceil(self.elements * self.bits / 8)


def kernels_of_log(messages: Iterable[str]) -> tuple[Kernel, ...]:
    """The kernels of the last engine that the builder listed, in the order in which they run.

    The builder lists layers at `ProfilingVerbosity.DETAILED`, in one message of the log that begins with "Layers:".
    Raises `BuildError` if there is no such message, or a line of it cannot be read.
    """
    listing = None
    for message in messages:
        if message.startswith(HEADING):
            listing = message
    if listing is None:
        raise _unreadable("the builder listed no layers")
    lines = listing.removeprefix(HEADING).split("\n")
    end = lines.index("") if "" in lines else len(lines)  # what follows are inputs and outputs
    return _kernels(_of_line(line) for line in lines[:end])


def kernels_of_inspector(text: str) -> tuple[Kernel, ...]:
    """The kernels in `EngineInspector.get_engine_information(LayerInformationFormat.JSON)`, of TensorRT 10.x or 11.x.

    Raises `BuildError` if it is not such a text, or has no more than names, as without `ProfilingVerbosity.DETAILED`.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(f"the inspector's text has no list of layers: {_short(text)}") from error
    if not isinstance(layers, list):
        raise _unreadable(f"the inspector's layers are no list: {_short(text)}")
    return _kernels(_of_json(layer) for layer in layers)


def _kernels(layers: Iterable[Kernel | None]) -> tuple[Kernel, ...]:
    kernels = tuple(kernel for kernel in layers if kernel is not None)
    if not kernels:
        raise _unreadable("the engine has no kernels")
    return kernels


def _of_line(line: str) -> Kernel | None:
    found = LAYER.fullmatch(line)
    if found is None:
        raise _unreadable(f"the log has the layer {_short(line)}")
    inputs, constants, outputs = (_of_text(found[group]) for group in ("inputs", "constants", "outputs"))
    return _kernel(found["name"], found["kind"], found["metadata"], inputs, constants, outputs)


def _of_text(text: str) -> list[Tensor]:
    tensors = [
        _tensor(found["name"], found["type"], [int(side) for side in found["dimensions"].split(",") if side])
        for found in TENSOR.finditer(text)
    ]
    if len(tensors) != text.count(TENSOR_START):
        raise _unreadable(f"the log has the tensors {_short(text)}")
    return tensors


def _of_json(layer: Any) -> Kernel | None:
    if not isinstance(layer, dict) or "LayerType" not in layer:
        raise _unreadable(f"the inspector gives no details of the layer {_short(str(layer))}")
    try:
        inputs, outputs = (_of_entries(layer[key]) for key in ("Inputs", "Outputs"))
        constants = _of_entries(layer.get("Constants", [])) + _weights(layer)
        return _kernel(layer["Name"], layer["LayerType"], layer.get("Metadata", ""), inputs, constants, outputs)
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(f"the inspector has the layer {_short(str(layer))}") from error


def _of_entries(entries: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Tensors that lie on the device; shapes on the host are not counted."""
    return [
        _tensor(entry["Name"], entry.get("Format/Datatype") or entry["Datatype"], entry["Dimensions"])
        for entry in entries
        if entry.get("Location") != "Host"
    ]


def _weights(layer: Mapping[str, Any]) -> list[Tensor]:
    """Convolutions of TensorRT 10 give their constants so: `"Weights": {"Type": "Half", "Count": 864}`."""
    found = []
    for key, rank in (("Weights", 2), ("Bias", 1)):
        entry = layer.get(key) or {}
        if entry.get("Count"):
            found.append(_tensor(key, entry["Type"], [1] * (rank - 1) + [int(entry["Count"])]))
    return found


def _tensor(name: str, type_name: str, dimensions: Sequence[int]) -> Tensor:
    word = TYPE.search(type_name)
    if word is None:
        raise _unreadable(f"tensor {name!r} has the type {type_name!r}")
    precision, bits = TYPES[word[0].lower()]
    return Tensor(name, precision, bits, tuple(1 if side == -1 else int(side) for side in dimensions))


def _kernel(
    name: str, kind: str, metadata: str, inputs: list[Tensor], constants: list[Tensor], outputs: list[Tensor]
) -> Kernel | None:
    if kind in HOST_ONLY:
        return None
    computes = any(word in kind.lower() for word in COMPUTE_WORDS)
    return Kernel(
        name=name,
        kind=kind,
        sources=_sources(metadata),
        precision=(_of_product if computes else _widest)(inputs, constants, outputs),
        bytes_read=_bytes(inputs + constants),
        bytes_written=_bytes(outputs),
        computes=computes,
    )


def _sources(metadata: str) -> tuple[str, ...]:
    """ONNX nodes in `[ONNX Layer: a][ONNX Layer: b]`; a decomposed one has a suffix: `[ONNX Layer: a]__gemm_from_…`."""
    parts = (part for part in SOURCE_END.split(metadata) if part.startswith(SOURCE) and "]" in part)
    return tuple(dict.fromkeys(part[len(SOURCE) : part.rindex("]")] for part in parts))


def _of_product(inputs: list[Tensor], constants: list[Tensor], outputs: list[Tensor]) -> str:
    """The precision of a convolution or matrix product: INT8 only if both the activation and the weights are INT8.

    Scales and biases are constants too, and the output of an INT8 product is a float: the weights decide, the largest
    constant with more than one axis. Where they are not listed, they are an input or hidden, and the inputs decide.
    """
    weights = max(
        (tensor for tensor in constants if len(tensor.dimensions) > 1), key=lambda t: t.elements, default=None
    )
    read = {tensor.precision for tensor in inputs}
    if weights is not None and weights.precision in FLOATS:
        return weights.precision
    if read == {"int8"} or (weights is not None and weights.precision == "int8" and "int8" in read):
        return "int8"
    return _widest(inputs, constants, outputs)


def _widest(inputs: list[Tensor], constants: list[Tensor], outputs: list[Tensor]) -> str:
    """The widest float among the activations, else among the constants; else the type of the first tensor."""
    for tensors in (inputs, constants):
        found = {tensor.precision for tensor in tensors}
        floats = [word for word in FLOATS if word in found]
        if floats:
            return floats[0]
    data = inputs or constants or outputs
    return data[0].precision if data else "none"


def _bytes(tensors: list[Tensor]) -> int:
    """A tensor that is listed more than once, as of several slices, is counted once."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.name] = max(tensor.bytes, sizes.get(tensor.name, 0))
    return sum(sizes.values())


def _unreadable(fact: str) -> BuildError:
    return BuildError(
        f"cannot read what was built: {fact}",
        "without that its precision is unknown; this version of the package may print another form",
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}…")
