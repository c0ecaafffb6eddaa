"""Cleans what torch's exporter leaves behind when its own optimizer is off (that optimizer would fold BatchNorm).

What depends on nothing but constants is computed, zero biases that stand for "no bias" and flattening by the run-time
batch size become what a person would have written, and nodes and tensors are called after the module they come from:
`features.1.0.block.1.fc2/Conv`. The exporter's metadata (stack traces with paths of the machine) is removed.
"""

from __future__ import annotations

import ast
from collections import Counter

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript.optimizer import fold_constants

__all__ = ["canonicalize"]

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # where the exporter knows no module
FOLDED_ELEMENTS = 1 << 26  # 256 MiB of float32: the weight of any layer, standardized or transposed


def canonicalize(model: ir.Model) -> None:
    """Cleans a freshly exported `model` in place; its outputs stay what they are."""
    fold_constants(model, input_size_limit=FOLDED_ELEMENTS, output_size_limit=FOLDED_ELEMENTS)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    IdentityEliminationPass()(model)
    for node in tuple(model.graph):
        _drop_zero_bias(node)
        _merge_padding(node)
        _keep_batch_by_copying(model.graph, node)
        _name_global_pooling(node)
    RemoveUnusedNodesPass()(model)
    ShapeInferencePass()(model)  # the exporter leaves the inside of decomposed operators, such as SiLU, without shapes
    _name_after_modules(model.graph)
    model.functions.clear()
    _remove_metadata(model)
    model.graph.name = "main"


def _remove_metadata(model: ir.Model) -> None:
    ClearMetadataAndDocStringPass()(model)  # of the graph and its nodes
    model.metadata_props.clear()
    model.doc_string = None
    values = (
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(v for node in model.graph for v in node.outputs),
    )
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def _drop_zero_bias(node: ir.Node) -> None:
    if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
        return
    bias = ir.convenience.get_const_tensor(node.inputs[2]) if node.inputs[2] is not None else None
    if bias is not None and not bias.numpy().any():
        node.resize_inputs(2)


def _merge_padding(node: ir.Node) -> None:
    """Pad with zeros, then Conv: one Conv with (asymmetric) pads."""
    source = node.inputs[0] if node.op_type == "Conv" else None
    pad = source.producer() if source is not None else None
    if source is None or pad is None or pad.op_type != "Pad" or len(source.uses()) != 1 or source.is_graph_output():
        return
    amounts = ir.convenience.get_const_tensor(pad.inputs[1]) if pad.inputs[1] is not None else None
    if amounts is None or pad.attributes.get_string("mode", "constant") != "constant" or not _pads_with_zero(pad):
        return
    begin, end = np.split(amounts.numpy(), 2)
    if begin[:2].any() or end[:2].any() or (begin < 0).any() or (end < 0).any():
        return
    rank = len(begin) - 2
    own = np.array(node.attributes.get_ints("pads", (0,) * 2 * rank))
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return
    merged = own + np.concatenate([begin[2:], end[2:]])
    node.attributes["pads"] = ir.AttrInt64s("pads", merged.tolist())
    node.replace_input_with(0, pad.inputs[0])


def _pads_with_zero(pad: ir.Node) -> bool:
    has_axes = len(pad.inputs) > 3 and pad.inputs[3] is not None
    if has_axes or len(pad.inputs) < 3 or pad.inputs[2] is None:
        return not has_axes
    value = ir.convenience.get_const_tensor(pad.inputs[2])
    return value is not None and not value.numpy().any()


def _keep_batch_by_copying(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape to [batch read at run time, 1280] as Reshape to the constant [0, 1280]; 0 copies the input's axis."""
    if node.op_type != "Reshape" or node.inputs[1] is None or ir.convenience.get_const_tensor(node.inputs[1]):
        return
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return
    batch, *rest = result.shape
    if isinstance(batch, int) or batch != source.shape[0] or not all(isinstance(side, int) for side in rest):
        return
    shape = np.array([0, *(int(side) for side in rest if isinstance(side, int))], np.int64)
    name = f"{result.name}/shape"
    constant = ir.Value(name=name, shape=ir.Shape([len(shape)]), type=ir.TensorType(ir.DataType.INT64))
    constant.const_value = ir.tensor(shape, name=name)
    graph.register_initializer(constant)
    node.replace_input_with(1, constant)
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _name_global_pooling(node: ir.Node) -> None:
    """ReduceMean over height and width is GlobalAveragePool, for which quantized kernels exist."""
    if node.op_type != "ReduceMean" or len(node.inputs) != 2 or node.inputs[0] is None or node.inputs[1] is None:
        return
    axes = ir.convenience.get_const_tensor(node.inputs[1])
    shape = node.inputs[0].shape
    keeps = node.attributes.get_int("keepdims", 1) == 1
    if axes is None or shape is None or shape.rank() != 4 or not keeps:
        return
    if sorted(axis % 4 for axis in axes.numpy().tolist()) != [2, 3]:
        return
    node.resize_inputs(1)
    node.attributes.clear()
    node.op_type = "GlobalAveragePool"


def _name_after_modules(graph: ir.Graph) -> None:
    seen: Counter[str] = Counter()
    kept = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
        module = scopes[-2] if len(scopes) > 1 and scopes[-2] != NO_MODULE else ""
        name = f"{module}/{node.op_type}" if module else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for position, output in enumerate(node.outputs):
            if output.name not in kept:
                output.name = node.name if position == 0 else f"{node.name}:{position}"
