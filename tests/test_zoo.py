"""Networks of every family go through the pipeline, by the checks of `make zoo`; and those checks can fail."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
import zoo_network
from onnx import numpy_helper

from edgewright.export.conventions import INPUT_NAME
from edgewright.export.models import MODELS
from edgewright.export.resolve import ModelRequest, resolve
from edgewright.optimize.verify import check_equivalent
from edgewright.runtime.errors import QuantizationError

PACKAGES = {"onnxruntime": "onnxruntime", "tensorrt-rtx": "tensorrt_rtx"}
FAMILIES = {  # a small network of each, and the side of its images in pixels
    "lenet_bn_scratch": 28,
    "fashion_alexnet": 224,
    "fashion_vgg11": 224,
    "fashion_nin": 80,
    "fashion_googlenet": 48,
    "fashion_resnet18": 32,
    "fashion_densenet": 48,
    "resnext_shallow": 64,
    "squeezenet": 64,
    "shufflenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet": 64,
    "convnext_tiny": 64,
    "efficientnet_lite0": 96,
}
OPTIONS = {"fashion_alexnet": {"hidden": 64}, "fashion_vgg11": {"hidden": 64}}  # not 40 million weights
UNFOLDED = {"fashion_densenet": 20}  # batch normalizations behind a concatenation or a pooling
LAYER_NORMS = {"convnext_tiny": 23}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_every_family_is_built(name: str, folder: Path) -> None:
    backends = tuple(backend for backend, package in PACKAGES.items() if importlib.util.find_spec(package))
    result = zoo_network.measured(
        name,
        folder,
        size=FAMILIES[name],
        backends=backends,
        precisions=("fp16", "int8"),
        model_options=OPTIONS.get(name),
    )
    assert result["problems"] == []
    assert result["folded"] == result["batch_norms"] - UNFOLDED.get(name, 0)
    assert sum(result["left"].values()) == UNFOLDED.get(name, 0) + LAYER_NORMS.get(name, 0)
    int8 = next(engine for engine in result["engines"] if engine["backend"] == "onnxruntime")
    assert int8["in_precision"] > int8["layers"] / 3


def test_a_folded_graph_that_is_another_is_noticed(folder: Path, tmp_path: Path) -> None:
    result = zoo_network.measured("lenet_bn", folder, backends=("onnxruntime",), precisions=("fp32",))
    model = onnx.load(folder / "lenet_bn" / "folded.onnx")
    bias = next(tensor for tensor in model.graph.initializer if "bias" in tensor.name)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 1.5, bias.name))
    onnx.save(model, tmp_path / "folded.onnx")
    module = resolve(ModelRequest("lenet_bn", "random")).module()
    difference, largest = zoo_network._difference(module, tmp_path / "folded.onnx", (1, 28, 28))
    (problem,) = zoo_network._problems({**result, "relative": difference / largest}, tmp_path / "folded.onnx")
    assert "differs from PyTorch" in problem


def test_a_normalization_that_could_have_been_folded_is_noticed(folder: Path) -> None:
    result = zoo_network.measured("lenet_bn", folder, backends=("onnxruntime",), precisions=("fp32",))
    problems = list(zoo_network._problems(result, folder / "lenet_bn" / "model.onnx"))
    assert len(problems) == 4
    assert all("could have been folded" in problem for problem in problems)


@pytest.mark.parametrize(("name", "size", "count"), [("lenet_bn", None, 4), ("fashion_resnet18", 32, 17)])
def test_dropping_any_one_normalization_is_refused(name: str, size: int | None, count: int, folder: Path) -> None:
    """The check of the fold stage, on graphs from which one BatchNormalization each was taken out."""
    result = zoo_network.measured(name, folder, size=size, backends=("onnxruntime",), precisions=("int8",))
    exported = onnx.load(folder / name / "model.onnx")
    images = np.random.default_rng(1).standard_normal((2, *result["input"]), np.float32)
    positions = [index for index, node in enumerate(exported.graph.node) if node.op_type == "BatchNormalization"]
    assert len(positions) == count
    for position in positions:
        dropped = onnx.ModelProto()
        dropped.CopyFrom(exported)
        norm = dropped.graph.node.pop(position)
        for node in dropped.graph.node:
            for index, value in enumerate(node.input):
                if value == norm.output[0]:
                    node.input[index] = norm.input[0]
        with pytest.raises(QuantizationError, match="differs from the original by"):
            check_equivalent(exported, dropped, feeds={INPUT_NAME: images})
    assert check_equivalent(exported, onnx.load(folder / name / "folded.onnx"), feeds={INPUT_NAME: images}) < 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"smallest_effect": 1e-5}, "a dropped batch normalization changes 1.0e-05 only"),
        ({"relative": float("nan")}, "differs from PyTorch by nan"),
        (
            {"engines": [{"backend": "b", "precision": "p", "status": "failed", "reason_code": "c", "reason": "r"}]},
            "b p: c: r",
        ),
    ],
)
def test_other_problems_are_noticed(change: dict[str, Any], words: str, folder: Path) -> None:
    result = zoo_network.measured("lenet_bn", folder, backends=("onnxruntime",), precisions=("fp32",))
    (problem,) = zoo_network._problems({**result, **change}, folder / "lenet_bn" / "folded.onnx")
    assert words in problem


def test_the_line_up_is_that_of_the_registry() -> None:
    sizes = json.loads(zoo.LINE_UP.read_text())
    assert list(sizes) == list(MODELS), "make zoo writes it again"


@pytest.mark.parametrize("name", MODELS)
def test_sizes_in_the_list_are_those_of_the_networks(name: str) -> None:
    import torch

    size = json.loads(zoo.LINE_UP.read_text())[name]
    entry = MODELS[name]
    with torch.device("cpu" if name == "regnet" else "meta"):  # RegNet draws its weights by NumPy
        model = entry.build(entry.task.classes)
    assert size["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert tuple(size["input"]) == entry.task.preprocess.input_shape
    assert size["macs"] > size["parameters"] / 100
