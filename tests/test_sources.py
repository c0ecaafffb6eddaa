"""Networks from anywhere, from the command line: a function in a file, an ONNX graph, options, what has to be said."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from command import Command

NETWORK = '''
"""A network of somebody's own."""
import torch
from torch import nn

from edgewright.export.entries import ModelSource
from edgewright.runtime.preprocess import Preprocess


def make(width: int = 8, classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )


def complete() -> ModelSource:
    preprocess = Preprocess((16, 16), None, (0.5,) * 3, (0.25,) * 3)
    return ModelSource(build=make, preprocess=preprocess, labels=("red", "green", "blue", "grey"))


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x.amax((2, 3))


class Loop(nn.Module):
    def forward(self, x):
        while x.sum() > 1:
            x = x / 2
        return x.mean((2, 3))
'''
SHAPE = ("--input-shape", "3,16,16")
NORMALIZATION = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--resize", "16,16")
CPU = ("--backend", "onnxruntime", "--max-drop", "100")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with net.py in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def built(place: Path) -> Path:
    """The one build folder of a Python file."""
    (folder,) = (place / "build").glob("net-*")
    return folder


def test_two_files_of_one_name_have_folders_of_their_own(command: Command, place: Path) -> None:
    (place / "other").mkdir()
    (place / "other" / "net.py").write_text(NETWORK)
    for model in ("net.py:make", "other/net.py:make", str(place / "net.py:make")):
        assert command("export", model, *SHAPE).code == 0
    assert len(list((place / "build").glob("net-make-*"))) == 2


def test_a_factory_becomes_engines_and_its_graph_again_a_source(command: Command, place: Path, images: Any) -> None:
    (place / "labels.txt").write_text("red\ngreen\n\nblue\ngrey\n")
    said = (*SHAPE, *NORMALIZATION, "--labels", "labels.txt", *images.options, *CPU, "--json")
    (images.evaluation / "labels.csv").unlink()  # the network is not trained
    first = command("engine", "net.py:make", *said)
    assert first.code == 0, first.err
    assert [engine["status"] for engine in first.document["engines"]] == ["verified", "verified"]
    assert "as make gives them" in first.document["weights"]
    info = json.loads((built(place) / "engines" / "onnxruntime-fp32.json").read_text())
    assert info["labels"] == ["red", "green", "blue", "grey"]
    (built(place) / "model.onnx").rename(place / "mine.onnx")
    again = command("engine", "mine.onnx", *said)
    assert again.code == 0, again.err
    assert again.document["reference"] == first.document["reference"] | {"source": "ONNX file"}
    fp32 = again.document["engines"][0]["parity"]
    assert (fp32["agreement"], fp32["loss_ci95"][0]) == (1.0, 0.0)
    listing = command("run", next(images.evaluation.glob("*.png")), "--model", "mine.onnx", "--json")
    assert listing.document["images"][0]["top"][0]["label"] in info["labels"]


def test_a_source_that_says_all_needs_no_options(command: Command, place: Path, images: Any) -> None:
    done = command("engine", "net.py:complete", *images.options, *CPU, "--precision", "fp32", "--json")
    assert done.code == 4, done.err
    assert "not clearly better than guessing (25 %)" in done.document["engines"][0]["reason"]  # it is not trained
    info = json.loads((built(place) / "engines" / "onnxruntime-fp32.json").read_text())
    assert (info["labels"][0], info["preprocess"]["mean"]) == ("red", [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "labels"),
    [("engine", ", --labels"), ("verify", ", --labels"), ("build", ""), ("calibrate", ""), ("quantize", "")],
)
def test_what_is_missing_is_asked_for_at_once(
    command: Command, place: Path, images: Any, name: str, labels: str
) -> None:
    error = command(name, "net.py:make", *images.options).error
    assert error.endswith(f"give --input-shape, --mean, --std, --resize{labels}")
    error = command(name, "net.py:make", *SHAPE, "--resize", "16,16", "--std", "1,1,1", *images.options).error
    assert error.endswith(f"give --mean{labels}")
    assert not list(place.glob("build/*/model.onnx"))


def test_a_graph_needs_no_more_than_the_shape(command: Command, place: Path) -> None:
    assert command("export", "net.py:make").error.endswith("give --input-shape")
    assert command("export", "net.py:make", *SHAPE).code == 0
    folded = command("fold", "net.py:make", *SHAPE, "--json")
    assert folded.document["folded"] == 1


def test_options_reach_the_factory(command: Command, place: Path) -> None:
    def width() -> int:
        assert command("export", "net.py:make", *SHAPE, *options, "--json").code == 0
        weights = onnx.load(built(place) / "model.onnx").graph.initializer
        return int(max(tensor.dims[0] for tensor in weights))

    options: tuple[str, ...] = ()
    assert width() == 8
    options = ("--option", "width=12", "--option", "classes=3")
    assert width() == 12
    assert "NAME=VALUE" in command("export", "net.py:make", "--option", "width").err
    assert "depth" in command("export", "net.py:make", *SHAPE, "--option", "depth=2").error


def test_a_changed_file_is_exported_again(command: Command, place: Path) -> None:
    export = ("export", "net.py:make", *SHAPE, "--json")
    assert [
        stage["cached"] for stage in (command(*export).document["stages"] + command(*export).document["stages"])
    ] == [
        False,
        True,
    ]
    (place / "net.py").write_text(NETWORK.replace("nn.ReLU()", "nn.Hardswish()"))
    (stage,) = command(*export).document["stages"]
    assert (stage["cached"], stage["changed"]) == (False, ["weights"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("net.py:TwoOutputs", "returns a tuple of 2, expected one tensor of logits"),
        ("net.py:Loop", "could not export Loop"),
        ("net.py:mke", "make"),
        ("net.py", "net.py:"),
        ("nowhere.py:make", "nowhere.py"),
        ("nowhere.onnx", "nowhere.onnx"),
        ("resnt18", "resnet18"),
        ("torchvision:resnt18", "resnet18"),
        ("edgewright.nowhere:make", "nowhere"),
    ],
)
def test_what_cannot_be_taken_is_said_in_a_line(command: Command, place: Path, model: str, words: str) -> None:
    assert words in command("export", model, *SHAPE).error


def test_features_are_built_but_not_judged(command: Command, place: Path, images: Any) -> None:
    said = ("resnext_shallow", "--weights", "random", "--option", "top=false", *SHAPE, *NORMALIZATION, *images.options)
    built = command("build", *said, "--backend", "onnxruntime", "--json")
    assert [engine["status"] for engine in built.document["engines"]] == ["built_not_run"] * 2, built.err
    assert "gives features 2048×1×1, no logits" in command("engine", *said).error


def test_a_single_logit_chooses_no_class(command: Command, place: Path, images: Any) -> None:
    (place / "labels.txt").write_text("one\n")
    said = ("net.py:make", "--option", "classes=1", "--labels", "labels.txt", *SHAPE, *NORMALIZATION)
    assert "gives a single logit" in command("engine", *said, "--calibration", images.calibration).error


def test_inspect(command: Command, place: Path) -> None:
    shown = command("inspect", "net.py:make", *SHAPE)
    assert "Conv+BN+ReLU" in shown.out
    parameters = 3 * 8 * 9 + 2 * 8 + 8 * 8 * 9 + 8 + 8 * 4 + 4
    assert f"{parameters} parameters" in shown.out
    folded = command("inspect", "net.py:make", *SHAPE, "--folded", "--json").document
    assert (folded["schema"], folded["model"]) == ("edgewright.inspect/1", "net.py:make")
    assert folded["totals"]["parameters"] == parameters - 8
    assert folded["totals"]["macs"] == 7 * 7 * 8 * 27 + 5 * 5 * 8 * 72 + 8 * 4
    own = command("inspect", built(place) / "folded.onnx", "--plot", "layers.svg", "--json").document
    assert own["totals"] == folded["totals"]
    assert xml.etree.ElementTree.parse(place / "layers.svg").getroot().tag.endswith("svg")


def test_inspect_refuses(command: Command, place: Path) -> None:
    (place / "broken.onnx").write_bytes(np.arange(100, dtype=np.uint8).tobytes())
    assert "broken.onnx" in command("inspect", "broken.onnx").error
    assert ".svg" in command("inspect", "net.py:make", *SHAPE, "--plot", "layers.txt").error
    assert not (place / "build").exists(), "the name of the plot is looked at first"


def test_the_list_of_networks(command: Command) -> None:
    lines = command("models").out.splitlines()
    assert next(line.split() for line in lines if line.startswith("resnet50 ")) == [
        "resnet50", "25.6M", "4.09G", "3×224×224", "torchvision"
    ]  # fmt: skip
    listed = {model["name"]: model for model in command("models", "--json").document["models"]}
    assert (listed["resnet50"]["parameters"], listed["resnet50"]["input"]) == (25_557_032, [3, 224, 224])
    assert round(listed["resnet50"]["macs"] / 1e9, 2) == 4.09
    assert "torchvision" in listed["resnet50"]["weights"]["default"]
    assert listed["plain34"]["weights"] == {}
