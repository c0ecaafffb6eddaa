"""Folding of batch normalization.

The graphs are written in ONNX's textual syntax, the constants are seeded and far from 0 and 1. The oracles are ONNX
Runtime on the graph before folding and, for the formulas themselves, PyTorch in float64.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgewright.optimize import fold_batchnorm as module
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.passes import PassResult, Skip, run_passes
from edgewright.optimize.verify import check_equivalent
from edgewright.runtime.errors import QuantizationError

Array = NDArray[Any]

TOLERANCE = 3e-6  # of the largest output: rounding of float32 sums of up to some hundred terms
IMAGE = "float[2, 3, 6, 6] x"
ROWS = "float[5, 3] x"
MAPS = "float[N, C, H, W] y"
LOGITS = "float[N, C] y"
CONV = "[conv] c = Conv (x, w)"
BN = "[bn] y = BatchNormalization (c, gamma, beta, mean, variance)"


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def statistics(channels: int, suffix: str = "") -> dict[str, Any]:
    """Float32 [channels] each: scales of both signs, variances from 0.05 to 4."""
    rng = np.random.default_rng([channels, *suffix.encode()])
    arrays = {
        "gamma": rng.uniform(0.3, 3.0, channels) * rng.choice([-1, 1], channels),
        "beta": rng.normal(0, 3, channels),
        "mean": rng.normal(0, 3, channels),
        "variance": np.geomspace(0.05, 4.0, channels),
    }
    return {name + suffix: array.astype(np.float32) for name, array in arrays.items()}


def graph(body: str, inputs: str = IMAGE, outputs: str = MAPS, *, opset: int = 18, **constants: Any) -> ir.Model:
    """A model in textual syntax; `constants`, arrays, become initializers."""
    header = f'<ir_version: 10, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{header} agraph ({inputs}) => ({outputs}) {{ {body} }}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return ir.from_proto(proto)


def feeds_of(model: ir.Model) -> dict[str, Any]:
    """Seeded values for the inputs that are not initializers."""
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return {value.name or "": normal(value.name or "", *(value.shape or ()).numpy()) for value in inputs}  # type: ignore[union-attr]


def assert_equivalent(before: ir.Model, after: ir.Model, tolerance: float = TOLERANCE) -> None:
    proto = ir.to_proto(after)
    onnx.checker.check_model(proto, full_check=True)
    check_equivalent(ir.to_proto(before), proto, feeds=feeds_of(before), tolerance=tolerance)


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def folded(model: ir.Model, changed: int = 1) -> ir.Model:
    """The folded model, after checking that nothing else happened to it or to `model`."""
    untouched = serialized(model)
    result = fold_batchnorm(model)
    assert serialized(model) == untouched
    assert result.changed == changed
    assert result.skipped == ()
    assert "BatchNormalization" not in operators(result.model)
    assert_equivalent(model, result.model)
    return result.model


W = normal("w", 4, 3, 3, 3)
S = statistics(4)


def conv_bn(**changes: Any) -> ir.Model:
    return graph(f"{CONV} {BN}", **{"w": normal("w", 4, 3, 3, 3), **statistics(4), **changes})


# What is folded


@pytest.mark.parametrize(
    ("convolution", "weight"),
    [
        ("Conv (x, w)", (4, 3, 3, 3)),
        ("Conv (x, w, b)", (4, 3, 3, 3)),
        ("Conv <pads = [1, 1, 1, 1], strides = [2, 2], dilations = [2, 2]> (x, w, b)", (4, 3, 3, 3)),
        ("Conv <group = 3> (x, w)", (6, 1, 3, 3)),
        ("Conv <group = 3> (x, w, b)", (3, 1, 3, 3)),
        ("ConvTranspose (x, w)", (3, 4, 3, 3)),
        ("ConvTranspose (x, w, b)", (3, 3, 3, 3)),
        ("ConvTranspose <group = 3> (x, w, b)", (3, 2, 3, 3)),
        ("ConvTranspose <group = 3, strides = [2, 2]> (x, w)", (3, 1, 3, 3)),
    ],
)
def test_convolution(convolution: str, weight: tuple[int, ...]) -> None:
    transposed, groups = convolution.startswith("ConvT"), 3 if "group" in convolution else 1
    channels = weight[1] * groups if transposed else weight[0]
    constants = {"w": normal("w", *weight), **statistics(channels)}
    if ", b)" in convolution:
        constants["b"] = normal("b", channels)
    model = graph(f"[conv] c = {convolution} {BN}", **constants)
    assert operators(folded(model)) == [convolution.split()[0]]


def test_groups_of_a_transposed_convolution_with_two_inputs_and_three_outputs() -> None:
    model = graph(
        f"[conv] c = ConvTranspose <group = 2> (x, w, b) {BN}",
        "float[2, 4, 5, 5] x",
        **{"w": normal("w", 4, 3, 2, 2), "b": normal("b", 6), **statistics(6)},
    )
    folded(model)


@pytest.mark.parametrize("rank", [1, 3])
def test_convolution_of_other_ranks(rank: int) -> None:
    space, kernel = (6,) * rank, (3,) * rank
    shape = ", ".join(str(size) for size in (2, 3, *space))
    axes = ", ".join("NCDHW"[: rank + 2])
    folded(
        graph(f"{CONV} {BN}", f"float[{shape}] x", f"float[{axes}] y", w=normal("w", 4, 3, *kernel), **statistics(4))
    )


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (4,), (1, 4), (), (1,), (1, 1)])
def test_gemm(trans_b: int, bias: tuple[int, ...] | None) -> None:
    constants = statistics(4) | {"w": normal("w", *((4, 3) if trans_b else (3, 4)))}
    if bias is not None:
        constants["b"] = np.asarray(normal("b", *bias), dtype=np.float32)
    inputs = "x, w" if bias is None else "x, w, b"
    gemm = f"[fc] c = Gemm <transB = {trans_b}, alpha = 0.37, beta = -2.5> ({inputs})"
    assert operators(folded(graph(f"{gemm} {BN}", ROWS, LOGITS, **constants))) == ["Gemm"]


def test_gemm_of_a_square_weight_and_a_transposed_left_operand() -> None:
    for trans_b in (0, 1):
        gemm = f"[fc] c = Gemm <transA = 1, transB = {trans_b}, beta = 0.0> (x, w, b)"
        folded(graph(f"{gemm} {BN}", ROWS, LOGITS, w=normal("w", 5, 5), b=normal("b", 5), **statistics(5)))


def test_matmul_gets_an_add() -> None:
    model = graph(f"[mm] c = MatMul (x, w) {BN}", ROWS, LOGITS, w=normal("w", 3, 3), **statistics(3))
    assert operators(folded(model)) == ["MatMul", "Add"]


@pytest.mark.parametrize("operands", ["p, b", "b, p"])
@pytest.mark.parametrize("bias", [(4,), (1, 4), ()])
def test_matmul_and_add(operands: str, bias: tuple[int, ...]) -> None:
    model = graph(
        f"[mm] p = MatMul (x, w) [add] c = Add ({operands}) {BN}",
        ROWS,
        LOGITS,
        **{"w": normal("w", 3, 4), "b": np.asarray(normal("b", *bias), dtype=np.float32), **statistics(4)},
    )
    assert operators(folded(model)) == ["MatMul", "Add"]


def test_momentum_and_epsilon() -> None:
    bn = BN.replace("Normalization", "Normalization <epsilon = 0.25, momentum = 0.1>")
    folded(graph(f"{CONV} {bn}", w=normal("w", 4, 3, 3, 3), **statistics(4)))


@pytest.mark.parametrize("opset", [9, 13, 14, 21])
def test_opsets(opset: int) -> None:
    folded(conv_bn(opset=opset))


def test_an_omitted_optional_bias() -> None:
    folded(graph(f'[conv] c = Conv (x, w, "") {BN}', w=normal("w", 4, 3, 3, 3), **statistics(4)))


def test_weights_from_constant_nodes() -> None:
    body = "w = Constant <value = float[2, 1, 1, 1] {3.0, -0.7}> () v = Constant <value = float[2] {0.1, 5.0}> ()"
    bn = BN.replace("variance", "v")
    constants = {name: array for name, array in statistics(2).items() if name != "variance"}
    assert operators(folded(graph(f"{body} {CONV} {bn}", "float[2, 1, 6, 6] x", **constants))) == ["Conv"]


def test_several_and_consecutive_normalizations() -> None:
    model = graph(
        "c1 = Conv (x, w1) n1 = BatchNormalization (c1, gamma1, beta1, mean1, variance1) "
        "n2 = BatchNormalization (n1, gamma2, beta2, mean2, variance2) r = Relu (n2) "
        "c3 = Conv (r, w3, b3) y = BatchNormalization (c3, gamma3, beta3, mean3, variance3)",
        w1=normal("w1", 4, 3, 3, 3),
        w3=normal("w3", 2, 4, 1, 1),
        b3=normal("b3", 2),
        **{**statistics(4, "1"), **statistics(4, "2"), **statistics(2, "3")},
    )
    assert operators(folded(model, changed=3)) == ["Conv", "Relu", "Conv"]


def test_channels_with_a_zero_scale_become_constant() -> None:
    folded(conv_bn(gamma=np.array([0.0, 2.0, 0.0, -3.0], np.float32)))


# The graph around it


def test_a_graph_output_keeps_its_name_type_and_shape() -> None:
    model = conv_bn()
    output = folded(model).graph.outputs[0]
    assert (output.name, output.type, output.shape) == ("y", model.graph.outputs[0].type, model.graph.outputs[0].shape)


def test_an_output_with_several_users() -> None:
    model = graph(
        f"{CONV} {BN.replace('y', 'n')} r = Relu (n) z = Sigmoid (n) y = Add (r, z)",
        outputs=f"{MAPS}, float[N, C, H, W] n",
        w=normal("w", 4, 3, 3, 3),
        **statistics(4),
    )
    assert [value.name for value in folded(model).graph.outputs] == ["y", "n"]


def test_unused_constants_are_removed_and_used_ones_stay() -> None:
    model = graph(
        f"{CONV} {BN.replace('y', 'n')} y = Mul (n, factor)",
        outputs=f"{MAPS}, float[4] mean",
        **{"w": normal("w", 4, 3, 3, 3), "factor": normal("factor", 1), **statistics(4)},
    )
    assert set(folded(model).graph.initializers) == {"conv_weight_folded", "conv_bias_folded", "factor", "mean"}


def test_statistics_and_biases_may_be_shared() -> None:
    bn = "BatchNormalization (c{0}, gamma, beta, mean, variance)"
    model = graph(
        f"c1 = Conv (x, w1, b) n1 = {bn.format(1)} c2 = Conv (x, w2, b) n2 = {bn.format(2)} y = Add (n1, n2)",
        **{"w1": normal("w1", 4, 3, 3, 3), "w2": normal("w2", 4, 3, 3, 3), "b": normal("b", 4), **statistics(4)},
    )
    assert len(folded(model, changed=2).graph.initializers) == 4


def test_shared_statistics_stay_for_a_normalization_that_is_not_folded() -> None:
    bn = "BatchNormalization ({0}, gamma, beta, mean, variance)"
    model = graph(f"c = Conv (x, w) n = {bn.format('c')} r = Relu (n) y = {bn.format('r')}", w=W, **S)
    result = fold_batchnorm(model)
    assert (result.changed, len(result.skipped)) == (1, 1)
    assert set(result.model.graph.initializers) == {"c_weight_folded", "c_bias_folded", *S}
    assert_equivalent(model, result.model)


def test_new_names_do_not_collide() -> None:
    """The names that would be given are those of an initializer, a node's output and a graph input already."""
    model = graph(
        f"{CONV} {BN.replace('y', 'n')} s = Add (n, conv_weight_folded) conv_bias_folded = Mul (s, conv_bias_folded_1) "
        "y = Relu (conv_bias_folded)",
        f"{IMAGE}, float[1] conv_bias_folded_1",
        **{"w": normal("w", 4, 3, 3, 3), "conv_weight_folded": normal("other", 1), **statistics(4)},
    )
    names = set(folded(model).graph.initializers)
    assert names == {"conv_weight_folded", "conv_weight_folded_1", "conv_bias_folded_2"}


def test_nodes_without_names() -> None:
    body = f"{CONV} {BN}".replace("[conv] ", "").replace("[bn] ", "")
    model = graph(body, w=normal("w", 4, 3, 3, 3), **statistics(4))
    assert set(folded(model).graph.initializers) == {"c_weight_folded", "c_bias_folded"}


def test_folding_twice_changes_nothing_more() -> None:
    once = fold_batchnorm(conv_bn()).model
    assert run_passes(conv_bn(), [fold_batchnorm, fold_batchnorm]).changed == 1
    assert fold_batchnorm(once).changed == 0


# Oracle: PyTorch in float64


def runtime_output(model: ir.Model, x: Array) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


def assert_matches_pytorch(model: ir.Model, arrays: dict[str, Any], linear: Callable[..., torch.Tensor]) -> None:
    """`linear` takes x, w and b; the arrays hold these and the statistics."""
    exact = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    expected = torch.nn.functional.batch_norm(
        linear(exact["x"], exact["w"], exact["b"]),
        exact["mean"],
        exact["variance"],
        exact["gamma"],
        exact["beta"],
        eps=0.03,
    ).numpy()
    actual = runtime_output(folded(model), arrays["x"])
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()


BN_003 = BN.replace("Normalization", "Normalization <epsilon = 0.03>")


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_convolution_against_pytorch(operator: str) -> None:
    transposed = operator == "ConvTranspose"
    weight = (4, 3, 3, 3) if transposed else (6, 2, 3, 3)
    function: Callable[..., torch.Tensor] = (
        torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    )
    constants = {"w": normal("w", *weight), "b": normal("b", 6), **statistics(6)}
    model = graph(f"c = {operator} <group = 2> (x, w, b) {BN_003}", "float[2, 4, 5, 5] x", **constants)
    arrays = {"x": normal("x", 2, 4, 5, 5), **constants}
    assert_matches_pytorch(model, arrays, lambda x, w, b: function(x, w, b, groups=2))


def test_linear_against_pytorch() -> None:
    constants = {"w": normal("w", 5, 3), "b": normal("b", 5), **statistics(5)}
    model = graph(f"c = Gemm <transB = 1> (x, w, b) {BN_003}", ROWS, LOGITS, **constants)
    assert_matches_pytorch(model, {"x": normal("x", 5, 3), **constants}, torch.nn.functional.linear)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    channels_in=st.integers(1, 3),
    channels_out=st.integers(1, 3),
    kernel=st.integers(1, 3),
    has_bias=st.booleans(),
    epsilon=st.sampled_from([None, 1e-7, 1e-3, 0.5]),
)
def test_any_convolution(
    transposed: bool,
    groups: int,
    channels_in: int,
    channels_out: int,
    kernel: int,
    has_bias: bool,
    epsilon: float | None,
) -> None:
    """`channels_in` and `channels_out` are those of one group."""
    channels = groups * channels_out
    shape = (groups * channels_in, channels_out) if transposed else (channels, channels_in)
    constants = {"w": normal("w", *shape, kernel, kernel), **statistics(channels)}
    if has_bias:
        constants["b"] = normal("b", channels)
    operator = "ConvTranspose" if transposed else "Conv"
    inputs = "x, w, b" if has_bias else "x, w"
    bn = BN if epsilon is None else BN.replace("Normalization", f"Normalization <epsilon = {epsilon:.7f}>")
    body = f"c = {operator} <group = {groups}> ({inputs}) {bn}"
    folded(graph(body, f"float[2, {groups * channels_in}, 5, 4] x", **constants))


# What must not be folded


def skipped(model: ir.Model, *expected: Skip) -> None:
    """Checks that just `expected` is listed and that the graph is what it was."""
    result = fold_batchnorm(model)
    assert result == PassResult(result.model, 0, expected)
    assert serialized(result.model) == serialized(model)


ON_IMAGE = statistics(3)
N = BN.replace("y", "n")


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        (f"{CONV} {N} z = Relu (c) y = Add (n, z)", {"w": W, **S}, "follows c, which has 2 consumers"),
        (f"{CONV} {N} y = Add (n, c)", {"w": W, **S}, "follows c, which has 2 consumers"),
        (f"{CONV} {N} z = Conv (x, w) y = Add (n, z)", {"w": W, **S}, "weight w is shared with z"),
        (f"{CONV} {N} z = ReduceMean (w) y = Add (n, z)", {"w": W, **S}, "weight w is shared with z"),
        (f"v = Abs (w) [conv] c = Conv (x, v) {BN}", {"w": W, **S}, "weight of conv is not constant"),
        (
            f"b = Abs (mean) [conv] c = Conv (x, w, b) {BN}",
            {"w": W, **S},
            "bias of conv is not constant",
        ),
        (f"{CONV} m = Abs (mean) {BN.replace('mean', 'm')}", {"w": W, **S}, "mean of bn is not constant"),
        (
            f"c = Concat <axis = 1> (x, x) {BN}",
            statistics(6),
            "follows Concat, not a linear operator",
        ),
        (f"c = Relu (x) {BN}", ON_IMAGE, "follows Relu, not a linear operator"),
        (
            f"c = MaxPool <kernel_shape = [2, 2]> (x) {BN}",
            ON_IMAGE,
            "follows MaxPool, not a linear operator",
        ),
        (f"c = Add (x, x) {BN}", ON_IMAGE, "follows Add, not a linear operator"),
        (
            f"p = Conv (x, w) c = Add (p, b) {BN}",
            {"w": W, "b": normal("b", 4, 1, 1), **S},
            "follows Add, not a linear operator",
        ),
        (
            "[bn] n = BatchNormalization (x, gamma, beta, mean, variance) y = Conv (n, w)",
            {"w": W, **ON_IMAGE},
            "follows a graph input, not a linear operator",
        ),
    ],
)
def test_skips_on_images(body: str, constants: dict[str, Any], reason: str) -> None:
    skipped(graph(body, **constants), Skip("bn", reason))


W2 = normal("w2", 3, 4)


@pytest.mark.parametrize(
    ("inputs", "body", "constants", "reason"),
    [
        (f"{ROWS}, float[3, 4] w", f"[mm] c = MatMul (x, w) {BN}", S, "weight of mm is not constant"),
        (
            "float[3, 4] x",
            f"[mm] c = MatMul (w, x) {BN}",
            {"w": normal("w", 5, 3), **S},
            "weight of mm is not constant",
        ),
        (f"{ROWS}, float[4] b", f"[fc] c = Gemm (x, w, b) {BN}", {"w": W2, **S}, "bias of fc is not constant"),
        (
            f"{ROWS}, float[5, 4] b",
            f"p = MatMul (x, w) [add] c = Add (p, b) {BN}",
            {"w": W2, **S},
            "bias of add is not constant",
        ),
        (
            ROWS,
            f"[fc] c = Gemm (x, w, b) {BN}",
            {"w": W2, "b": normal("b", 5, 4), **S},
            "bias of fc has shape (5, 4), not one number per channel",
        ),
        (
            ROWS,
            f"p = MatMul (x, w) [add] c = Add (p, b) {BN}",
            {"w": W2, "b": normal("b", 5, 1), **S},
            "bias of add has shape (5, 1), not one number per channel",
        ),
        (
            "float[4, 3] x",  # as many rows as channels
            f"p = MatMul (x, w) [add] c = Add (p, b) {BN}",
            {"w": W2, "b": normal("b", 4, 1), **S},
            "bias of add has shape (4, 1), not one number per channel",
        ),
        (
            ROWS,
            f"p = MatMul (x, w) [add] c = Add (b, p) {N} y = Add (p, n)",
            {"w": W2, "b": normal("b", 4), **S},
            "follows p, which has 2 consumers",
        ),
    ],
)
def test_skips_on_rows(inputs: str, body: str, constants: dict[str, Any], reason: str) -> None:
    skipped(graph(body, inputs, LOGITS, **constants), Skip("bn", reason))


def test_skips_a_matmul_of_more_axes() -> None:
    """BatchNormalization's channels are axis 1, the product's are the last one; here both have 4."""
    model = graph(
        f"c = MatMul (x, w) {BN}", "float[2, 4, 3] x", "float[N, C, L] y", w=normal("w", 3, 4), **statistics(4)
    )
    skipped(model, Skip("bn", "follows a MatMul whose output is not known to have two axes"))


def test_skips_a_matmul_of_unknown_rank() -> None:
    reshaped = "r = Reshape (x, s) c = MatMul (r, w)"
    constants = {"s": np.array([2, 4, 3], np.int64), "w": normal("w", 3, 4), **statistics(4)}
    model = graph(f"{reshaped} {N} y = Relu (n)", "float[24] x", "float y", **constants)
    skipped(model, Skip("bn", "follows a MatMul whose output is not known to have two axes"))


def test_skips_a_matmul_with_a_vector() -> None:
    model = graph(f"c = MatMul (x, w) {BN}", "float[2, 3, 4] x", LOGITS, w=normal("w", 4), **statistics(3))
    skipped(model, Skip("bn", "weight w has shape (4,), not two axes"))


def test_operators_of_other_domains_are_not_what_they_are_called() -> None:
    skipped(graph(f"c = custom.Conv (x, w) {BN}", w=W, **S), Skip("bn", "follows Conv, not a linear operator"))
    skipped(graph(f"{CONV} {BN.replace('Batch', 'custom.Batch')}", w=W, **S))


def test_skips_a_graph_output() -> None:
    model = graph(f"{CONV} {BN}", outputs=f"{MAPS}, float[N, C, H, W] c", w=W, **S)
    skipped(model, Skip("bn", "follows c, which is a graph output"))


@pytest.mark.parametrize(("overridable", "shape"), [("w", "4, 3, 3, 3"), ("variance", "4")])
def test_skips_initializers_that_callers_may_override(overridable: str, shape: str) -> None:
    model = graph(f"{CONV} {BN}", f"{IMAGE}, float[{shape}] {overridable}", w=W, **S)
    reason = "weight of conv is not constant" if overridable == "w" else "variance of bn is not constant"
    skipped(model, Skip("bn", reason))


def test_skips_a_weight_shared_by_two_normalized_convolutions() -> None:
    bn = "BatchNormalization (c{0}, gamma{0}, beta{0}, mean{0}, variance{0})"
    model = graph(
        f"[conv1] c1 = Conv (x, w) [bn1] n1 = {bn.format(1)} [conv2] c2 = Conv (x, w) [bn2] n2 = {bn.format(2)} "
        "y = Add (n1, n2)",
        **{"w": W, **statistics(4, "1"), **statistics(4, "2")},
    )
    skipped(model, Skip("bn1", "weight w is shared with conv2"), Skip("bn2", "weight w is shared with conv1"))


def test_skips_training_mode() -> None:
    bn = BN.replace("y =", "y, m, v =").replace("Normalization", "Normalization <training_mode = 1>")
    reason = "is in training mode: it uses the statistics of the batch"
    skipped(graph(f"{CONV} {bn}", w=W, **S), Skip("bn", reason))
    one_output = BN.replace("Normalization", "Normalization <training_mode = 1>")
    skipped(graph(f"{CONV} {one_output}", w=W, **S), Skip("bn", reason))


def test_skips_training_as_it_was_before_opset_14() -> None:
    bn = BN.replace("y =", "y, m, v, sm, sv =")
    model = graph(f"{CONV} {bn}", opset=9, w=W, **S)
    skipped(model, Skip("bn", "is in training mode: it uses the statistics of the batch"))


def test_skips_weights_that_are_not_float32() -> None:
    constants = {name: array.astype(np.float16) for name, array in {"w": W, **S}.items()}
    model = graph(f"{CONV} {BN}", "float16[2, 3, 6, 6] x", "float16[N, C, H, W] y", **constants)
    skipped(model, Skip("bn", "weight w is float16, only float32 is folded"))


def test_skips_statistics_of_another_size() -> None:
    """Of one channel, they would be broadcast silently."""
    skipped(conv_bn(**statistics(1)), Skip("bn", "has statistics of 1 channels behind 4 output channels"))


@pytest.mark.parametrize(
    ("operator", "opset", "size"),
    [
        ("InstanceNormalization (x, s, b)", 18, 3),
        ("LayerNormalization <axis = -1> (x, s, b)", 18, 6),
        ("GroupNormalization <num_groups = 3> (x, s, b)", 21, 3),
        ("MeanVarianceNormalization (x)", 18, 3),
        ("RMSNormalization <axis = -1> (x, s)", 23, 6),
    ],
)
def test_lists_normalizations_that_depend_on_the_image(operator: str, opset: int, size: int) -> None:
    model = graph(f"[norm] y = {operator}", opset=opset, s=normal("s", size), b=normal("b", size))
    reason = f"{operator.split()[0]} depends on the image, not a constant affine map"
    skipped(model, Skip("norm", reason))


def test_skips_subgraphs_and_what_they_see() -> None:
    """One normalization is inside a branch; the other one's input is also read there."""
    model = graph(
        f"{CONV} {N} "
        "k = Constant <value = bool {1}> () "
        "t = If (k) <then_branch = then () => (a) {"
        "[inner] a = BatchNormalization (c, gamma, beta, mean, variance) },"
        " else_branch = other () => (e) { e = Relu (c) }> "
        "y = Add (n, t)",
        **{"w": W, **S},
    )
    skipped(
        model,
        Skip("bn", "follows c, which has 3 consumers"),
        Skip("inner", "is inside a subgraph or a function; only the main graph is folded"),
    )


def test_one_skip_does_not_keep_others_from_folding() -> None:
    model = graph(
        "[bn1] n1 = BatchNormalization (x, gamma1, beta1, mean1, variance1) c = Conv (n1, w) "
        "y = BatchNormalization (c, gamma, beta, mean, variance)",
        **{"w": W, **S, **statistics(3, "1")},
    )
    result = fold_batchnorm(model)
    assert (result.changed, result.skipped) == (1, (Skip("bn1", "follows a graph input, not a linear operator"),))
    assert operators(result.model) == ["BatchNormalization", "Conv"]
    assert_equivalent(model, result.model)


# Broken statistics


@pytest.mark.parametrize("role", ["gamma", "beta", "mean", "variance"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_raise(role: str, value: float) -> None:
    broken = S[role].copy()
    broken[2] = value
    with pytest.raises(QuantizationError, match=r"^bn has broken statistics"):
        fold_batchnorm(conv_bn(**{role: broken}))


@pytest.mark.parametrize("variance", [-0.5, -1e-5])
def test_a_variance_that_has_no_root_raises(variance: float) -> None:
    broken = np.array([1.0, 2.0, 3.0, variance - 1e-9], np.float32)
    with pytest.raises(QuantizationError, match=r"^bn has broken statistics"):
        fold_batchnorm(conv_bn(variance=broken))


def test_a_zero_variance_needs_an_epsilon() -> None:
    folded(conv_bn(variance=np.zeros(4, np.float32)))
    bn = BN.replace("Normalization", "Normalization <epsilon = 0.0>")
    with pytest.raises(QuantizationError, match="variance \\+ epsilon positive"):
        fold_batchnorm(graph(f"{CONV} {bn}", w=W, **{**S, "variance": np.zeros(4, np.float32)}))


def test_weights_beyond_float32_raise() -> None:
    with pytest.raises(QuantizationError, match=r"^folding bn yields weights that are not finite in float32"):
        fold_batchnorm(conv_bn(w=W * np.float32(1e38), variance=np.full(4, 1e-8, np.float32)))


# Mutants: what the oracle must catch


def test_oracle_catches_a_dropped_normalization() -> None:
    mutant = graph(CONV.replace("c =", "y ="), w=W)
    with pytest.raises(QuantizationError, match="differs"):
        assert_equivalent(conv_bn(), mutant)


def test_oracle_catches_a_wrong_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_bn(variance=np.array([0.01, 0.02, 0.015, 0.03], np.float32))
    folded(model)
    monkeypatch.setattr(module, "BN_EPSILON", 1e-3)
    with pytest.raises(QuantizationError, match="differs"):
        check_mutant(model)


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "weight", "channels"),
    [
        ("Conv", IMAGE, MAPS, (3, 3, 3, 3), 3),
        ("ConvTranspose", IMAGE, MAPS, (3, 3, 3, 3), 3),
        ("Gemm", ROWS, LOGITS, (3, 3), 3),
        ("Gemm <transB = 1>", ROWS, LOGITS, (3, 3), 3),
        ("MatMul", ROWS, LOGITS, (3, 3), 3),
    ],
)
def test_oracle_catches_a_transposed_axis(
    operator: str, inputs: str, outputs: str, weight: tuple[int, ...], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graph(f"c = {operator} (x, w) {BN}", inputs, outputs, w=normal("w", *weight), **statistics(channels))
    folded(model)
    other_axis = (1, channels) if operator in ("Conv", "Gemm <transB = 1>") else (channels, 1)
    scale_view = (*other_axis, *[1] * (len(weight) - 2))
    monkeypatch.setattr(module, "_layout", lambda linear, shape: (shape, scale_view))
    with pytest.raises(QuantizationError, match="differs"):
        check_mutant(model)


def test_oracle_catches_scales_of_the_wrong_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a transposed convolution's weight belong to the groups in blocks, not in turn."""
    body = f"c = ConvTranspose <group = 3> (x, w) {BN}"
    model = graph(body, "float[2, 6, 5, 5] x", w=normal("w", 6, 3, 2, 2), **statistics(9))
    folded(model)
    monkeypatch.setattr(module, "_layout", lambda linear, shape: ((2, 3, 3, 4), (1, 3, 3, 1)))
    with pytest.raises(QuantizationError, match="differs"):
        check_mutant(model)


def check_mutant(model: ir.Model) -> None:
    """At the default tolerance: a real mistake must not need a tight one to be seen."""
    after = fold_batchnorm(model).model
    check_equivalent(ir.to_proto(model), ir.to_proto(after), feeds=feeds_of(model))


# The work of the pass


def blocks(count: int) -> ir.Model:
    """`count` convolutions, each with its batch normalization and ReLU."""
    arrays: dict[str, Array] = {}
    nodes = []
    for index in range(count):
        arrays |= {f"w{index}": normal("w", 3, 3, 1, 1), **statistics(3, str(index))}
        parameters = [f"{name}{index}" for name in ("gamma", "beta", "mean", "variance")]
        nodes += [
            onnx.helper.make_node("Conv", [f"r{index}", f"w{index}"], [f"c{index}"]),
            onnx.helper.make_node("BatchNormalization", [f"c{index}", *parameters], [f"n{index}"]),
            onnx.helper.make_node("Relu", [f"n{index}"], [f"r{index + 1}"]),
        ]
    shape: list[str | int | None] = ["N", 3, 4, 4]
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(f"r{index}", onnx.TensorProto.FLOAT, shape)] for index in (0, count)
    )
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph(nodes, "blocks", inputs, outputs, constants)))


def calls_to_fold(model: ir.Model, count: int) -> int:
    """Python and C functions that are called; unlike seconds, the same on every run."""
    calls = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        result = fold_batchnorm(model)
    finally:
        sys.setprofile(None)
    assert result.changed == count
    return calls


def test_the_work_is_linear_in_the_number_of_nodes() -> None:
    """A quadratic step would be a hundredfold of calls for a tenfold graph."""
    calls = {count: calls_to_fold(blocks(count), count) for count in (10, 100, 1000)}
    assert calls[100] / calls[10] <= 10.5
    assert calls[1000] / calls[100] <= 10.5
