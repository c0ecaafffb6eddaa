"""A foreign graph in the form that our own exporter writes: names, opset, constants computed, any batch.

    inline functions → fix height and width → convert the opset → free the batch → clean

The batch becomes dynamic where a fixed one stands in nothing but shapes: in that of the input, in inferred shapes,
which are dropped, and in the targets of Reshape, where the batch as a number becomes 0, "as in the input". Whether
that was all of it is not decided here: whoever calls this compares the results at two batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import (
    InlinePass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    ShapeInferencePass,
)
from onnxscript.optimizer import fold_constants

from edgewright.export.canonicalize import canonicalize
from edgewright.export.conventions import BATCH_NAME, INPUT_NAME, OUTPUT_NAME, check_opset, first_line
from edgewright.export.entries import InputShape
from edgewright.export.onnx_header import Header, opset_of
from edgewright.export.onnx_session import cpu_session
from edgewright.runtime.errors import ExportError

__all__ = ["rewritten"]

IR_VERSION = 10
FLOATS = (None, ir.DataType.FLOAT)
CONTROL_FLOW = ("If", "Loop", "Scan")
FOLDED_ELEMENTS = 1 << 26  # as in canonicalize.py

Shapes = Mapping[str, tuple[int, ...]]


def rewritten(proto: onnx.ModelProto, header: Header, input_shape: InputShape, *, opset: int) -> bytes:
    """Serialized ONNX: input "images" `[batch, C, H, W]`, output "logits" with the batch as its first axis.

    Nodes keep their names where those are unique. Raises `ExportError` for what cannot be converted:
    operators without a converter, control flow that depends on the image, floats other than float32.
    """
    check_opset(opset)
    own = header.batch or 1
    plain = _converted(_plain(proto), opset)
    before = _shapes(_with_input(plain, header, (own, *input_shape)))
    model = ir.from_proto(_with_input(plain, header, (BATCH_NAME, *input_shape)))
    _free_batch(model, before, own)
    after = _shapes(_with_input(ir.to_proto(model), header, (own + 1, *input_shape)))
    _annotate(model.graph, before, after, own)
    _clean(model)
    _refuse_unsupported(model)
    _name_interface(model.graph)
    return _serialized(model)


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """One graph without functions, in which no initializer is an input and all names are there and unique."""
    model = ir.from_proto(proto)
    InlinePass()(model)
    RemoveInitializersFromInputsPass()(model)
    model.functions.clear()
    used = {node.domain for node in model.graph.all_nodes()} | {""}
    for domain in set(model.opset_imports) - used:
        del model.opset_imports[domain]
    NameFixPass()(model)
    model.ir_version = IR_VERSION  # up to 3, initializers had to be inputs
    return ir.to_proto(model)


def _converted(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    written = opset_of(proto)
    if written == opset:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, opset)
    except Exception as error:  # the converter raises what its C++ code throws: mostly RuntimeError, also IndexError
        raise ExportError(
            f"the graph cannot be converted from opset {written} to {opset}: {first_line(error)}",
            f"export it with opset {opset}",
        ) from error


def _shapes(proto: onnx.ModelProto) -> Shapes:
    """The shape of each tensor in a run on the input's own shape, by name; none if it does not run.

    Shape inference would not see through sizes that are computed on the way, such as channels // 2.
    """
    graph = proto.graph
    (image,) = graph.input
    names = [name for node in graph.node for name in node.output if name]
    graph.ClearField("output")
    for index, name in enumerate(names):
        measured = f"shape of tensor {index}"
        graph.node.append(onnx.helper.make_node("Shape", [name], [measured]))
        graph.output.append(onnx.helper.make_tensor_value_info(measured, onnx.TensorProto.INT64, (None,)))
    sides = tuple(dim.dim_value for dim in image.type.tensor_type.shape.dim)
    try:
        zeros = np.zeros(sides, np.float32)
        found = cpu_session(proto.SerializeToString(), "the graph").run(None, {image.name: zeros})
    except Exception:  # the batch cannot be changed; the comparison that follows says so
        return {}
    shapes = {name: tuple(shape.tolist()) for name, shape in zip(names, found, strict=True)}
    return {image.name: sides, **shapes}


def _with_input(proto: onnx.ModelProto, header: Header, shape: tuple[int | str, ...]) -> onnx.ModelProto:
    """A copy in which the input has `shape` and no other tensor has one."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _forget_known(copy.graph)
    (image,) = (value for value in copy.graph.input if value.name == header.input_name)
    image.CopyFrom(onnx.helper.make_tensor_value_info(image.name, onnx.TensorProto.FLOAT, shape))
    return copy


def _forget_known(graph: onnx.GraphProto) -> None:
    graph.ClearField("value_info")
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                _forget_known(inner)


def _free_batch(model: ir.Model, shapes: Shapes, own: int) -> None:
    """Takes the graph's `own` batch out of the targets of its Reshapes; `shapes` are those at that batch."""
    for node in model.graph:
        _end_dropout(node)
    fold_constants(model, input_size_limit=FOLDED_ELEMENTS, output_size_limit=FOLDED_ELEMENTS)
    for node in tuple(model.graph):
        _free_reshape(model.graph, node, shapes, own)
    for value in (value for node in model.graph for value in node.outputs):
        value.shape = None  # may have been inferred from a fixed batch
    ShapeInferencePass()(model)  # types, and shapes where a run cannot say them


def _annotate(graph: ir.Graph, before: Shapes, after: Shapes, own: int) -> None:
    """Gives each tensor the shape that it has at any batch: what is the same at both batches is a number."""
    for value in (value for node in graph for value in node.outputs):
        one, other = before.get(value.name or ""), after.get(value.name or "")
        if value.type is None or one is None or other is None or len(one) != len(other):
            continue
        sides: list[int | str | None] = [a if a == b else None for a, b in zip(one, other, strict=True)]
        if (one[:1], other[:1]) == ((own,), (own + 1,)):
            sides[0] = BATCH_NAME
        value.shape = ir.Shape(sides)


def _clean(model: ir.Model) -> None:
    """`canonicalize`, with the names that the graph came with."""
    for node in tuple(model.graph):
        _read_shape(node)
        _settle_reshape(model.graph, node)
    names = {node: (node.name, [value.name for value in node.outputs]) for node in model.graph}
    canonicalize(model)
    _restore_names(model.graph, names)
    _flatten_lone_axes(model.graph)


def _end_dropout(node: ir.Node) -> None:
    """Dropout outside of training is Identity, which is then removed."""
    if node.op_type != "Dropout" or node.domain or any(value.uses() for value in node.outputs[1:]):
        return
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        training = ir.convenience.get_const_tensor(node.inputs[2])
        if training is None or training.numpy().any():
            return
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    node.resize_outputs(1)


def _free_reshape(graph: ir.Graph, node: ir.Node, shapes: Shapes, own: int) -> None:
    """Reshape to [1, 1280] as Reshape to [0, 1280], where 1 is the batch of the graph and of the reshaped tensor."""
    if node.op_type != "Reshape" or node.domain or node.inputs[0] is None or node.inputs[1] is None:
        return
    constant = ir.convenience.get_const_tensor(node.inputs[1])
    target = np.array([] if constant is None else constant.numpy(), np.int64)
    literal_zero = node.attributes.get_int("allowzero", 0) == 1 and not target.all()
    if not len(target) or target[0] != own or literal_zero:
        return
    if shapes.get(node.inputs[0].name or "", ())[:1] == (own,):
        target[0] = 0
    elif (target > 0).all():
        target[0] = -1
    else:
        return
    _retarget(graph, node, target)


def _settle_reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape to a target that is computed, but whose sides behind the batch are always the same."""
    data, result = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op_type != "Reshape" or node.domain or data is None or node.inputs[1] is None:
        return
    if ir.convenience.get_const_tensor(node.inputs[1]) is not None or data.shape is None or result.shape is None:
        return
    batch, *rest = result.shape
    sides = [side for side in rest if isinstance(side, int)]
    if data.shape[0] == batch == BATCH_NAME and len(sides) == len(rest) and all(sides):
        _retarget(graph, node, np.array([0, *sides], np.int64))


def _retarget(graph: ir.Graph, node: ir.Node, target: NDArray[np.int64]) -> None:
    """Gives a Reshape a constant target, in which 0 stands for "as in the input"."""
    name = f"{node.outputs[0].name}/shape"
    shape = ir.Value(name=name, shape=ir.Shape([len(target)]), type=ir.TensorType(ir.DataType.INT64))
    shape.const_value = ir.tensor(target, name=name)
    graph.register_initializer(shape)
    node.replace_input_with(1, shape)
    node.attributes.pop("allowzero", None)


def _read_shape(node: ir.Node) -> None:
    """Sides taken out of a Shape: constants, where they are the same at any batch."""
    source = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
    if source is None or source.op_type != "Shape" or source.attributes or node.inputs[1] is None:
        return
    index, measured = ir.convenience.get_const_tensor(node.inputs[1]), source.inputs[0]
    if index is None or measured is None or measured.shape is None:
        return
    sides = [side if isinstance(side, int) else -1 for side in measured.shape]
    taken = np.array(sides, np.int64)[index.numpy()]
    if (taken >= 0).all():
        node.op_type = "Constant"
        node.resize_inputs(0)
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(taken))


def _restore_names(graph: ir.Graph, names: Mapping[ir.Node, tuple[str | None, list[str | None]]]) -> None:
    """Each node is called as before, new ones by their operator; the second of a name gets a number."""
    given = {name for name, _ in names.values()}
    seen: Counter[str] = Counter()
    for node in graph:
        own, outputs = names.get(node, (None, []))
        name = own or node.op_type
        seen[name] += 1
        while seen[name] > 1 and f"{name}_{seen[name]}" in given:
            seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for value, before in zip(node.outputs, outputs, strict=False):
            if before and not value.is_graph_output():
                value.name = before


def _flatten_lone_axes(graph: ir.Graph) -> None:
    """[batch, classes, 1, 1] as [batch, classes]."""
    (output,) = graph.outputs
    if output.shape is None or output.shape.rank() < 3 or any(side != 1 for side in output.shape[2:]):
        return
    flatten = ir.Node("", "Flatten", [output], [ir.AttrInt64("axis", 1)], name="logits/Flatten")
    flatten.outputs[0].type = output.type
    flatten.outputs[0].shape = ir.Shape(output.shape[:2])
    graph.append(flatten)
    graph.outputs[0] = flatten.outputs[0]


def _refuse_unsupported(model: ir.Model) -> None:
    (output,) = model.graph.outputs
    if output.producer() is None:
        raise ExportError("the output does not depend on the image", "give the graph of a classifier")
    for node in model.graph:
        if node.op_type in CONTROL_FLOW and not node.domain:
            raise ExportError(
                f"{node.op_type} {node.name!r} is control flow that depends on the image",
                "export the branch that is taken, without conditions or loops",
            )
        for value in node.outputs:
            if value.dtype is not None and value.dtype.is_floating_point() and value.dtype not in FLOATS:
                raise ExportError(
                    f"{node.op_type} {node.name!r} computes in {value.dtype.name}, expected FLOAT",
                    "give the graph in float32; casting to FP16 comes later",
                )


def _name_interface(graph: ir.Graph) -> None:
    """The input is called "images" and the output "logits", and nothing else is."""
    (image,), (output,) = graph.inputs, graph.outputs
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = {value.name for value in values}
    for value in values:
        if value.name in (INPUT_NAME, OUTPUT_NAME) and value is not output:
            name = f"{value.name}/inner"
            while name in taken:
                name += "_"
            value.name = name
            taken.add(name)
    image.name, output.name = INPUT_NAME, OUTPUT_NAME


def _serialized(model: ir.Model) -> bytes:
    """Checked; the output has a shape whose first axis is the batch."""
    proto = ir.to_proto(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the shapes of the graph contradict each other: {first_line(error)}") from error
    (output,) = inferred.graph.output
    dims = output.type.tensor_type.shape.dim
    if len(dims) < 2 or output.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(output.type.tensor_type.elem_type)
        shape = [dim.dim_param or dim.dim_value or "?" for dim in dims]
        raise ExportError(f"the output is {kind} {shape}, expected float32 [batch, classes]")
    dims[0].dim_param = BATCH_NAME
    proto.graph.output[0].CopyFrom(output)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the rewritten graph is not valid ONNX: {first_line(error)}") from error
    content: bytes = proto.SerializeToString()
    return content
