"""timm's classifiers: their names, their preprocessing as timm does it, and the loader of their weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgewright.export.resolve import ModelRequest, resolve
from edgewright.export.timm_models import timm_entry
from edgewright.export.torchvision_models import imagenet_labels
from edgewright.runtime.errors import ModelError

timm = pytest.importorskip("timm")

SMALL = "test_byobnet"  # 0.5 million parameters, made by timm for tests
SQUASHED = "eva02_tiny_patch14_336.mim_in22k_ft_in1k"


def configured(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Lets timm's configuration of the small network say something else."""
    found = replace(timm.models.get_pretrained_cfg(SMALL), **changes)
    monkeypatch.setattr(timm.models, "get_pretrained_cfg", lambda name: found)


def theirs(**changes: Any) -> Any:
    """timm's own transform of the small network's images."""
    config = timm.models.get_pretrained_cfg(SMALL).to_dict() | changes
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))


@pytest.mark.parametrize("size", [(331, 250), (90, 200)], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": 0.9, "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)},
        {"crop_pct": 1.0, "crop_mode": "squash"},
        {"crop_pct": 0.9, "crop_mode": "squash", "input_size": (3, 96, 128)},
        {"interpolation": "lanczos", "input_size": (3, 97, 97)},
    ],
    ids=str,
)
def test_images_are_preprocessed_as_timm_does(
    changes: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(monkeypatch, **changes)
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    ours = timm_entry(SMALL).task.preprocess
    np.testing.assert_array_equal(ours(pixels), theirs(**changes)(Image.fromarray(pixels)).numpy())


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "vit_base_patch16_224", SQUASHED])
def test_preprocessing_of_released_weights(name: str) -> None:
    config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    pixels = np.random.default_rng(3).integers(0, 256, (400, 370, 3), np.uint8)
    expected = timm.data.create_transform(**config)(Image.fromarray(pixels)).numpy()
    np.testing.assert_array_equal(timm_entry(name).task.preprocess(pixels), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop_mode": "border"}, "expects images with borders"),
        ({"input_size": (3, 96, 128)}, "of 96×128 cut from their middle"),
        ({"interpolation": "box"}, "not supported: interpolation is 'box'"),
        ({"num_classes": 0}, "gives features, expected a classifier"),
    ],
)
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(monkeypatch, **changes)
    with pytest.raises(ModelError, match=said):
        timm_entry(SMALL)


def test_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timm_entry(SMALL).task.labels is imagenet_labels
    configured(monkeypatch, num_classes=3)
    assert timm_entry(SMALL).task.labels == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet-18", "resnet18"),
        ("resnet18.bogus", "resnet18"),
        ("RESNET18", "resnet18"),
        ("", ""),
        ("hf-hub:a/b", ""),
    ],
)
def test_unknown_names(name: str, near: str) -> None:
    with pytest.raises(ModelError, match=f"timm has no classifier '{name}'; (did you mean|see).*{near}"):
        timm_entry(name)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm is not installed here; pip install 'edgewright\[timm\]'"):
        resolve("timm:resnet18")


# Weights


def fake_download(monkeypatch: pytest.MonkeyPatch, result: nn.Module | Exception) -> None:
    """timm's `create_model`, which does not download: it gives `result` for `pretrained=True`."""
    create = timm.create_model

    def fake(name: str, pretrained: bool = False, **keywords: Any) -> Any:
        if not pretrained:
            return create(name, **keywords)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(timm, "create_model", fake)


def test_released_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    released = timm.create_model(SMALL)
    fake_download(monkeypatch, released)
    source = resolve(f"timm:{SMALL}")
    assert source.fingerprint == f"timm:{SMALL}:{metadata.version('timm')}"
    assert source.input_shape == (3, 160, 160)
    model = source.module()
    assert not model.training
    state = released.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), ValueError("x"), Exception()], ids=repr)
def test_a_failed_download_names_the_alternatives(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_download(monkeypatch, error)
    source = resolve(f"timm:{SMALL}")  # asks for nothing yet
    with pytest.raises(ModelError, match=r"could not download .* --weights random.*--weights FILE") as caught:
        source.module()
    assert "\n" not in str(caught.value)


def test_a_network_without_released_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    configured(monkeypatch, url=None, file=None, hf_hub_id=None)
    with pytest.raises(ModelError, match=f"timm:{SMALL} has no weights of its own; give --weights FILE, or --weights"):
        resolve(f"timm:{SMALL}")


def test_options_and_random_weights() -> None:
    source = resolve(ModelRequest(f"timm:{SMALL}", "random", {"drop_rate": 0.25}))
    assert source.module().drop_rate == 0.25
    with pytest.raises(ModelError, match=r"cannot be built with .*absent"):
        resolve(ModelRequest(f"timm:{SMALL}", "random", {"absent": 1})).module()
