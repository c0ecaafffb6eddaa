"""Global average pooling as pooling over a window: the same numbers, and left alone where it would not help."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from edgewright.optimize.window_pooling import window_pooling

Array = NDArray[Any]

LIMITS: dict[str, Any] = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
HEAD = "[gap] p = GlobalAveragePool (m) [flat] y = Flatten (p)"


def normal(name: str, *shape: int) -> Array:
    """Float32, seeded by its name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def graph(body: str, inputs: str = "float[N, 3, 8, 6] x", outputs: str = "float[N, M] y", **arrays: Any) -> ir.Model:
    """A model with its shapes inferred; `arrays` become initializers, seeded where only a shape is given."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]> agraph ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in arrays.items():
        values = array if isinstance(array, np.ndarray) else normal(name, *array)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def serialized(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def run(model: ir.Model, x: Array) -> Array:
    session = onnxruntime.InferenceSession(serialized(model), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# --- Rewritten ---------------------------------------------------------------------------------------------------

BEHIND: dict[str, tuple[str, dict[str, Any]]] = {
    "convolution": ("[c] m = Conv (x, w)", {}),
    "ReLU": ("[c] a = Conv (x, w) [r] m = Relu (a)", {}),
    "ReLU6": ("[c] a = Conv (x, w) [r] m = Clip (a, zero, six)", LIMITS),
    "residual addition": ("[c] a = Conv (x, w) [e] b = Conv (x, v) [s] m = Add (a, b)", {"v": (4, 3, 3, 3)}),
    "addition and ReLU": (
        "[c] a = Conv (x, w) [e] b = Conv (x, v) [s] t = Add (a, b) [r] m = Relu (t)",
        {"v": (4, 3, 3, 3)},
    ),
    "transposed convolution": ("[c] m = ConvTranspose (x, u)", {"u": (3, 4, 3, 3)}),
}


@pytest.mark.parametrize("place", BEHIND)
def test_behind_a_convolution_it_becomes_a_window_and_gives_the_same(place: str) -> None:
    body, arrays = BEHIND[place]
    model = graph(f"{body} {HEAD}", w=(4, 3, 3, 3), **arrays)
    before = serialized(model)
    result = window_pooling(model)
    assert serialized(model) == before, "it works on a copy"
    assert (result.changed, result.skipped) == (1, ())
    assert "GlobalAveragePool" not in operators(result.model)
    (pool,) = (node for node in result.model.graph if node.op_type == "AveragePool")
    assert pool.name == "gap"
    shape = pool.inputs[0].shape if pool.inputs[0] is not None else None
    assert shape is not None
    assert tuple(pool.attributes.get_ints("kernel_shape")) == tuple(shape[2:])
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    for batch in (1, 5):
        x = normal("x", batch, 3, 8, 6)
        np.testing.assert_allclose(run(result.model, x), run(model, x), rtol=1e-5, atol=1e-6)


def test_a_window_of_another_size_would_be_seen() -> None:
    model = graph(f"{BEHIND['convolution'][0]} {HEAD}", w=(4, 3, 3, 3))
    mutant = window_pooling(model).model
    (pool,) = (node for node in mutant.graph if node.op_type == "AveragePool")
    pool.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [6, 3])
    pool.attributes["strides"] = ir.AttrInt64s("strides", [6, 3])
    x = normal("x", 2, 3, 8, 6)
    assert np.abs(run(mutant, x) - run(model, x)).max() > 0.1


def test_one_dimension() -> None:
    model = graph(f"[c] m = Conv (x, w) {HEAD}", "float[N, 3, 9] x", w=(4, 3, 4))
    result = window_pooling(model)
    assert result.changed == 1
    x = normal("x", 3, 3, 9)
    np.testing.assert_allclose(run(result.model, x), run(model, x), rtol=1e-5, atol=1e-6)


def test_applied_twice_it_changes_nothing_more() -> None:
    once = window_pooling(graph(f"[c] m = Conv (x, w) {HEAD}", w=(4, 3, 3, 3)))
    again = window_pooling(once.model)
    assert (again.changed, again.skipped) == (0, ())
    assert serialized(again.model) == serialized(once.model)


# --- Left alone --------------------------------------------------------------------------------------------------

FUSED = "it does not follow a convolution: the mean is fused into the kernel before it"
UNKNOWN = "the size of its map is not fixed"
NOT_BEHIND: dict[str, tuple[str, str, str]] = {
    "SiLU": ("[c] a = Conv (x, w) [s] b = Sigmoid (a) [p] m = Mul (a, b)", "float[N, 3, 8, 6] x", FUSED),
    "gate": ("[c] a = Conv (x, w) [g] b = Conv (x, w) [p] m = Mul (a, b)", "float[N, 3, 8, 6] x", FUSED),
    "Tanh": ("[c] a = Conv (x, w) [t] m = Tanh (a)", "float[N, 3, 8, 6] x", FUSED),
    "MaxPool": ("[c] a = Conv (x, w) [t] m = MaxPool <kernel_shape = [2, 2]> (a)", "float[N, 3, 8, 6] x", FUSED),
    "the image": ("[c] m = Relu (x)", "float[N, 3, 8, 6] x", FUSED),
    "a map of dynamic height": ("[c] m = Conv (x, w)", "float[N, 3, H, 6] x", UNKNOWN),
    "a map of dynamic width": ("[c] m = Conv (x, w)", "float[N, 3, 8, L] x", UNKNOWN),
    "a map of dynamic sides": ("[c] m = Conv (x, w)", "float[N, 3, H, L] x", UNKNOWN),
}


@pytest.mark.parametrize("place", NOT_BEHIND)
def test_elsewhere_it_stays_and_the_reason_is_given(place: str) -> None:
    body, inputs, reason = NOT_BEHIND[place]
    model = graph(f"{body} {HEAD}", inputs, w=(4, 3, 3, 3))
    result = window_pooling(model)
    assert result.changed == 0
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("gap", reason)]
    assert serialized(result.model) == serialized(model)


def test_a_map_of_unknown_shape_stays() -> None:
    model = graph(f"[c] m = Conv (x, w) {HEAD}", w=(4, 3, 3, 3))
    for node in model.graph:
        if node.name == "c":
            node.outputs[0].shape = None
    assert [skip.reason for skip in window_pooling(model).skipped] == [UNKNOWN]


def test_other_poolings_are_not_touched() -> None:
    body = "[c] m = Conv (x, w) [p] q = AveragePool <kernel_shape = [2, 2]> (m) [z] y = GlobalMaxPool (q)"
    model = graph(body, outputs="float[A, B, C, D] y", w=(4, 3, 3, 3))
    result = window_pooling(model)
    assert (result.changed, result.skipped) == (0, ())
    assert serialized(result.model) == serialized(model)


def test_of_two_only_the_one_behind_a_convolution_changes() -> None:
    body = (
        "[c] a = Conv (x, w) [one] p = GlobalAveragePool (a) [s] g = Sigmoid (a) [m] b = Mul (a, g) "
        "[two] q = GlobalAveragePool (b) [sum] t = Add (p, q) [flat] y = Flatten (t)"
    )
    model = graph(body, w=(4, 3, 3, 3))
    result = window_pooling(model)
    assert result.changed == 1
    assert [skip.node for skip in result.skipped] == ["two"]
    x = normal("x", 2, 3, 8, 6)
    np.testing.assert_allclose(run(result.model, x), run(model, x), rtol=1e-5, atol=1e-6)
