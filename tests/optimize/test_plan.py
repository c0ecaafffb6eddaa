"""The plan: what becomes integer, what stays in floating point, and that a reason is always given."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.optimize.plan import COMPUTE_OPERATORS, Decision, QuantPlan, constant_weight, plan_for_cpu

Array = NDArray[Any]

W, V, U = (4, 3, 3, 3), (4, 4, 1, 1), (5, 4)
HEAD = "[gap] p = GlobalAveragePool (m) [flat] f = Flatten (p) [head] y = Gemm <transB = 1> (f, u)"
GATE_SHAPES: dict[str, Any] = {"w": W, "down": (2, 4, 1, 1), "up": (4, 2, 1, 1), "v": V, "u": U}


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def graph(body: str, outputs: str = "float[N, M] y", inputs: str = "float[N, 3, 8, 8] x", **shapes: Any) -> ir.Model:
    """A model in textual syntax; `shapes` make seeded initializers, arrays are taken as they are."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, shape in shapes.items():
        array = shape if isinstance(shape, np.ndarray) else normal(name, *shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def precisions(plan: QuantPlan) -> dict[str, str]:
    return {decision.node: decision.precision for decision in plan.decisions}


def reason(plan: QuantPlan, node: str) -> str:
    (found,) = [decision.reason for decision in plan.decisions if decision.node == node]
    return found


def planned(model: ir.Model) -> QuantPlan:
    """The plan, after checking what holds of every plan."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan = plan_for_cpu(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    nodes = {str(node.name): node for node in model.graph}
    assert all(decision.reason and decision.precision in ("int8", "fp32") for decision in plan.decisions)
    assert len({decision.node for decision in plan.decisions}) == len(plan.decisions)
    compute = {name for name, node in nodes.items() if node.op_type in COMPUTE_OPERATORS}
    assert compute <= {decision.node for decision in plan.decisions}
    assert len(set(plan.activations)) == len(plan.activations)
    assert set(plan.silu_inputs) <= set(plan.activations)
    for decision in plan.nodes_in("int8"):
        node = nodes[decision.node]
        assert decision.operator == node.op_type
        data = node.inputs[:1] if node.op_type in (*COMPUTE_OPERATORS, "Reshape") else node.inputs
        assert {value.name for value in data if value is not None} <= set(plan.activations)
    return plan


# --- Convolutions and matrix products ----------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", ["Relu (a)", "Clip (a, zero, six)"])
def test_clamp_is_absorbed_so_that_nothing_stands_between_it_and_the_convolution(clamp: str) -> None:
    limits: dict[str, Any] = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    model = graph(f"[c] a = Conv (x, w) [r] m = {clamp} [d] y = Conv (m, v)", "float[N, C, H, L] y", w=W, v=V, **limits)
    plan = planned(model)
    assert precisions(plan) == {"c": "int8", "d": "int8"}
    assert plan.activations == ("x", "m", "y")


@pytest.mark.parametrize(
    "body",
    [
        "[c] a = Conv (x, w) [r] m = Relu (a) [s] e = Add (a, m) [d] y = Conv (e, v)",  # two readers
        "[c] a = Conv (x, w) [r] m = Tanh (a) [d] y = Conv (m, v)",  # no clamp
    ],
)
def test_convolution_itself_is_quantized_where_no_clamp_alone_reads_it(body: str) -> None:
    plan = planned(graph(body, "float[N, C, H, L] y", w=W, v=V))
    assert plan.activations[:2] == ("x", "a")
    assert {"c", "d"} <= {decision.node for decision in plan.nodes_in("int8")}


def test_clamp_behind_a_graph_output_is_not_absorbed() -> None:
    model = graph("[c] a = Conv (x, w) [r] y = Relu (a)", "float[N, C, H, L] a, float[N, C, H, L] y", w=W)
    assert planned(model).activations == ("x", "a")


def test_convolution_at_the_end_is_integer_with_its_output() -> None:
    plan = planned(graph("[c] y = Conv (x, w)", "float[N, C, H, L] y", w=W))
    assert precisions(plan) == {"c": "int8"}
    assert plan.activations == ("x", "y")


@pytest.mark.parametrize(
    ("head", "shape"), [("Gemm <transB = 1> (f, u)", (5, 4)), ("Gemm (f, u)", (4, 5)), ("MatMul (f, u)", (4, 5))]
)
def test_logits_stay_float(head: str, shape: tuple[int, ...]) -> None:
    body = f"[c] m = Conv (x, w) [gap] p = GlobalAveragePool (m) [flat] f = Flatten (p) [head] y = {head}"
    plan = planned(graph(body, w=W, u=shape))
    assert precisions(plan)["head"] == "int8"
    assert "f" in plan.activations
    assert "y" not in plan.activations


def test_hidden_layer_of_a_perceptron_is_integer_on_both_sides() -> None:
    body = "[one] h = Gemm (x, v) [r] k = Relu (h) [two] y = Gemm (k, u)"
    plan = planned(graph(body, inputs="float[N, 6] x", v=(6, 4), u=(4, 5)))
    assert plan.activations == ("x", "k")


def test_transposed_convolution_stays_float_and_takes_nothing_with_it() -> None:
    model = graph("[c] a = Conv (x, w) [t] b = ConvTranspose (a, k) [r] y = Relu (b)", "float[N,C,H,L] y", w=W, k=W)
    plan = planned(model)
    assert precisions(plan) == {"c": "int8", "t": "fp32"}
    assert "no integer ConvTranspose" in reason(plan, "t")
    assert plan.activations == ("x", "a")


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("[n] k = Neg (w) [c] y = Conv (x, k)", "float[N, 3, 8, 8] x"),
        (
            "[c] y = Conv (x, w)",
            "float[N, 3, 8, 8] x, float[4, 3, 3, 3] w",
        ),  # an initializer that the caller may change
    ],
)
def test_a_weight_that_is_not_constant_stays_float(body: str, inputs: str) -> None:
    model = graph(body, "float[N, C, H, L] y", inputs, w=W)
    plan = planned(model)
    assert precisions(plan) == {"c": "fp32"}
    assert "computed at run time" in reason(plan, "c")
    assert plan.activations == ()
    (convolution,) = [node for node in model.graph if node.op_type == "Conv"]
    assert constant_weight(convolution) is None


# --- What follows integers ---------------------------------------------------------------------------------------


def test_residual_addition_of_two_integers_is_integer() -> None:
    body = "[c] a = Conv (x, w) [d] b = Conv (a, v) [add] y = Add (a, b)"
    plan = planned(graph(body, "float[N, C, H, L] y", w=W, v=V))
    assert precisions(plan) == {"c": "int8", "d": "int8", "add": "int8"}
    assert plan.activations == ("x", "a", "b", "y")


@pytest.mark.parametrize("operator", ["Add", "Concat <axis = 1>"])
def test_joining_with_a_float_branch_stays_float(operator: str) -> None:
    body = f"[c] a = Conv (x, w) [t] b = Tanh (a) [join] y = {operator} (a, b)"
    plan = planned(graph(body, "float[N, C, H, L] y", w=W))
    assert precisions(plan) == {"c": "int8", "join": "fp32"}
    assert "not all its inputs" in reason(plan, "join")
    assert "y" not in plan.activations


@pytest.mark.parametrize("operator", ["Add", "Concat <axis = 0>"])
def test_joining_with_a_constant_stays_float(operator: str) -> None:
    body = f"[c] a = Conv (x, w) [join] e = {operator} (a, k) [t] y = Tanh (e)"
    plan = planned(graph(body, "float[N, C, H, L] y", w=W, k=(1, 4, 6, 6)))
    assert precisions(plan) == {"c": "int8", "join": "fp32"}
    assert "constant" in reason(plan, "join")
    assert plan.activations == ("x", "a")


def test_constants_alone_are_no_integers() -> None:
    body = "[j] k = Concat <axis = 0> (one, one) [n] s = Expand (x, k) [c] y = Conv (s, w)"
    dimensions = np.array([1, 1], np.int64)
    plan = planned(graph(body, "float[N, C, H, L] y", w=W, one=dimensions))
    assert precisions(plan) == {"j": "fp32", "c": "int8"}
    assert plan.activations == ("s", "y")


@pytest.mark.parametrize(
    "follower",
    [
        "MaxPool <kernel_shape = [2, 2]> (a)",
        "AveragePool <kernel_shape = [2, 2]> (a)",
        "GlobalAveragePool (a)",
        "Concat <axis = 1> (a, a)",
        "Flatten (a)",
        "Reshape (a, shape)",
        "Transpose <perm = [0, 2, 3, 1]> (a)",
    ],
)
def test_data_movement_and_pooling_follow_integers(follower: str) -> None:
    body = f"[c] a = Conv (x, w) [k] e = {follower} [t] y = Tanh (e)"
    constants: dict[str, Any] = {"shape": np.array([0, -1], np.int64)} if "shape" in follower else {}
    plan = planned(graph(body, "float y", w=W, **constants))
    assert precisions(plan) == {"c": "int8", "k": "int8"}
    assert plan.activations == ("x", "a", "e")


def test_pooling_of_floats_stays_float() -> None:
    body = "[p] a = MaxPool <kernel_shape = [2, 2]> (x) [t] b = Tanh (a) [c] y = Conv (b, w)"
    plan = planned(graph(body, "float[N, C, H, L] y", w=W))
    assert precisions(plan) == {"p": "fp32", "c": "int8"}


def test_silu_sigmoid_stays_float_with_its_reason() -> None:
    for product in ("Mul (a, s)", "Mul (s, a)"):
        body = f"[c] a = Conv (x, w) [s] s = Sigmoid (a) [m] m = {product} [d] y = Conv (m, v)"
        plan = planned(graph(body, "float[N, C, H, L] y", w=W, v=V))
        assert precisions(plan) == {"c": "int8", "s": "fp32", "d": "int8"}
        assert reason(plan, "s").startswith("SiLU")
        assert plan.activations == ("x", "a", "m", "y")
        assert plan.silu_inputs == ("a",)


@pytest.mark.parametrize(
    ("more", "outputs"),
    [
        ("[m] m = Mul (a, s) [d] b = Conv (m, v) [add] y = Add (a, b)", "float[N, C, H, L] y"),  # a residual reads it
        ("[m] m = Mul (a, s) [d] y = Conv (m, v)", "float[N, C, H, L] y, float[N, C, H, L] a"),  # the caller reads it
        ("[m] m = Mul (a, s) [n] k = Mul (m, s) [d] y = Conv (k, v)", "float[N, C, H, L] y"),  # the sigmoid has more
        ("[t] k = Tanh (a) [m] m = Mul (k, s) [d] y = Conv (m, v)", "float[N, C, H, L] y"),  # another product
    ],
)
def test_only_what_a_silu_alone_reads_is_measured_behind_it(more: str, outputs: str) -> None:
    plan = planned(graph(f"[c] a = Conv (x, w) [s] s = Sigmoid (a) {more}", outputs, w=W, v=V))
    assert plan.silu_inputs == ()
    assert "a" in plan.activations


def test_a_silu_between_floats_is_not_among_the_silu_inputs() -> None:
    body = "[t] a = ConvTranspose (x, w) [s] s = Sigmoid (a) [m] y = Mul (a, s)"
    assert planned(graph(body, "float[N, C, H, L] y", w=(3, 4, 3, 3))).silu_inputs == ()


# --- Squeeze and excitation --------------------------------------------------------------------------------------

FC = {
    "Conv": "[fc1] h = Conv (q, down) [act] k = {act} [fc2] l = Conv (k, up)",
    "Gemm": "[rows] n = Flatten (q) [fc1] h = Gemm (n, down) [act] k = {act} [fc2] o = Gemm (k, up) "
    "[back] l = Reshape (o, shape)",
    "MatMul": "[rows] n = Flatten (q) [fc1] h = MatMul (n, down) [act] k = {act} [fc2] o = MatMul (k, up) "
    "[bias] z = Add (o, b) [back] l = Reshape (z, shape)",
}
GATES = {
    "sigmoid": "[gate] e = Sigmoid (l) [scale] m = Mul (a, e)",
    "hard sigmoid": "[gate] e = HardSigmoid (l) [scale] m = Mul (e, a)",
    "relu6 times a sixth": "[plus] i = Add (l, three) [gate] j = Clip (i, zero, six) [sixth] e = Mul (j, third) "
    "[scale] m = Mul (a, e)",
    "relu6 over six": "[plus] i = Add (l, three) [gate] j = Clip (i, zero, six) [sixth] e = Div (j, six) "
    "[scale] m = Mul (a, e)",
}
SCALARS: dict[str, Any] = {
    name: np.array(value, np.float32) for name, value in {"zero": 0, "six": 6, "three": 3, "third": 1 / 6}.items()
}


def gated(kind: str, gate: str, pool: str = "GlobalAveragePool (a)", act: str = "Relu (h)") -> ir.Model:
    shapes: dict[str, Any] = dict(GATE_SHAPES)
    if kind != "Conv":
        shapes |= {"down": (4, 2), "up": (2, 4), "b": (4,), "shape": np.array([-1, 4, 1, 1], np.int64)}
    body = f"[c] a = Conv (x, w) [squeeze] q = {pool} {FC[kind].format(act=act)} {GATES[gate]} {HEAD}"
    return graph(body, **shapes, **SCALARS, axes=np.array([2, 3], np.int64))


@pytest.mark.parametrize("kind", FC)
@pytest.mark.parametrize("gate", GATES)
def test_gate_stays_float_as_a_whole(kind: str, gate: str) -> None:
    plan = planned(gated(kind, gate))
    found = precisions(plan)
    assert {found[node] for node in ("fc1", "fc2", "gate")} == {"fp32"}
    assert all("squeeze-and-excitation gate" in reason(plan, node) for node in ("fc1", "fc2", "gate"))
    assert found["c"] == found["head"] == "int8"
    assert not {"q", "h", "k", "l", "e", "m"} & set(plan.activations)


@pytest.mark.parametrize("pool", ["GlobalAveragePool (a)", "ReduceMean (a, axes)"])
@pytest.mark.parametrize("act", ["Relu (h)", "Clip (h, zero, six)", "Sigmoid (h)"])
def test_gate_is_found_behind_either_pooling_and_activation(pool: str, act: str) -> None:
    plan = planned(gated("Conv", "sigmoid", pool, act))
    assert precisions(plan)["fc1"] == precisions(plan)["fc2"] == "fp32"


def test_silu_inside_a_gate_belongs_to_the_gate() -> None:
    body = f"""[c] a = Conv (x, w) [squeeze] q = GlobalAveragePool (a) [fc1] h = Conv (q, down) [s] s = Sigmoid (h)
    [silu] k = Mul (h, s) [fc2] l = Conv (k, up) {GATES["sigmoid"]} {HEAD}"""
    plan = planned(graph(body, **GATE_SHAPES))
    assert {precisions(plan)[node] for node in ("fc1", "s", "silu", "fc2", "gate")} == {"fp32"}
    assert "squeeze" in reason(plan, "s")


def test_silu_of_a_map_is_no_gate() -> None:
    body = f"[c] a = Conv (x, w) [d] b = Conv (a, v) [s] s = Sigmoid (b) [silu] m = Mul (b, s) {HEAD}"
    plan = planned(graph(body, w=W, v=V, u=U))
    assert precisions(plan)["c"] == precisions(plan)["d"] == "int8"
    assert "squeeze" not in reason(plan, "s")


def test_attention_over_positions_is_no_gate() -> None:
    # not from a global pooling: its convolution is real work on the whole map
    body = f"[c] a = Conv (x, w) [d] b = Conv (a, v) [s] s = Sigmoid (b) [scale] m = Mul (a, s) {HEAD}"
    plan = planned(graph(body, w=W, v=V, u=U))
    assert precisions(plan)["d"] == "int8"
    assert not any("squeeze" in decision.reason for decision in plan.decisions)


def test_gate_that_also_sees_the_map_is_no_gate() -> None:
    body = f"""[c] a = Conv (x, w) [squeeze] q = GlobalAveragePool (a) [mix] h = Add (q, a) [fc] l = Conv (h, v)
    {GATES["sigmoid"]} {HEAD}"""
    plan = planned(graph(body, **GATE_SHAPES))
    assert precisions(plan)["fc"] == "int8"


def test_pooled_sigmoid_without_a_layer_is_no_gate() -> None:
    body = f"[c] a = Conv (x, w) [squeeze] l = GlobalAveragePool (a) {GATES['sigmoid']} {HEAD}"
    plan = planned(graph(body, **GATE_SHAPES))
    assert not any("squeeze-and" in decision.reason for decision in plan.decisions)


# --- The plan itself ---------------------------------------------------------------------------------------------


def test_plan_without_any_layer_is_empty() -> None:
    assert planned(graph("[t] y = Tanh (x)", "float[N, C, H, L] y")) == QuantPlan((), ())


def test_plan_is_plain_json_and_immutable() -> None:
    plan = planned(gated("Conv", "sigmoid"))
    content = json.loads(json.dumps(plan.to_json()))
    assert tuple(Decision(**decision) for decision in content["decisions"]) == plan.decisions
    assert tuple(content["activations"]) == plan.activations
    assert tuple(content["silu_inputs"]) == plan.silu_inputs
    assert plan.nodes_in("int8") + plan.nodes_in("fp32") != ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.activations = ()  # type: ignore[misc]


# --- What the reader of a report would be surprised by -----------------------------------------------------------


def test_what_was_not_measured_stays_float_with_its_reason() -> None:
    model = graph("[c] a = Conv (x, w) [d] y = Conv (a, v)", "float[N, C, H, L] y", w=W, v=V)
    plan = plan_for_cpu(model, measured={"x", "a"})
    assert precisions(plan) == {"c": "int8", "d": "fp32"}
    assert reason(plan, "d") == "y was not measured: it has no batch axis in front of a fixed size"
    assert plan.activations == ("x", "a")


@pytest.mark.parametrize(("low", "absorbed"), [(0.0, True), (-0.5, False), (0.25, False)])
def test_only_a_clamp_at_zero_is_absorbed(low: float, absorbed: bool) -> None:
    lower, upper = np.array(low, np.float32), np.array(6.0, np.float32)
    model = graph("[c] a = Conv (x, w) [r] y = Clip (a, l, u)", "float[N, C, H, L] y", w=W, l=lower, u=upper)
    assert planned(model).activations == ("x", "y" if absorbed else "a")


def test_silu_in_a_classifier_head_is_no_gate() -> None:
    head = "[gap] p = GlobalAveragePool (m) [flat] f = Flatten (p) [hid] h = Gemm <transB = 1> (f, t)"
    silu = "[sig] s = Sigmoid (h) [mul] k = Mul (h, s) [head] y = Gemm <transB = 1> (k, u)"
    model = graph(f"[c] m = Conv (x, w) {head} {silu}", w=W, t=(4, 4), u=U)
    assert {name: kind for name, kind in precisions(planned(model)).items() if name in ("hid", "head")} == {
        "hid": "int8",
        "head": "int8",
    }
