"""Parameters, multiply-accumulates and bytes by hand arithmetic on small graphs, and what cannot be counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgewright.optimize.stages import Placed, grouped_by_stage, module_of
from edgewright.optimize.summary import Layer, Summary, summary
from edgewright.runtime.errors import ModelError
from textual_graphs import graph

LOGITS = "float[N, C] y"


def layer(found: Summary, operator: str) -> Layer:
    (only,) = (layer for layer in found.layers if layer.operator == operator)
    return only


def of(body: str, **arrays: Any) -> Summary:
    return summary(graph(body, **arrays))


# --- Convolutions and matrix products ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "weight", "output", "macs"),
    [
        ("pads = [1, 1, 1, 1]", (5, 4, 3, 3), (5, 8, 8), 5 * 64 * 4 * 9),
        ("strides = [2, 2]", (5, 4, 3, 3), (5, 3, 3), 5 * 9 * 4 * 9),
        ("dilations = [2, 2]", (5, 4, 3, 3), (5, 4, 4), 5 * 16 * 4 * 9),
        ("group = 2", (6, 2, 3, 3), (6, 6, 6), 6 * 36 * 2 * 9),
        ("group = 4", (4, 1, 3, 3), (4, 6, 6), 4 * 36 * 9),
    ],
)
def test_a_convolution(attributes: str, weight: tuple[int, ...], output: tuple[int, ...], macs: int) -> None:
    bias = (weight[0],)
    found = of(f"y = Conv <{attributes}> (x, w, b)", inputs="float[N, 4, 8, 8] x", w=weight, b=bias)
    (conv,) = found.layers
    elements, written = int(np.prod(weight)) + weight[0], int(np.prod(output))
    assert conv.output == output
    assert (conv.cost.parameters, conv.cost.macs, conv.cost.activations) == (elements, macs, written)
    assert conv.cost.bytes_of_constants == 4 * elements
    assert conv.cost.bytes_read == 4 * (4 * 64 + elements)
    assert conv.cost.bytes_written == 4 * written
    assert conv.cost.macs_per_byte == macs / (4 * (256 + elements + written))
    assert found.cost == conv.cost


def test_a_transposed_convolution_multiplies_each_input() -> None:
    found = of("y = ConvTranspose <strides = [2, 2]> (x, w)", inputs="float[N, 4, 8, 8] x", w=(4, 3, 2, 2))
    assert found.cost.macs == 4 * 64 * 3 * 4
    assert found.layers[0].output == (3, 16, 16)


def test_half_precision_halves_the_bytes() -> None:
    arrays = {"w": np.ones((5, 3, 1, 1)), "b": np.ones(5)}
    costs = [
        of("y = Conv (x, w, b)", inputs=f"{kind}[N, 3, 8, 8] x", outputs=f"{kind}[N, C, H, L] y",
           **{name: array.astype(dtype) for name, array in arrays.items()}).cost
        for kind, dtype in (("float", np.float32), ("float16", np.float16))
    ]  # fmt: skip
    assert costs[0].bytes_moved == 2 * costs[1].bytes_moved == 4 * (192 + 20 + 320)
    assert costs[0].parameters == costs[1].parameters == 20


QUANTIZED = """
xq = QuantizeLinear (x, xs, xz)
xd = DequantizeLinear (xq, xs, xz)
wd = DequantizeLinear <axis = 0> (w, ws, wz)
a = Conv (xd, wd, b)
aq = QuantizeLinear (a, xs, xz)
ad = DequantizeLinear (aq, xs, xz)
y = {}
"""
QUANTIZED_ARRAYS = {
    "xs": np.float32(0.1), "xz": np.uint8(3), "ws": np.ones(5, np.float32), "wz": np.zeros(5, np.int8),
    "w": np.ones((5, 3, 1, 1), np.int8), "b": np.ones(5, np.float32),
}  # fmt: skip


def quantized(last: str) -> Summary:
    return of(QUANTIZED.format(last), **QUANTIZED_ARRAYS)


def test_between_quantize_and_dequantize_a_tensor_has_the_size_of_integers() -> None:
    found = quantized("Relu (ad)")
    assert [layer.operator for layer in found.layers] == ["Conv", "Relu"]
    conv, relu = found.layers
    assert conv.cost.parameters == 15 + 5  # no scales, no zero-points
    assert conv.cost.bytes_read == 192 + 15 + 4 * 5
    assert conv.cost.bytes_written == 320
    assert (relu.cost.bytes_read, relu.cost.bytes_written) == (320, 4 * 320)


def test_a_tensor_that_is_also_read_as_a_float_is_written_twice() -> None:
    conv = layer(quantized("Add (ad, a)"), "Conv")
    assert conv.cost.bytes_written == 320 + 4 * 320


# --- What is learnable -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "arrays", "learned"),
    [
        ("BatchNormalization (a, s, s2, m, v)", {"s": (3,), "s2": (3,), "m": (3,), "v": np.ones(3, np.float32)}, 6),
        ("InstanceNormalization (a, s, s2)", {"s": (3,), "s2": (3,)}, 6),
        ("LayerNormalization (a, s, s2)", {"s": (8,), "s2": (8,)}, 16),
        ("PRelu (a, s)", {"s": (1,)}, 1),
        ("PRelu (a, s)", {"s": (3, 1, 1)}, 3),
        ("Mul (a, s)", {"s": (3, 1, 1)}, 3),
        ("Add (s, a)", {"s": (3, 1, 1)}, 3),
        ("Mul (a, s)", {"s": np.float32(3.0)}, 0),  # of a hard-swish
        ("Add (a, s)", {"s": np.array([6.0], np.float32)}, 0),
        ("Sub (a, s)", {"s": (3, 1, 1)}, 0),  # a mean
        ("Div (a, s)", {"s": np.ones((3, 1, 1), np.float32)}, 0),
        ("Clip (a, s, s2)", {"s": np.float32(0), "s2": np.float32(6)}, 0),
        ("Relu (a)", {}, 0),
        ("Conv (a, w)", {}, 0),  # the same weight a second time
    ],
)
def test_learnable_parameters(tail: str, arrays: dict[str, Any], learned: int) -> None:
    found = of(f"a = Conv (x, w)\ny = {tail}", w=(3, 3, 1, 1), **arrays)
    assert found.layers[0].cost.parameters == 9
    assert found.layers[1].cost.parameters == learned
    assert found.cost.parameters == 9 + learned


def test_a_weight_behind_a_cast_and_a_transposition_is_counted_as_it_is_stored() -> None:
    body = "h = Cast <to = 1> (w)\nt = Transpose (h)\nf = Flatten (x)\ny = MatMul (f, t)"
    found = of(body, outputs=LOGITS, w=np.ones((7, 192), np.float16))
    assert (found.cost.parameters, found.cost.macs) == (7 * 192, 7 * 192)
    assert [layer.operator for layer in found.layers] == ["Flatten", "MatMul"]


def test_reshapes_move_nothing() -> None:
    found = of("f = Flatten (x)\ny = MatMul (f, w)", outputs=LOGITS, w=(192, 7))
    assert layer(found, "Flatten").cost.bytes_moved == 0
    assert layer(found, "MatMul").cost.bytes_moved == 4 * (192 + 192 * 7 + 7)


# --- Any graph ---------------------------------------------------------------------------------------------------


def fixed_batch(batch: int) -> Summary:
    body = "a = Conv (x, w)\nf = Reshape (a, s)\ny = MatMul (f, v)"
    shape = np.array([batch, -1])
    return of(body, inputs=f"float[{batch}, 3, 8, 8] x", outputs=LOGITS, w=(4, 3, 3, 3), v=(144, 7), s=shape)


def test_a_fixed_batch_counts_as_one_image() -> None:
    one, eight = fixed_batch(1), fixed_batch(8)
    assert one.cost == eight.cost
    assert one.cost.macs == 4 * 36 * 27 + 144 * 7
    assert [layer.output for layer in eight.layers] == [(4, 6, 6), (144,), (7,)]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_fixed_batch_is_followed_to_where_reshapes_and_transpositions_take_it(batch: int) -> None:
    body = "r = Reshape (x, a)\nt = Transpose <perm = [2, 0, 1]> (r)\nm = MatMul (t, w)\n"
    shapes = {"a": np.array([batch, 3, 17]), "b": np.array([17 * batch, 5])}
    found = of(f"{body}f = Reshape (m, b)\ny = MatMul (f, v)", inputs=f"float[{batch}, 3, 1, 17] x",
               outputs=LOGITS, w=(3, 5), v=(5, 2), **shapes)  # fmt: skip
    assert [layer.cost.macs for layer in found.layers if layer.computes] == [17 * 3 * 5, 17 * 5 * 2]
    assert [layer.cost.bytes_written for layer in found.layers if layer.computes] == [4 * 17 * 5, 4 * 17 * 2]
    assert found.cost.complete


ATTENTION = """
r = Reshape (x, split)
q = Transpose <perm = [1, 0, 2]> (r)
k = Transpose <perm = [1, 2, 0]> (r)
s = MatMul (q, k)
p = Softmax <axis = 2> (s)
v = MatMul (p, q)
t = Transpose <perm = [1, 0, 2]> (v)
y = Reshape (t, joined)
"""


def test_heads_that_are_merged_with_a_fixed_batch() -> None:
    """Six tokens of two heads of four, as `nn.MultiheadAttention` has them: two products of 2 · 6 · 6 · 4."""
    shapes = {"split": np.array([6, 8 * 2, 4]), "joined": np.array([6, 8, 8])}
    found = of(f"i = Transpose <perm = [1, 0, 2]> (z)\n{ATTENTION.replace('(x,', '(i,')}",
               inputs="float[8, 6, 8] z", outputs="float[A, B, C] y", **shapes)  # fmt: skip
    assert [layer.cost.macs for layer in found.layers if layer.computes] == [2 * 6 * 6 * 4] * 2
    assert found.cost.complete
    assert found.cost.activations == 2 * 6 * 6 + 2 * 6 * 4


@pytest.mark.parametrize(
    "body",
    [
        "m = ReduceMean <keepdims = 0> (x, zero)\ny = MatMul (m, w)",  # over the images
        "t = Transpose <perm = [1, 2, 3, 0]> (x)\ny = MatMul (t, u)",
        "t = Transpose <perm = [1, 0, 2, 3]> (x)\ny = Conv (t, c)",
    ],
)
def test_a_fixed_batch_that_is_summed_over_is_not_divided_but_said(body: str) -> None:
    arrays: dict[str, Any] = {"zero": np.array([0]), "w": (8, 5), "u": (8, 5), "c": (8, 8, 1, 1)}
    used = {name: array for name, array in arrays.items() if f"{name})" in body}
    outputs = "float[A, B, C] y" if "Reduce" in body else "float[A, B, C, D] y"
    found = of(body, inputs="float[8, 3, 8, 8] x", outputs=outputs, **used)
    assert (found.layers[-1].output, found.layers[-1].cost.macs, found.cost.complete) == (None, 0, False)
    assert "unknown shape" in found.notes[0]


def test_a_dynamically_quantized_product_of_a_fixed_batch() -> None:
    """The scale is one for all images: it holds no batch."""
    body = "q, s, z = DynamicQuantizeLinear (x)\ni = MatMulInteger (q, w, z)\nf = Cast <to = 1> (i)\ny = Mul (f, s)"
    found = of(body, inputs="float[8, 6] x", outputs=LOGITS, w=np.ones((6, 5), np.int8))
    assert found.cost.complete
    assert (found.cost.macs, found.layers[-1].output) == (30, (5,))


def test_the_model_is_left_as_it_is() -> None:
    model = graph("y = Conv (x, w)", w=(3, 3, 3, 3))
    before = ir.to_proto(model).SerializeToString()
    summary(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_an_old_file_without_names_shapes_or_types() -> None:
    """Opset 9, initializers among the inputs, as files from 2019 are."""
    body = "a = Conv (x, w)\nb = Relu (a)\np = GlobalAveragePool (b)\nf = Flatten (p)\ny = Gemm (f, v, c)"
    inputs = "float[1, 3, 8, 8] x, float[4, 3, 3, 3] w"
    model = graph(body, inputs, LOGITS, opset=9, w=(4, 3, 3, 3), v=(4, 2), c=(2,))
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        node.name = ""
    found = summary(ir.from_proto(proto))
    assert found.inputs == (("x", (3, 8, 8)),)
    assert (found.cost.parameters, found.cost.macs) == (108 + 8 + 2, 4 * 36 * 27 + 8)
    assert [(stage.name, stage.output) for stage in found.stages] == [("6×6", (4, 6, 6)), ("head", (2,))]
    assert found.cost.complete


def test_a_missing_image_size_is_asked_for_and_taken() -> None:
    model = graph("y = Conv (x, w)", "float[N, 3, H, L] x", w=(4, 3, 3, 3))
    with pytest.raises(ModelError, match=r"\[N, 3, H, L\] does not say how large an image is; give it with"):
        summary(model)
    assert summary(model, (3, 10, 12)).cost.macs == 4 * 8 * 10 * 27
    with pytest.raises(ModelError, match="does not take images"):
        summary(model, (1, 10, 12))


@pytest.mark.parametrize(
    "body", ["y = Relu (x)", "a = MatMul (v, v)\ns = ReduceSum <keepdims = 0> (a)\ny = Add (x, s)"]
)
def test_a_graph_without_layers_is_refused(body: str) -> None:
    arrays: dict[str, Any] = {"v": (2, 2)} if "v" in body else {}
    with pytest.raises(ModelError, match="no convolution and no matrix product that depends on its input"):
        summary(graph(body, **arrays))


def test_control_flow_is_not_counted_and_said() -> None:
    branch = "{} () => (float[1, 3, 8, 8] {}) {{ {} = Relu (a) }}"
    branches = [branch.format(name, out, out) for name, out in (("then", "t"), ("other", "e"))]
    body = f"a = Conv (x, w)\nc = If (b) <then_branch = {branches[0]}, else_branch = {branches[1]}>\ny = Conv (c, v)"
    found = summary(graph(body, "float[1, 3, 8, 8] x", w=(3, 3, 1, 1), v=(3, 3, 1, 1), b=np.array(True)))
    assert not found.cost.complete
    assert found.cost.macs == 2 * 9 * 64
    assert found.layers[1].reach is None
    assert found.layers[0].cost.complete
    assert [note for note in found.notes if "not counted" in note and note.endswith(": c")]


# --- Stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layer1.0.conv1/Conv", "layer1.0.conv1"),
        ("layer1.0.relu/Relu_2", "layer1.0.relu"),
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("Conv_17", ""),
        ("", ""),
    ],
)
def test_modules_of_names(name: str, module: str) -> None:
    assert module_of(name) == module


def stages(*nodes: tuple[str, int, str]) -> list[tuple[str, list[int]]]:
    """Nodes as (module, side of the map, kind: c computes, p pools, anything else does neither)."""
    return grouped_by_stage([Placed(name, side**2, (side,), kind == "c", kind == "p") for name, side, kind in nodes])


def test_a_residual_network() -> None:
    stem = [("conv1", 8, "c"), ("relu", 8, ""), ("maxpool", 4, "p")]
    first = [("layer1.0.conv1", 4, "c"), ("layer1.0.conv2", 4, "c")]
    second = [("layer2.0.conv1", 4, "c"), ("layer2.0.conv2", 2, "c")]
    nodes = [*stem, *first, *second, ("avgpool", 1, "p"), ("fc", 1, "c")]
    assert stages(*nodes) == [("stem", [0, 1, 2]), ("layer1", [3, 4]), ("layer2", [5, 6]), ("head", [7, 8])]


def test_a_flat_list_of_layers_is_parted_behind_its_poolings() -> None:
    nodes = [("features.0", 8, "c"), ("features.1", 8, ""), ("features.2", 4, "p"), ("features.3", 4, "c"),
             ("features.4", 2, "p"), ("classifier.0", 1, "c"), ("classifier.2", 1, "c")]  # fmt: skip
    assert stages(*nodes) == [("features.0 … 2", [0, 1, 2]), ("features.3 … 4", [3, 4]), ("head", [5, 6])]


def test_equal_blocks_of_a_flat_list_are_one_stage_and_gates_part_nothing() -> None:
    block = [("c", 0), ("c", 1), ("p", 2), ("c", 3)]
    nodes = [("features.0", 16, "c")]
    for number, side in ((1, 8), (2, 4), (3, 4)):
        nodes += [(f"features.{number}.{part}", 1 if part in (1, 2) else side, kind) for kind, part in block]
    assert [name for name, _ in stages(*nodes)] == ["stem", "features.1", "features.2 … 3"]


def test_a_normalization_stays_with_the_convolution_that_follows_it_in_its_module() -> None:
    block = [("features.1.0", 8, "c"), ("features.1.1", 8, "c")]
    down = [("features.2.0", 8, ""), ("features.2.1", 4, "c")]
    after = [("features.3.0", 4, "c"), ("features.3.1", 2, "c")]
    assert stages(("features.0", 8, "c"), *block, *down, *after)[1:3] == [
        ("features.1", [1, 2]),
        ("features.2", [3, 4]),
    ]
    foreign = [("act", 8, ""), ("features.2.1", 4, "c")]  # of another module: it ends what is in front of it
    assert stages(("features.0", 8, "c"), *block, *foreign, *after)[1][1] == [1, 2, 3]


def test_each_node_is_in_one_stage() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        names = [".".join(rng.choice(["a", "b", "0", "1"], rng.integers(0, 4))) for _ in range(30)]
        nodes = [Placed(n, int(rng.integers(1, 5)), None, bool(rng.integers(2)), bool(rng.integers(2))) for n in names]
        grouped = grouped_by_stage(nodes)
        assert sorted(index for _, indices in grouped for index in indices) == list(range(30))
        assert len({name for name, _ in grouped}) == len(grouped)


def test_rows_end_at_branches_and_stages() -> None:
    found = of(
        "a = Conv (x, w)\nr = Relu (a)\nb = Conv (r, w)\ns = Sigmoid (b)\nm = Mul (b, s)\ny = Add (m, r)",
        w=(3, 3, 1, 1),
    )
    assert [layer.joins for layer in found.layers] == [0, 0, 2, 2, 2, 5]
