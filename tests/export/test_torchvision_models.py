"""torchvision's networks: preprocessing and sizes as torchvision has them, and the loader of its released weights."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgewright.export.models import MODELS
from edgewright.export.resolve import ModelRequest, resolve
from edgewright.export.torchvision_models import (
    _NETWORKS,
    _RESIDUAL,
    imagenet_labels,
    torchvision_entry,
)
from edgewright.runtime.errors import ModelError

models = pytest.importorskip("torchvision.models")

LINE_UP = {**_RESIDUAL, **_NETWORKS}
PIXELS = np.random.default_rng(1).integers(0, 256, (351, 420, 3), np.uint8)


def preset(builder: str) -> Any:
    return models.get_model_weights(builder).DEFAULT


# What torchvision says


@pytest.mark.parametrize("name", LINE_UP)
def test_images_are_preprocessed_as_torchvision_does(name: str) -> None:
    weights = models.get_model_weights(LINE_UP[name].builder)[LINE_UP[name].version]
    assert weights is preset(LINE_UP[name].builder)
    expected = weights.transforms()(Image.fromarray(PIXELS)).numpy()
    np.testing.assert_array_equal(MODELS[name].task.preprocess(PIXELS), expected)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_v2_t", "efficientnet_v2_l", "resnet50"])
def test_any_other_network_is_preprocessed_as_torchvision_does(name: str) -> None:
    """efficientnet_v2_l has a mean of its own."""
    expected = preset(name).transforms()(Image.fromarray(PIXELS)).numpy()
    np.testing.assert_array_equal(torchvision_entry(name).task.preprocess(PIXELS), expected)


def test_every_classifier_has_an_entry() -> None:
    for name in models.list_models(module=models):
        entry, weights = torchvision_entry(name), preset(name)
        assert entry.task.preprocess.mean == tuple(weights.transforms().mean)
        assert entry.task.preprocess.input_shape == (3, *weights.transforms().crop_size * 2)


@pytest.mark.parametrize("name", LINE_UP)
def test_networks_are_torchvisions(name: str) -> None:
    """The same names, shapes and number of parameters as torchvision's, its auxiliary heads apart."""
    keywords = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    build: Callable[[], nn.Module] = lambda: models.get_model(LINE_UP[name].builder, **keywords)  # noqa: E731
    if name == "regnet":  # computes with tensors while it is built
        ours, theirs = MODELS[name].build(1000), build()
    else:
        with torch.device("meta"):
            ours, theirs = MODELS[name].build(1000), build()
    expected = {
        key: list(value.shape) for key, value in theirs.state_dict().items() if not key.startswith(("aux", "Aux"))
    }
    assert {key: list(value.shape) for key, value in ours.state_dict().items()} == expected
    count = sum(value.numel() for value in ours.parameters())
    if not keywords:
        assert count == preset(LINE_UP[name].builder).meta["num_params"]


def test_labels() -> None:
    assert imagenet_labels() == tuple(preset("inception_v3").meta["categories"])
    assert len(imagenet_labels()) == 1000


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet-18", "did you mean .*resnet18"),
        ("fcn_resnet50", "did you mean"),
        ("", "see torchvision"),
        ("vit_b16", ""),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=f"^torchvision has no classifier '{name}'; {hint}"):
        resolve(f"torchvision:{name}")


# Released weights


def fake_download(monkeypatch: pytest.MonkeyPatch, builder: str, result: dict[str, torch.Tensor] | Exception) -> None:
    """torchvision's `get_state_dict`, which does not download."""

    def get_state_dict(self: Any, *arguments: Any, **options: Any) -> Any:
        assert options["check_hash"] is True
        if isinstance(result, Exception):
            raise result
        return dict(result)

    monkeypatch.setattr(models.get_model_weights(builder), "get_state_dict", get_state_dict)


def released(name: str) -> dict[str, torch.Tensor]:
    """A state dict as the released file has it."""
    torch.manual_seed(2)
    keywords = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    state: dict[str, torch.Tensor] = models.get_model(name, **keywords).state_dict()
    if name.startswith("densenet"):  # so old that it does not count batches either
        state = {key: value for key, value in state.items() if "num_batches" not in key}
        for number in "12":
            for kind in ("norm", "conv"):
                state = {key.replace(f".{kind}{number}.", f".{kind}.{number}."): value for key, value in state.items()}
    return state


@pytest.mark.parametrize(
    ("model", "builder", "way"),
    [
        ("squeezenet", "squeezenet1_1", "download"),
        ("resnet18", "resnet18", "download"),
        ("densenet121", "densenet121", "download"),
        ("densenet121", "densenet121", "file"),
        ("googlenet", "googlenet", "download"),
        ("googlenet", "googlenet", "file"),
        ("inception_v3", "inception_v3", "download"),
        ("torchvision:googlenet", "googlenet", "download"),
    ],
)
def test_released_weights_are_loaded(
    model: str, builder: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Also with DenseNet's old names, and without the heads that are for training only."""
    state = released(builder)
    weights = "default"
    if way == "download":
        fake_download(monkeypatch, builder, state)
    else:
        torch.save(state, tmp_path / "released.pth")
        weights = str(tmp_path / "released.pth")
    source = resolve(ModelRequest(model, weights))
    ours = source.module()
    assert not ours.training
    assert getattr(ours, "transform_input", True)  # Inception's weights expect it
    state = {key.replace("norm.", "norm").replace("conv.", "conv"): value for key, value in state.items()}
    for key, value in ours.state_dict().items():
        if "num_batches" in key:
            continue
        assert torch.equal(value, state[key.replace("norm.", "norm").replace("conv.", "conv")]), key
    assert source.preprocess == MODELS[model.removeprefix("torchvision:")].task.preprocess
    if way == "download":
        assert source.fingerprint.startswith(f"torchvision:{builder}:IMAGENET1K_V")


def test_features_without_the_classifier(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    state = released("resnet18")
    fake_download(monkeypatch, "resnet18", state)
    torch.save(state, tmp_path / "released.pth")
    for weights in ("default", str(tmp_path / "released.pth")):
        source = resolve(ModelRequest("resnet18", weights, {"top": False}))
        assert source.class_names() == ()
        assert source.input_shape == (3, 224, 224)
        model = source.module()
        assert "fc.weight" not in model.state_dict()
        assert torch.equal(model.get_parameter("conv1.weight"), state["conv1.weight"])
    assert resolve(ModelRequest("resnet18", options={"top": False})).fingerprint != resolve("resnet18").fingerprint


def test_weights_of_another_network_are_still_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    torch.save(released("resnet18") | {"extra.weight": torch.ones(2)}, tmp_path / "own.pth")
    for options in ({}, {"top": False}):
        with pytest.raises(ModelError, match=r"own\.pth does not fit this network: it has the unknown .*extra\.weight"):
            resolve(ModelRequest("resnet18", str(tmp_path / "own.pth"), options)).module()


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("[Errno -3] Temporary failure in name resolution"),
        urllib.error.HTTPError("https://download.pytorch.org", 403, "Forbidden", None, None),  # type: ignore[arg-type]
        TimeoutError("timed out"),
        ConnectionResetError(104, "reset by peer"),
        PermissionError(13, "Permission denied"),
        RuntimeError('invalid hash value (expected "3dd342df", got "00000000")'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_download_names_the_alternatives(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_download(monkeypatch, "squeezenet1_1", error)
    source = resolve("squeezenet")  # asks for nothing yet
    with pytest.raises(ModelError, match=r"could not download.*--weights random.*--weights FILE"):
        source.module()
