"""What TensorRT refuses or silently misreads in an ONNX graph, found before a device sees it.

    check(model, "10.3")            raises QuantizationError
    for finding in lint(model, "rtx"): ...

A rule does one of three things (`RULES`):

* refused    the parser or the builder of TensorRT ends with an error, often one that names no node of the graph;
* misread    it builds, and computes something else than the ONNX specification says: nothing but this file notices;
* excluded   the ONNX specification or NVIDIA's documentation rules it out; one parser may take it, another may not.

The rules and their evidence stand in `lint_rules.py`.

Left alone, since it depends on the GPU and not on the parser: FP8 (RTX for SM86: "the model contains HW-specific
datatypes: fp8_e4m3") and INT4 weights (RTX builds them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from edgewright.optimize.lint_rules import PARSERS, RULES, ParserRules
from edgewright.optimize.plan import COMPUTE_OPERATORS
from edgewright.runtime.errors import QuantizationError

__all__ = ["Finding", "check", "lint"]


@dataclass(frozen=True)
class Finding:
    """A place in a graph that TensorRT refuses or misreads.

    * node: the node's name; where it has none, the name of its first output; for a whole graph the graph's name
    * rule: a key of RULES; reason: a sentence about this node; remedy: what to do about it
    """

    node: str
    rule: str
    reason: str
    remedy: str


# Read by name in NVIDIA's own domain: TRT_FP8QuantizeLinear and the like (10.1 source); ModelOpt writes them.
PARSER_DOMAINS = ("", "ai.onnx", "trt")
INTEGER_OPERATORS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "QAttention")  # and QLinear*
QUANTIZED_TYPES = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)
FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # below it FP32 is subnormal, and soon 1 / scale is infinite
SHOWN = 3  # findings in an error message


def check(model: ir.Model, target: str) -> None:
    """Raises `QuantizationError` with the first findings for `target` and the number of all, if there are any."""
    findings = lint(model, target)
    if not findings:
        return
    shown = "; ".join(f"{finding.node} ({finding.rule}): {finding.reason}" for finding in findings[:SHOWN])
    more = f"; and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
    places = "1 place" if len(findings) == 1 else f"{len(findings)} places"
    raise QuantizationError(
        f"TensorRT {target} does not read this graph as ONNX does, in {places}: {shown}{more}", findings[0].remedy
    )


def lint(model: ir.Model, target: str) -> tuple[Finding, ...]:
    """What TensorRT `target`, a key of PARSERS, refuses or misreads in `model`, in the order of its nodes.

    Looks into subgraphs and functions. `model` stays as it was; types that it does not say are inferred.
    Raises `QuantizationError` if `target` is unknown.
    """
    if target not in PARSERS:
        raise QuantizationError(f"TensorRT {target!r} is not known", f"choose one of {', '.join(PARSERS)}")
    inferred = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model.clone()).model
    return tuple(_Linter(inferred, PARSERS[target]).findings())


class _Linter:
    """One walk over one model; `opset` is that of ONNX's own domain."""

    def __init__(self, model: ir.Model, rules: ParserRules) -> None:
        self.model, self.rules = model, rules
        self.opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))
        self.local = {(identifier[0], identifier[1]) for identifier in model.functions}

    def findings(self) -> Iterator[Finding]:
        nodes = [*self.model.graph.all_nodes(), *(n for f in self.model.functions.values() for n in f.all_nodes())]
        yield from self._opset(nodes)
        for node in nodes:
            for check_node in _CHECKS:
                for rule, reason, remedy in check_node(self, node):
                    assert rule in RULES
                    yield Finding(_label(node), rule, reason, remedy)

    def _opset(self, nodes: list[ir.Node]) -> Iterator[Finding]:
        newest = self.rules.newest_opset
        if self.opset <= newest:
            return
        # the node whose definition is newer, if there is one: the others mean the same in both opsets
        newer = next((node for node in nodes if node.domain == "" and _since(node, self.opset) > newest), None)
        reason = f"the graph is of opset {self.opset}, and opset {newest} is the newest of {self.rules.source}"
        place = _label(newer) if newer is not None else self.model.graph.name or "graph"
        yield Finding(place, "newer-opset", reason, f"export with opset {newest} or older")


Broken = Iterator[tuple[str, str, str]]  # rule, reason, remedy


def _operator(linter: _Linter, node: ir.Node) -> Broken:
    """Operators that TensorRT has not, or has under the name of another."""
    if _is_integer_operator(node):
        remedy = "write it as a float operator between QuantizeLinear and DequantizeLinear"
        yield "integer-operator", f"TensorRT has no {node.op_type}", remedy
    elif node.domain not in PARSER_DOMAINS and (node.domain, node.op_type) not in linter.local:
        remedy = f"export without operators of {node.domain}"
        if onnx.defs.has(node.op_type):
            yield "ignored-domain", f"{node.domain}.{node.op_type} is read as the {node.op_type} of ONNX", remedy
        else:
            yield "custom-operator", f"{node.domain}.{node.op_type} is no operator of ONNX", remedy


def _types(linter: _Linter, node: ir.Node) -> Broken:
    """Types of tensors that TensorRT has not, and those that must be equal."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    narrows = node.op_type == "Cast" and _constant(node.inputs[0]) is not None  # float64 constants: FP32 either way
    if any(value.dtype == ir.DataType.DOUBLE for value in values) and not (
        narrows and node.outputs[0].dtype == ir.DataType.FLOAT
    ):
        yield "float64", "it computes in float64, which TensorRT rounds to float32", "cast to float32 in the graph"
    if _is_quantizing(node):
        return
    in_cast = node.op_type in ("Cast", "Identity")  # RTX builds both at the border of the graph
    reads = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.UINT8 and _constant(v) is None]
    inside = [v for v in node.outputs if v.dtype == ir.DataType.UINT8 and not v.is_graph_output()]
    if not _is_integer_operator(node) and (inside or (reads and not in_cast)):
        name = (inside or reads)[0].name
        yield "uint8-tensor", f"{name} is uint8 inside the graph", "cast to float right behind the graph's input"
    if node.op_type in COMPUTE_OPERATORS:
        found = {str(v.name): t for v in node.inputs if v is not None and (t := _float_type(v)) is not None}
        if len(set(found.values())) > 1:
            described = ", ".join(f"{name} is {kind.name}" for name, kind in found.items())
            yield "mixed-types", described, "give the scales, the bias and the weights one type"


def _integers(linter: _Linter, node: ir.Node) -> Broken:
    """Where integers come from and go to."""
    named_elsewhere = _is_quantizing(node) or _is_integer_operator(node)
    for value in () if named_elsewhere else node.inputs:
        if _input_type(value) == ir.DataType.INT8 and value is not None and _is_stored(value):
            reason = f"it reads the INT8 constant {value.name} and is no DequantizeLinear"
            yield "int8-constant", reason, "put DequantizeLinear right behind the constant"
    if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        source = _producer(_optional(node, 2), "DequantizeLinear")
        if source is not None and _input_type(source.inputs[0]) != ir.DataType.INT32:
            yield "quantized-bias", f"its bias is quantized by {_label(source)}", "keep the bias in floating point"
    if linter.rules.stray_int8 or not _is_quantizing(node):
        return
    if node.op_type == "QuantizeLinear":
        integers = node.outputs[0]
        if integers.is_graph_output() or any(user.op_type != "DequantizeLinear" for user in integers.consumers()):
            reason = "its integers reach something else than DequantizeLinear"
            yield "stray-int8", reason, "put DequantizeLinear right behind it"
    elif _constant(node.inputs[0]) is None and _producer(node.inputs[0], "QuantizeLinear") is None:
        reason = f"{_name(node.inputs[0])} comes neither from QuantizeLinear nor from a constant"
        yield "stray-int8", reason, "put QuantizeLinear right in front of it"


def _quantized_type(linter: _Linter, node: ir.Node) -> Broken:
    """The type that a Q writes or a DQ reads."""
    if not _is_quantizing(node):
        return
    source, zero_point = node.inputs[0], _optional(node, 2)
    read, kind = _input_type(source), _input_type(zero_point)
    array = _constant(zero_point)
    if kind == ir.DataType.UINT8 and (array is None or not np.any(array)):  # another one is refused anyway
        remedy = "quantize symmetrically: INT8 with an INT8 zero-point of zeros"
        yield "uint8-zero-point", "its zero-point is uint8, so values above 127 would be misread as INT8", remedy
    if node.op_type == "QuantizeLinear":
        declared = ir.DataType(node.attributes.get_int("output_dtype", 0))
        if zero_point is None and declared == ir.DataType.UNDEFINED:
            remedy = "give it an INT8 zero-point of zeros"
            yield "uint8-default", "without a zero-point ONNX quantizes to uint8, TensorRT to INT8", remedy
        written = declared if declared != ir.DataType.UNDEFINED else kind
        if written not in (None, *QUANTIZED_TYPES) and not (written == kind == ir.DataType.UINT8):
            yield "quantized-type", f"it quantizes to {_type_name(written)}", "quantize to INT8"
        if read not in (None, ir.DataType.DOUBLE, *FLOAT_TYPES):  # DOUBLE is said elsewhere
            reason = f"it quantizes {_name(source)}, which is {_type_name(read)}"
            yield "quantized-type", reason, "quantize a floating-point tensor"
        return
    if read == ir.DataType.INT32:
        reason = f"it dequantizes {_name(source)}, which is INT32"
        yield "int32-dequantize", reason, "keep the bias in floating point"
    elif read not in (None, *QUANTIZED_TYPES) and _producer(source, "QuantizeLinear") is None:  # of a pair, Q is named
        yield "quantized-type", f"it dequantizes {_name(source)}, which is {_type_name(read)}", "quantize to INT8"


def _zero_point(linter: _Linter, node: ir.Node) -> Broken:
    zero_point = _optional(node, 2) if _is_quantizing(node) else None
    if zero_point is None:
        return
    array, scale = _constant(zero_point), _constant(_optional(node, 1))
    remedy = "quantize symmetrically, with a zero-point of constant zeros"
    if array is None:
        yield "zero-point", f"its zero-point {zero_point.name} is not constant", remedy
    elif np.any(array.astype(np.float64)):
        yield "zero-point", f"its zero-point {zero_point.name} is not zero", remedy
    if array is not None and scale is not None and array.size != scale.size:
        reason = f"it has {array.size} zero-points and {scale.size} scales"
        yield "zero-point-shape", reason, "give the zero-point the scale's shape"


def _scale(linter: _Linter, node: ir.Node) -> Broken:
    """The numbers in a scale, and their type."""
    scale = _optional(node, 1) if _is_quantizing(node) else None
    if scale is None:
        return
    source, kind = node.inputs[0], _input_type(scale)
    tensor = _float_type(source) if node.op_type == "QuantizeLinear" and source is not None else None
    if None not in (kind, tensor) and kind != tensor and not (linter.opset >= 23 and linter.rules.free_scale_type):
        reason = f"{_name(source)} is {_type_name(tensor)} and its scale {scale.name} is {_type_name(kind)}"
        yield "scale-type", reason, "store the scale in the tensor's type"
    if kind == ir.DataType.FLOAT16 and linter.opset < 19:
        reason = f"its scale is FLOAT16, which needs opset 19, and the graph is of opset {linter.opset}"
        yield "scale-opset", reason, "export with opset 19"
    array = _constant(scale)
    if array is None:
        yield "scale-constant", f"its scale {scale.name} is not stored in the graph", "calibrate, and store the scale"
        return
    if array.size > 1 and linter.opset < 13:
        reason = f"it has a scale per channel, which needs opset 13, and the graph is of opset {linter.opset}"
        yield "scale-opset", reason, "export with opset 13 or newer"
    numbers = array.astype(np.float64)
    if not np.all(numbers > 0):  # a NaN is not above zero either
        reason = f"its scale {scale.name} has a value that is not above zero"
        yield "scale-value", reason, "calibrate again; a channel of zeros needs some positive scale"
    elif not np.all((numbers >= SMALLEST_SCALE) & np.isfinite(numbers)):
        reason = f"its scale {scale.name} has a value that is infinite or subnormal in float32"
        yield "scale-range", reason, "calibrate again, with a floor for the scales"


def _channels(linter: _Linter, node: ir.Node) -> Broken:
    """The axis of the scales: one scale per output channel of a weight, one in all for an activation."""
    array = _constant(_optional(node, 1)) if _is_quantizing(node) else None
    source = node.inputs[0] if array is not None else None
    if array is None or source is None or linter.opset < 13:  # no axis before; said with the scale
        return
    shape = source.shape
    rank = shape.rank() if shape is not None else None
    blocked = node.attributes.get_int("block_size", 0) != 0
    axis = node.attributes.get_int("axis", 1)
    if axis < 0 and rank is not None:
        axis += rank
    if blocked:
        if rank is not None and axis < rank - 2:
            reason = f"its blocks lie along axis {axis} of {rank}"
            yield "block-axis", reason, "quantize per output channel"
        return
    if array.ndim > 1:
        reason = f"its scale has shape {list(array.shape)}"
        yield "scale-shape", reason, "use one number, or one axis with a number per channel"
        return
    if array.size <= 1:
        return
    weight = _quantized_source(node)
    if weight is None or _constant(weight) is None:
        if _producer(source, "QuantizeLinear") is None:  # of a pair, the Q is named
            reason = f"{_name(source)} is no constant and has {array.size} scales"
            yield "activation-axis", reason, "use one scale for the tensor; if it is a weight, fold the constants"
        return
    if "axis" not in node.attributes and linter.rules.default_axis != 1:
        read = "this TensorRT 0" if linter.rules.default_axis == 0 else "other versions of TensorRT 0"
        yield (
            "default-axis",
            f"it has a scale per channel and no axis: ONNX reads 1, {read}",
            "write the axis attribute",
        )
    length = shape[axis] if shape is not None and rank is not None and axis < rank else None
    if isinstance(length, int) and length != array.size:
        reason = f"it has {array.size} scales for the {length} channels of axis {axis}"
        yield "scale-length", reason, "give each channel one scale"
        return
    for reader, expected in _weight_readers(node):
        if axis != expected:
            reason = f"it scales axis {axis}, and the output channels of {_label(reader)} lie along axis {expected}"
            yield "weight-axis", reason, "quantize the weight per output channel"


_CHECKS: tuple[Callable[[_Linter, ir.Node], Broken], ...] = (
    _operator,
    _types,
    _integers,
    _quantized_type,
    _zero_point,
    _scale,
    _channels,
)


def _is_quantizing(node: ir.Node) -> bool:
    """Whether the parser takes `node` for a Q or DQ: it looks at the name alone."""
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _is_integer_operator(node: ir.Node) -> bool:
    return node.op_type in INTEGER_OPERATORS or node.op_type.startswith("QLinear")


def _is_stored(value: ir.Value) -> bool:
    """Whether `value` itself is an initializer or the output of Constant."""
    return _constant(value) is not None and (value.producer() is None or _producer(value, "Constant") is not None)


def _weight_readers(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """The layers that read what a DQ yields as their weight, each with the axis of its output channels."""
    if node.op_type != "DequantizeLinear":
        return
    for reader, index in node.outputs[0].uses():
        if index != 1 or reader.op_type not in COMPUTE_OPERATORS or node.outputs[0].shape is None:
            continue
        if reader.op_type == "MatMul":  # [..., K, N]
            yield reader, node.outputs[0].shape.rank() - 1
        elif reader.op_type == "Gemm":  # [K, N], with transB [N, K]
            yield reader, 0 if reader.attributes.get_int("transB", 0) else 1
        else:  # Conv [O, I/g, kH, kW], ConvTranspose [I, O/g, kH, kW]
            yield reader, 1 if reader.op_type == "ConvTranspose" else 0


def _quantized_source(node: ir.Node) -> ir.Value | None:
    """The tensor in front of a Q/DQ pair: what Q reads, or the integers if no Q made them."""
    source = node.inputs[0]
    quantize = _producer(source, "QuantizeLinear")
    return quantize.inputs[0] if quantize is not None else source


def _float_type(value: ir.Value) -> ir.DataType | None:
    """The floating-point type of `value`, None if it is none or not known; a DQ yields that of its scale."""
    dequantize = _producer(value, "DequantizeLinear")
    if dequantize is not None:
        declared = ir.DataType(dequantize.attributes.get_int("output_dtype", 0))
        kind = declared if declared != ir.DataType.UNDEFINED else _input_type(_optional(dequantize, 1))
    else:
        kind = _input_type(value)
    return kind if kind in FLOAT_TYPES else None


def _input_type(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.dtype if value.dtype is not None or value.const_value is None else value.const_value.dtype


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers of `value` if they stand in the graph: an initializer or Constant, possibly behind Identity or Cast.

    An initializer that is a graph input too counts: TensorRT takes it for a constant.
    """
    if value is None:
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value.numpy() if value.const_value is not None else None
    if producer.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(value)
        return tensor.numpy() if tensor is not None else None
    if producer.op_type == "Identity":
        return _constant(producer.inputs[0])
    array = _constant(producer.inputs[0]) if producer.op_type == "Cast" else None
    return array.astype(ir.DataType(producer.attributes.get_int("to", 1)).numpy()) if array is not None else None


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that yields `value`, if it is an `operator`."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == operator else None


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _since(node: ir.Node, opset: int) -> int:
    """The opset that gave the operator of `node` the definition that holds in `opset`; 0 if ONNX does not know it."""
    try:
        return int(onnx.defs.get_schema(node.op_type, min(opset, onnx.defs.onnx_opset_version())).since_version)
    except onnx.defs.SchemaError:
        return 0


def _name(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else "nothing"


def _type_name(kind: ir.DataType | None) -> str:
    return kind.name if kind is not None else "of no known type"


def _label(node: ir.Node) -> str:
    """The node's name; where it has none, the name of its first output."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type
