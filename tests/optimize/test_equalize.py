"""Cross-layer equalization: the same is computed, both layers of a pair end up equal, the rest is left alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.optimize.equalize import LARGEST_SCALE, SETTLED, equalize
from edgewright.optimize.verify import max_relative_difference
from textual_graphs import graph, normal

Array = NDArray[Any]

IMAGE = "float[N, 3, 8, 8] x"
LOGITS = "float[N, M] y"
MAPS = "float[N, C, H, L] y"
LIMITS: dict[str, Any] = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}


def uneven(name: str, *shape: int, axis: int = 0, reach: float = 100.0) -> Array:
    """Seeded weights whose slices along `axis` lie up to a factor of `reach` apart."""
    weight = normal(name, *shape)
    factors = reach ** np.random.default_rng(len(name)).uniform(size=shape[axis])
    along = [-1 if index == axis else 1 for index in range(len(shape))]
    scaled: Array = (weight * factors.reshape(along)).astype(np.float32)
    return scaled


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def constants(model: ir.Model, node_name: str) -> list[Array]:
    """Weight and, if there is one, bias of a node."""
    (node,) = (node for node in model.graph if node.name == node_name)
    return [
        value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value is not None
    ]


def run(model: ir.Model) -> Array:
    """What `model` gives for the images of `difference`."""
    session = onnxruntime.InferenceSession(serialized(model), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": normal("x", 3, 3, 8, 8)})[0]
    return result


def difference(before: ir.Model, after: ir.Model, batch: int = 3) -> float:
    (source,) = before.graph.inputs
    assert source.shape is not None
    x = normal("x", batch, *(int(side) for side in source.shape[1:] if isinstance(side, int)))
    return max_relative_difference(ir.to_proto(before), ir.to_proto(after), {"x": x})


# --- Equalized ---------------------------------------------------------------------------------------------------

W = uneven("w", 6, 3, 3, 3)
B = normal("b", 6)
C = "[c] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
GAP = "[p] q = GlobalAveragePool (r) [f] s = Flatten (q)"

# body, output, pairs, constants, and the axes over which the largest magnitude of a channel is taken in c and in d
PAIRS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "ReLU": (
        f"{C} [r] r = Relu (a) [d] y = Conv <pads = [1, 1, 1, 1]> (r, v)",
        MAPS,
        {"v": (5, 6, 3, 3)},
        (1, 2, 3),
        (0, 2, 3),
    ),
    "nothing": (f"{C} [d] y = Conv (a, v, e)", MAPS, {"v": (5, 6, 1, 1), "e": (5,)}, (1, 2, 3), (0, 2, 3)),
    "LeakyReLU": (
        f"{C} [r] r = LeakyRelu <alpha = 0.2> (a) [d] y = Conv (r, v)",
        MAPS,
        {"v": (5, 6, 2, 2)},
        (1, 2, 3),
        (0, 2, 3),
    ),
    "PReLU": (
        f"{C} [r] r = PRelu (a, k) [d] y = Conv (r, v)",
        MAPS,
        {"v": (5, 6, 2, 2), "k": (6, 1, 1)},
        (1, 2, 3),
        (0, 2, 3),
    ),
    "pooling": (
        f"{C} [r] r = Relu (a) [m] m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r) "
        "[n] n = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (m) [d] y = Conv (n, v)",
        MAPS,
        {"v": (5, 6, 2, 2)},
        (1, 2, 3),
        (0, 2, 3),
    ),
    "depthwise": (
        f"{C} [r] r = Relu (a) [d] y = Conv <group = 6, pads = [1, 1, 1, 1]> (r, v, e)",
        MAPS,
        {"v": (6, 1, 3, 3), "e": (6,)},
        (1, 2, 3),
        (1, 2, 3),
    ),
    "head": (f"{C} [r] r = Relu (a) {GAP} [d] y = Gemm (s, v, e)", LOGITS, {"v": (6, 5), "e": (5,)}, (1, 2, 3), (1,)),
    "head, transB": (
        f"{C} [r] r = Relu (a) {GAP} [d] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (s, v, e)",
        LOGITS,
        {"v": (5, 6), "e": (5,)},
        (1, 2, 3),
        (0,),
    ),
    "mean": (
        f"{C} [r] r = Relu (a) [p] s = ReduceMean <keepdims = 0> (r, axes) [d] y = MatMul (s, v)",
        LOGITS,
        {"v": (6, 5), "axes": np.array([-1, 2])},
        (1, 2, 3),
        (1,),
    ),
    "dropout": (
        f"{C} [r] r = Relu (a) {GAP} [o] o = Dropout (s) [i] i = Identity (o) [d] y = Gemm (i, v)",
        LOGITS,
        {"v": (6, 5)},
        (1, 2, 3),
        (1,),
    ),
}


@pytest.mark.parametrize("place", PAIRS)
def test_both_layers_of_a_pair_are_spread_equally_and_the_network_stays_what_it_was(place: str) -> None:
    body, outputs, arrays, first_axes, second_axes = PAIRS[place]
    model = graph(body, IMAGE, outputs, w=W, b=B, **arrays)
    before = serialized(model)
    result = equalize(model)
    assert serialized(model) == before, "it works on a copy"
    assert result.changed == 1
    assert [skip.node for skip in result.skipped] == ["d"]
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert difference(model, result.model) < 1e-5
    reach = [
        np.abs(constants(result.model, name)[0]).max(axis=axes)
        for name, axes in (("c", first_axes), ("d", second_axes))
    ]
    np.testing.assert_allclose(reach[0], reach[1], rtol=2 * SETTLED)
    old = np.abs(W).max(axis=(1, 2, 3)) / np.abs(constants(model, "d")[0]).max(axis=second_axes)
    assert old.max() / old.min() > 10, "there was something to do"


OTHERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "columns of a map": (
        f"{C} [r] r = Relu (a) [f] s = Flatten (r) [d] y = Gemm (s, v)",
        IMAGE,
        LOGITS,
        {"v": (384, 5)},
    ),
    "columns of a map, transB": (
        f"{C} [r] r = Relu (a) [f] s = Reshape (r, to) [d] y = Gemm <transB = 1> (s, v)",
        IMAGE,
        LOGITS,
        {"v": (5, 384), "to": np.array([0, -1])},
    ),
    "groups": (
        f"{C} [r] r = Relu (a) [d] y = Conv <group = 2> (r, v)",
        IMAGE,
        "float[N, 4, H, L] y",
        {"v": (4, 3, 3, 3)},
    ),
    "grouped first": (
        "[c] a = Conv <group = 3> (x, g, b) [r] r = Relu (a) [d] y = Conv (r, v)",
        IMAGE,
        "float[N, 4, H, L] y",
        {"g": uneven("g", 6, 1, 3, 3), "v": (4, 6, 1, 1)},
    ),
    "transposed first": (
        "[c] a = ConvTranspose <group = 3> (x, g, b) [r] r = Relu (a) [d] y = Conv (r, v)",
        IMAGE,
        "float[N, 4, H, L] y",
        {"g": uneven("g", 3, 2, 3, 3, axis=1), "v": (4, 6, 1, 1)},
    ),
    "transposed second": (
        f"{C} [r] r = Relu (a) [d] y = ConvTranspose <group = 2, strides = [2, 2]> (r, v)",
        IMAGE,
        MAPS,
        {"v": (6, 4, 2, 2)},
    ),
    "Gemm": (
        "[c] a = Gemm (x, w, b) [r] r = Relu (a) [d] y = Gemm (r, v)",
        "float[N, 7] x",
        LOGITS,
        {"w": uneven("w", 7, 6, axis=1), "v": (6, 5)},
    ),
    "MatMul of sequences": (
        "[c] a = MatMul (x, w) [r] r = Relu (a) [d] y = MatMul (r, v)",
        "float[N, 4, 7] x",
        "float[N, S, M] y",
        {"w": uneven("w", 7, 6, axis=1), "v": (6, 5)},
    ),
}


@pytest.mark.parametrize("place", OTHERS)
def test_other_layouts_of_weights(place: str) -> None:
    body, inputs, outputs, arrays = OTHERS[place]
    model = graph(body, inputs, outputs, **{"w": W, "b": B, **arrays} if "w" in body else {"b": B, **arrays})
    result = equalize(model)
    assert result.changed == 1
    assert difference(model, result.model) < 1e-5
    assert equalize(result.model).changed == 0, "it had come to rest"


def test_expansion_depthwise_and_projection_become_equal_all_three() -> None:
    body = (
        "[c] a = Conv (x, w, b) [r] r = Relu (a) [d] e = Conv <group = 6, pads = [1, 1, 1, 1]> (r, v) "
        "[s] s = Relu (e) [g] y = Conv (s, u)"
    )
    model = graph(body, IMAGE, MAPS, w=W, b=B, v=uneven("vv", 6, 1, 3, 3), u=(5, 6, 1, 1))
    result = equalize(model)
    assert result.changed == 2
    assert difference(model, result.model) < 1e-5
    before, after = (
        [
            np.abs(constants(m, name)[0]).max(axis=axes)
            for name, axes in (("c", (1, 2, 3)), ("d", (1, 2, 3)), ("g", (0, 2, 3)))
        ]
        for m in (model, result.model)
    )
    np.testing.assert_allclose(after[0], after[1], rtol=2 * SETTLED)
    np.testing.assert_allclose(after[1], after[2], rtol=2 * SETTLED)
    # each scale takes from one layer what it gives to the next: the product of the three stays
    np.testing.assert_allclose(after[0], np.cbrt(before[0] * before[1] * before[2]), rtol=2 * SETTLED)


def test_applied_twice_it_changes_nothing_more() -> None:
    body, outputs, arrays, *_ = PAIRS["head"]
    once = equalize(graph(body, IMAGE, outputs, w=W, b=B, **arrays)).model
    again = equalize(once)
    assert again.changed == 0
    assert serialized(again.model) == serialized(once)


class Blocks(nn.Module):
    """Convolution, depthwise convolution, projection, classifier."""

    GRAPH = (
        "[c] a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0) [r] r = Relu (a) "
        "[d] e = Conv <group = 8, strides = [2, 2]> (r, w1, b1) [s] s = Relu (e) "
        "[p] p = Conv (s, w2, b2) [t] t = Relu (p) [f] f = Flatten (t) [g] y = Gemm <transB = 1> (f, w3, b3)"
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, stride=2, groups=8),
                nn.Conv2d(8, 6, 1),
                nn.Linear(6 * 9, 4),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        *features, classifier = self.layers
        for layer in features:
            x = layer(x).relu()
        logits: Tensor = classifier(x.flatten(1))
        return logits

    def rescale(self, generator: torch.Generator) -> None:
        """Makes channels up to a hundredfold larger in one layer and smaller in the next."""
        for layer, following in itertools.pairwise(self.layers):
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            assert isinstance(following, nn.Conv2d | nn.Linear)
            factor = 100 ** torch.rand(layer.out_channels, generator=generator)
            layer.weight.data *= factor[:, None, None, None]
            layer.bias.data *= factor
            if isinstance(following, nn.Linear):
                following.weight.data /= factor.repeat_interleave(9)
            else:
                following.weight.data /= factor[:, None, None, None] if following.groups > 1 else factor[:, None, None]

    def graph(self) -> ir.Model:
        """The same as ONNX."""
        arrays = {
            f"{part[0]}{index}": getattr(layer, part).detach().numpy().copy()
            for index, layer in enumerate(self.layers)
            for part in ("weight", "bias")
        }
        return graph(self.GRAPH, IMAGE, LOGITS, **arrays)


def test_a_rescaled_network_and_its_original_become_the_same_network() -> None:
    torch.manual_seed(4)
    network = Blocks().eval()
    with torch.inference_mode():
        expected = network(torch.from_numpy(normal("x", 3, 3, 8, 8))).numpy()
    results = []
    for _ in range(2):
        model = network.graph()
        result = equalize(model)
        assert result.changed == 3
        assert difference(model, result.model) < 1e-5
        np.testing.assert_allclose(run(result.model), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        results.append(result.model)
        network.rescale(torch.Generator().manual_seed(5))
    before = [np.abs(constants(model, name)[0]).max() for model in (network.graph(),) for name in "cdpg"]
    for name in "cdpg":
        for one, other in zip(*(constants(model, name) for model in results), strict=True):
            np.testing.assert_allclose(one, other, rtol=20 * SETTLED, atol=1e-6 * np.abs(one).max())
    after = [np.abs(constants(results[1], name)[0]).max() for name in "cdpg"]
    assert max(before) / max(after) > 10, "there was something to do"


# --- Channels that are not like others ---------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["w", "v"])
def test_a_channel_that_is_zero_keeps_its_scale(side: str) -> None:
    body, outputs, *_ = PAIRS["ReLU"]
    arrays = {"w": W.copy(), "v": normal("v", 5, 6, 3, 3)}
    arrays[side][(2,) if side == "w" else (slice(None), 2)] = 0
    model = graph(body, IMAGE, outputs, b=B, **arrays)
    result = equalize(model)
    assert result.changed == 1
    weight, bias = constants(result.model, "c")
    np.testing.assert_array_equal(weight[2], arrays["w"][2])
    assert bias[2] == B[2]
    np.testing.assert_array_equal(constants(result.model, "d")[0][:, 2], arrays["v"][:, 2])
    assert difference(model, result.model) < 1e-5


def test_scales_are_bounded() -> None:
    body, outputs, *_ = PAIRS["ReLU"]
    w = W.copy()
    w[1] *= 1e-30
    model = graph(body, IMAGE, outputs, w=w, b=B, v=(5, 6, 3, 3))
    result = equalize(model)
    _, bias = constants(result.model, "c")
    np.testing.assert_allclose(bias[1], B[1] * LARGEST_SCALE, rtol=1e-5)
    assert difference(model, result.model) < 1e-5


def test_a_bias_that_others_read_stays_theirs() -> None:
    body = f"{C} [r] r = Relu (a) [d] y = Conv (r, v, b)"
    model = graph(body, IMAGE, MAPS, w=W, b=B, v=(6, 6, 3, 3))
    result = equalize(model)
    assert result.changed == 1
    np.testing.assert_array_equal(constants(result.model, "d")[1], B)
    assert not np.array_equal(constants(result.model, "c")[1], B)
    assert difference(model, result.model) < 1e-5


# --- Left alone --------------------------------------------------------------------------------------------------


def test_what_begins_no_pair_stays_and_the_reason_is_given() -> None:
    """All the reasons are in `test_layer_pairs.py`."""
    body = f"{C} [r] r = Relu (a) [d] d = Conv (r, v) [e] e = Conv (r, u) [s] y = Add (d, e)"
    model = graph(body, IMAGE, MAPS, w=W, b=B, v=(5, 6, 3, 3), u=(5, 6, 3, 3))
    result = equalize(model)
    assert result.changed == 0
    assert [(skip.node, skip.reason) for skip in result.skipped] == [
        ("c", "2 nodes read its result"),
        ("d", "Add behind it does not pass a channel on as it is"),
        ("e", "Add behind it does not pass a channel on as it is"),
    ]
    assert serialized(result.model) == serialized(model)


# --- Where it is not exact ---------------------------------------------------------------------------------------

NEARLY: dict[str, tuple[str, dict[str, Any]]] = {
    "ReLU6": ("[r] r = Clip (a, zero, six)", LIMITS),
    "SiLU": ("[t] t = Sigmoid (a) [r] r = Mul (a, t)", {}),
    "SiLU, turned": ("[t] t = Sigmoid (a) [r] r = Mul (t, a)", {}),
    "HardSwish": ("[r] r = HardSwish (a)", {}),
}


@pytest.mark.parametrize("activation", NEARLY)
def test_on_request_it_goes_through_what_is_nearly_homogeneous(activation: str) -> None:
    between, arrays = NEARLY[activation]
    model = graph(f"{C} {between} [d] y = Conv (r, v)", IMAGE, MAPS, w=W, b=B, v=(5, 6, 3, 3), **arrays)
    assert equalize(model).changed == 0
    result = equalize(model, inexact=True)
    assert result.changed == 1
    reach = [
        np.abs(constants(result.model, name)[0]).max(axis=axes) for name, axes in (("c", (1, 2, 3)), ("d", (0, 2, 3)))
    ]
    np.testing.assert_allclose(reach[0], reach[1], rtol=2 * SETTLED)
    assert difference(model, result.model) > 1e-3, "which is why it has to be asked for"


@pytest.mark.parametrize("gate", ["[t] t = Sigmoid (a) [r] r = Mul (x, t)", "[t] t = Sigmoid (a) [r] r = Mul (t, t)"])
def test_a_gate_is_no_silu(gate: str) -> None:
    model = graph(f"[c] a = Conv (x, w) {gate} [d] y = Conv (r, v)", IMAGE, MAPS, w=(3, 3, 1, 1), v=(5, 3, 1, 1))
    assert equalize(model, inexact=True).changed == 0
