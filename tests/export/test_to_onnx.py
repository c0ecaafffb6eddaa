"""Export through torch.onnx: small networks of many kinds, and what their graphs hold.

The oracle is PyTorch at batch sizes that the exporter itself does not look at. Batch norms are far from the identity.
What is refused, and what a check has to notice, is in test_to_onnx_refusals.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewright.export.conventions import OPSETS, OUTPUT_NAME
from edgewright.export.resolve import resolve
from edgewright.export.to_onnx import export_onnx
from edgewright.runtime.errors import ExportError
from small_networks import (
    SHAPE,
    TOLERANCE,
    Net,
    conv_net,
    difference,
    disturbed,
    exported,
    head,
    logits_of,
    operators,
    run,
)

ROOT = str(Path(__file__).resolve().parents[2]).encode()
OLD_EXPORTER = torch.__version__ < "2.7"  # a TorchVersion, which compares as versions do
HELPERS = {"Shape", "Expand", "CastLike", "Identity", "Constant", "ConstantOfShape", "Gather", "Pad", "Transpose"}


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
