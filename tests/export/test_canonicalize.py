"""Cleaning of an exported graph: what is merged, renamed and removed, and above all what must stay.

The graphs are written in ONNX's textual syntax. The oracle is ONNX Runtime without optimization on the graph before.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.export import canonicalize as module
from edgewright.export.canonicalize import NO_MODULE, SCOPES_KEY, canonicalize

Array = NDArray[Any]

TOLERANCE = 1e-5  # of the largest output
IMAGE = "float[batch, 3, 6, 6] x"
MAPS = "float[batch, C, H, W] y"
PAD_RIGHT_AND_BELOW = (0, 0, 0, 0, 0, 0, 1, 1)  # begin of N, C, H, W, then end
CONV = "y = Conv <strides = [2, 2]> (p, w)"
MEAN = "y = ReduceMean <keepdims = 1> (x, axes)"


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def proto_of(body: str, inputs: str = IMAGE, outputs: str = MAPS, **constants: Any) -> onnx.ModelProto:
    """A model in textual syntax with its shapes inferred; `constants`, arrays, become initializers."""
    text = f'<ir_version: 10, opset_import: ["": 18]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def outputs_of(proto: onnx.ModelProto, batch: int) -> list[Array]:
    (source,) = proto.graph.input
    sides = [batch, *(dim.dim_value for dim in source.type.tensor_type.shape.dim[1:])]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    return [np.asarray(array) for array in session.run(None, {source.name: normal("x", *sides)})]


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> float:
    """Largest difference of any output at the batch sizes 1 and 3, as a share of the largest value."""
    worst = 0.0
    for batch in (1, 3):
        for ours, theirs in zip(outputs_of(after, batch), outputs_of(before, batch), strict=True):
            assert ours.shape == theirs.shape
            worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return worst


def cleaned(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The canonical form, after checking that it is valid and computes the same."""
    model = ir.from_proto(proto)
    canonicalize(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert difference(proto, after) <= TOLERANCE
    return after


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def pads_of(proto: onnx.ModelProto) -> list[int]:
    (conv,) = (node for node in proto.graph.node if node.op_type == "Conv")
    return [value for attribute in conv.attribute if attribute.name == "pads" for value in attribute.ints]


def padded_conv(
    pads: tuple[int, ...] = PAD_RIGHT_AND_BELOW, pad: str = "p = Pad (x, pads)", conv: str = CONV, **more: Any
) -> onnx.ModelProto:
    outputs = more.pop("outputs", MAPS)
    constants = {"pads": np.array(pads, np.int64), "w": normal("w", 4, more.pop("channels", 3), 3, 3), **more}
    return proto_of(f"{pad} {conv}", outputs=outputs, **constants)


# Pad, then Conv


def test_padding_on_one_side_becomes_asymmetric_pads() -> None:
    after = cleaned(padded_conv())
    assert operators(after) == ["Conv"]
    assert pads_of(after) == [0, 0, 1, 1]  # ONNX: begin of every axis, then end


def test_every_side_keeps_its_own_amount() -> None:
    """Different amounts everywhere, so that no two of them can be exchanged unnoticed."""
    after = cleaned(padded_conv((0, 0, 1, 2, 0, 0, 3, 0), conv="y = Conv (p, w)"))
    assert pads_of(after) == [1, 2, 3, 0]


def test_own_pads_are_added() -> None:
    after = cleaned(padded_conv((0, 0, 1, 0, 0, 0, 0, 2), conv="y = Conv <pads = [1, 0, 0, 3]> (p, w)"))
    assert operators(after) == ["Conv"]
    assert pads_of(after) == [2, 0, 0, 5]


def test_groups_dilation_strides_and_bias_stay() -> None:
    conv = "y = Conv <group = 3, dilations = [2, 1], strides = [1, 2]> (p, dw, b)"
    after = cleaned(padded_conv(conv=conv, dw=normal("dw", 6, 1, 3, 3), b=normal("b", 6)))
    assert operators(after) == ["Conv"]


@pytest.mark.parametrize("rank", [1, 3])
def test_padding_of_other_ranks(rank: int) -> None:
    shape = ", ".join(["6"] * rank)
    amounts = np.array([0, 0, *range(rank), 0, 0, *range(1, rank + 1)], np.int64)
    after = cleaned(
        proto_of(
            "p = Pad (x, pads) y = Conv (p, w)",
            f"float[batch, 3, {shape}] x",
            f"float[batch, C, {', '.join('DHW'[:rank])}] y",
            pads=amounts,
            w=normal("w", 2, 3, *(3,) * rank),
        )
    )
    assert operators(after) == ["Conv"]


@pytest.mark.parametrize("pad", ['p = Pad <mode = "constant"> (x, pads, zero)', 'p = Pad (x, pads, "")'])
def test_zero_may_be_said_in_several_ways(pad: str) -> None:
    assert operators(cleaned(padded_conv(pad=pad, zero=np.zeros((), np.float32)))) == ["Conv"]


@pytest.mark.parametrize("wrong", [(1, 1, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0)])
def test_mutant_with_other_pads_is_caught(wrong: tuple[int, ...]) -> None:
    """Symmetric instead of asymmetric padding is the error that costs Lite0 eight points."""
    before = padded_conv()
    model = ir.from_proto(before)
    canonicalize(model)
    model.graph[0].attributes["pads"] = ir.AttrInt64s("pads", wrong)
    after = ir.to_proto(model)
    for ours, theirs in zip(outputs_of(after, 3), outputs_of(before, 3), strict=True):
        assert ours.shape != theirs.shape or np.abs(ours - theirs).max() > 0.1 * np.abs(theirs).max()


ONE = np.ones((), np.float32)

MUST_NOT_MERGE: dict[str, Callable[[], onnx.ModelProto]] = {
    "another value": lambda: padded_conv(pad="p = Pad (x, pads, value)", value=ONE),
    "a tiny value": lambda: padded_conv(pad="p = Pad (x, pads, value)", value=ONE * np.float32(1e-3)),
    "reflect": lambda: padded_conv(pad='p = Pad <mode = "reflect"> (x, pads)'),
    "edge": lambda: padded_conv(pad='p = Pad <mode = "edge"> (x, pads)'),
    "channels": lambda: padded_conv((0, 1, 0, 0, 0, 0, 0, 0), channels=4),
    "channels at the end": lambda: padded_conv((0, 0, 0, 0, 0, 1, 0, 0), channels=4),
    "batch": lambda: padded_conv((0, 0, 0, 0, 1, 0, 0, 0), outputs="float[N, C, H, W] y"),
    "cropping": lambda: padded_conv((0, 0, -1, 0, 0, 0, 1, 1)),
    "cropping at the end": lambda: padded_conv((0, 0, 2, 2, 0, 0, 0, -1)),
    "cropping in total zero": lambda: padded_conv((0, 0, -1, -1, 0, 0, 1, 1)),
    "two users": lambda: padded_conv(conv="a = Conv (p, w) b = Conv (p, w) y = Add (a, b)"),
    "a user that is no convolution": lambda: padded_conv(
        conv="a = Conv <pads = [1, 1, 1, 1]> (p, w) b = ReduceMean (p, one) y = Add (a, b)", one=np.array([1], np.int64)
    ),
    "a graph output": lambda: padded_conv(outputs=f"{MAPS}, float[batch, D, I, J] p"),
    "named axes": lambda: padded_conv((1, 0, 0, 1), pad='p = Pad (x, pads, "", axes)', axes=np.array([2, 3], np.int64)),
    "automatic padding": lambda: padded_conv(conv='y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (p, w)'),
    "amounts known at run time": lambda: padded_conv(
        pad="s = Shape <start = 1, end = 2> (x) t = Sub (s, three) "
        "a = Concat <axis = 0> (t, t, t, t, t, t, t, t) pads2 = Add (a, pads) p = Pad (x, pads2)",
        three=np.array([3], np.int64),
        outputs="float[N, C, H, W] y",
    ),
}


@pytest.mark.parametrize("name", MUST_NOT_MERGE)
def test_padding_that_must_stay(name: str) -> None:
    before = MUST_NOT_MERGE[name]()
    after = cleaned(before)
    if name != "amounts known at run time":  # where shape inference may make a constant of them, and then may merge
        assert operators(after).count("Pad") == 1
        assert operators(after) == operators(before)


def test_padding_before_something_else_stays() -> None:
    pads = np.array(PAD_RIGHT_AND_BELOW, np.int64)
    before = proto_of("p = Pad (x, pads) y = MaxPool <kernel_shape = [3, 3]> (p)", pads=pads)
    assert operators(cleaned(before)) == ["Pad", "MaxPool"]  # a maximum sees the zeros


def test_padding_of_a_weight_is_no_padding_of_the_image() -> None:
    pads = np.array(PAD_RIGHT_AND_BELOW, np.int64)
    body = "s = ReduceMean <keepdims = 1> (x, zero) p = Pad (s, pads) y = Conv (x, p)"
    text = proto_of(
        body,
        "float[1, 3, 6, 6] x",
        "float[1, C, H, W] y",
        pads=pads,
        zero=np.array([0], np.int64),
    )
    model = ir.from_proto(text)
    canonicalize(model)
    assert "Pad" in operators(ir.to_proto(model))


# Biases of zeros


@pytest.mark.parametrize(
    ("operator", "weight", "channels"), [("Conv", (4, 3, 3, 3), 4), ("ConvTranspose", (3, 4, 3, 3), 4)]
)
def test_zero_bias_is_dropped_and_another_kept(operator: str, weight: tuple[int, ...], channels: int) -> None:
    bias = np.zeros(channels, np.float32)
    w = normal("w", *weight)
    (node,) = cleaned(proto_of(f"y = {operator} (x, w, b)", w=w, b=bias)).graph.node
    assert list(node.input) == ["x", "w"]
    bias[-1] = 1e-20
    (node,) = cleaned(proto_of(f"y = {operator} (x, w, b)", w=w, b=bias)).graph.node
    assert list(node.input) == ["x", "w", "b"]


def test_a_dropped_bias_leaves_no_initializer_unless_somebody_else_uses_it() -> None:
    zeros: dict[str, Any] = {"w": normal("w", 3, 3, 1, 1), "b": np.zeros(3, np.float32)}
    after = cleaned(proto_of("y = Conv (x, w, b)", **zeros))
    assert [tensor.name for tensor in after.graph.initializer] == ["w"]
    after = cleaned(
        proto_of("c = Conv (x, w, b) y = BatchNormalization (c, one, b, b, one)", one=np.ones(3, "f"), **zeros)
    )
    assert {tensor.name for tensor in after.graph.initializer} == {"w", "b", "one"}
    assert [len(node.input) for node in after.graph.node] == [2, 5]


def test_a_bias_computed_at_run_time_stays() -> None:
    body = "m = ReduceMean <keepdims = 0> (x, axes) y = Conv (x, w, m)"
    before = proto_of(body, axes=np.array([0, 2, 3], np.int64), w=normal("w", 3, 3, 1, 1))
    assert [len(node.input) for node in cleaned(before).graph.node] == [2, 3]


def test_the_zero_bias_of_a_gemm_stays() -> None:
    before = proto_of(
        "y = Gemm (x, w, b)", "float[batch, 3] x", "float[batch, 4] y", w=normal("w", 3, 4), b=np.zeros(4, "f")
    )
    assert [len(node.input) for node in cleaned(before).graph.node] == [3]


# Flattening by the run-time batch size

FLATTEN = (
    "s = Shape <start = 0, end = 1> (x) shape = Concat <axis = 0> (s, rest) y = Reshape <allowzero = 1> (x, shape)"
)


def test_reshape_copies_the_batch() -> None:
    after = cleaned(proto_of(FLATTEN, outputs="float[batch, 108] y", rest=np.array([108], np.int64)))
    assert operators(after) == ["Reshape"]
    (shape,) = after.graph.initializer
    assert onnx.numpy_helper.to_array(shape).tolist() == [0, 108]
    (attribute,) = after.graph.node[0].attribute
    assert (attribute.name, attribute.i) == ("allowzero", 0)


def test_reshape_to_more_axes_copies_the_batch() -> None:
    """As in ShuffleNet: channels become groups."""
    after = cleaned(proto_of(FLATTEN, outputs="float[batch, 3, 1, 6, 6] y", rest=np.array([3, 1, 6, 6], np.int64)))
    assert onnx.numpy_helper.to_array(after.graph.initializer[0]).tolist() == [0, 3, 1, 6, 6]


@pytest.mark.parametrize(
    ("rest", "output"),
    [
        ([-1], "float[batch, n] y"),  # an inferred axis has no number yet
        ([54], "float[twice, 54] y"),  # the first axis is not the input's
    ],
)
def test_other_reshapes_are_left_alone(rest: list[int], output: str) -> None:
    body = FLATTEN if rest == [-1] else f"two = Add (one, one) {FLATTEN.replace('(s, rest)', '(t, rest)')}"
    body = body.replace("shape =", "t = Mul (s, two) shape =") if rest != [-1] else body
    constants: dict[str, Any] = {"one": np.array([1], np.int64)} if rest != [-1] else {}
    before = proto_of(body, outputs=output, rest=np.array(rest, np.int64), **constants)
    after = cleaned(before)
    assert operators(after)[0] == "Shape"
    assert operators(after)[-1] == "Reshape"


def test_mutant_that_fixes_the_batch_is_caught() -> None:
    before = proto_of(FLATTEN, outputs="float[batch, 108] y", rest=np.array([108], np.int64))
    model = ir.from_proto(before)
    canonicalize(model)
    (shape,) = model.graph.initializers.values()
    shape.const_value = ir.tensor(np.array([1, 108], np.int64))
    with pytest.raises(Exception, match="Reshape"):  # onnxruntime's exceptions have no common base of their own
        difference(before, ir.to_proto(model))


# Global pooling


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, 2], [-2, 3]])
def test_mean_over_height_and_width_is_global_pooling(axes: list[int]) -> None:
    after = cleaned(proto_of(MEAN, axes=np.array(axes, np.int64)))
    assert operators(after) == ["GlobalAveragePool"]
    assert list(after.graph.node[0].input) == ["x"]
    assert not after.graph.node[0].attribute
    assert not after.graph.initializer


@pytest.mark.parametrize(
    ("body", "axes", "inputs", "outputs"),
    [
        (MEAN, [3], IMAGE, MAPS),
        (MEAN, [1, 2], IMAGE, MAPS),
        (MEAN, [1, 2, 3], IMAGE, MAPS),
        (MEAN.replace("1>", "0>"), [2, 3], IMAGE, "float[batch, 3] y"),
        (MEAN, [1, 2], "float[batch, 5, 6] x", "float[batch, 1, 1] y"),
        (MEAN, [2, 3], "float[batch, 2, 3, 4, 5] x", "float[batch, 2, 1, 1, 5] y"),
        (MEAN.replace("Mean", "Max"), [2, 3], IMAGE, MAPS),
        (MEAN.replace("Mean", "Sum"), [2, 3], IMAGE, MAPS),
    ],
)
def test_other_reductions_stay(body: str, axes: list[int], inputs: str, outputs: str) -> None:
    before = proto_of(body, inputs, outputs, axes=np.array(axes, np.int64))
    assert operators(cleaned(before)) == operators(before)


def test_a_mean_over_all_axes_stays() -> None:
    before = proto_of("y = ReduceMean <keepdims = 1> (x)", outputs="float[1, 1, 1, 1] y")
    assert operators(cleaned(before)) == ["ReduceMean"]


# Constants and helpers


def test_constants_are_computed_and_lifted() -> None:
    body = (
        "a = Constant <value = float[3] {1.0, 2.0, -3.0}> () i = Identity (a) m = Mul (i, i) "
        "shape = Constant <value_ints = [3, 1, 1]> () r = Reshape (m, shape) j = Identity (x) y = Add (j, r)"
    )
    after = cleaned(proto_of(body))
    assert operators(after) == ["Add"]
    (value,) = after.graph.initializer
    assert onnx.numpy_helper.to_array(value).ravel().tolist() == [1, 4, 9]


def test_large_constants_are_computed_too() -> None:
    """A standardized weight has more elements than onnxscript's folder takes on by default."""
    weight = normal("w", 300, 3, 6, 6)
    assert weight.size > 8192
    before = proto_of("v = Sub (w, one) y = Conv (x, v)", w=weight, one=np.ones((1, 1, 1, 1), np.float32))
    after = cleaned(before)
    assert operators(after) == ["Conv"]
    (folded,) = after.graph.initializer
    assert np.array_equal(onnx.numpy_helper.to_array(folded), weight - 1)


def test_batch_normalization_stays() -> None:
    statistics: dict[str, Any] = {name: np.abs(normal(name, 4)) + 0.1 for name in ("gamma", "beta", "mean", "variance")}
    body = "c = Conv (x, w) y = BatchNormalization (c, gamma, beta, mean, variance)"
    after = cleaned(proto_of(body, w=normal("w", 4, 3, 1, 1), **statistics))
    assert operators(after) == ["Conv", "BatchNormalization"]


def test_unused_nodes_go() -> None:
    assert operators(cleaned(proto_of("a = Relu (x) b = Relu (a) y = Neg (x)"))) == ["Neg"]


def test_an_identity_between_input_and_output_stays_valid() -> None:
    after = cleaned(proto_of("y = Identity (x)", outputs="float[batch, 3, 6, 6] y"))
    assert [value.name for value in (*after.graph.input, *after.graph.output)] == ["x", "y"]


def test_cleaning_twice_changes_nothing_more() -> None:
    statistics: dict[str, Any] = {name: np.abs(normal(name, 4)) + 0.1 for name in ("gamma", "beta", "mean", "variance")}
    once = cleaned(
        padded_conv(conv=f"{CONV.replace('y', 'c')} y = BatchNormalization (c, {', '.join(statistics)})", **statistics)
    )
    assert cleaned(once).SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


# Names and metadata


def with_scopes(*scopes: str) -> ir.Model:
    """A chain of Relu, each with the name scopes that torch's exporter would write."""
    names = ["x", *(f"v{index}" for index in range(1, len(scopes))), "y"]
    body = " ".join(f"{after} = Relu ({before})" for before, after in itertools.pairwise(names))
    model = ir.from_proto(proto_of(body, outputs="float[batch, 3, 6, 6] y"))
    for node, scope in zip(model.graph, scopes, strict=True):
        if scope:
            node.metadata_props[SCOPES_KEY] = scope
    return model


def test_nodes_and_tensors_are_named_after_their_modules() -> None:
    model = with_scopes(
        "['', 'features', 'features.0', 'relu']",
        "['', 'features', 'features.0', 'relu_1']",
        "['', 'head', 'relu']",
        "['', 'relu']",
        f"['', '{NO_MODULE}', 'relu']",
        "",
    )
    canonicalize(model)
    assert [node.name for node in model.graph] == [
        "features.0/Relu",
        "features.0/Relu_2",
        "head/Relu",
        "Relu",
        "Relu_2",
        "Relu_3",
    ]
    tensors = [node.outputs[0].name for node in model.graph]
    assert tensors == [*(node.name for node in tuple(model.graph)[:-1]), "y"]
    assert model.graph.inputs[0].name == "x"


def test_further_outputs_of_a_node_are_numbered() -> None:
    body = "a, b, c = Split <axis = 1, num_outputs = 3> (x) d = Add (a, b) y = Add (d, c)"
    after = cleaned(proto_of(body, outputs="float[batch, 1, 6, 6] y"))
    assert list(after.graph.node[0].output) == ["Split", "Split:1", "Split:2"]


def test_nothing_of_the_machine_remains() -> None:
    model = with_scopes("['', 'a', 'relu']", "")
    secret = "/home/somebody/model.py"
    model.metadata_props["path"] = model.graph.metadata_props["path"] = secret
    model.doc_string = model.graph.doc_string = secret
    model.graph.inputs[0].doc_string = secret
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = node.doc_string = secret
        node.outputs[0].metadata_props["path"] = secret
    content = ir.to_proto(model).SerializeToString()
    assert content.count(secret.encode()) >= 8
    canonicalize(model)
    content = ir.to_proto(model).SerializeToString()
    assert b"/home" not in content
    assert b"pkg.torch" not in content
    assert model.graph.name == "main"


def test_scopes_are_read_as_data_and_never_run() -> None:
    with pytest.raises(ValueError, match="malformed"):
        canonicalize(with_scopes("__import__('os').getcwd()"))


# The oracle can fail


@pytest.mark.parametrize("step", ["_drop_zero_bias", "_merge_padding"])
def test_mutants_of_the_steps_are_caught(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping whatever bias there is, and removing whatever padding there is."""
    before = padded_conv(conv="y = Conv <strides = [2, 2]> (p, w, b)", b=normal("b", 4) * 3)

    def drop(node: ir.Node) -> None:
        if node.op_type == "Conv" and step == "_drop_zero_bias":
            node.resize_inputs(2)
        elif node.op_type == "Conv":
            pad = node.inputs[0]
            assert pad is not None
            producer = pad.producer()
            assert producer is not None
            node.replace_input_with(0, producer.inputs[0])

    monkeypatch.setattr(module, step, drop)
    with pytest.raises((AssertionError, onnx.shape_inference.InferenceError)):
        cleaned(before)
