"""The FP16 pass, against numpy.float16, counts by hand, and all assignments of small random graphs tried one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.calibration.ranges import Range
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.optimize.cast_fp16 import CastResult, cast_fp16
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.runtime.errors import QuantizationError
from textual_graphs import IMAGE, MAPS, graph, normal

Array = NDArray[Any]

W = (3, 3, 1, 1)
FITS = Range(-10.0, 10.0)


def fitting(model: ir.Model, **others: Range | None) -> dict[str, Range]:
    """A harmless range for every float tensor; `others` replace some of them, None drops one."""
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    ranges: dict[str, Range | None] = {str(v.name): FITS for v in values if v.dtype == ir.DataType.FLOAT}
    return {name: interval for name, interval in (ranges | others).items() if interval is not None}


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def cast(model: ir.Model, ranges: Mapping[str, Range] | None = None) -> CastResult:
    """The result, after checking what holds of every one."""
    before = serialized(model)
    result = cast_fp16(model, fitting(model) if ranges is None else ranges)
    assert serialized(model) == before
    proto, original = ir.to_proto(result.model), ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert list(proto.graph.input) == list(original.graph.input)
    assert list(proto.graph.output) == list(original.graph.output)
    assert proto.opset_import == original.opset_import
    assert result.casts == operators(result.model).count("Cast") - operators(model).count("Cast")
    inferred = onnx.ModelProto.FromString(proto.SerializeToString())
    inferred.graph.ClearField("value_info")  # what inference makes of the graph without our word for it
    inferred = onnx.shape_inference.infer_shapes(inferred, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    inputs = {value.name for value in proto.graph.input}
    constants = {tensor.name: tensor.data_type for tensor in proto.graph.initializer if tensor.name not in inputs}
    assert (types | constants) == {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    names = {value.name for node in result.model.graph for value in node.outputs}
    assert names >= {value.name for node in model.graph for value in node.outputs if node.op_type != "Constant"}
    return result


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def types(result: CastResult) -> dict[str, str]:
    """The type of each tensor that a node yields and of each initializer."""
    graph = result.model.graph
    values = (*graph.initializers.values(), *(value for node in graph for value in node.outputs))
    return {str(value.name): str(value.dtype) for value in values}


def precision(result: CastResult, node: str) -> str:
    (decision,) = (decision for decision in result.decisions if decision.node == node)
    return decision.precision


def reason(result: CastResult, node: str) -> str:
    """Why `node` is FP32."""
    (decision,) = (decision for decision in result.decisions if decision.node == node)
    assert decision.precision == "fp32"
    return decision.reason


def initializer(result: CastResult, name: str) -> Array:
    value = result.model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


# --- Borders, names, constants -----------------------------------------------------------------------------------


def test_inside_is_fp16_and_the_borders_are_fp32() -> None:
    result = cast(graph("[conv] c = Conv (x, w, b) [relu] y = Relu (c)", w=W, b=(3,)))
    assert operators(result.model) == ["Cast", "Conv", "Relu", "Cast"]
    assert types(result) == {
        "w": "FLOAT16",
        "b": "FLOAT16",
        "x::fp16": "FLOAT16",
        "c": "FLOAT16",
        "y::fp16": "FLOAT16",
        "y": "FLOAT",
    }
    assert [(d.node, d.operator, d.precision) for d in result.decisions] == [
        ("conv", "Conv", "fp16"),
        ("relu", "Relu", "fp16"),
    ]


def test_weights_are_rounded_to_nearest_even() -> None:
    ties = np.array(
        [1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 65504, 65503, 2**-24, 2**-25, 3 * 2**-25, 1 / 3], np.float32
    )
    result = cast(graph("[add] c = Add (x, k) [conv] y = Conv (c, w)", "float[N, 3, 8, 9] x", k=ties, w=W))
    expected = np.array([1, 1 + 2**-9, -1, 65504, 65504, 2**-24, 0, 2**-23, 1365 / 4096], np.float64)
    assert initializer(result, "k").dtype == np.float16
    assert np.array_equal(initializer(result, "k").astype(np.float64), expected)


def test_output_that_others_read_keeps_its_name_in_fp32() -> None:
    model = graph("[a] y = Conv (x, w) [b] z = Conv (y, w)", outputs=f"{MAPS}, float[N, C, H, L] z", w=W)
    result = cast(model)
    assert result.casts == 3
    (second,) = (node for node in result.model.graph if node.name == "b")
    assert [str(value.name) for value in second.inputs if value] == ["y::fp16", "w"]


def test_output_that_is_an_input_stays() -> None:
    result = cast(graph("[a] y = Conv (x, w)", outputs=f"{MAPS}, {IMAGE}", w=W))
    assert result.casts == 2


def test_shared_initializer_exists_in_both_forms() -> None:
    model = graph("[a] c = Conv (x, w) [b] y = Conv (c, w)", w=W)
    result = cast(model, fitting(model, y=Range(0, 1e6)))
    assert (precision(result, "a"), precision(result, "b")) == ("fp16", "fp32")
    original = model.graph.initializers["w"].const_value
    assert original is not None
    assert initializer(result, "w").dtype == np.float32
    assert np.array_equal(initializer(result, "w"), original.numpy())
    assert np.array_equal(initializer(result, "w::fp16"), original.numpy().astype(np.float16))


def test_initializer_that_is_an_output_stays_fp32() -> None:
    result = cast(graph("[a] y = Conv (x, w)", outputs=f"{MAPS}, float[3, 3, 1, 1] w", w=W))
    assert types(result)["w"] == "FLOAT"
    assert types(result)["w::fp16"] == "FLOAT16"


def test_initializer_that_callers_can_override_is_not_converted() -> None:
    model = graph("[a] c = Conv (x, w) [b] y = Add (c, k)", f"{IMAGE}, float[1] k", w=W, k=(1,))
    result = cast(model, fitting(model, k=None))
    assert types(result)["k"] == "FLOAT"
    assert reason(result, "b") == "k was not measured"


def test_constants_become_initializers() -> None:
    result = cast(graph("k = Constant <value_float = 0.5> () [m] c = Mul (x, k) [a] y = Conv (c, w)", w=W))
    assert types(result)["k"] == "FLOAT16"
    assert operators(result.model) == ["Cast", "Mul", "Conv", "Cast"]


# --- Bound to FP32 -----------------------------------------------------------------------------------------------

CHAIN = "[a] c = Conv (x, w) [b] d = Conv (c, w) [e] y = Conv (d, w)"


@pytest.mark.parametrize("interval", [Range(0, 32753), Range(-32753, 0), Range(-1, 1e30), Range(float("nan"), 0)])
def test_range_beyond_the_safe_part(interval: Range) -> None:
    model = graph(CHAIN, w=W)
    result = cast(model, fitting(model, d=interval))
    assert [d.precision for d in result.decisions] == ["fp16", "fp32", "fp32"]
    assert reason(result, "b").startswith("d reaches")
    assert types(result)["c"] == "FLOAT16"
    assert types(result)["d"] == "FLOAT"
    assert result.casts == 2


@pytest.mark.parametrize("interval", [Range(-32752, 32752), Range(0, 0), Range(0, 2**-14), Range(-(2**-14), 0)])
def test_range_that_fits(interval: Range) -> None:
    """All zeros among them: nothing is lost of them."""
    model = graph(CHAIN, w=W)
    assert {d.precision for d in cast(model, fitting(model, d=interval)).decisions} == {"fp16"}


def test_range_below_the_normal_numbers() -> None:
    model = graph(CHAIN, w=W)
    result = cast(model, fitting(model, d=Range(-6e-5, 6e-5)))
    assert "below the normal numbers" in reason(result, "b")
    assert [d.precision for d in result.decisions] == ["fp16", "fp32", "fp32"]


def test_unmeasured() -> None:
    model = graph(CHAIN, w=W)
    result = cast(model, fitting(model, d=None))
    assert reason(result, "b") == reason(result, "e") == "d was not measured"


def test_large_weight() -> None:
    large, limit = np.full(W, 65520, np.float32), np.full(W, 65504, np.float32)
    result = cast(graph("[a] c = Conv (x, large) [b] y = Conv (c, limit)", large=large, limit=limit))
    assert "large reaches 65520" in reason(result, "a")
    assert precision(result, "b") == "fp16"


CHANNELS = {
    "Conv (x, w)": ((4, 3, 1, 1), (2,)),
    "Conv <group = 3> (x, w)": ((6, 1, 1, 1), (2,)),
    "ConvTranspose (x, w)": ((3, 4, 2, 2), (slice(None), 2)),
    "ConvTranspose <group = 3> (x, w)": ((3, 2, 2, 2), (1, 1)),
    "MatMul (x, w)": ((8, 5), (slice(None), 2)),
    "MatMul (x, v)": ((8,), (slice(None),)),
}


@pytest.mark.parametrize("operator", CHANNELS)
@pytest.mark.parametrize(("factor", "expected"), [(1e-6, "fp32"), (1e-3, "fp16"), (0.0, "fp16")])
def test_tiny_channel(operator: str, factor: float, expected: str) -> None:
    shape, channel = CHANNELS[operator]
    weight = np.ones(shape, np.float32)
    weight[channel] *= factor
    name = "v" if "v)" in operator else "w"
    constants: dict[str, Any] = {name: weight}
    outputs = "float[N, C, H] y" if name == "v" else MAPS
    assert precision(cast(graph(f"[a] y = {operator}", outputs=outputs, **constants)), "a") == expected


@pytest.mark.parametrize("transposed", [0, 1])
def test_tiny_channel_of_gemm(transposed: int) -> None:
    weight = np.ones((5, 4), np.float32)
    weight[2] *= 1e-6  # with transB a channel, else an input
    model = graph(
        f"[a] y = Gemm <transB = {transposed}> (x, w)",
        "float[N, K] x",
        "float[N, M] y",
        w=weight,
    )
    assert precision(cast(model), "a") == ("fp32" if transposed else "fp16")


@pytest.mark.parametrize(("bias", "expected"), [(1.0, "fp16"), (0.01, "fp32"), (0.0, "fp32")])
def test_tiny_channel_beside_its_bias(bias: float, expected: str) -> None:
    """`bias` in multiples of the one whose own rounding loses as much as the weights do."""
    weight = np.ones((4, 3, 1, 1), np.float32)
    weight[2] = 1e-6
    lost = np.abs(weight[2] - weight[2].astype(np.float16)).sum() * 10 * 2
    assert 2e-7 < lost < 4.9e-4
    biases = np.array([1, 1, bias * lost * 2**11 * 1.01, 1], np.float32)
    if bias == 1.0:
        assert precision(cast(graph("[a] y = Conv (x, w, b)", w=weight, b=biases)), "a") == expected
    else:
        assert "1 of 4 channels" in reason(cast(graph("[a] y = Conv (x, w, b)", w=weight, b=biases)), "a")


def test_tiny_bias_counts_for_nothing() -> None:
    result = cast(graph("[a] y = Conv (x, w, b)", w=W, b=np.full(3, 1e-7, np.float32)))
    assert precision(result, "a") == "fp16"


def test_tiny_factor() -> None:
    result = cast(graph("[m] c = Mul (x, k) [a] y = Conv (c, w)", k=np.array([1e-6], np.float32), w=W))
    assert "below the normal numbers" in reason(result, "m")


@pytest.mark.parametrize("factor", [[0.0], [1e-6, 1.0, 1.0, 1, 1, 1, 1, 1]])
def test_factor_of_which_something_is_left(factor: list[float]) -> None:
    result = cast(graph("[m] c = Mul (x, k) [a] y = Conv (c, w)", k=np.array(factor, np.float32), w=W))
    assert precision(result, "m") == "fp16"


# --- Operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "d = InstanceNormalization (c, k, k)",
        "d = LayerNormalization <axis = 1> (c, l, l)",
        "d = Softmax (c)",
        "d = LogSoftmax (c)",
        "d = Exp (c)",
        "d = Softplus (c)",
        "d = Pow (c, k2)",
        "d = ReduceL2 (c)",
        "d = ReduceSumSquare (c)",
        "d = ReduceLogSumExp (c)",
        "d = LpNormalization (c)",
    ],
)
def test_sensitive_operator(body: str) -> None:
    constants = {"w": W, "v": W, "k": (3,), "l": (3, 8, 8), "k2": np.float32(2.0)}
    model = graph(f"[a] c = Conv (x, w) [s] {body} [e] y = Conv (d, v)", **constants)
    result = cast(model)
    assert [d.precision for d in result.decisions] == ["fp16", "fp32", "fp16"]
    assert result.casts == 4


@pytest.mark.parametrize(
    "operator",
    [
        *("Relu", "Sigmoid", "Tanh", "HardSwish", "Sqrt", "GlobalAveragePool", "GlobalMaxPool", "Erf", "Neg"),
        "ReduceMean",
    ],
)
def test_harmless_operator(operator: str) -> None:
    result = cast(graph(f"[a] c = Conv (x, w) [s] d = {operator} (c) [e] y = Conv (d, v)", w=W, v=W))
    assert {d.precision for d in result.decisions} == {"fp16"}
    assert result.casts == 2


def test_operator_without_an_fp16_form() -> None:
    """Range is for float and double alone; before opset 14 CumSum was too."""
    body = "[s] s = Range (k, m, k) [t] y = Add (x, s)"
    result = cast(graph(body, k=np.float32(1), m=np.float32(9)))
    assert "no FP16 form" in reason(result, "s")
    old = graph("[a] c = Conv (x, w) [s] d = CumSum (c, i) [e] y = Conv (d, w)", opset=13, w=W, i=np.int64(1))
    assert "no FP16 form" in reason(cast(old), "s")
    new = graph("[a] c = Conv (x, w) [s] d = CumSum (c, i) [e] y = Conv (d, w)", opset=14, w=W, i=np.int64(1))
    assert precision(cast(new), "s") == "fp16"


def test_operator_of_another_domain() -> None:
    proto = ir.to_proto(graph("[a] c = Conv (x, w) [s] d = Relu (c) [e] y = Conv (d, w)", w=W))
    proto.graph.node[1].domain = "elsewhere"
    proto.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    model = ir.from_proto(proto)
    result = cast_fp16(model, fitting(model))
    assert reason(result, "s") == "ONNX does not specify elsewhere.Relu"
    assert result.casts == 4


@pytest.mark.parametrize(
    "body",
    [
        "h = Cast <to = 7> (c) d = Cast <to = 1> (h)",
        "h = Shape (c) d = ConstantOfShape (h)",
        "d = RandomNormalLike (c)",
    ],
)
def test_output_type_of_an_attribute(body: str) -> None:
    model = graph(f"[a] c = Conv (x, w) {body} [e] f = Add (c, d) [g] y = Conv (f, w)", w=W)
    result = cast(model)
    assert types(result)["d"] == "FLOAT"
    assert precision(result, "e") == "fp16"


def test_shapes_are_untouched_and_decide_nothing() -> None:
    """What reads but the shape of a tensor may read one that leaves FP16, in either type."""
    body = "[a] c = Conv (x, w) [s] s = Shape (c) [r] y = Reshape (c, s)"
    model = graph(body, w=W)
    result = cast(model)
    assert types(result)["s"] == "INT64"
    assert result.casts == 2
    assert [d.node for d in result.decisions] == ["a", "r"]
    assert cast(model, fitting(model, c=Range(0, 1e9))).casts == 0


def test_integers_are_untouched() -> None:
    result = cast(
        graph(
            "[a] i = Add (k, k) [r] c = Reshape (x, i) [e] y = Conv (c, w)",
            k=np.array([1, 1, 4, 8], np.int64),
            w=(3, 2, 1, 1),
        )
    )
    assert [d.node for d in result.decisions] == ["r", "e"]
    assert types(result)["i"] == types(result)["k"] == "INT64"


@pytest.mark.parametrize("opset", [18, 19, 20])
def test_scales_of_resize_stay_float(opset: int) -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    model = graph(
        "[a] c = Conv (x, w) [r] d = Resize (c, roi, s) [e] y = Conv (d, w)",
        opset=opset,
        w=W,
        s=scales,
        roi=np.zeros(0, np.float32),
    )
    result = cast(model)
    assert precision(result, "r") == "fp16"
    assert (types(result)["s"], types(result)["roi"], types(result)["d"]) == ("FLOAT", "FLOAT16", "FLOAT16")
    assert np.array_equal(initializer(result, "s"), scales)


def test_computed_scales_of_resize_get_no_cast() -> None:
    body = "[p] s = Add (k, k) [a] c = Conv (x, w) [r] d = Resize (c, , s) [e] y = Conv (d, w)"
    model = graph(body, w=W, k=np.array([0.5, 0.5, 1, 1], np.float32))
    result = cast(model)
    assert result.casts == 2
    assert (precision(result, "r"), types(result)["s"]) == ("fp16", "FLOAT")


# --- What is refused ---------------------------------------------------------------------------------------------


def test_control_flow() -> None:
    body = "[branch] y = If (k) <then_branch = g () => (float[1, 3, 8, 8] a) { a = Identity (x) }, "
    body += "else_branch = h () => (float[1, 3, 8, 8] b) { b = Relu (x) }>"
    model = graph(body, "float[1, 3, 8, 8] x", "float[1, 3, 8, 8] y", k=np.bool_(True).reshape(()))
    with pytest.raises(QuantizationError, match=r"branch \(If\) has subgraphs"):
        cast_fp16(model, fitting(model))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_initializer_that_is_not_finite(bad: float) -> None:
    model = graph("[a] y = Conv (x, w)", w=np.full(W, bad, np.float32))
    with pytest.raises(QuantizationError, match="initializer w is not finite"):
        cast_fp16(model, fitting(model))


def test_tensor_without_a_type() -> None:
    proto = ir.to_proto(graph(CHAIN, w=W))
    proto.graph.ClearField("value_info")
    with pytest.raises(QuantizationError, match="tensor c has no type"):
        cast_fp16(ir.from_proto(proto), {})


# --- The number of Casts -----------------------------------------------------------------------------------------


def test_cast_is_shared_by_all_its_readers() -> None:
    body = "[a] c = Conv (x, w) [b] d = Conv (x, v) [p] e = Exp (c) [q] f = Softplus (c) [s] y = Sum (d, e, f)"
    result = cast(graph(body, w=W, v=W))
    assert result.casts == 3  # x down once, c up once, d up once


def test_no_casts_between_two_islands_of_fp32() -> None:
    model = graph("[a] c = Exp (x) [b] d = Relu (c) [e] f = Neg (d) [g] y = Exp (f)")
    result = cast(model)
    assert result.casts == 0
    assert reason(result, "b") == "fits FP16, but needs more Casts there"


def test_tie_goes_to_fp16() -> None:
    """One Cast either way."""
    result = cast(
        graph(
            "[a] c = Exp (x) [b] d = Relu (c) [e] f = Neg (d) [g] h = Conv (f, w) [i] j = Relu (h) [k] y = Exp (j)", w=W
        )
    )
    assert [d.precision for d in result.decisions] == ["fp32", "fp16", "fp16", "fp16", "fp16", "fp32"]
    assert result.casts == 2


def test_without_convolutions_nothing_is_gained() -> None:
    result = cast(graph("[a] c = Relu (x) [b] y = Neg (c)"))
    assert result.casts == 0
    assert {d.precision for d in result.decisions} == {"fp32"}


KINDS = {"Conv": ("[{n}] {n}o = Conv ({a}, w)", 1), "Exp": ("[{n}] {n}o = Exp ({a})", 1)}
KINDS |= {"Relu": ("[{n}] {n}o = Relu ({a})", 1), "Add": ("[{n}] {n}o = Add ({a}, {b})", 2)}
Network = dict[str, tuple[str, tuple[str, ...]]]


def random_network(seed: int) -> Network:
    """Node to operator and the nodes it reads; "x" is the image."""
    rng = np.random.default_rng(seed)
    network: Network = {}
    for index in range(9):
        operator = str(rng.choice(list(KINDS), p=[0.2, 0.2, 0.25, 0.35]))
        sources = [str(source) for source in rng.choice(["x", *network], KINDS[operator][1])]
        network[f"n{index}"] = (operator, tuple(sources))
    return network


def casts_of(network: Network, fp16: set[str]) -> int:
    """Tensors, the image among them, with a reader on the other side; what nobody reads is an output, in FP32."""
    casts = 0
    for tensor in ("x", *network):
        readers = {node in fp16 for node, (_, sources) in network.items() if tensor in sources} or {False}
        casts += (tensor not in fp16) in readers
    return casts


@pytest.mark.parametrize("seed", range(40))
def test_no_assignment_needs_fewer_casts(seed: int) -> None:
    network = random_network(seed)
    ends = set(network) - {source for _, sources in network.values() for source in sources}
    tensor = {"x": "x", **{node: f"{node}o" for node in network}}
    body = " ".join(
        KINDS[operator][0].format(n=node, a=tensor[sources[0]], b=tensor[sources[-1]])
        for node, (operator, sources) in network.items()
    )
    outputs = ", ".join(f"float[N, 3, 8, 8] {node}o" for node in sorted(ends))
    result = cast(graph(body, outputs=outputs, w=W))
    flexible = [node for node, (operator, _) in network.items() if operator in ("Relu", "Add")]
    convolutions = {node for node, (operator, _) in network.items() if operator == "Conv"}
    assignments = [
        convolutions | set(some) for size in range(len(flexible) + 1) for some in itertools.combinations(flexible, size)
    ]
    fewest = min(casts_of(network, assignment) for assignment in assignments)
    largest = max((a for a in assignments if casts_of(network, a) == fewest), key=len)
    assert {d.node for d in result.decisions if d.precision == "fp16"} == largest
    assert result.casts == fewest


def test_counter_of_casts_can_be_beaten() -> None:
    """The oracle tells a bad assignment from a good one."""
    network: Network = {"n0": ("Exp", ("x",)), "n1": ("Relu", ("n0",)), "n2": ("Exp", ("n1",))}
    assert casts_of(network, {"n1"}) == 2
    assert casts_of(network, set()) == 0


# --- A network of torch's exporter -------------------------------------------------------------------------------


def test_tiny_network(tiny_models: None) -> None:
    source = resolve("tiny")
    assert source.input_shape is not None
    exported = export_onnx(source.module(), source.input_shape)
    model = fold_batchnorm(ir.from_proto(onnx.load_from_string(exported))).model
    x = normal("images", 16, *source.input_shape)
    result = cast(model, collect(model, [x], identity={}).ranges("minmax"))
    assert result.casts == 2
    assert {d.precision for d in result.decisions} == {"fp16"}
    floats = {name for name, data_type in types(result).items() if data_type == "FLOAT"}
    assert floats == {str(value.name) for value in model.graph.outputs}
