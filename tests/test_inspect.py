"""Totals against fvcore on ten networks, ResNet-50's published figures, the table, the document and the picture."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import Bottleneck

from edgewright.export.to_onnx import export_onnx
from edgewright.inspect_plot import save_plot
from edgewright.inspect_report import inspect_document, inspect_lines, inspect_table, rows_of
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.summary import Summary, summary, total
from edgewright.report import in_short
from edgewright.runtime.errors import WorkspaceError
from textual_graphs import graph

NETWORKS: dict[str, Callable[[], nn.Module]] = {  # most of them with fewer blocks than the published ones
    "resnet18": models.resnet18,
    "mobilenet_v2": lambda: models.MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
    "mobilenet_v3": lambda: models.MobileNetV3(
        [
            InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
            InvertedResidualConfig(16, 5, 96, 40, True, "HS", 2, 1, 1.0),
        ],
        128,
    ),
    "squeezenet1_1": models.squeezenet1_1,
    "shufflenet_v2": lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 1024]),
    "mnasnet0_5": models.mnasnet0_5,
    "efficientnet": lambda: models.EfficientNet(
        [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(6, 5, 2, 16, 24, 2)], 0.2
    ),
    "densenet": lambda: models.DenseNet(12, (2, 2, 2, 2), 16),
    "resnext": lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
    "convnext": lambda: models.ConvNeXt(
        [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)]
    ),
}
SIDE = 64


def of_module(model: nn.Module, side: int) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(export_onnx(model, (3, side, side))))


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """With biases that are not zero: the exporter leaves those out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return model


@pytest.fixture
def quiet_fvcore() -> Iterator[None]:
    """It warns of each operator that it does not count, and its tracing of what newer versions of torch deprecate."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(disabled)


@pytest.mark.parametrize("name", NETWORKS)
def test_totals_agree_with_fvcore(name: str, quiet_fvcore: None) -> None:
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count

    model = built(NETWORKS[name])
    image = torch.zeros(1, 3, SIDE, SIDE)
    by_operator = FlopCountAnalysis(model, image).by_operator()  # a multiply-accumulate is one of its flops
    cost = summary(of_module(model, SIDE)).cost
    assert cost.complete
    assert cost.macs == sum(by_operator[operator] for operator in ("conv", "linear", "addmm", "matmul"))
    assert cost.parameters == parameter_count(model)[""]
    assert cost.activations == ActivationCountAnalysis(model, image).total()


# --- ResNet-50 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50() -> ir.Model:
    return of_module(built(models.resnet50), 224)


@pytest.fixture(scope="module")
def exported(resnet50: ir.Model) -> Summary:
    return summary(resnet50)


def test_resnet50_as_exported_and_folded(resnet50: ir.Model, exported: Summary) -> None:
    folded = summary(fold_batchnorm(resnet50).model)
    assert exported.cost.parameters == 25_557_032
    assert folded.cost.parameters == 25_530_472
    assert exported.cost.macs == folded.cost.macs == 4_089_184_256
    assert exported.cost.activations == 11_114_984  # 11.1 M in Radosavovic et al. 2020, table 2
    assert folded.cost.bytes_moved < exported.cost.bytes_moved
    for found in (exported, folded):
        assert [(stage.name, stage.output) for stage in found.stages] == [
            ("stem", (64, 56, 56)),
            ("layer1", (256, 56, 56)),
            ("layer2", (512, 28, 28)),
            ("layer3", (1024, 14, 14)),
            ("layer4", (2048, 7, 7)),
            ("head", (1000,)),
        ]
        assert total(stage.cost for stage in found.stages) == found.cost
        assert [len(rows_of(found, stage)) for stage in found.stages] == [2, 13, 17, 25, 13, 2]


def printed(found: Summary, width: int) -> list[str]:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(inspect_table(found, width))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_cuts_nothing_off(width: int, exported: Summary) -> None:
    lines = printed(exported, width)
    assert len(lines) == 2 + 6 + 72 + 1
    assert max(map(len, lines)) <= width
    assert not [line for line in lines[1:] if "…" in line.split()[0] and len(line.split()[0]) < 12]
    assert ("MAC/B" in lines[0]) == (width >= 80)
    assert lines[0].split()[:3] == ["layer", "operator", "kernel" if width >= 80 else "output"]


def test_the_table_of_resnet50(exported: Summary) -> None:
    lines = printed(exported, 100)
    assert lines[0].split() == [
        "layer",
        "operator",
        "kernel",
        "output",
        "param",
        "MACs",
        "field",
        "jump",
        "bytes",
        "MAC/B",
    ]
    assert lines[3].split() == [
        "conv1",
        "Conv+BN+ReLU",
        "7×7/2",
        "64×112×112",
        "9.54k",
        "118M",
        "7",
        "2",
        "16.7M",
        "7.1",
    ]
    assert lines[5].split() == ["layer1", "256×56×56", "216k", "668M", "125M", "5.4"]
    assert lines[-1].split() == ["total", "25.6M", "4.09G", "426M", "9.6"]
    assert any(line.startswith(" 0.downsample.0 Conv+BN ") for line in lines)
    assert inspect_lines(exported)[0] == (
        "one image of 3×224×224: 25,557,032 parameters, 4.09 GMACs, 11.1 M activations"
    )


def test_the_document(exported: Summary) -> None:
    document = json.loads(json.dumps(inspect_document(exported), allow_nan=False))
    assert document["schema"] == "edgewright.inspect/1"
    assert document["inputs"] == [{"name": "images", "shape": [3, 224, 224]}]
    assert document["totals"]["parameters"] == sum(layer["parameters"] for layer in document["layers"])
    assert document["totals"]["complete"] is True
    first, norm = document["layers"][:2]
    assert (first["kernel"], first["stride"], first["groups"]) == ([7, 7], [2, 2], 1)
    assert (first["receptive_field"], first["jump"]) == ([7, 7], [2, 2])
    assert (norm["operator"], norm["row"], norm["kernel"]) == ("BatchNormalization", "conv1/Conv", None)
    last = document["layers"][-1]
    assert (last["stage"], last["receptive_field"], last["jump"]) == ("head", ["all", "all"], [None, None])


# --- Other graphs in the table -----------------------------------------------------------------------------------


def cells(body: str, heading: str, inputs: str = "float[N, 4, 8, 8] x", **arrays: Any) -> list[str]:
    """What a column says of each row."""
    table = inspect_table(summary(graph(body, inputs, **arrays)), 100)
    (column,) = (column for column in table.columns if column.header == heading)
    return [str(cell) for cell in list(column.cells)[1:-1]]  # without the stage and the total


@pytest.mark.parametrize(
    ("attributes", "weight", "said"),
    [
        ("strides = [2, 2]", (4, 4, 3, 3), "3×3/2"),
        ("strides = [2, 1]", (4, 4, 1, 7), "1×7/2×1"),
        ("group = 2", (4, 2, 3, 3), "3×3 g2"),
        ("group = 4", (4, 1, 3, 3), "3×3 dw"),
        ("dilations = [2, 2]", (4, 4, 3, 3), "3×3 d2"),
    ],
)
def test_the_kernel_in_words(attributes: str, weight: tuple[int, ...], said: str) -> None:
    assert cells(f"y = Conv <{attributes}> (x, w)", "kernel", w=weight) == [said]


def test_height_and_width_are_told_apart_where_they_differ() -> None:
    assert cells("y = Conv <strides = [1, 2]> (x, w)", "field", w=(4, 4, 1, 7)) == ["1×7"]
    assert cells("y = Conv <strides = [1, 2]> (x, w)", "jump", w=(4, 4, 1, 7)) == ["1×2"]


def test_activations_of_several_nodes_have_one_name() -> None:
    body = "a = Conv (x, w)\nb = Sigmoid (a)\nc = Mul (a, b)\nd = Conv (c, w)\ny = Relu (d)"
    assert cells(body, "operator", w=(4, 4, 1, 1)) == ["Conv+SiLU", "Conv+ReLU"]


def test_a_row_has_the_output_of_its_convolution_and_a_stage_that_of_its_last_node() -> None:
    body = "a = Conv (x, w)\ny = Transpose <perm = [0, 2, 3, 1]> (a)"
    assert cells(body, "output", w=(5, 4, 3, 3)) == ["5×6×6"]
    (stage,) = summary(graph(body, "float[N, 4, 8, 8] x", w=(5, 4, 3, 3))).stages
    assert stage.output == (6, 6, 5)


def test_a_row_of_the_module_of_the_stage_is_called_after_its_operator() -> None:
    body = "a = Conv (x, w)\nb = Conv (a, w)\nc = Concat <axis = 1> (a, b)\ny = Relu (c)"
    model = graph(body, "float[N, 4, 8, 8] x", w=(4, 4, 1, 1))
    for node, module in zip(model.graph, ("fire.squeeze", "fire.expand", "fire", "fire"), strict=True):
        node.name = f"{module}/{node.op_type}"
    found = summary(model)
    (stage,) = found.stages
    assert stage.name == "fire"
    assert [(row.name, row.operators) for row in rows_of(found, stage)] == [
        ("squeeze", "Conv"),
        ("expand", "Conv"),
        ("Concat", "Concat+ReLU"),
    ]


def test_what_is_not_known_is_a_question_mark_and_the_totals_are_at_least() -> None:
    body = 'a = Conv (x, w)\ny = Einsum <equation = "nchw,cd->ndhw"> (a, v)'
    found = summary(graph(body, "float[N, 4, 8, 8] x", w=(4, 4, 1, 1), v=(4, 4)))
    assert cells(body, "MACs", w=(4, 4, 1, 1), v=(4, 4)) == ["1.02k", "?"]
    assert cells(body, "field", w=(4, 4, 1, 1), v=(4, 4)) == ["1", "?"]
    assert "at least 32 parameters" in inspect_lines(found)[0]
    assert inspect_lines(found)[-1].startswith("note: not counted")


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, ""), (7, "7"), (999, "999"), (1000, "1.00k"), (9996, "10.0k"), (99_960, "100k"), (999_600, "1.00M")],
)
def test_three_digits(count: int, said: str) -> None:
    assert in_short(count) == said


# --- The picture -------------------------------------------------------------------------------------------------


def test_the_picture_is_the_same_each_time_and_says_what_it_shows(exported: Summary, tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        save_plot(exported, path, "resnet50")
    text = first.read_text()
    assert text == second.read_text()
    for word in ("resnet50", "25.6 M parameters", "layer3", "bytes moved", "multiply-accumulates"):
        assert f"<!-- {word}" in text or word in text
    assert "<dc:date>" not in text


def test_a_png_and_no_global_state(exported: Summary, tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    save_plot(exported, tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a.pdf", "neither a .svg nor a .png"),
        ("a", "neither a .svg nor a .png"),
        ("missing/a.svg", "there is no folder"),
        ("folder.svg", "is a folder"),
    ],
)
def test_refused_files(name: str, match: str, exported: Summary, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(WorkspaceError, match=match):
        save_plot(exported, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(exported: Summary, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WorkspaceError):
        save_plot(exported, tmp_path / "a.svg")
