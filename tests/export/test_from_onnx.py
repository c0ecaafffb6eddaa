"""Graphs that others have written: what is read off them, what they become, and what is refused.

The oracles are numpy, PyTorch, and onnx's reference evaluator on the file as it was.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from edgewright.export.conventions import BATCH_NAME, INPUT_NAME, OUTPUT_NAME
from edgewright.export.from_onnx import check_request, import_onnx, onnx_source, reference_of
from edgewright.export.resolve import ModelRequest
from edgewright.runtime.errors import ExportError, ModelError
from textual_graphs import normal
from tiny_modules import TinyNetwork, randomize

SHAPE = (3, 8, 8)
ANY, ONE = "float[N,3,8,8] x", "float[1,3,8,8] x"
WEIGHTS = {"w": (4, 3, 3, 3), "dense": (4, 5)}
HEAD = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) p = GlobalAveragePool(r)"
FLAT = f"{HEAD} f = Flatten(p) y = MatMul(f, dense)"
FIXED_RESHAPE = f"{HEAD} t = Constant<value = int64[2] {{1, 4}}>() f = Reshape(p, t) y = MatMul(f, dense)"

Array = NDArray[Any]


def written(
    folder: Path, body: str = FLAT, inputs: str = ANY, outputs: str = "float[N,5] y", *, opset: int = 17, ir: int = 8
) -> Path:
    model = onnx.parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["": {opset}]> net ({inputs}) => ({outputs}) {{ {body} }}'
    )
    used = {name for node in model.graph.node for name in node.input}
    for name, shape in WEIGHTS.items():
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(normal(name, *shape), name))
    return saved(folder, model)


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def images(count: int) -> Array:
    return np.random.default_rng(5).standard_normal((count, *SHAPE), np.float32)


def logits_of(content: bytes, batch: Array) -> Array:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run([OUTPUT_NAME], {INPUT_NAME: batch})
    return np.asarray(found)


def expected_of(path: Path, batch: Array) -> Array:
    """Each image alone, by onnx's reference evaluator."""
    evaluator = ReferenceEvaluator(onnx.load(path))
    name = onnx.load(path).graph.input[0].name
    outputs: list[Any] = [evaluator.run(None, {name: image[None]}) for image in batch]
    return np.concatenate([output[0] for output in outputs])


def operators(content: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(content).graph.node]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 19, 22])
@pytest.mark.parametrize("inputs", [ANY, ONE])
def test_old_and_new_opsets_with_any_batch(opset: int, inputs: str, tmp_path: Path) -> None:
    path = written(tmp_path, FIXED_RESHAPE if inputs == ONE else FLAT, inputs, opset=opset)
    content = import_onnx(path, SHAPE, opset=19)
    model = onnx.load_from_string(content)
    assert [entry.version for entry in model.opset_import] == [19]
    for value, name, sides in ((model.graph.input[0], INPUT_NAME, [*SHAPE]), (model.graph.output[0], OUTPUT_NAME, [5])):
        batch, *rest = value.type.tensor_type.shape.dim
        assert (value.name, batch.dim_param, [side.dim_value for side in rest]) == (name, BATCH_NAME, sides)
    np.testing.assert_allclose(logits_of(content, images(6)), expected_of(path, images(6)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reference_of(path)(images(6)), expected_of(path, images(6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_network_of_the_torchscript_exporter_equals_pytorch(dynamic: bool, tmp_path: Path) -> None:
    model = TinyNetwork(3, 5).eval()
    randomize(model, 3)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(1, *SHAPE),),
            path,
            dynamo=False,
            opset_version=13,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}} if dynamic else None,
        )
    content = import_onnx(path, SHAPE, opset=19)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images(6))).numpy()
    np.testing.assert_allclose(logits_of(content, images(6)), expected, rtol=1e-3, atol=1e-5)
    assert not {"Identity", "Dropout", "Constant", "Shape"} & set(operators(content))


def test_batch_normalization_stays_visible_and_dropout_goes(tmp_path: Path) -> None:
    body = f"{HEAD} d = Dropout(p) i = Identity(d) f = Flatten(i) y = MatMul(f, dense)"
    path = written(tmp_path, body.replace("Relu(c)", "BatchNormalization(c, s, s, s, v)"), opset=9)
    model = onnx.load(path)
    for name in "sv":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.abs(normal(name, 4)), name))
    found = operators(import_onnx(saved(tmp_path, model), SHAPE, opset=19))
    assert found == ["Conv", "BatchNormalization", "GlobalAveragePool", "Flatten", "MatMul"]


def test_shapes_that_are_computed_become_constants(tmp_path: Path) -> None:
    body = f"""{HEAD} s = Shape(p) zero = Constant<value_int = 0>() one = Constant<value_int = 1>()
        n = Gather(s, zero) k = Gather(s, one) axis = Constant<value = int64[1] {{0}}>()
        n1 = Unsqueeze(n, axis) k1 = Unsqueeze(k, axis) t = Concat<axis=0>(n1, k1)
        f = Reshape(p, t) y = MatMul(f, dense)"""
    found = import_onnx(written(tmp_path, body), SHAPE, opset=19)
    assert operators(found) == ["Conv", "Relu", "GlobalAveragePool", "Reshape", "MatMul"]


def test_initializers_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    path = written(tmp_path, inputs=f"{ANY}, float[4,3,3,3] w, float[4,5] dense", opset=8, ir=3)
    assert onnx_source(ModelRequest(str(path))).input_shape == SHAPE
    assert [value.name for value in onnx.load_from_string(import_onnx(path, SHAPE, opset=18)).graph.input] == ["images"]


def test_node_names_are_kept_and_missing_ones_filled(tmp_path: Path) -> None:
    model = onnx.load(written(tmp_path))
    for node, name in zip(model.graph.node, ("stem", "relu", "", "", "logits"), strict=True):
        node.name = name
    content = import_onnx(saved(tmp_path, model), SHAPE, opset=18)
    names = [node.name for node in onnx.load_from_string(content).graph.node]
    assert (names[0], names[1], names[4]) == ("stem", "relu", "logits")
    assert len({*names, ""}) == 6


def test_tensors_with_the_names_of_the_interface_make_way(tmp_path: Path) -> None:
    path = written(tmp_path, FLAT.replace("c ", "logits ").replace("(c)", "(logits)").replace("r ", "images "))
    model = onnx.load(path)
    model.graph.node[2].input[0] = "images"
    content = import_onnx(saved(tmp_path, model), SHAPE, opset=19)
    np.testing.assert_allclose(logits_of(content, images(5)), expected_of(path, images(5)), rtol=1e-4, atol=1e-5)


def test_lone_axes_behind_the_classes_go(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD.replace("p =", "y ="), outputs="float[N,4,1,1] y")
    content = import_onnx(path, SHAPE, opset=19)
    assert logits_of(content, images(5)).shape == reference_of(path)(images(5)).shape == (5, 4)


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    expected = expected_of(written(tmp_path), images(6))  # the same graph, which takes any batch
    path = written(tmp_path, FLAT, "float[4,3,8,8] x", "float[4,5] y")
    np.testing.assert_allclose(reference_of(path)(images(6)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits_of(import_onnx(path, SHAPE, opset=19), images(6)), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_axis_that_is_dynamic_in_name_only(tmp_path: Path) -> None:
    path = written(tmp_path, FIXED_RESHAPE, ANY)
    expected = expected_of(path, images(3))
    np.testing.assert_allclose(reference_of(path)(images(3)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits_of(import_onnx(path, SHAPE, opset=19), images(3)), expected, rtol=1e-4, atol=1e-5)


def test_what_is_read_off_the_file(tmp_path: Path) -> None:
    model = onnx.load(written(tmp_path, FLAT.replace("y =", "z =") + " y = Softmax(z)", "float[N,3,H,W] x"))
    names = {index: f"thing {index}" for index in range(5)}
    model.metadata_props.add(key="names", value=str(names))  # as Ultralytics writes it
    path = saved(tmp_path, model)
    source = onnx_source(ModelRequest(str(path)))
    assert (source.onnx, source.name, source.weights) == (path, str(path), "in the graph")
    assert source.input_shape is None
    assert source.class_names() == tuple(names.values())
    assert "probabilities" in source.note
    assert source.fingerprint.startswith("sha256:")


@pytest.mark.parametrize("text", ["{0: 'a', 1: 'b'}", "[1, 2, 3, 4, 5]", "__import__('os')", "[" * 9999, "{'a': 1}"])
def test_labels_that_do_not_fit_are_not_taken(text: str, tmp_path: Path) -> None:
    model = onnx.load(written(tmp_path))
    model.metadata_props.add(key="names", value=text)
    source = onnx_source(ModelRequest(str(saved(tmp_path, model))))
    assert source.class_names() is None
    assert source.note == ""
    assert source.input_shape == SHAPE


QUANTIZED = (
    "s = Constant<value_float = 0.5>() z = Constant<value = uint8 {0}>() "
    "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) " + FLAT.replace("(x,", "(d,")
)


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "reason"),
    [
        (FLAT, f"{ANY}, float[N] mask", "float[N,5] y", r"2 inputs \(x, mask\), expected one"),
        (FLAT, ANY, "float[N,5] y, float[N,4] f", r"2 outputs \(y, f\), expected the logits alone"),
        (FLAT.replace("(x,", "(h,"), "float16[N,3,8,8] x", "float[N,5] y", "type FLOAT16, expected FLOAT"),
        (FLAT.replace("(x,", "(h,"), "uint8[N,3,8,8] x", "float[N,5] y", "type UINT8, expected FLOAT"),
        (FLAT.replace("(x,", "(h,"), "float[N,8,8,3] x", "float[N,5] y", "NHWC"),
        (FLAT.replace("(x,", "(h,"), "float[N,192] x", "float[N,5] y", r"shape \[\?, 192\]"),
        (QUANTIZED, ANY, "float[N,5] y", "quantized already"),
    ],
)
def test_graphs_of_another_kind_are_refused(body: str, inputs: str, outputs: str, reason: str, tmp_path: Path) -> None:
    if "(h," in body:
        body = {
            "8,8,3": "h = Transpose<perm=[0,3,1,2]>(x) ",
            ",192]": "t = Constant<value = int64[4] {0,3,8,8}>() xx = Unsqueeze(x, t) h = Reshape(x, t) ",
        }.get(next((key for key in ("8,8,3", ",192]") if key in inputs), ""), "h = Cast<to=1>(x) ") + body
        body = body.replace("xx = Unsqueeze(x, t) ", "")
    with pytest.raises(ModelError, match=reason):
        onnx_source(ModelRequest(str(written(tmp_path, body, inputs, outputs))))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [({"weights": "random"}, "carries its own"), ({"options": {"width": 2}}, r"takes no options \(width\)")],
)
def test_a_graph_takes_neither_weights_nor_options(request_: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        onnx_source(ModelRequest(str(written(tmp_path)), **request_))
    with pytest.raises(ModelError, match=reason):
        check_request(ModelRequest("absent.onnx", **request_))
    check_request(ModelRequest("absent.onnx"))


def test_operators_that_do_not_run_are_refused_at_once(tmp_path: Path) -> None:
    model = onnx.load(written(tmp_path))
    model.graph.node[1].domain = "ours"
    model.opset_import.append(onnx.helper.make_opsetid("ours", 1))
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        onnx_source(ModelRequest(str(saved(tmp_path, model))))


LOOKS = f"{HEAD} m = ReduceMax<keepdims=0>(x) zero = Constant<value_float = 0.0>() above = Greater(m, zero)"
BRANCH = "If (above) <then_branch = a () => (float[N,4,1,1] u) { u = Relu(p) }, "
BRANCH += "else_branch = b () => (float[N,4,1,1] v) { v = Neg(p) }>"


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        (FLAT.replace("y =", "z =") + " m = ReduceMean<axes=[0], keepdims=1>(z) y = Sub(z, m)", ANY, "mix the images"),
        (FLAT.replace("y =", "z =") + " r1 = RandomNormalLike(z) y = Add(z, r1)", ANY, "random numbers"),
        (
            FLAT.replace("y =", "z =") + " k = Constant<value = int64[2] {1, 5}>() e = Expand(z, k) "
            "g = Constant<value = int64[1] {1}>() y0 = Split<axis=0>(e, g) y = Relu(y0)",
            ONE,
            "batch of 1 only",
        ),
        (f"{LOOKS} q = {BRANCH} f = Flatten(q) y = MatMul(f, dense)", ANY, "control flow"),
        (FLAT.replace("y =", "z =") + " h = Cast<to=10>(z) a = Abs(h) y = Cast<to=1>(a)", ANY, "computes in FLOAT16"),
    ],
)
def test_graphs_that_cannot_go_on_are_refused(body: str, inputs: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        import_onnx(written(tmp_path, body, inputs), SHAPE, opset=19)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "layer conv .Conv. gives NaN for image 1: its weight w holds NaN; export the model again"),
        (3e38, "layer conv .Conv. gives .*infinite values for image 1: it reads finite values .* exceed float32"),
    ],
)
@pytest.mark.parametrize("inputs", [ANY, "float[4,3,8,8] x"], ids=["any", "four"])
def test_a_graph_without_finite_logits_names_its_layer(value: float, reason: str, inputs: str, tmp_path: Path) -> None:
    path = written(tmp_path, FLAT.replace("c = Conv", "[conv] c = Conv"), inputs)
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "w")
    weights = onnx.numpy_helper.to_array(weight).copy()
    weights[1] = value
    weight.CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    with pytest.raises(ModelError, match=f"net.onnx gives no finite logits: on random images {reason}"):
        import_onnx(saved(tmp_path, model), SHAPE, opset=19)


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    fingerprint = onnx_source(ModelRequest(str(path))).fingerprint
    content = import_onnx(path, SHAPE, opset=19, fingerprint=fingerprint)
    np.testing.assert_allclose(
        reference_of(path, fingerprint=fingerprint)(images(2)), logits_of(content, images(2)), rtol=1e-4, atol=1e-5
    )
    written(tmp_path, FLAT.replace("Relu", "Sigmoid"))
    with pytest.raises(ModelError, match="changed during the run; run again"):
        import_onnx(path, SHAPE, opset=19, fingerprint=fingerprint)
    with pytest.raises(ModelError, match="changed during the run; run again"):
        reference_of(path, fingerprint=fingerprint)


def test_images_that_are_too_large_are_refused_unmade(tmp_path: Path) -> None:
    path = written(tmp_path, inputs="float[N,3,H,W] x")
    with pytest.raises(ModelError, match="expected at most 67108864 pixels"):
        import_onnx(path, (3, 1 << 40, 1 << 40), opset=19)


def test_the_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    path = written(tmp_path).rename(tmp_path / "NET.ONNX")
    assert onnx_source(ModelRequest(str(path))).input_shape == SHAPE


def test_another_size_than_the_graph_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes images of 8 along width, not 9"):
        import_onnx(written(tmp_path), (3, 8, 9), opset=19)
    with pytest.raises(ModelError, match="does not run on images of shape"):
        reference_of(written(tmp_path))(np.zeros((2, 3, 9, 9), np.float32))


@pytest.mark.parametrize("opset", [5, 6, 27, 99])
def test_opsets_out_of_reach_are_refused(opset: int, tmp_path: Path) -> None:
    path = written(tmp_path, HEAD.replace("p =", "y ="), outputs="float[N,4,1,1] y", opset=opset)
    reason = f"net.onnx is of opset {opset}, expected 7 … 26; export it with opset 18 … 20"
    for read in (lambda: onnx_source(ModelRequest(str(path))), lambda: import_onnx(path, SHAPE, opset=19)):
        with pytest.raises(ModelError, match=reason):
            read()


def test_an_unknown_opset_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 22 is not supported"):
        import_onnx(written(tmp_path), SHAPE, opset=22)


class Scaled(nn.Module):
    """Height and width are read at run time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * x.shape[2]


def test_a_dynamic_size_is_fixed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        example = (torch.zeros(1, *SHAPE),)
        torch.onnx.export(Scaled(), example, path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    content = import_onnx(path, SHAPE, opset=19)
    np.testing.assert_allclose(logits_of(content, images(2)), images(2).mean((2, 3)) * 8, rtol=1e-4, atol=1e-5)
    assert "Shape" not in operators(content)
