"""Plans for NVIDIA's targets: what NVIDIA's placement rules say, what TensorRT-RTX absorbs, and random networks."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Container
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgewright.optimize import plan_tensorrt as module
from edgewright.optimize.plan import COMPUTE_OPERATORS, QuantPlan
from edgewright.optimize.plan_tensorrt import plan_for_rtx, plan_for_tensorrt

Array = NDArray[Any]
Planner = Callable[[ir.Model, Container[str] | None], QuantPlan]

IMAGE = "float[N, 16, 8, 8] x"
MAPS = "float[A, B, C, D] y"
W = (16, 16, 3, 3)
PAD = "<pads = [1, 1, 1, 1]>"
LIMITS: dict[str, Any] = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def graph(body: str, inputs: str = IMAGE, outputs: str = MAPS, **arrays: Any) -> ir.Model:
    """A model with its shapes inferred; `arrays` become initializers, seeded where only a shape is given."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in arrays.items():
        values = array if isinstance(array, np.ndarray) else normal(name, *array)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def planned(planner: Planner, model: ir.Model, measured: Container[str] | None = None) -> QuantPlan:
    """The plan, after checking what holds of every such plan."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan = planner(model, measured)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    nodes = {str(node.name): node for node in model.graph}
    assert len({decision.node for decision in plan.decisions}) == len(plan.decisions)
    assert all(decision.reason and decision.precision in ("int8", "fp16") for decision in plan.decisions)
    assert all(decision.operator == nodes[decision.node].op_type for decision in plan.decisions)
    layers = {name for name, node in nodes.items() if node.op_type in COMPUTE_OPERATORS}
    assert layers == {decision.node for decision in plan.decisions if decision.operator in COMPUTE_OPERATORS}
    assert plan.activations == tuple(plan.readers)
    assert plan.silu_inputs == ()
    for tensor, readers in plan.readers.items():
        for reader in readers:  # integers are read by whoever is planned so, and by nobody else
            assert tensor in {value.name for value in nodes[reader].inputs if value is not None}
            assert reader in {decision.node for decision in plan.nodes_in("int8")}
        assert measured is None or tensor in measured
    assert json.loads(json.dumps(plan.to_json()))["readers"] == {
        tensor: list(readers) for tensor, readers in plan.readers.items()
    }
    return plan


def tensorrt(model: ir.Model, measured: Container[str] | None = None) -> QuantPlan:
    return planned(plan_for_tensorrt, model, measured)


def rtx(model: ir.Model, measured: Container[str] | None = None) -> QuantPlan:
    return planned(plan_for_rtx, model, measured)


def precisions(plan: QuantPlan) -> dict[str, str]:
    return {decision.node: decision.precision for decision in plan.decisions}


def reason(plan: QuantPlan, node: str) -> str:
    (found,) = [decision.reason for decision in plan.decisions if decision.node == node]
    return found


# --- TensorRT: layers --------------------------------------------------------------------------------------------

DENSE: dict[str, tuple[str, str, str, tuple[int, ...]]] = {
    "Conv": ("Conv (x, w)", IMAGE, MAPS, W),
    "ConvTranspose": ("ConvTranspose (x, w)", IMAGE, MAPS, (16, 32, 3, 3)),
    "Gemm": ("Gemm (x, w)", "float[N, 16] x", "float[A, B] y", (16, 20)),
    "Gemm transB": ("Gemm <transB = 1> (x, w)", "float[N, 16] x", "float[A, B] y", (20, 16)),
    "MatMul": ("MatMul (x, w)", "float[N, 7, 16] x", "float[A, B, C] y", (16, 20)),
}


@pytest.mark.parametrize("name", DENSE)
def test_all_inputs_of_dense_layers_are_integers_and_no_output_is(name: str) -> None:
    call, inputs, outputs, shape = DENSE[name]
    plan = tensorrt(graph(f"[layer] y = {call}", inputs, outputs, w=shape))
    assert precisions(plan) == {"layer": "int8"}
    assert plan.readers == {"x": ("layer",)}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("side", [0, 1])
def test_narrow_layers_stay(name: str, side: int) -> None:
    """Fifteen channels in or out; the axis is that of the operator."""
    call, inputs, outputs, shape = DENSE[name]
    narrow = list(shape)
    narrow[side] = 15
    reads = {"Conv": 1, "ConvTranspose": 0, "Gemm": 0, "Gemm transB": 1, "MatMul": 0}[name]
    if side == reads:
        inputs = inputs.replace("16", "15")
    plan = tensorrt(graph(f"[layer] y = {call}", inputs, outputs, w=narrow))
    assert precisions(plan) == {"layer": "fp16"}
    assert reason(plan, "layer") == "narrow: 15 channels, INT8 kernels need 16"
    assert plan.readers == {}


@pytest.mark.parametrize(("groups", "shape"), [(2, (16, 8, 3, 3)), (16, (16, 1, 3, 3)), (16, (64, 1, 3, 3))])
def test_grouped_and_depthwise_layers_stay(groups: int, shape: tuple[int, ...]) -> None:
    model = graph(f"[c] y = Conv <group = {groups}> (x, w)", w=shape)
    for plan in (tensorrt(model), rtx(model)):
        assert precisions(plan) == {"c": "fp16"}
        assert reason(plan, "c").startswith("grouped or depthwise: ")


@pytest.mark.parametrize(
    ("body", "inputs"),
    [("[n] k = Neg (w) [c] y = Conv (x, k)", IMAGE), ("[c] y = Conv (x, w)", f"{IMAGE}, float[16,16,3,3] w")],
)
def test_computed_weights_stay(body: str, inputs: str) -> None:
    model = graph(body, inputs, w=W)
    for plan in (tensorrt(model), rtx(model)):
        assert precisions(plan) == {"c": "fp16"}
        assert reason(plan, "c") == "its weight is computed at run time"


def test_the_product_of_two_activations_stays() -> None:
    body = "[a] q = MatMul (x, w) [b] k = MatMul (x, v) [t] r = Transpose <perm = [0, 2, 1]> (k) [c] y = MatMul (q, r)"
    plan = tensorrt(graph(body, "float[N, 32, 16] x", "float[A, B, C] y", w=(16, 16), v=(16, 16)))
    assert precisions(plan) == {"a": "int8", "b": "int8", "c": "fp16"}
    assert plan.readers == {"x": ("a", "b")}


def test_a_constant_input_stays() -> None:
    model = graph("[c] a = Conv (k, w) [s] y = Add (a, x)", k=(1, 16, 10, 10), w=W)
    for plan in (tensorrt(model), rtx(model)):
        assert reason(plan, "c") == "its input is a constant"


def test_a_tensor_that_was_not_measured_stays_and_the_others_do_not() -> None:
    model = graph(f"[c] a = Conv {PAD} (x, w) [r] b = Relu (a) [d] y = Conv {PAD} (b, v)", w=W, v=W)
    plan = tensorrt(model, {"x"})
    assert precisions(plan) == {"c": "int8", "d": "fp16"}
    assert reason(plan, "d").startswith("b was not measured")
    assert precisions(tensorrt(model, ())) == {"c": "fp16", "d": "fp16"}
    assert precisions(rtx(model, ())) == {"c": "fp16", "d": "fp16"}
    assert "x was not measured" in reason(rtx(model, {"b"}), "c")


GATE = """
[expand] m = Conv (x, w) [pool] p = GlobalAveragePool (m) [down] d = Conv (p, dw) [act] e = Relu (d)
[up] u = Conv (e, uw) [sig] s = Sigmoid (u) [scale] g = Mul (m, s) [project] y = Conv (g, v)
"""
GATE_SHAPES: dict[str, Any] = {"w": (32, 16, 1, 1), "dw": (16, 32, 1, 1), "uw": (32, 16, 1, 1), "v": (16, 32, 1, 1)}


def test_a_squeeze_and_excitation_gate_stays() -> None:
    plan = tensorrt(graph(GATE, **GATE_SHAPES))
    assert precisions(plan) == {"expand": "int8", "down": "fp16", "up": "fp16", "project": "int8"}
    assert reason(plan, "down").startswith("squeeze-and-excitation gate of scale")
    assert plan.readers == {"x": ("expand",), "g": ("project",)}


@pytest.mark.parametrize(
    "activation",
    ["[s] b = Sigmoid (a)", "[s] c = Sigmoid (a) [m] b = Mul (a, c)", "[s] b = HardSigmoid (a)", "[s] b = Relu (a)"],
)
def test_nothing_stands_around_an_activation(activation: str) -> None:
    model = graph(f"[c] a = Conv {PAD} (x, w) {activation} [d] y = Conv {PAD} (b, v)", w=W, v=W)
    assert tensorrt(model).readers == {"x": ("c",), "b": ("d",)}, "nothing but the convolutions reads integers"


@pytest.mark.parametrize(
    ("mover", "shape"),
    [
        ("MaxPool <kernel_shape = [2, 2]> (a)", W),
        ("Transpose <perm = [0, 1, 3, 2]> (a)", W),
        ("Concat <axis = 1> (a, a)", (16, 32, 3, 3)),
    ],
)
def test_moving_values_needs_no_pair_of_its_own(mover: str, shape: tuple[int, ...]) -> None:
    plan = tensorrt(graph(f"[c] a = Conv {PAD} (x, w) [m] b = {mover} [d] y = Conv {PAD} (b, v)", w=W, v=shape))
    assert plan.readers == {"x": ("c",), "b": ("d",)}
    assert precisions(plan) == {"c": "int8", "d": "int8"}


def test_one_tensor_that_two_read_is_quantized_once() -> None:
    plan = tensorrt(graph("[c] a = Conv (x, w) [d] b = Conv (x, v) [s] y = Add (a, b)", w=W, v=W))
    assert plan.readers["x"] == ("c", "d")


# --- TensorRT: residual additions --------------------------------------------------------------------------------

BLOCK = f"""
[stem] s = Conv {PAD} (x, w) [r] i = Relu (s)
[one] a = Conv {PAD} (i, v) [q] b = Relu (a) [two] c = Conv {PAD} (b, u)
"""
RESIDUAL: dict[str, Any] = {"w": W, "v": W, "u": W}


@pytest.mark.parametrize("operands", ["i, c", "c, i"])
def test_a_residual_addition_reads_integers_on_the_identity_branch(operands: str) -> None:
    plan = tensorrt(graph(f"{BLOCK} [add] t = Add ({operands}) [end] y = Relu (t)", **RESIDUAL))
    assert plan.readers == {"x": ("stem",), "i": ("one", "add"), "b": ("two",)}
    assert reason(plan, "add") == "residual addition: the convolution on its other side absorbs it"


@pytest.mark.parametrize("operands", ["e, c", "c, e"])
def test_a_downsampling_convolution_is_on_the_identity_branch(operands: str) -> None:
    model = graph(f"{BLOCK} [down] e = Conv (i, k) [add] y = Add ({operands})", **RESIDUAL, k=(16, 16, 1, 1))
    plan = tensorrt(model)
    assert plan.readers == {"x": ("stem",), "i": ("one", "down"), "b": ("two",), "e": ("add",)}


def test_nested_blocks_each_have_one_integer_branch() -> None:
    body = (
        f"{BLOCK} [add] t = Add (i, c) [three] d = Conv {PAD} (t, k) [four] f = Conv {PAD} (d, l) [more] y = Add (t, f)"
    )
    plan = tensorrt(graph(body, **RESIDUAL, k=W, l=W))
    assert plan.readers["i"] == ("one", "add")
    assert plan.readers["t"] == ("three", "more")
    assert "c" not in plan.readers
    assert "f" not in plan.readers


@pytest.mark.parametrize(
    "other",
    [
        "[dw] c = Conv <pads = [1, 1, 1, 1], group = 16> (i, k) [add] y = Add (i, c)",  # it stays FP16
        f"[one] a = Conv {PAD} (i, v) [act] c = Relu (a) [add] y = Add (i, c)",  # ReLU stands between
        f"[one] a = Conv {PAD} (i, v) [g] h = Sigmoid (a) [m] c = Mul (a, h) [add] y = Add (i, c)",  # SiLU does
    ],
)
def test_without_an_int8_convolution_straight_before_it_an_addition_stays(other: str) -> None:
    model = graph(f"[stem] s = Conv {PAD} (x, w) [r] i = Relu (s) {other}", w=W, v=W, k=(16, 1, 3, 3))
    plan = tensorrt(model)
    assert "add" not in precisions(plan)
    assert not any("add" in readers for readers in plan.readers.values())


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("[add] y = Add (c, k)", {"k": (1, 16, 8, 8)}),  # a constant
        ("[add] y = Add (k, c)", {"k": (1, 16, 1, 1)}),
        ("[p] g = GlobalAveragePool (i) [add] y = Add (g, c)", {}),  # broadcast
        ("[add] y = Add (c, c)", {}),  # no branches
    ],
)
def test_other_additions_are_left_alone(body: str, arrays: dict[str, Any]) -> None:
    plan = tensorrt(graph(f"{BLOCK} {body}", **RESIDUAL, **arrays))
    assert "add" not in precisions(plan)
    assert plan.readers == {"x": ("stem",), "i": ("one",), "b": ("two",)}


def test_an_identity_branch_that_was_not_measured_stays_float() -> None:
    model = graph(f"{BLOCK} [p] j = Relu (i) [add] y = Add (j, c)", **RESIDUAL)
    assert "j" in tensorrt(model).readers
    plan = tensorrt(model, {"x", "i", "b", "c"})
    assert "add" not in precisions(plan)
    assert precisions(plan)["two"] == "int8"


# --- TensorRT-RTX ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operands", ["m, s", "s, m"])
def test_rtx_takes_the_convolution_behind_a_gate(operands: str) -> None:
    plan = rtx(graph(GATE.replace("Mul (m, s)", f"Mul ({operands})"), **GATE_SHAPES))
    assert precisions(plan)["project"] == "int8"
    assert plan.readers["g"] == ("project",)


@pytest.mark.parametrize(
    ("behind", "taken"),
    [
        ("[e] y = Relu (c)", True),
        ("[e] y = Clip (c, zero, six)", True),
        ("[e] y = Add (c, z)", True),
        ("[e] a = Add (c, z) [f] y = Relu (a)", True),
        ("[e] a = Sigmoid (c) [f] y = Mul (c, a)", False),
        ("[e] y = HardSwish (c)", False),
        ("[e] a = HardSigmoid (c) [f] y = Mul (c, a)", False),
        ("[e] y = LeakyRelu (c)", False),
        ("[e] y = Tanh (c)", False),
        ("[e] y = Elu (c)", False),
        ("[e] y = Mul (c, six)", False),
        ("[e] a = Relu (c) [f] b = Sigmoid (c) [g2] y = Add (a, b)", False),  # one of two readers is enough
    ],
)
def test_rtx_follows_what_the_kernel_absorbs(behind: str, taken: bool) -> None:
    inputs = f"{IMAGE}, float[N, 16, 8, 8] z"
    body = GATE.replace("[project] y = Conv (g, v)", f"[project] c = Conv (g, v) {behind}")
    for model in (
        graph(body, inputs, **GATE_SHAPES, **LIMITS),
        graph(f"[project] c = Conv {PAD} (x, w) {behind}", inputs, w=W, **LIMITS),
    ):
        plan = rtx(model)
        assert (precisions(plan)["project"] == "int8") is taken
        if not taken:
            assert "behind it is a kernel more in INT8, while FP16 absorbs it" in reason(plan, "project")


def test_rtx_takes_the_first_convolution_from_the_image() -> None:
    body = f"[c] a = Conv {PAD} (x, w) [r] b = Relu (a) [d] y = Conv {PAD} (b, v)"
    plan = rtx(graph(body, w=W, v=W))
    assert precisions(plan) == {"c": "int8", "d": "fp16"}
    assert reason(plan, "d").startswith("its input comes from a kernel that gives FP16 only")
    assert plan.readers == {"x": ("c",)}


def test_rtx_needs_no_width() -> None:
    plan = rtx(graph("[c] y = Conv (x, w)", "float[N, 3, 8, 8] x", w=(8, 3, 3, 3)))
    assert precisions(plan) == {"c": "int8"}


def test_rtx_takes_no_input_that_others_read() -> None:
    plan = rtx(graph("[c] a = Conv (x, w) [d] b = Conv (x, v) [s] y = Add (a, b)", w=W, v=W))
    assert precisions(plan) == {"c": "fp16", "d": "fp16"}
    assert reason(plan, "c") == "others read its input too, which would be written twice"
    shared = rtx(graph(f"{GATE} [other] z = Relu (g)", **GATE_SHAPES))
    assert "others read its input too" in reason(shared, "project")


@pytest.mark.parametrize("name", [name for name in DENSE if name != "Conv"])
def test_rtx_takes_convolutions_alone(name: str) -> None:
    call, inputs, outputs, shape = DENSE[name]
    plan = rtx(graph(f"[layer] y = {call}", inputs, outputs, w=shape))
    assert reason(plan, "layer") == "only convolutions absorb what follows"


def test_rtx_does_not_take_a_product_without_a_gate() -> None:
    body = "[c] m = Conv (x, w) [s] h = Sigmoid (m) [p] g = Mul (m, h) [d] y = Conv (g, v)"
    assert precisions(rtx(graph(body, w=W, v=W))) == {"c": "fp16", "d": "fp16"}


def test_the_products_of_gates_are_found() -> None:
    assert {value.name for value in module._gated_maps(graph(GATE, **GATE_SHAPES).graph)} == {"g"}


# --- Random networks ---------------------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    """A chain of blocks over 16 or 24 channels: convolutions of all kinds, activations, gates, residual additions."""
    arrays: dict[str, Any] = dict(LIMITS)
    lines: list[str] = []
    current, count = "x", 0

    def fresh() -> str:
        nonlocal count
        count += 1
        return f"t{count}"

    def conv(source: str, groups: int = 1, outputs: int = 16) -> str:
        result = fresh()
        arrays[f"w_{result}"] = (outputs, 16 // groups, 3, 3)
        lines.append(f"[n_{result}] {result} = Conv <pads = [1, 1, 1, 1], group = {groups}> ({source}, w_{result})")
        return result

    def one(operator: str, *sources: str) -> str:
        result = fresh()
        lines.append(f"[n_{result}] {result} = {operator} ({', '.join(sources)})")
        return result

    def activated(source: str) -> str:
        kind = draw(st.sampled_from(["none", "Relu", "Clip", "SiLU", "HardSwish", "Sigmoid", "Tanh"]))
        if kind == "none":
            return source
        if kind == "SiLU":
            return one("Mul", source, one("Sigmoid", source))
        return one("Clip", source, "zero", "six") if kind == "Clip" else one(kind, source)

    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["plain", "depthwise", "residual", "gate", "pool", "fork"]))
        if kind == "plain":
            current = activated(conv(current))
        elif kind == "depthwise":
            current = activated(conv(current, draw(st.sampled_from([2, 16]))))
        elif kind == "residual":
            inner = conv(activated(conv(current)))
            operands = (current, inner) if draw(st.booleans()) else (inner, current)
            current = activated(one("Add", *operands))
        elif kind == "gate":
            gate = one("Sigmoid", conv(one("Relu", conv(one("GlobalAveragePool", current)))))
            current = activated(conv(one("Mul", current, gate)))
        elif kind == "pool":
            current = one("MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>", current)
        else:
            current = one("Add", conv(current), conv(current))
    lines.append(f"[last] y = Identity ({current})")
    return graph(" ".join(lines), **arrays)


@settings(max_examples=60, deadline=None)
@given(networks())
def test_random_networks_keep_the_rules_of_tensorrt(model: ir.Model) -> None:
    plan = tensorrt(model)
    nodes = {str(node.name): node for node in model.graph}
    integer = {decision.node for decision in plan.nodes_in("int8")}
    for name in integer:
        node = nodes[name]
        assert node.op_type in ("Conv", "Add")
        if node.op_type == "Conv":
            assert node.attributes.get_int("group", 1) == 1
            source, weight = node.inputs[:2]
            assert source is not None
            assert weight is not None
            assert weight.const_value is not None
            assert name in plan.readers[str(source.name)]
        else:
            reads = [
                value for value in node.inputs if value is not None and name in plan.readers.get(str(value.name), ())
            ]
            assert len(reads) == 1, "exactly one operand"
            (other,) = (value for value in node.inputs if value is not reads[0])
            assert other is not None
            producer = other.producer()
            assert producer is not None
            assert producer.op_type == "Conv"
            assert producer.name in integer


@settings(max_examples=60, deadline=None)
@given(networks())
def test_random_networks_keep_the_rules_of_rtx(model: ir.Model) -> None:
    plan = rtx(model)
    nodes = {str(node.name): node for node in model.graph}
    for decision in plan.nodes_in("int8"):
        node = nodes[decision.node]
        assert node.op_type == "Conv"
        assert node.attributes.get_int("group", 1) == 1
        source = node.inputs[0]
        assert source is not None
        assert len(source.uses()) == 1
        producer = source.producer()
        assert producer is None or producer.op_type == "Mul"
        followers = {reader.op_type for reader in node.outputs[0].consumers()}
        assert followers <= {"Relu", "Clip", "Add", "MaxPool", "GlobalAveragePool", "Identity", "Conv"}


@pytest.mark.parametrize("planner", [plan_for_tensorrt, plan_for_rtx])
def test_rules_are_seen_to_be_broken(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that takes depthwise convolutions too."""
    model = graph("[c] y = Conv <group = 16> (x, w)", w=(16, 1, 3, 3))
    assert precisions(planner(model, None)) == {"c": "fp16"}
    monkeypatch.setattr(module, "_too_little_work", lambda node: "")
    monkeypatch.setattr(module, "_costs_a_kernel", lambda node, products: "")
    assert precisions(planner(model, None)) == {"c": "int8"}
