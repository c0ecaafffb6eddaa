"""Batch normalization that is written out from its formula.

The oracles are PyTorch's own batch normalization in float64, and ONNX Runtime on the graph as it was. Constants are
seeded, scales of both signs, far from 0 and 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from edgewright.export.conventions import INPUT_NAME
from edgewright.export.to_onnx import export_onnx
from edgewright.export.zoo.lenet import lenet_bn, lenet_bn_scratch, state_for
from edgewright.optimize import recognize_batchnorm as module
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.passes import Skip, run_passes
from edgewright.optimize.recognize_batchnorm import recognize_batchnorm
from edgewright.optimize.verify import max_relative_difference
from edgewright.runtime.errors import QuantizationError
from textual_graphs import IMAGE, MAPS, graph, normal

Array = NDArray[Any]

TOLERANCE = 1e-6  # of the largest output
PASSES = (recognize_batchnorm, fold_batchnorm)
CONV = "[conv] c = Conv (x, w)"
BOOK = "[sub] s = Sub (c, mean) d = Div (s, deviation) m = Mul (gamma, d) y = Add (m, beta)"
SHIFTED = "v = Add (variance, epsilon)"
ROWS, LOGITS = "float[N, 3] x", "float[N, C] y"
W = (4, 3, 3, 3)
MAP_AXES, ROW_AXES = (1, 4, 1, 1), (1, 4)


def parameters(*shape: int) -> dict[str, Array]:
    """Float32 of `shape` each; deviation is √(variance + epsilon)."""
    rng = np.random.default_rng([7, *shape])
    arrays = {
        "mean": rng.normal(0, 3, shape),
        "variance": rng.uniform(0.05, 4, shape),
        "gamma": rng.uniform(0.3, 3, shape) * rng.choice([-1, 1], shape),
        "beta": rng.normal(0, 3, shape),
    }
    arrays["deviation"] = np.sqrt(arrays["variance"] + 0.01)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def used(body: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """Those of `arrays` that `body` names."""
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return {name: array for name, array in arrays.items() if name in words}


def maps(body: str, shape: tuple[int, ...] = MAP_AXES, outputs: str = MAPS, **arrays: Any) -> ir.Model:
    """`body` on an image of 3 channels, with constants of `shape`; w is a convolution's weight with 4 channels."""
    constants = {"w": W, "epsilon": np.float32(0.01), "minus_half": np.float32(-0.5), **parameters(*shape), **arrays}
    return graph(body, outputs=outputs, **used(body, constants))


def rows(body: str, shape: tuple[int, ...] = ROW_AXES, **arrays: Any) -> ir.Model:
    """`body` on rows of 3 numbers."""
    return graph(body, ROWS, LOGITS, **used(body, {"w": (3, 4), **parameters(*shape), **arrays}))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def difference(before: ir.Model, after: ir.Model) -> float:
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    sides = [3, 8, 8] if before.graph.inputs[0].shape.rank() == 4 else [3]  # type: ignore[union-attr]
    return max_relative_difference(ir.to_proto(before), ir.to_proto(after), {"x": normal("x", 5, *sides)})


def recognized(before: ir.Model, *expected: str) -> None:
    """Checks that one chain is recognized, that `expected` operators remain after folding, and that results stay."""
    untouched = ir.to_proto(before).SerializeToString(deterministic=True)
    result = recognize_batchnorm(before)
    assert (result.changed, result.skipped) == (1, ())
    assert operators(result.model).count("BatchNormalization") == 1
    assert difference(before, result.model) <= TOLERANCE
    folded = run_passes(before, PASSES)
    assert operators(folded.model) == list(expected)
    assert difference(before, folded.model) <= TOLERANCE
    assert [value.name for value in folded.model.graph.outputs] == [value.name for value in before.graph.outputs]
    assert ir.to_proto(before).SerializeToString(deterministic=True) == untouched


def left_alone(before: ir.Model, *expected: Skip) -> None:
    """Checks that nothing changes, and that just `expected` is listed."""
    result = recognize_batchnorm(before)
    assert (result.changed, result.skipped) == (0, expected)
    assert ir.to_proto(result.model).SerializeToString() == ir.to_proto(before).SerializeToString()


# What is recognized


def test_the_books_form_equals_pytorchs_batch_normalization() -> None:
    arrays = parameters(*MAP_AXES)
    before = maps(f"{CONV} {BOOK}")
    x, w = torch.from_numpy(normal("x", 5, 3, 8, 8)), torch.from_numpy(normal("w", *W))
    exact = {name: torch.from_numpy(array).double().reshape(-1) for name, array in arrays.items()}
    maps_in = torch.nn.functional.conv2d(x.double(), w.double())
    statistics = exact["mean"], exact["deviation"] ** 2
    expected = torch.nn.functional.batch_norm(maps_in, *statistics, exact["gamma"], exact["beta"], eps=0.0)
    for passes in ((recognize_batchnorm,), PASSES):
        after = run_passes(before, passes).model
        found = torch.from_numpy(ir_output(after, x.numpy()))
        assert float((found - expected).abs().max() / expected.abs().max()) <= TOLERANCE


def ir_output(model: ir.Model, x: Array) -> Array:
    (output,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return np.asarray(output)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1)])
@pytest.mark.parametrize(
    "steps",
    [
        BOOK,
        BOOK.replace("gamma, d", "d, gamma").replace("m, beta", "beta, m"),
        "s = Sub (c, mean) y = Div (s, deviation)",
        "s = Sub (c, mean) d = Mul (s, deviation) m = Mul (d, gamma) y = Add (m, beta)",
        "s = Sub (mean, c) d = Div (s, deviation) m = Mul (d, gamma) y = Sub (beta, m)",
        "s = Add (c, mean) d = Div (s, deviation) m = Mul (d, gamma) y = Sub (m, beta)",
        "m = Mul (c, gamma) y = Add (m, beta)",
        "y = Mul (c, gamma)",
        f"{SHIFTED} r = Sqrt (v) s = Sub (c, mean) d = Div (s, r) m = Mul (d, gamma) y = Add (m, beta)",
        f"{SHIFTED} r = Sqrt (v) q = Reciprocal (r) s = Sub (c, mean) d = Mul (s, q) y = Add (d, beta)",
        f"{SHIFTED} r = Pow (v, minus_half) g = Mul (r, gamma) s = Sub (c, mean) d = Mul (g, s) y = Add (d, beta)",
        f"{SHIFTED} r = Pow (v, minus_half) g = Mul (r, gamma) d = Mul (c, g) h = Mul (mean, g) n = Neg (h) "
        "b = Add (n, beta) y = Add (d, b)",
    ],
)
def test_forms(steps: str, shape: tuple[int, ...]) -> None:
    recognized(maps(f"{CONV} {steps}", shape), "Conv")


@pytest.mark.parametrize("view", ["Reshape (mean, to)", "Unsqueeze (mean, axes)"])
def test_parameters_that_are_reshaped_in_the_graph(view: str) -> None:
    flat: dict[str, Any] = {name: array.reshape(-1) for name, array in parameters(*MAP_AXES).items()}
    views = f"p = {view} q = {view.replace('mean', 'deviation')}"
    body = f"{CONV} {views} s = Sub (c, p) y = Div (s, q)"
    recognized(maps(body, **flat, to=np.array([1, -1, 1, 1]), axes=np.array([1, 2])), "Conv")


def test_constant_nodes() -> None:
    text = "float[4, 1, 1] {3.0, -0.7, 0.2, 5.0}"
    recognized(maps(f"k = Constant <value = {text}> () {CONV} y = Mul (c, k)"), "Conv")


@pytest.mark.parametrize("shape", [(1, 4), (4,)])
@pytest.mark.parametrize("product", ["Gemm (x, w)", "Gemm <transB = 1> (x, v)", "MatMul (x, w)"])
def test_rows(product: str, shape: tuple[int, ...]) -> None:
    remaining = ["MatMul", "Add"] if "MatMul" in product else ["Gemm"]
    recognized(rows(f"c = {product} {BOOK}", shape, v=(4, 3)), *remaining)


def test_the_bias_behind_a_matrix_product_belongs_to_the_chain() -> None:
    recognized(rows(f"p = MatMul (x, w) c = Add (p, bias) {BOOK}", bias=normal("bias", 4)), "MatMul", "Add")


def test_transposed_convolution_in_groups() -> None:
    recognized(maps(f"c = ConvTranspose <group = 3> (x, w) {BOOK}", (1, 6, 1, 1), w=(3, 2, 3, 3)), "ConvTranspose")


def test_one_channel() -> None:
    recognized(maps(f"{CONV} {BOOK}", (1, 1, 1, 1), w=(1, 3, 3, 3)), "Conv")


def test_scale_layer_behind_batch_normalization() -> None:
    """As Caffe has it: normalization and its scale are two layers."""
    statistics = {name: array.reshape(-1) for name, array in parameters(*MAP_AXES).items()}
    norm = "n = BatchNormalization (p, one, zero, flat_mean, flat_variance)"
    flat: dict[str, Any] = {"flat_mean": statistics["mean"], "flat_variance": statistics["variance"]}
    body = f"p = Conv (x, w) {norm} m = Mul (n, gamma) y = Add (m, beta)"
    before = maps(body, **flat, one=np.ones(4, np.float32), zero=np.zeros(4, np.float32))
    assert recognize_batchnorm(before).changed == 1
    after = run_passes(before, PASSES)
    assert (after.changed, operators(after.model)) == (3, ["Conv"])
    assert difference(before, after.model) <= TOLERANCE


def test_numbers_for_all_channels_between_belong_to_it_and_behind_do_not() -> None:
    body = f"{CONV} h = Mul (c, half) {BOOK.replace('(c', '(h').replace('y =', 'n =')} y = Mul (n, half)"
    recognized(maps(body, half=np.float32(0.5)), "Conv", "Mul")


def test_what_follows_the_last_usable_step_stays() -> None:
    body = f"{CONV} {BOOK.replace('y =', 'n =')} y = Mul (n, mask)"
    recognized(maps(body, mask=(1, 4, 6, 6)), "Conv", "Mul")


def test_the_result_may_have_several_readers_and_be_an_output() -> None:
    body = f"{CONV} {BOOK.replace('y =', 'n =')} r = Relu (n) z = Sigmoid (n) y = Add (r, z)"
    recognized(maps(body, outputs=f"{MAPS}, float[N, C, H, L] n"), "Conv", "Relu", "Sigmoid", "Add")


def test_shared_parameters_stay_for_their_other_users() -> None:
    body = f"{CONV} {BOOK.replace('y =', 'n =')} y = Add (n, beta)"  # a chain of five
    recognized(maps(body), "Conv")
    body = f"{CONV} {BOOK.replace('y =', 'n =')} r = Relu (n) y = Add (r, beta)"
    after = recognize_batchnorm(maps(body)).model
    assert "beta" in after.graph.initializers
    assert not {"mean", "deviation", "gamma"} & set(after.graph.initializers)


def test_new_names_do_not_collide() -> None:
    body = f"{CONV} {BOOK.replace('y =', 'n =')} r = Relu (n) y = Add (r, sub_mean)"
    before = maps(body, sub_mean=np.ones(1, np.float32))
    after = recognize_batchnorm(before).model
    assert {"sub_mean", "sub_mean_1", "sub_scale", "sub_bias", "sub_variance"} <= set(after.graph.initializers)
    assert difference(before, after) <= TOLERANCE


def test_recognizing_twice_changes_nothing_more() -> None:
    assert run_passes(maps(f"{CONV} {BOOK}"), (recognize_batchnorm, recognize_batchnorm)).changed == 1


def test_means_far_from_zero_are_subtracted_before_anything_is_rounded() -> None:
    """The mean almost cancels the convolution's bias; multiplied by the scale first, three digits would be lost."""
    bias = np.full(4, 1000, np.float32)
    far = {"mean": bias.reshape(MAP_AXES) + np.float32(0.25), "deviation": np.full(MAP_AXES, 0.001, np.float32)}
    before = maps(f"c = Conv (x, w, bias) {BOOK}", **far, bias=bias)
    after = run_passes(before, PASSES).model
    gamma, beta = (parameters(*MAP_AXES)[name].reshape(-1).astype(np.float64) for name in ("gamma", "beta"))
    exact = -0.25 * gamma / far["deviation"].reshape(-1).astype(np.float64) + beta
    (found,) = (value.const_value for name, value in after.graph.initializers.items() if "bias" in name)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), exact, rtol=2e-7)


# What is left alone

LEFT: dict[str, tuple[ir.Model, str]] = {
    "rows of the map": (
        maps(f"{CONV} {BOOK}", (6, 1)),
        "sub has a constant of shape (6, 1), not one number for each of 4 channels",
    ),
    "width of the map": (
        maps(f"{CONV} {BOOK}", (4,), w=(4, 3, 5, 5)),
        "sub has a constant of shape (4,), not one number for each of 4 channels",
    ),
    "every place of the map": (
        maps(f"{CONV} {BOOK}", (4, 6, 6)),
        "sub has a constant of shape (4, 6, 6), not one number for each of 4 channels",
    ),
    "one channel that becomes four": (
        maps(f"{CONV} {BOOK}", w=(1, 3, 3, 3)),
        "sub has a constant of shape (1, 4, 1, 1), not one number for each of 1 channels",
    ),
    "several readers of the convolution": (
        maps(f"{CONV} {BOOK.replace('y =', 'n =')} y = Add (n, c)"),
        "follows c, which has 2 consumers",
    ),
    "several readers inside": (
        maps(f"{CONV} {BOOK.replace('y =', 'n =')} z = Relu (s) y = Add (n, z)"),
        "follows s, which has 2 consumers",
    ),
    "an output inside": (
        maps(f"{CONV} {BOOK}", outputs=f"{MAPS}, float[N, C, H, L] s"),
        "follows s, which is a graph output",
    ),
    "no linear operator": (
        maps(f"p = Conv (x, w) c = Concat <axis = 1> (p) {BOOK}"),
        "follows Concat, not a linear operator",
    ),
    "the image": (
        maps(BOOK.replace("(c", "(x"), (1, 3, 1, 1)),
        "follows a graph input, not a linear operator",
    ),
    "infinite factors": (
        maps(f"{CONV} {BOOK}", deviation=np.zeros(MAP_AXES, np.float32)),
        "its constants give numbers that are not finite",
    ),
    "a product with more axes": (
        graph(
            f"c = MatMul (x, w) {BOOK}", "float[N, 2, 3] x", "float[N, L, C] y", w=(3, 4), **used(BOOK, parameters(4))
        ),
        "follows c, a product with 3 axes",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_reason(name: str) -> None:
    before, reason = LEFT[name]
    left_alone(before, Skip("sub", reason))


@pytest.mark.parametrize(
    "body",
    [
        f"{CONV} y = Add (c, beta)",  # a bias
        f"{CONV} a = Add (c, three) k = Clip (a, zero, six) p = Mul (c, k) y = Div (p, six)",  # hard-swish
        f"{CONV} a = Add (c, three) k = Clip (a, zero, six) y = Div (k, six)",  # hard-sigmoid
        f"{CONV} a = Add (c, three) y = Div (a, six)",  # the same factor for all
        f"{CONV} a = Sub (c, mean) r = Relu (a) y = Div (r, deviation)",
        f"{CONV} y = Div (gamma, c)",
        f"{CONV} t = Transpose <perm = [0, 2, 3, 1]> (c) g = Mul (t, layer_scale) y = Add (t, g)",
        f"{CONV} r = Relu (c) g = Mul (r, gamma) y = Add (g, c)",  # a layer scale before an addition
    ],
)
def test_left_alone_without_a_word(body: str) -> None:
    numbers = {"zero": np.float32(0), "three": np.float32(3), "six": np.float32(6)}
    left_alone(maps(body, **numbers, layer_scale=(4,)))


def test_the_normalization_of_the_input_is_left_alone() -> None:
    body = "s = Sub (x, mean) d = Div (s, deviation) y = Conv (d, w)"
    left_alone(maps(body, (1, 3, 1, 1)))


def test_torchvisions_change_of_the_inputs_normalization_is_left_alone() -> None:
    channels = "t = Mul (r, half) u = Add (t, half) v = Mul (g, half) z = Add (v, half)"
    body = f"r, g, b = Split <axis = 1, num_outputs = 3> (x) {channels} i = Concat <axis = 1> (u, z, b) y = Conv (i, w)"
    left_alone(maps(body, half=np.float32(0.5)))


@pytest.mark.parametrize("mean", ["ReduceMean <keepdims = 1> (c, axes)", "GlobalAveragePool (c)"])
def test_normalization_by_the_image_is_listed(mean: str) -> None:
    """What the book's layer gives when it is exported in training mode."""
    body = f"{CONV} mu = {mean} [sub] s = Sub (c, mu) d = Div (s, deviation) m = Mul (d, gamma) y = Add (m, beta)"
    before = maps(body, axes=np.array([0, 2, 3]))
    left_alone(before, Skip("sub", "subtracts the mean of the images at hand, not a constant affine map"))


def test_constants_that_callers_may_override_are_none() -> None:
    arrays = used(BOOK, parameters(*MAP_AXES))
    left_alone(graph(f"{CONV} {BOOK}", f"{IMAGE}, float[1, 4, 1, 1] deviation", w=W, **arrays))


def test_half_precision_is_left_alone() -> None:
    arrays = {name: array.astype(np.float16) for name, array in used(BOOK, parameters(*MAP_AXES)).items()}
    weight = normal("w", *W).astype(np.float16)
    left_alone(graph(f"{CONV} {BOOK}", "float16[N, 3, 8, 8] x", "float16[N, C, H, L] y", w=weight, **arrays))


def test_old_opsets_are_left_alone() -> None:
    proto = ir.to_proto(maps(f"{CONV} {BOOK}"))
    proto.opset_import[0].version = 8
    left_alone(ir.from_proto(proto))


def test_operators_of_other_domains_are_not_what_they_are_called() -> None:
    proto = ir.to_proto(maps(f"{CONV} s = Sub (c, mean) y = Div (s, deviation)"))
    proto.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    proto.graph.node[0].domain = "custom"
    left_alone(ir.from_proto(proto))


# The layer as PyTorch exports it


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Statistics and affine parameters of the normalizations far from 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name.removesuffix(name.split(".")[-1]) + "running_var" in model.state_dict():
            low, high = (-1.0, 1.0) if name.endswith(("bias", "running_mean")) else (0.5, 2.0)
            tensor.uniform_(low, high, generator=generator)
    return model.eval()


def test_lenet_from_the_formula_equals_the_one_from_layers() -> None:
    torch.manual_seed(0)
    plain = disturbed(lenet_bn())
    written_out = lenet_bn_scratch().eval()
    written_out.load_state_dict(state_for(written_out, plain.state_dict()))
    images = torch.randn((4, 1, 28, 28))
    with torch.inference_mode():
        expected = written_out(images).numpy()
    graphs = {}
    for name, network in (("plain", plain), ("written out", written_out)):
        before = ir.from_proto(onnx.load_from_string(export_onnx(network, (1, 28, 28))))
        result = run_passes(before, PASSES)
        assert (result.changed, result.skipped) == ({"plain": 4, "written out": 8}[name], ())
        assert not {"Sub", "Div", "Mul", "Add", "BatchNormalization"} & set(operators(result.model))
        session_output = network_output(result.model, images.numpy())
        assert np.abs(session_output - expected).max() <= TOLERANCE * np.abs(expected).max()
        graphs[name] = result.model
    assert operators(graphs["plain"]) == operators(graphs["written out"])


def network_output(model: ir.Model, images: Array) -> Array:
    (output,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {INPUT_NAME: images})
    return np.asarray(output)


# The oracle can fail


@pytest.mark.parametrize("mutant", [0, 1, 2])
def test_a_wrong_mean_scale_or_shift_is_caught(mutant: int, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = module._affine

    def wrong(*arguments: Any) -> tuple[Array, ...]:
        arrays = affine(*arguments)
        return tuple(array * np.float32(1.001) if index == mutant else array for index, array in enumerate(arrays))

    monkeypatch.setattr(module, "_affine", wrong)
    with pytest.raises(AssertionError):
        recognized(maps(f"{CONV} {BOOK}"), "Conv")


def test_a_deviation_that_is_not_a_number_is_never_folded() -> None:
    broken = np.full(MAP_AXES, np.nan, np.float32)
    before = maps(f"{CONV} {BOOK}", deviation=broken)
    try:
        after = run_passes(before, PASSES).model
    except QuantizationError:
        pytest.fail("a chain that is left alone is nothing to refuse")
    assert operators(after) == operators(before)
