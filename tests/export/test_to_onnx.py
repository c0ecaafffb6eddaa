"""Export through torch.onnx: small networks of many kinds, what their graphs hold, and what is refused.

The oracle is PyTorch at batch sizes that the exporter itself does not look at. Batch norms are far from the identity.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgewright.export import to_onnx as module
from edgewright.export.conventions import INPUT_NAME, OPSETS, OUTPUT_NAME
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.runtime.errors import ExportError

ROOT = str(Path(__file__).resolve().parents[2]).encode()
OLD_EXPORTER = torch.__version__ < "2.7"  # a TorchVersion, which compares as versions do

Array = NDArray[Any]

TOLERANCE = 1e-5  # of the largest logit
SHAPE = (3, 8, 8)
HELPERS = {"Shape", "Expand", "CastLike", "Identity", "Constant", "ConstantOfShape", "Gather", "Pad", "Transpose"}


class Net(nn.Module):
    """`parts` in the order in which `function(parts, images)` uses them."""

    def __init__(self, function: Callable[[nn.ModuleList, Tensor], Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.parts, x)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def disturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights, statistics and affine parameters, far from 0 and 1; evaluation mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.weight.uniform_(0.5, 2.0)
                part.bias.normal_()
                part.running_mean.normal_()
                part.running_var.uniform_(0.3, 3.0)
            elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                part.weight.normal_(0, 0.5)
                if part.bias is not None:
                    part.bias.normal_()
    return model.eval()


def logits_of(model: nn.Module, images: Tensor) -> Array:
    with torch.inference_mode():
        return np.asarray(model(images))


def run(content: bytes, images: Tensor) -> Array:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT_NAME], {INPUT_NAME: images.numpy()})[0])


def difference(content: bytes, model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> float:
    """Largest difference to PyTorch at batch sizes 3 and 2, as a share of the largest logit."""
    worst = 0.0
    for batch in (3, 2):
        images = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))
        expected, found = logits_of(model, images), run(content, images)
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert np.ptp(expected, 0).max() > 0.01 * np.abs(expected).max(), "the logits say nothing about the image"
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def exported(model: nn.Module, shape: tuple[int, int, int] = SHAPE, **options: Any) -> onnx.ModelProto:
    """The graph, after checking it against PyTorch."""
    content = export_onnx(model, shape, **options)
    assert difference(content, model, shape) <= TOLERANCE
    return onnx.load_from_string(content)


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def refused(model: nn.Module, match: str, shape: tuple[int, int, int] = SHAPE) -> ExportError:
    with pytest.raises(ExportError, match=match) as caught:
        export_onnx(model, shape)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value


def conv_net() -> nn.Module:
    """All that the tests of the graph's looks need."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU6())
    return disturbed(nn.Sequential(body, head(6)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return conv_net()


@pytest.fixture(scope="module")
def content(net: nn.Module) -> bytes:
    return export_onnx(net, SHAPE)


@pytest.fixture(scope="module")
def graph(content: bytes) -> onnx.ModelProto:
    return onnx.load_from_string(content)


# The graph


def test_graph_is_what_a_person_would_have_written(graph: onnx.ModelProto) -> None:
    assert [(node.name, node.op_type) for node in graph.graph.node] == [
        ("0.0/Conv", "Conv"),
        ("0.1/BatchNormalization", "BatchNormalization"),
        ("0.2/Relu", "Relu"),
        ("0.3/Conv", "Conv"),
        ("0.4/Clip", "Clip"),
        ("1.0/GlobalAveragePool", "GlobalAveragePool"),
        ("1.1/Reshape", "Reshape"),
        ("1.2/Gemm", "Gemm"),
    ]
    names = {node.output[0] for node in graph.graph.node}
    assert names == {node.name for node in graph.graph.node} - {"1.2/Gemm"} | {OUTPUT_NAME}


def test_inputs_and_outputs(graph: onnx.ModelProto) -> None:
    (images,), (logits,) = graph.graph.input, graph.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    for value, sides in ((images, [3, 8, 8]), (logits, [5])):
        batch, *rest = value.type.tensor_type.shape.dim
        assert (batch.dim_param, batch.WhichOneof("value")) == ("batch", "dim_param")
        assert [side.dim_value for side in rest] == sides
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_parameters_keep_their_names_and_values(graph: onnx.ModelProto, net: nn.Module) -> None:
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for name, value in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert np.array_equal(found.pop(name), value.numpy())
    assert sorted(array.size for array in found.values()) == [1, 1, 2]  # the limits of ReLU6, the shape [0, 6]


def test_flattening_copies_the_batch(graph: onnx.ModelProto) -> None:
    (reshape,) = (node for node in graph.graph.node if node.op_type == "Reshape")
    (shape,) = (tensor for tensor in graph.graph.initializer if tensor.name == reshape.input[1])
    assert onnx.numpy_helper.to_array(shape).tolist() == [0, 6]


def test_outputs_equal_pytorchs_at_any_batch(content: bytes, net: nn.Module) -> None:
    assert difference(content, net) <= TOLERANCE
    images = torch.randn((17, *SHAPE), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(run(content, images), logits_of(net, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mutant", ["0.1.running_var", "0.0.weight", "0.3.bias", "1.2.weight"])
def test_mutants_are_caught(content: bytes, net: nn.Module, mutant: str) -> None:
    proto = onnx.load_from_string(content)
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == mutant)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[0] *= 1.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, mutant))
    assert difference(proto.SerializeToString(), net) > TOLERANCE


def test_mutant_without_batch_normalization_is_caught(content: bytes, net: nn.Module) -> None:
    model = ir.from_proto(onnx.load_from_string(content))
    norm = model.graph.node("0.1/BatchNormalization")
    assert norm.inputs[0] is not None
    ir.convenience.replace_all_uses_with(norm.outputs[0], norm.inputs[0])
    model.graph.remove(norm)
    assert difference(ir.to_proto(model).SerializeToString(), net) > 100 * TOLERANCE


def test_nothing_of_the_machine_stands_in_the_file(content: bytes, graph: onnx.ModelProto) -> None:
    for trace in (b"pkg.torch", b"/home", ROOT, b"site-packages", b".py", __name__.encode(), b"File "):
        assert trace not in content
    assert not graph.metadata_props
    assert not graph.functions
    assert not graph.doc_string
    assert all(not node.metadata_props and not node.doc_string for node in graph.graph.node)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 19)]


def test_same_model_gives_the_same_bytes_in_training_mode_too(content: bytes) -> None:
    assert export_onnx(conv_net().train(), SHAPE) == content


@pytest.mark.parametrize("opset", sorted({*OPSETS} - {19}))
def test_other_opsets(net: nn.Module, graph: onnx.ModelProto, opset: int) -> None:
    proto = exported(net, opset=opset)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert operators(proto) == operators(graph)


@pytest.mark.parametrize("opset", [17, 21, 0, -19])
def test_opsets_that_are_refused(net: nn.Module, opset: int) -> None:
    assert opset not in OPSETS
    with pytest.raises(ExportError, match=f"opset {opset} is not supported; choose one of 18 … 20"):
        export_onnx(net, SHAPE, opset=opset)


# Networks of many kinds


def residual(parts: nn.ModuleList, x: Tensor) -> Tensor:
    stem, first, second, shortcut, last = parts
    x = functional.relu(stem(x))
    return torch.as_tensor(last(functional.relu(second(functional.relu(first(x))) + shortcut(x))))


def dense(parts: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in parts:
        x = torch.cat([x, layer(x)], 1)
    return x


def conv_bn(channels: int, out: int, kernel: int, stride: int = 1, padding: int = 0, **options: Any) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


def bn_conv(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 3, padding=1, bias=False))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "residual": (
        lambda: Net(
            residual, conv_bn(3, 4, 3), conv_bn(4, 8, 3, 2, 1), conv_bn(8, 8, 3, 1, 1), conv_bn(4, 8, 1, 2), head(8)
        ),
        {"Conv": 4, "BatchNormalization": 4, "Relu": 3, "Add": 1, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1},
    ),
    "dense": (
        lambda: nn.Sequential(Net(dense, bn_conv(3), bn_conv(7)), nn.BatchNorm2d(11), head(11)),
        {"BatchNormalization": 3, "Relu": 2, "Conv": 2, "Concat": 2, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1},
    ),
    "groups, dilation and transposed convolution": (
        lambda: nn.Sequential(
            conv_bn(3, 6, 3, padding=2, dilation=2, groups=3),
            nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2),
            nn.BatchNorm2d(4, eps=0.1),
            nn.ConvTranspose2d(4, 4, 2, bias=False),
            head(4),
        ),
        {"Conv": 1, "ConvTranspose": 2, "BatchNormalization": 2, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1},
    ),
    "shuffle and pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ChannelShuffle(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 5),
        ),
        {"Conv": 1, "Reshape": 3, "Transpose": 1, "MaxPool": 1, "AveragePool": 1, "Gemm": 1},
    ),
    "squeeze-and-excitation": (
        lambda: Net(
            lambda parts, x: parts[3](x * parts[2](parts[1](functional.silu(parts[0](x.mean((2, 3), keepdim=True)))))),
            nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1), nn.Sigmoid(), head(3),
        ),
        {"GlobalAveragePool": 2, "Conv": 2, "Sigmoid": 2, "Mul": 2, "Reshape": 1, "Gemm": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    build, expected = NETWORKS[name]
    assert Counter(operators(exported(disturbed(build())))) == expected


class Standardized(nn.Conv2d):
    """The weight is computed from the parameter, as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.skipif(OLD_EXPORTER, reason="torch 2.6 cannot export prims.broadcast_in_dim")
def test_a_computed_weight_becomes_a_constant() -> None:
    model = disturbed(nn.Sequential(Standardized(3, 320, 3, bias=False), nn.BatchNorm2d(320), head(320)))
    assert model.get_parameter("0.weight").numel() > 8192  # where onnxscript's folder stops by default
    assert operators(exported(model)) == ["Conv", "BatchNormalization", "GlobalAveragePool", "Reshape", "Gemm"]


def padded(mode: str, pads: tuple[int, ...], value: float | None = None) -> nn.Module:
    convolution = nn.Conv2d(3 + (sum(pads[4:]) if len(pads) > 4 else 0), 4, 3, 2, bias=False)

    def function(parts: nn.ModuleList, x: Tensor) -> Any:
        return parts[1](parts[0](functional.pad(x, pads, mode, value)))

    return disturbed(Net(function, convolution, head(4)))


def test_padding_is_merged_into_the_convolution() -> None:
    """torch pads width before height and begin beside end; ONNX names all begins, then all ends."""
    proto = exported(padded("constant", (0, 1, 2, 3)))
    assert operators(proto) == ["Conv", "GlobalAveragePool", "Reshape", "Gemm"]
    (pads,) = (attribute for attribute in proto.graph.node[0].attribute if attribute.name == "pads")
    assert list(pads.ints) == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("mode", "pads", "value"),
    [("constant", (0, 1, 0, 1), 0.5), ("reflect", (0, 1, 0, 1), None), ("constant", (-1, 1, 0, 1), None)],
)
def test_padding_that_stays(mode: str, pads: tuple[int, ...], value: float | None) -> None:
    assert operators(exported(padded(mode, pads, value)))[:2] == ["Pad", "Conv"]


def test_lite0_pads_in_its_convolutions() -> None:
    """TensorFlow's padding of a strided convolution on an even side: one zero, right and below."""
    from edgewright.export.zoo.mbconv import LITE0, ConvNormAct

    layer = ConvNormAct(3, 4, 3, stride=2, flavour=LITE0, activation=nn.ReLU6)
    proto = exported(disturbed(nn.Sequential(layer, head(4))))
    assert operators(proto) == ["Conv", "BatchNormalization", "Clip", "GlobalAveragePool", "Reshape", "Gemm"]
    (pads,) = (attribute for attribute in proto.graph.node[0].attribute if attribute.name == "pads")
    assert list(pads.ints) == [0, 0, 1, 1]


# The model of the main job


@pytest.fixture(scope="module")
def b0() -> tuple[nn.Module, bytes]:
    model = resolve("mobilenet_effnet_b0").module()
    return model, export_onnx(model, (3, 32, 32))


def test_b0(b0: tuple[nn.Module, bytes]) -> None:
    model, content = b0
    assert difference(content, model, (3, 32, 32)) <= TOLERANCE
    proto = onnx.load_from_string(content)
    assert Counter(operators(proto)) == {
        "Conv": 81,  # 49 and two in each of the 16 gates
        "BatchNormalization": 49,
        "Sigmoid": 65,  # 49 SiLU − 16 projections + 16 inside the gates + 16 gates
        "Mul": 65,
        "GlobalAveragePool": 17,
        "Add": 9,
        "Reshape": 1,
        "Gemm": 1,
    }
    assert not HELPERS & set(operators(proto))
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    modules = {name for name, _ in model.named_modules()}
    assert {name.split("/")[0] for name in names} <= modules | set(operators(proto))
    assert "features.2.0.block.2.fc1/Conv" in names
    assert "features.1.0.block.1.avgpool/GlobalAveragePool" in names
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert sum(len(node.input) == 3 for node in convolutions) == 32
    assert ROOT not in content


# Refused


def pooled(parts: nn.ModuleList, x: Tensor) -> Any:
    return parts[0](x.mean((2, 3)))


def control_flow(parts: nn.ModuleList, x: Tensor) -> Any:
    return pooled(parts, x) if x.sum() > 0 else -pooled(parts, x)


def raising(parts: nn.ModuleList, x: Tensor) -> Any:
    raise KeyError("my own\nmistake")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (control_flow, "could not export Net: .*data-dependent.*control flow"),
        (raising, "cannot run a batch of 1: .*my own"),
        (lambda parts, x: (pooled(parts, x), x), "returns a tuple of 2, expected one tensor of logits"),
        (lambda parts, x: (pooled(parts, x),), "returns a tuple of 1, expected one tensor of logits"),
        (lambda parts, x: {"logits": pooled(parts, x)}, "returns a dict of 1, expected one tensor of logits"),
        (lambda parts, x: pooled(parts, x).view(2, 5), r"cannot run a batch of 1: .*invalid for input of size 5"),
        (lambda parts, x: pooled(parts, x).sum(0)[None].expand(2, 5), r"shape \[2, 5\], expected \[batch, classes\]"),
        (lambda parts, x: pooled(parts, x).reshape(-1, 10), "cannot run a batch of 1: RuntimeError: shape"),
        (lambda parts, x: x.mean((1, 2, 3)), r"shape \['batch'\], expected \[batch, classes\]"),
        (lambda parts, x: pooled(parts, x).double(), "of type DOUBLE, expected FLOAT"),
        (lambda parts, x: pooled(parts, x) + torch.rand_like(x[:, :1, 0, 0]), r"differs from PyTorch by 0\.\d+ of"),
        (lambda parts, x: (-pooled(parts, x).abs()).sqrt(), "differs from PyTorch by nan"),
    ],
    ids=[
        "control flow", "raising", "tuple", "tuple of one", "dict", "fixed batch", "mixed batch", "pairs",
        "no classes", "double", "random", "nan",
    ],
)  # fmt: skip
def test_models_that_are_refused(
    function: Callable[[nn.ModuleList, Tensor], Any], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(disturbed(Net(function, nn.Linear(3, 5))), "." if OLD_EXPORTER else match)  # it refuses them in other words
    assert capfd.readouterr() == ("", "")


def test_a_model_for_other_images_is_refused() -> None:
    refused(disturbed(nn.Sequential(nn.Conv2d(1, 4, 3), head(4))), "cannot run a batch of 1: .*channels")


def test_half_precision_weights_are_refused() -> None:
    refused(disturbed(nn.Sequential(nn.Conv2d(3, 4, 3), head(4))).half(), "cannot run a batch of 1: .*type")


def test_a_padded_pooling_that_onnxruntime_computes_wrongly_is_refused() -> None:
    """onnxruntime makes the zeros pads of MaxPool, which are minus infinity; its engine would be wrong as well."""
    model = Net(lambda parts, x: parts[0](functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, 2) - 1), head(3))
    try:
        content = export_onnx(disturbed(model), SHAPE)
    except ExportError as error:
        differs = "differs from PyTorch" in error.message
    else:
        differs = difference(content, model) > TOLERANCE  # a version that has mended it must be right
        assert not differs
        return
    assert differs


# The check of what is returned can fail


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Callable[[Callable[[ir.Model], None]], None]:
    """Damages the graph where it is cleaned, without the exporter's second for each case."""

    def changing(damage: Callable[[ir.Model], None]) -> None:
        monkeypatch.setattr(module, "_exported", lambda *args: ir.from_proto(onnx.load_from_string(content)))
        monkeypatch.setattr(module, "canonicalize", damage)

    return changing


Change = Callable[[Callable[[ir.Model], None]], None]


def test_an_undamaged_graph_passes(net: nn.Module, change: Change, content: bytes) -> None:
    change(lambda model: None)
    assert export_onnx(net, SHAPE) == content


@pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf"), 0.0])
def test_a_corrupted_weight_is_caught(net: nn.Module, change: Change, factor: float) -> None:
    def corrupt(model: ir.Model) -> None:
        value = model.graph.initializers["1.2.weight"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)

    change(corrupt)
    refused(net, "differs from PyTorch by")


def test_a_fixed_batch_behind_a_dynamic_name_is_caught(
    net: nn.Module, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fix(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.numpy().tolist() == [0, 6]:
                value.const_value = ir.tensor(np.array([1, 6], np.int64), name=value.name)

    change(fix)
    monkeypatch.setattr(module, "_check_structure", lambda proto: None)
    refused(net, "onnxruntime cannot run the exported graph at batch 5")


def test_an_invalid_graph_is_caught(net: nn.Module, change: Change) -> None:
    def damage(model: ir.Model) -> None:
        model.graph[0].op_type = "Convolution"

    change(damage)
    refused(net, "not valid ONNX: .*Convolution")


def test_another_opset_than_asked_for_is_caught(
    net: nn.Module, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exporters do that lack a converter."""
    proto = onnx.load_from_string(content)
    proto.opset_import[0].version = 18
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: SimpleNamespace(model=ir.from_proto(proto)))
    refused(net, "wrote opset 18 instead of 19")


def test_an_exporter_that_returns_nothing_is_caught(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: None)
    refused(net, "returned nothing")


# What it leaves behind


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_logging_warnings_and_streams_are_as_before(
    error: type[BaseException] | None, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (sys.stdout, sys.stderr, warnings.filters[:], logging.root.manager.disable)
    with contextlib.suppress(ValueError, KeyboardInterrupt), module._quiet():
        print("a page")
        print("another", file=sys.stderr)
        warnings.warn("deprecated", stacklevel=1)
        logging.getLogger("torch._dynamo").critical("a third")
        if error is not None:
            raise error
    assert (sys.stdout, sys.stderr, warnings.filters[:], logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


def test_the_model_is_not_changed(net: nn.Module) -> None:
    fresh = conv_net().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
