"""From what a person writes to a network: its form, its weights, its options, and what identifies it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgewright.export.completion import Completion
from edgewright.export.models import CHECKPOINTS, FASHION_MNIST_LABELS, MODELS
from edgewright.export.resolve import ModelRequest, folder_name, resolve
from edgewright.export.weights import save_checkpoint
from edgewright.export.zoo.mbconv import mobilenet_effnet_b0
from edgewright.runtime.errors import EdgewrightError, ModelError
from edgewright.runtime.preprocess import Preprocess

B0 = "mobilenet_effnet_b0"
B0_FILE = CHECKPOINTS / f"{B0}.safetensors"
LITE0 = "efficientnet_lite0"
OTHER = Preprocess((32, 32), None, (0.5,) * 3, (0.25,) * 3)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def states() -> dict[int, State]:
    """B0's untrained weights by the number of classes, for files."""
    torch.manual_seed(7)
    return {classes: mobilenet_effnet_b0(classes).state_dict() for classes in (3, 10)}


def metadata(preprocess: Preprocess, labels: tuple[str, ...]) -> dict[str, str]:
    return {"preprocess": json.dumps(preprocess.to_json()), "labels": json.dumps(labels)}


def one_line(error: pytest.ExceptionInfo[EdgewrightError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def from_file(path: Path, model: str = B0, **options: Any) -> Any:
    return resolve(ModelRequest(model, str(path), options))


# Forms


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("resnet18", "resnet18"),
        ("torchvision:vit_b_16", "torchvision-vit_b_16"),
        ("timm:resnet18.a1_in1k", "timm-resnet18.a1_in1k"),
        ("package.module:make", "package.module-make"),
        ("a/b:make", "a-b-make"),
    ],
)
def test_build_folders_are_called(model: str, expected: str) -> None:
    assert folder_name(model) == expected


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ("models/net.onnx", "net-"),
        ("../net.v2.onnx", "net.v2-"),
        ("NET.ONNX", "NET-"),
        ("models/net.py:make", "net-make-"),
        ("C:/my nets/net.py:make", "net-make-"),
        ("...onnx", ""),
    ],
)
def test_build_folders_of_files_end_in_letters_of_their_path(model: str, start: str) -> None:
    name = folder_name(model)
    assert re.fullmatch(f"{re.escape(start)}[0-9a-f]{{6}}", name)
    elsewhere = Path(model.partition(":")[0]).resolve()
    assert folder_name(str(elsewhere) + model[len(model.partition(":")[0]) :]) == name
    assert folder_name(f"other/{model}") != name


@pytest.mark.parametrize("model", ["torchvision:vgg11", "timm:test_byobnet"])
def test_a_prefix_names_the_library(model: str) -> None:
    pytest.importorskip(model.partition(":")[0])
    source = resolve(ModelRequest(model, "random"))
    assert (source.name, source.data, len(source.class_names() or ())) == (model, None, 1000)


def test_what_is_said_completes_the_source() -> None:
    source = resolve(ModelRequest(B0, completion=Completion(mean=(0.25,) * 3, labels=("x",) * 10)))
    assert source.preprocess == Preprocess((64, 64), None, (0.25,) * 3, (0.502,) * 3)
    assert source.labels == ("x",) * 10


# Named weights


def test_default_weights() -> None:
    source = resolve(B0)
    assert (source.name, source.data, source.preprocess) == (B0, "fashion_mnist", MODELS[B0].task.preprocess)
    assert (source.class_names(), source.input_shape, source.note) == (FASHION_MNIST_LABELS, (3, 64, 64), "")
    model = source.module()
    assert not any(part.training for part in model.modules())
    shipped = load_file(B0_FILE)
    for name, value in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, shipped[name].float())


def test_weights_may_be_for_another_task(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    state = theirs.efficientnet_b0().state_dict()
    monkeypatch.setattr(theirs.EfficientNet_B0_Weights, "get_state_dict", lambda self, **options: state)
    source = resolve(ModelRequest(B0, "imagenet"))
    assert source.preprocess == MODELS["efficientnet_b0"].task.preprocess
    assert (len(source.class_names() or ()), source.data) == (1000, None)
    assert all(torch.equal(value, state[name]) for name, value in source.module().state_dict().items())


@pytest.mark.parametrize("weights", ["imagnet", "", "weights", "b0.onnx", "safetensors"])
def test_unknown_weights_are_answered_with_those_that_exist(weights: str) -> None:
    with pytest.raises(ModelError, match=r"there are default, imagenet, random, or give a \.safetensors or \.pth"):
        resolve(ModelRequest(B0, weights))


def test_weights_of_another_network_are_not_offered() -> None:
    with pytest.raises(ModelError, match="efficientnet_lite0 has no weights 'imagenet'; there are default, random"):
        resolve(ModelRequest(LITE0, "imagenet"))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("plain34", "give --weights FILE, or --weights random"),
        ("fashion_nin", r"train it \(edgewright train fashion_nin\) and give --weights FILE, or --weights random"),
    ],
)
def test_no_weights_at_all(name: str, remedy: str) -> None:
    with pytest.raises(ModelError, match=f"^{name} has no weights of its own; {remedy}$"):
        resolve(name)


# Random weights


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    source = resolve(ModelRequest(B0, "random"))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first = source.module()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(10)
    ours, theirs = first.state_dict(), resolve(ModelRequest(B0, "random")).module().state_dict()
    assert not first.training
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert "random" in source.weights
    assert "random" in source.fingerprint
    assert not source.trained
    assert "random" in source.note


def test_random_only_when_said() -> None:
    shipped, random = resolve(B0), resolve(ModelRequest(B0, "random"))
    name = "features.0.0.weight"
    assert not torch.equal(shipped.module().get_parameter(name), random.module().get_parameter(name))
    assert "random" not in shipped.weights


# Options


def test_options_reach_the_network() -> None:
    dilated = {"replace_stride_with_dilation": [False, False, True]}
    model = resolve(ModelRequest("resnet50", "random", dilated)).module()
    assert model.get_submodule("layer4.1.conv2").dilation == (2, 2)


def test_without_a_classifier_there_are_no_labels() -> None:
    source = resolve(ModelRequest("resnet18", "random", {"top": False}))
    assert source.class_names() == ()
    with torch.inference_mode():
        assert source.module()(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    assert len(resolve(ModelRequest("resnet18", "random", {"top": True})).class_names() or ()) == 1000


@pytest.mark.parametrize("name", ["resnet18", B0, "alexnet"])
def test_unknown_options_are_refused(name: str) -> None:
    source = resolve(ModelRequest(name, "random", {"absent": 1}))
    with pytest.raises(ModelError, match=f"{name} cannot be built with absent=1: .*absent") as caught:
        source.module()
    one_line(caught)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 3}, "groups=3: "),
        ({"replace_stride_with_dilation": [True, True, True]}, "Dilation > 1"),
        ({"weights": "DEFAULT"}, "weights is no option of torchvision:resnet18; --weights says"),
        ({"num_classes": 3}, "num_classes is no option of torchvision:resnet18"),
    ],
)
def test_options_that_a_builder_refuses(options: dict[str, Any], words: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ModelError, match=words) as caught:
        resolve(ModelRequest("torchvision:resnet18", "random", options)).module()
    one_line(caught)


def test_named_weights_know_nothing_of_options() -> None:
    note = resolve(ModelRequest("resnet50", "default", {"version": "v1"})).note
    assert note == 'the weights were trained without version="v1"'
    assert resolve("resnet50").note == ""


@pytest.mark.parametrize("model", ["mine.pth", "weights/mine.safetensors"])
def test_weights_are_no_network(model: str) -> None:
    with pytest.raises(ModelError, match=f"{model} holds weights, not a network; name the network: NAME --weights"):
        resolve(model)


def test_options_of_no_meaning_are_refused() -> None:
    with pytest.raises(ModelError, match="there is no version 'v3' of a residual network"):
        resolve(ModelRequest("resnet50", "random", {"version": "v3"})).module()


# Weights from a file


def test_a_file_that_describes_itself(tmp_path: Path, states: dict[int, State]) -> None:
    path = tmp_path / "own.safetensors"
    save_file(states[3], path, metadata(OTHER, ("a", "b", "c")))
    source = from_file(path)
    assert (source.preprocess, source.class_names(), source.data) == (OTHER, ("a", "b", "c"), None)
    assert (source.weights, source.note) == (str(path), "")
    model = source.module()
    assert not model.training
    assert all(torch.equal(value, states[3][name]) for name, value in model.state_dict().items())


def test_a_file_of_edgewright_train(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, resolve(B0).module(), OTHER, FASHION_MNIST_LABELS)
    source = from_file(path)
    assert (source.preprocess, source.data, source.note) == (OTHER, "fashion_mnist", "")


def test_own_labels_mean_own_data(tmp_path: Path, states: dict[int, State]) -> None:
    """Ten classes alone do not make it Fashion-MNIST."""
    path = tmp_path / "digits.safetensors"
    save_file(states[10], path, metadata(OTHER, tuple("0123456789")))
    assert from_file(path).data is None


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_file_without_metadata_is_taken_for_the_weights_of_as_many_classes(
    tmp_path: Path, states: dict[int, State], suffix: str
) -> None:
    path = tmp_path / f"own{suffix}"
    if suffix == ".safetensors":
        save_file(states[10], path)
    else:
        torch.save({"state_dict": states[10]}, path)
    source = from_file(path)
    assert (source.preprocess, source.class_names()) == (MODELS[B0].task.preprocess, FASHION_MNIST_LABELS)
    assert source.data == "fashion_mnist"
    assert source.note.startswith(f"{path} does not state its preprocessing and labels: assumed are those of {B0}")
    assert source.module().get_parameter("classifier.1.bias").shape == (10,)


def test_preprocessing_is_never_guessed(tmp_path: Path, states: dict[int, State]) -> None:
    """Another number of classes is another training: it may have seen other images."""
    path = tmp_path / "own.safetensors"
    save_file(states[3], path)
    source = from_file(path)
    assert source.missing == ("--input-shape", "--mean", "--std", "--resize")
    assert (source.class_names(), source.data, source.note) == (("class 0", "class 1", "class 2"), None, "")
    assert source.module().get_parameter("classifier.1.bias").shape == (3,)
    said = Completion(mean=OTHER.mean, std=OTHER.std, resize=(32, 32))
    assert resolve(ModelRequest(B0, str(path), completion=said)).preprocess == OTHER


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c", "d")])
def test_the_number_of_labels_must_fit(tmp_path: Path, states: dict[int, State], labels: tuple[str, ...]) -> None:
    path = tmp_path / "own.safetensors"
    save_file(states[3], path, metadata(OTHER, labels))
    with pytest.raises(ModelError, match=f"names {len(labels)} labels for 3 classes"):
        from_file(path)


@pytest.mark.parametrize("head", [None, torch.ones(()), torch.ones(10)])
def test_a_file_without_a_classifier(tmp_path: Path, head: torch.Tensor | None) -> None:
    path = tmp_path / "own.pth"
    torch.save({"fc.weight": torch.ones(2, 2)} | ({} if head is None else {"classifier.1.weight": head}), path)
    with pytest.raises(ModelError, match=r"has no matrix classifier\.1\.weight.*; give weights of mobilenet_effnet_b0"):
        from_file(path)


def test_a_classifier_of_another_form(tmp_path: Path, states: dict[int, State]) -> None:
    path = tmp_path / "own.pth"
    torch.save(states[3] | {"classifier.1.weight": torch.ones(3, 2, 2)}, path)
    with pytest.raises(ModelError, match=r"classifier\.1\.weight is \[3, 2, 2\], expected \[3, 1280\]"):
        from_file(path).module()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no weights file"):
        from_file(tmp_path / "absent.pth")


def test_weights_of_b0_do_not_fit_lite0(tmp_path: Path, states: dict[int, State]) -> None:
    path = tmp_path / "own.safetensors"
    save_file(states[3], path, metadata(OTHER, ("a", "b", "c")))
    source = from_file(path, LITE0)
    with pytest.raises(ModelError, match=r"own\.safetensors does not fit this network: it .*unknown.*fc1") as caught:
        source.module()
    one_line(caught)


@pytest.mark.parametrize("name", ["squeezenet", "fashion_nin", "resnet18", "regnet"])
def test_the_head_of_every_form_tells_the_classes(name: str, tmp_path: Path) -> None:
    """A convolution, a block, a linear layer, and a network that computes with tensors while it is built."""
    path = tmp_path / "own.pth"
    torch.save(MODELS[name].build(7).state_dict(), path)
    source = from_file(path, name)
    assert source.class_names() == tuple(f"class {index}" for index in range(7))
    source.module()


# Fingerprints


def test_fingerprints_differ_when_and_only_when_the_content_does(tmp_path: Path, states: dict[int, State]) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abcd"]
    changed = {**states[3], "classifier.1.bias": states[3]["classifier.1.bias"] + 1}
    save_file(states[3], paths[0], metadata(OTHER, ("a", "b", "c")))
    shutil.copy(paths[0], paths[1])  # safetensors writes its metadata in an order that changes
    save_file(changed, paths[2], metadata(OTHER, ("a", "b", "c")))
    save_file(states[3], paths[3], metadata(OTHER, ("a", "b", "z")))
    prints = [from_file(path).fingerprint for path in paths]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_fingerprints_of_named_weights_and_options_differ() -> None:
    requests = [
        ModelRequest(B0),
        ModelRequest(B0, "imagenet"),
        ModelRequest(B0, "random"),
        ModelRequest(LITE0),
        ModelRequest("resnet18"),
        ModelRequest("resnet18", options={"version": "v1"}),
        ModelRequest("resnet18", options={"version": "v1.5"}),
        ModelRequest("resnet34"),
    ]
    assert len({resolve(request).fingerprint for request in requests}) == len(requests)
    first, second = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert (
        resolve(ModelRequest("resnet18", options=first)).fingerprint
        == resolve(ModelRequest("resnet18", options=second)).fingerprint
    )
