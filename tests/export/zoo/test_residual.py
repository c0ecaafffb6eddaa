"""The residual family. Oracles: torchvision's networks, timm's SE-ResNet-50, and blocks run by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewright.export.zoo import residual
from edgewright.export.zoo.mbconv import SqueezeExcitation
from edgewright.export.zoo.residual import BasicBlock, BlockStyle, Bottleneck, ResidualNet
from edgewright.runtime.errors import ModelError
from tiny_modules import randomize

torchvision = pytest.importorskip("torchvision.models")

TOLERANCE = 1e-6  # of the largest value
THEIRS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
OURS = ("se_resnet50", "plain34", "resnext_shallow")


def images(side: int = 64) -> Tensor:
    return torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(1))


def result(model: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.inference_mode():
        return model(x)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def build(name: str, **options: Any) -> ResidualNet:
    model = getattr(residual, name)(**options)
    assert isinstance(model, ResidualNet)
    return model.eval()


def bare(name: str, **options: Any) -> ResidualNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build(name, **options)


def shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def oracle(name: str, **options: Any) -> nn.Module:
    """torchvision's network with weights that depend on its shapes alone and batch norms far from the identity."""
    return filled(lambda: getattr(torchvision, name)(num_classes=10, **options))


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """The network of `make` with seeded weights, without the time that its own initialization takes."""
    with torch.device("meta"):
        model = make().eval()
    model.to_empty(device="cpu")
    randomize(model, 3)
    return model


def twin(theirs: nn.Module, name: str, **options: Any) -> ResidualNet:
    """Our network with the weights of `theirs`, which it shares."""
    return sharing(theirs.state_dict(), name, classes=10, **options)


def sharing(state: Mapping[str, Tensor], name: str, **options: Any) -> ResidualNet:
    model = bare(name, **options)
    model.load_state_dict(state, strict=True, assign=True)
    return model


# Against torchvision


@pytest.mark.parametrize("name", THEIRS)
def test_names_shapes_and_parameters_are_torchvisions_in_its_order(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision, name)()
    ours = bare(name)
    assert shapes(ours) == shapes(theirs)
    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize(
    ("name", "dilation"),
    [
        ("resnet18", (False, False, False)),
        ("resnet50", (False, False, False)),
        ("resnet50", (False, True, True)),
        ("resnet50", (True, False, True)),
        ("resnext50_32x4d", (False, False, True)),
    ],
)
def test_networks_compute_what_torchvisions_do(name: str, dilation: tuple[bool, bool, bool]) -> None:
    theirs = oracle(name, replace_stride_with_dilation=dilation)
    expected = result(theirs, images())
    assert relative_difference(expected[0], expected[1]) > 0.01, "the logits say nothing about the image"
    found = result(twin(theirs, name, replace_stride_with_dilation=dilation), images())
    assert relative_difference(found, expected) <= TOLERANCE


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return oracle("resnet50")


@pytest.mark.parametrize("mutant", ["shortcut", "stride", "dilation", "epsilon", "stem"])
def test_mutants_are_caught(resnet50: nn.Module, mutant: str) -> None:
    ours = twin(resnet50, "resnet50")
    block: Any = ours.layer3[0]
    if mutant == "shortcut":
        last: Any = ours.layer4[2]
        last.shortcut = False
    elif mutant == "stride":
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    elif mutant == "dilation":
        block.conv2.dilation = block.conv2.padding = (2, 2)
    elif mutant == "epsilon":
        ours.bn1.eps = 1e-2
    else:
        ours.maxpool.padding = 0
    assert relative_difference(result(ours, images()), result(resnet50, images())) > 100 * TOLERANCE


def test_the_shallow_resnext_is_torchvisions_with_a_block_per_stage() -> None:
    resnet = pytest.importorskip("torchvision.models.resnet")
    theirs = filled(
        lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4)
    )
    ours = twin(theirs, "resnext_shallow")
    for side in (64, 224):
        assert relative_difference(result(ours, images(side)), result(theirs, images(side))) <= TOLERANCE


def test_fresh_weights_keep_the_variance_of_gradients() -> None:
    """He et al. 2015: standard deviation sqrt(2 / fan out)."""
    torch.manual_seed(0)
    block: Any = build("resnext_shallow").layer4[0]
    assert float(block.conv3.weight.detach().std()) == pytest.approx((2 / 2048) ** 0.5, rel=0.01)


# Version 1: the stride in the first 1×1 convolution


def sizes(model: nn.Module, side: int = 64) -> dict[str, tuple[int, ...]]:
    """Height and width of what each convolution yields for an image `side` wide."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, out, name=name: found.update({name: tuple(out.shape[2:])}))
    result(model, torch.empty((1, 3, side, side), device="meta"))
    return found


def test_versions_differ_in_where_the_resolution_halves() -> None:
    first, later = sizes(bare("resnet50", version="v1")), sizes(bare("resnet50"))
    different = {name for name in later if first[name] != later[name]}
    assert different == {"layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"}
    assert (later["layer2.0.conv1"], later["layer2.0.conv2"]) == ((16, 16), (8, 8))
    assert (first["layer2.0.conv1"], first["layer2.0.conv2"]) == ((8, 8), (8, 8))


def test_versions_have_the_same_weights() -> None:
    assert shapes(bare("resnet50", version="v1")) == shapes(bare("resnet50"))


def test_version_1_is_torchvisions_with_the_strides_exchanged(resnet50: nn.Module) -> None:
    ours = result(twin(resnet50, "resnet50", version="v1"), images())
    theirs: Any = copy.deepcopy(resnet50)
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    assert relative_difference(ours, result(theirs, images())) <= TOLERANCE
    assert relative_difference(ours, result(resnet50, images())) > 100 * TOLERANCE


def test_versions_are_one_where_dilation_took_the_stride(resnet50: nn.Module) -> None:
    options = {"top": False, "replace_stride_with_dilation": (True, True, True)}
    assert sizes(bare("resnet50", version="v1", **options)) == sizes(bare("resnet50", **options))


# Without top


def test_features_are_those_of_torchvisions_last_stage(resnet50: nn.Module) -> None:
    getter: Any = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
    expected = result(getter(resnet50, {"layer4": "out"}), images())["out"]
    state = {name: value for name, value in resnet50.state_dict().items() if not name.startswith("fc.")}
    ours = sharing(state, "resnet50", top=False)
    assert expected.shape == (2, 2048, 2, 2)
    assert relative_difference(result(ours, images()), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("dilation", "side"),
    [((False, False, False), 2), ((False, False, True), 4), ([False, True, True], 8), ((True, True, True), 16)],
)
def test_dilation_makes_the_features_finer(dilation: Any, side: int) -> None:
    ours = bare("resnet50", top=False, replace_stride_with_dilation=dilation)
    assert result(ours, torch.empty((1, 3, 64, 64), device="meta")).shape == (1, 2048, side, side)


def test_every_second_of_the_finer_features_is_an_old_one(resnet50: nn.Module) -> None:
    """What "à trous" means: a dilated convolution reads its neighbours where the strided network had them."""
    state = {name: value for name, value in resnet50.state_dict().items() if not name.startswith("fc.")}
    old = result(sharing(state, "resnet50", top=False), images())
    finer = result(sharing(state, "resnet50", top=False, replace_stride_with_dilation=(False, True, True)), images())
    assert relative_difference(finer[:, :, ::4, ::4], old) <= TOLERANCE
    assert relative_difference(finer[:, :, 1::4, 1::4], old) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["resnet18", "resnet50", *OURS])
def test_without_top_there_is_no_classifier_to_train(name: str) -> None:
    missing = set(dict(shapes(bare(name)))) - set(dict(shapes(bare(name, top=False))))
    assert missing == {"fc.weight", "fc.bias"}


# Squeeze-and-excitation


def test_se_block_is_its_formula() -> None:
    """Hu et al. 2018, equations 2 to 4, before the addition."""
    torch.manual_seed(0)
    block: Any = Bottleneck(64, 16, stride=1, dilation=1, style=BlockStyle(squeeze_reduction=16)).eval()
    randomize(block, 5)
    block.requires_grad_(False)
    x = images(7).repeat(1, 22, 1, 1)[:, :64]
    branch = result(block.branch, x)
    squeezed = branch.mean((2, 3))
    hidden = (squeezed @ block.se.fc1.weight[:, :, 0, 0].T + block.se.fc1.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ block.se.fc2.weight[:, :, 0, 0].T + block.se.fc2.bias)))
    expected = (branch * gate[:, :, None, None] + x).clamp(min=0)
    assert hidden.shape == (2, 4)
    torch.testing.assert_close(result(block, x), expected)
    assert relative_difference(result(block, x), (branch + x).clamp(min=0)) > 0.01, "the gate does nothing"


def test_se_resnet50_computes_what_timms_does() -> None:
    timm = pytest.importorskip("timm")
    theirs = filled(lambda: timm.create_model("seresnet50", num_classes=10))
    ours = twin(theirs, "se_resnet50")
    expected = result(theirs, images())
    assert relative_difference(expected[0], expected[1]) > 0.01
    assert relative_difference(result(ours, images()), expected) <= TOLERANCE


def test_se_resnet50_adds_two_small_layers_to_each_block() -> None:
    channels = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    gates = sum(2 * count * count // 16 + count // 16 + count for count in channels)
    assert parameters(bare("se_resnet50")) == 25_557_032 + gates == 28_088_024  # Hu et al. 2018, section 4: 28.1 M
    assert sum(isinstance(module, SqueezeExcitation) for module in bare("se_resnet50").modules()) == 16
    assert not any(isinstance(module, SqueezeExcitation | nn.SiLU) for module in bare("resnet50").modules())


# The plain network


def plainly(resnet34: Any, x: Tensor) -> Tensor:
    """torchvision's ResNet-34 run by hand, layer after layer, with nothing added."""
    x = resnet34.maxpool(functional.relu(resnet34.bn1(resnet34.conv1(x))))
    for stage in (resnet34.layer1, resnet34.layer2, resnet34.layer3, resnet34.layer4):
        for block in stage:
            x = functional.relu(block.bn1(block.conv1(x)))
            x = functional.relu(block.bn2(block.conv2(x)))
    logits: Tensor = resnet34.fc(x.mean((2, 3)))
    return logits


def test_plain34_is_resnet34_without_its_shortcuts() -> None:
    theirs = oracle("resnet34")
    state = {name: value for name, value in theirs.state_dict().items() if "downsample" not in name}
    ours = sharing(state, "plain34", classes=10)
    expected = result(lambda x: plainly(theirs, x), images())
    assert relative_difference(result(ours, images()), expected) <= TOLERANCE
    assert relative_difference(result(theirs, images()), expected) > 0.1


def test_plain34_has_no_projections() -> None:
    projections = 64 * 128 + 128 * 256 + 256 * 512 + 2 * (128 + 256 + 512)
    assert parameters(bare("plain34")) == 21_797_672 - projections
    assert not any("downsample" in name for name, _ in shapes(bare("plain34")))


# Refused


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "plain34"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replace_stride_with_dilation": (False, False, True)}, r"basic blocks has no dilated form; leave"),
        ({"replace_stride_with_dilation": [True, False, False]}, r"basic blocks has no dilated form; leave"),
        ({"version": "v1"}, r"no 1×1 convolution.*; leave version out"),
    ],
)
def test_basic_blocks_refuse_what_only_bottlenecks_have(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        bare(name, **options)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replace_stride_with_dilation": (False, False)}, "three booleans"),
        ({"replace_stride_with_dilation": (False,) * 4}, "three booleans"),
        ({"replace_stride_with_dilation": (0, 0, 1)}, "three booleans"),
        ({"replace_stride_with_dilation": None}, "three booleans"),
        ({"replace_stride_with_dilation": "yes"}, "three booleans"),
        ({"version": "v2"}, r"no version 'v2'.*\"v1\" or \"v1.5\""),
        ({"version": 1.5}, r"no version 1.5"),
        ({"classes": 0}, "a classifier of 0 classes"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        bare(name, **options)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "style",
    [{"groups": 0}, {"width_per_group": 0}, {"squeeze_reduction": 0}, {"stride_in": "5x5"}],
)
def test_bad_styles_are_refused(style: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        BlockStyle(**style)


@pytest.mark.parametrize("style", [BlockStyle(groups=32), BlockStyle(width_per_group=4)])
def test_basic_blocks_refuse_groups(style: BlockStyle) -> None:
    with pytest.raises(ModelError, match="no grouped form"):
        BasicBlock(64, 64, stride=1, dilation=1, style=style)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_defaults_may_be_said(name: str) -> None:
    said = bare(name, version="v1.5", top=True, replace_stride_with_dilation=[False, False, False])
    assert shapes(said) == shapes(bare(name))


def test_unknown_options_are_a_mistake_in_the_program() -> None:
    with pytest.raises(TypeError, match="zero_init"):
        bare("resnet50", zero_init=True)
