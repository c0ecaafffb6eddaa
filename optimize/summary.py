"""What each layer of an ONNX graph is, costs and sees, by stages and in all; for a batch of one image.

* Parameters are what is learnable: weights and biases of convolutions and matrix products (also behind
  DequantizeLinear, whose scales are not), scale and shift of normalizations (not their running statistics), slopes of
  PRelu, embeddings, and constants of more than one element that are added, multiplied or concatenated, such as a layer
  scale. An ONNX graph does not tell a learned constant from a fixed one: those of Sub and Div, which normalize by mean
  and deviation, do not count; the masks that Swin adds to the attention of shifted windows do, though they are fixed,
  just as its position biases, which are learned. A tensor that several nodes share counts once, where it is first used.
* MACs are those of convolutions and matrix products, as in `work.py`.
* Activations are the elements that these give (Radosavovic et al. 2020, "Designing Network Design Spaces").
* Bytes moved: each node reads its inputs and constants and writes its outputs once, as if nothing were fused. Reshapes
  move nothing. A tensor between QuantizeLinear and DequantizeLinear has the size of the integers, and these two move
  nothing themselves: they say of their neighbours in which type they read and write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgewright.optimize.one_image import for_one_image, image_inputs
from edgewright.optimize.receptive_field import Reach, Window, receptive_fields, window_of
from edgewright.optimize.stages import Placed, grouped_by_stage, module_of
from edgewright.optimize.work import LAYER_OPERATORS, macs
from edgewright.runtime.errors import ModelError

__all__ = ["Cost", "Layer", "Stage", "Summary", "summary", "total"]

LEARNED_INPUTS = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "ConvInteger": (1,), "QLinearConv": (3, 8),
    "Gemm": (0, 1, 2), "MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "Einsum": (0, 1),
    "BatchNormalization": (1, 2), "GroupNormalization": (1, 2), "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2), "RMSNormalization": (1,), "PRelu": (1,), "Gather": (0,),
    "GRU": (1, 2, 3), "LSTM": (1, 2, 3), "RNN": (1, 2, 3),
}  # fmt: skip
OPERANDS = ("Add", "Concat", "Mul", "Sum")
PASSING = ("Cast", "DequantizeLinear", "Expand", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze",
           "Transpose", "Unsqueeze")  # fmt: skip
"""What stands between a stored constant and the node that uses it."""
VIEWS = ("Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
MARKS = ("DequantizeLinear", "QuantizeLinear")
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool", "ReduceMean")
UNCOUNTED = ("Attention", "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan")
"""They multiply, or hold nodes that may; their products are not counted."""
JOINING = (
    "Add", "BatchNormalization", "Cast", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Mish", "Mul", "PRelu", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub",
    "Swish", "Tanh", "Transpose", *VIEWS,
)  # fmt: skip
"""A reader sees them as part of the layer in front of them, if they read nothing else."""


@dataclass(frozen=True)
class Cost:
    """What layers cost for one image; `complete` is False where something could not be counted and is left out.

    * bytes_of_constants: that part of `bytes_read` which is weights and other constants
    """

    parameters: int = 0
    macs: int = 0
    activations: int = 0
    bytes_read: int = 0
    bytes_of_constants: int = 0
    bytes_written: int = 0
    complete: bool = True

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def macs_per_byte(self) -> float:
        """Arithmetic intensity: multiply-accumulates per byte moved; 0 where nothing moves."""
        return self.macs / self.bytes_moved if self.bytes_moved else 0.0


@dataclass(frozen=True)
class Layer:
    """A node whose result depends on the image.

    * output: shape of the first output without its batch axis, None for a side that is not known
    * reach: the receptive field, None where it is not known
    * joins: index of the layer in whose row it is listed: its own, or that of a layer in front of it
    """

    name: str
    operator: str
    window: Window | None
    output: tuple[int | None, ...] | None
    cost: Cost
    reach: Reach | None
    joins: int

    @property
    def computes(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return self.operator in LAYER_OPERATORS


@dataclass(frozen=True)
class Stage:
    """Layers that belong together, as indices in their order; `output` is the shape of what the last one gives."""

    name: str
    layers: tuple[int, ...]
    output: tuple[int | None, ...] | None
    cost: Cost


@dataclass(frozen=True)
class Summary:
    """Layers in the order of the graph, stages in that of their first layers; notes say what could not be counted."""

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[Layer, ...]
    stages: tuple[Stage, ...]
    cost: Cost
    notes: tuple[str, ...]


def total(costs: Iterable[Cost]) -> Cost:
    """The sum; complete if all are."""
    listed = tuple(costs)
    return Cost(
        sum(cost.parameters for cost in listed),
        sum(cost.macs for cost in listed),
        sum(cost.activations for cost in listed),
        sum(cost.bytes_read for cost in listed),
        sum(cost.bytes_of_constants for cost in listed),
        sum(cost.bytes_written for cost in listed),
        all(cost.complete for cost in listed),
    )


def summary(model: ir.Model, input_shape: Sequence[int] | None = None) -> Summary:
    """The layers of `model`, which is left as it is: exported, folded, quantized or any other ONNX graph.

    `input_shape` `[C, H, W]` sets the sides that the graph leaves open. Raises `ModelError` if the size of the image is
    not known or contradicts the graph, or if there is no convolution or matrix product.
    """
    copy = for_one_image(model, input_shape)
    graph = copy.graph
    fields = receptive_fields(graph)
    nodes = [node for node in graph if node.op_type not in MARKS and any(output in fields for output in node.outputs)]
    if not any(node.op_type in (*LAYER_OPERATORS, *UNCOUNTED) or node.domain not in ("", "ai.onnx") for node in nodes):
        raise ModelError(
            "the graph has no convolution and no matrix product that depends on its input",
            "give the ONNX file of a network",
        )
    places = [_placed(node, fields) for node in nodes]
    stages = grouped_by_stage(places)
    stage_of = {index: number for number, (_, indices) in enumerate(stages) for index in indices}
    joins = _joins(nodes, stage_of)
    counted: set[ir.Value] = set()
    layers = tuple(_layer(node, fields, counted, joins[index]) for index, node in enumerate(nodes))
    return Summary(
        tuple((str(value.name), _known(value)[1:]) for value in image_inputs(graph)),
        layers,
        tuple(_stage(name, indices, layers) for name, indices in stages),
        total(layer.cost for layer in layers),
        _notes(nodes, layers),
    )


def _layer(node: ir.Node, fields: Mapping[ir.Value, Reach | None], counted: set[ir.Value], joins: int) -> Layer:
    reach, cost = fields.get(node.outputs[0]), _cost(node, fields, counted)
    return Layer(_name(node), node.op_type, window_of(node), _output(node), cost, reach, joins)


def _output(node: ir.Node) -> tuple[int | None, ...] | None:
    """Shape of the first output without its first axis, if it has more."""
    output = node.outputs[0]
    if output.shape is None:
        return None
    sides = _sides(output)
    return sides[1:] if len(sides) > 1 else sides


def _cost(node: ir.Node, fields: Mapping[ir.Value, Reach | None], counted: set[ir.Value]) -> Cost:
    """`counted` are the constants of earlier nodes, to which those of this one are added."""
    given = [v for v in node.inputs if v is not None and (v in fields or v.dtype != ir.DataType.INT64)]
    values = [*given, *(output for output in node.outputs if output.name)]
    complete = node.op_type not in UNCOUNTED and node.domain in ("", "ai.onnx") and all(map(_is_known, values))
    learned = [_stored(value) for value in _learned(node, fields)]
    fresh = [value for value in dict.fromkeys(learned) if value not in counted]
    counted.update(fresh)
    computes = node.op_type in LAYER_OPERATORS and complete
    reads, writes = ([], []) if node.op_type in VIEWS else (_reads(node, fields), node.outputs)
    return Cost(
        parameters=sum(_elements(value) for value in fresh),
        macs=macs(node) if computes else 0,
        activations=_elements(node.outputs[0]) if computes else 0,
        bytes_read=sum(map(_bytes_read, reads)),
        bytes_of_constants=sum(_bytes_read(value) for value in reads if value not in fields),
        bytes_written=sum(map(_bytes_written, writes)),
        complete=complete,
    )


def _learned(node: ir.Node, fields: Mapping[ir.Value, Reach | None]) -> list[ir.Value]:
    """Those inputs of `node` that are learnable."""
    if node.op_type in OPERANDS:
        return [value for value in node.inputs if value is not None and value not in fields and _elements(value) > 1]
    positions = LEARNED_INPUTS.get(node.op_type, ())
    inputs = [node.inputs[index] for index in positions if index < len(node.inputs)]
    return [value for value in inputs if value is not None and value not in fields]


def _stored(value: ir.Value) -> ir.Value:
    """The constant as the file holds it, before casts, transpositions and DequantizeLinear."""
    while (node := value.producer()) is not None and node.op_type in PASSING and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _reads(node: ir.Node, fields: Mapping[ir.Value, Reach | None]) -> list[ir.Value]:
    """Without scalars, and without axes and shapes, which are int64."""
    given = dict.fromkeys(value for value in node.inputs if value is not None and value.name)
    return [v for v in given if v in fields or (_elements(v) > 1 and v.dtype != ir.DataType.INT64)]


def _bytes_read(value: ir.Value) -> int:
    producer = value.producer()
    stored = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
    return _bytes(value, value.dtype if stored is None else stored.dtype)


def _bytes_written(value: ir.Value) -> int:
    """Once in each type in which it is read."""
    if not value.name:
        return 0
    readers = value.consumers()
    types = {reader.outputs[0].dtype for reader in readers if reader.op_type == "QuantizeLinear"}
    if value.is_graph_output() or not readers or any(reader.op_type != "QuantizeLinear" for reader in readers):
        types.add(value.dtype)
    return sum(_bytes(value, dtype) for dtype in types)


def _bytes(value: ir.Value, dtype: ir.DataType | None) -> int:
    return math.ceil(_elements(value) * (dtype or ir.DataType.FLOAT).itemsize)


def _elements(value: ir.Value) -> int:
    return math.prod(_known(value))


def _known(value: ir.Value) -> tuple[int, ...]:
    """A side that is not known makes a tensor of no elements: it is left out of sums."""
    return (0,) if value.shape is None else tuple(side or 0 for side in _sides(value))


def _sides(value: ir.Value) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in value.shape or ())


def _is_known(value: ir.Value) -> bool:
    return value.shape is not None and None not in _sides(value)


def _placed(node: ir.Node, fields: Mapping[ir.Value, Reach | None]) -> Placed:
    output, reach = node.outputs[0], fields.get(node.outputs[0])
    sides = _known(output)
    if reach is not None and len(reach.axes) == len(sides) > 2:
        plane = math.prod(side for side, axes in zip(sides, reach.axes, strict=True) if axes)
    else:
        plane = math.prod(sides[2:])  # as if it were NCHW
    return Placed(
        module_of(_name(node)), max(plane, 1), _output(node), node.op_type in LAYER_OPERATORS, node.op_type in POOLS
    )


def _joins(nodes: Sequence[ir.Node], stage_of: Mapping[int, int]) -> list[int]:
    """For each node the index of the one in whose row it is listed."""
    row_of: dict[ir.Value, int] = {}
    joins: list[int] = []
    for index, node in enumerate(nodes):
        rows = {
            row_of.get(_unmarked(value)) for value in node.inputs if value is not None and _unmarked(value) in row_of
        }
        row = rows.pop() if len(rows) == 1 and node.op_type in JOINING else None
        joins.append(row if row is not None and stage_of[row] == stage_of[index] else index)
        row_of.update((output, joins[-1]) for output in node.outputs)
    return joins


def _unmarked(value: ir.Value) -> ir.Value:
    """The tensor in front of QuantizeLinear and DequantizeLinear."""
    while (node := value.producer()) is not None and node.op_type in MARKS and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _stage(name: str, indices: Sequence[int], layers: Sequence[Layer]) -> Stage:
    return Stage(name, tuple(indices), layers[indices[-1]].output, total(layers[index].cost for index in indices))


def _notes(nodes: Sequence[ir.Node], layers: Sequence[Layer]) -> tuple[str, ...]:
    uncounted = [_name(node) for node in nodes if node.op_type in UNCOUNTED or node.domain not in ("", "ai.onnx")]
    shapeless = [layer.name for layer in layers if not layer.cost.complete and layer.name not in uncounted]
    notes = []
    if uncounted:
        notes.append(f"not counted, so that the totals are too small: {_listed(uncounted)}")
    if shapeless:
        notes.append(f"of unknown shape, so that the totals are too small: {_listed(shapeless)}")
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type
