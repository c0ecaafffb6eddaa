"""One fault in each hop is found, by hop and by layer; a healthy chain blames nobody."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgewright.blame import Blame, Hop, Kind, blame
from edgewright.blame_report import blame_document, blame_lines, blame_table
from edgewright.blame_torch import TorchActivations
from edgewright.calibration.collect import CalibrationTable, collect
from edgewright.calibration.ranges import Range
from edgewright.export.reference import torch_reference
from edgewright.export.to_onnx import export_onnx
from edgewright.optimize.cast_fp16 import cast_fp16
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.edits import constant_tensor
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.segments import logits_of, values_by_name
from edgewright.optimize.simulate import signed_to_unsigned, simulate_fp16
from edgewright.runtime.errors import ParityError
from tiny_modules import randomize

Batch = NDArray[np.float32]
WIDTH, SIDE, CLASSES = 16, 8, 4
IMAGES: Batch = np.random.default_rng(21).normal(size=(384, 3, SIDE, SIDE)).astype(np.float32)


def network() -> nn.Sequential:
    """Convolutions and square matrices; one ReLU module, called once, works in place."""
    module = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(inplace=True),
        nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(WIDTH * SIDE * SIDE // 4, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES),
    )
    randomize(module, 5)
    return module.eval()


@dataclass(frozen=True)
class Chain:
    """The graphs of a healthy network."""

    module: nn.Module
    exported: ir.Model
    folded: ir.Model
    table: CalibrationTable

    def quantized(self, dialect: str = "cpu") -> ir.Model:
        return Quantizer(dialect, self.folded, self.table, method="mse", remainder="fp32").quantized().model

    def half(self, ranges: dict[str, Range] | None = None) -> ir.Model:
        return cast_fp16(self.folded, ranges or self.table.ranges("minmax")).model

    def source(self) -> Hop:
        activations = TorchActivations(self.module, self.exported, IMAGES)
        infer = torch_reference(self.module)
        return Hop("PyTorch", "source", infer, activations=activations, tensors=activations.tensors)


@pytest.fixture(scope="module")
def chain() -> Chain:
    module = network()
    exported = ir.from_proto(onnx.load_from_string(export_onnx(module, (3, SIDE, SIDE))))
    folded = fold_batchnorm(exported).model
    return Chain(module, exported, folded, collect(folded, [IMAGES[:64]], identity={}, threads=1))


def hop(name: str, kind: Kind, graph: ir.Model, **more: Any) -> Hop:
    return Hop(name, kind, functools.partial(logits_of, graph, threads=1), graph=graph, **more)


def half_hop(graph: ir.Model) -> Hop:
    return hop("half", "fp16", simulate_fp16(graph))


def int8_hop(chain: Chain, graph: ir.Model) -> Hop:
    runnable = signed_to_unsigned(simulate_fp16(graph))
    return hop("int8", "int8", runnable, before="folded", quantized=graph, histograms=chain.table.histograms)


def engine_hop(graph: ir.Model, seen: Callable[[Batch], Batch] = lambda images: images) -> Hop:
    """Stands for an engine: it answers, and its activations cannot be read."""
    return Hop("engine", "engine", lambda images: logits_of(graph, seen(images), threads=1))


def judged(hops: Sequence[Hop]) -> Blame:
    return blame(hops, IMAGES, threads=1)


def only_culprit(found: Blame) -> tuple[str, str]:
    """The guilty hop and its layer; fails if there are several."""
    (step,) = found.guilty
    assert step.origin is not None, step.note
    return step.hop, step.origin.layer


def edited(model: ir.Model, operator: str, number: int, edit: Callable[[ir.Node], None]) -> tuple[ir.Model, str]:
    """A copy in which the node `number` of that operator is edited, and its name."""
    changed = ir.from_proto(ir.to_proto(model))
    node = [node for node in changed.graph if node.op_type == operator][number]
    edit(node)
    return changed, str(node.name)


def scaled(index: int, factor: float) -> Callable[[ir.Node], None]:
    """Multiplies the constant input `index`."""

    def edit(node: ir.Node) -> None:
        value = node.inputs[index]
        assert value is not None
        tensor = constant_tensor(value)
        assert tensor is not None
        value.const_value = ir.tensor(np.asarray(tensor.numpy() * factor, tensor.numpy().dtype), name=value.name)

    return edit


def transposed(node: ir.Node) -> None:
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    weight = value.const_value.numpy()
    assert weight.shape[0] == weight.shape[1], "the shape must not tell"
    value.const_value = ir.tensor(np.ascontiguousarray(weight.swapaxes(0, 1)), name=value.name)


# Nobody


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_a_healthy_chain_blames_nobody(chain: Chain, dialect: str) -> None:
    quantized = chain.quantized(dialect)
    found = judged(
        [
            chain.source(),
            hop("exported", "exact", chain.exported),
            hop("folded", "exact", chain.folded),
            half_hop(chain.half()),
            int8_hop(chain, quantized),
            engine_hop(signed_to_unsigned(quantized)),
        ]
    )
    assert found.guilty == ()
    assert [step.before for step in found.steps] == ["PyTorch", "exported", "folded", "folded", "int8"]
    exact = [step.parity.sqnr_db for step in found.steps[:2] if step.parity is not None]
    assert min(value or 0.0 for value in exact) > 100
    assert blame_lines(found, [])[-1].startswith("nobody is to blame")


# One fault a hop


@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_epsilon_in_the_exported_graph(chain: Chain, number: int) -> None:
    def edit(node: ir.Node) -> None:
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)

    exported, name = edited(chain.exported, "BatchNormalization", number, edit)
    folded = fold_batchnorm(exported).model
    found = judged([chain.source(), hop("exported", "exact", exported), hop("folded", "exact", folded)])
    assert only_culprit(found) == ("exported", name)
    assert name == ("1/BatchNormalization", "4/BatchNormalization")[number]


@pytest.mark.parametrize(("operator", "number"), [("Gemm", 1), ("Conv", 1)])
def test_a_transposed_weight_in_the_folded_graph(chain: Chain, operator: str, number: int) -> None:
    folded, name = edited(chain.folded, operator, number, transposed)
    found = judged([chain.source(), hop("exported", "exact", chain.exported), hop("folded", "exact", folded)])
    assert only_culprit(found) == ("folded", name)


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_wrong_scale_of_an_activation(chain: Chain, dialect: str, number: int) -> None:
    """Of the pair in front of a layer: QuantizeLinear and DequantizeLinear share it."""
    quantized, _ = edited(chain.quantized(dialect), "QuantizeLinear", number, scaled(1, 4.0))
    readers = [node for node in quantized.graph if node.op_type == "QuantizeLinear"][number].outputs[0].consumers()
    found = judged([hop("folded", "exact", chain.folded), int8_hop(chain, quantized)])
    (step,) = found.guilty
    assert step.hop == "int8"
    assert step.origin is not None
    assert step.origin.layer in {reader.name for node in readers for reader in node.outputs[0].consumers()}
    assert step.origin.tensor == str(readers[0].name).removesuffix("::dequantize")
    assert re.search(r"is [3-7](\.\d)? times the best", step.origin.what), "four, but for what the best range is here"


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_a_wrong_scale_of_a_weight(chain: Chain, factor: float) -> None:
    graph = chain.quantized()
    weights = [node for node in graph.graph if node.op_type == "DequantizeLinear" and constant_tensor(node.inputs[0])]
    reader = weights[1].outputs[0].consumers()[0].name
    position = [node for node in graph.graph if node.op_type == "DequantizeLinear"].index(weights[1])
    quantized, _ = edited(graph, "DequantizeLinear", position, scaled(1, factor))
    found = judged([hop("folded", "exact", chain.folded), int8_hop(chain, quantized)])
    assert only_culprit(found) == ("int8", reader)


def test_a_broken_bias_is_found_though_all_scales_are_right(chain: Chain) -> None:
    quantized, name = edited(chain.quantized(), "Conv", 1, scaled(2, -4.0))
    assert only_culprit(judged([hop("folded", "exact", chain.folded), int8_hop(chain, quantized)])) == ("int8", name)


def enlarged(node: ir.Node) -> None:
    for index in (1, 2):
        scaled(index, 1e5)(node)


def test_an_overflow_in_fp16(chain: Chain) -> None:
    """The second convolution gives values 1e5 times too large, and the next layer takes some of it back."""
    large, name = edited(chain.folded, "Conv", 1, enlarged)
    large, _ = edited(large, "Gemm", 0, scaled(1, 1e-3))
    lies = {tensor: Range(-1.0, 1.0) for tensor in values_by_name(large)}
    found = judged([hop("folded", "exact", large), half_hop(cast_fp16(large, lies).model)])
    (step,) = found.guilty
    assert step.hop == "half"
    assert step.origin is not None
    assert step.origin.layer == name
    assert "65504" in step.origin.what
    assert not judged([hop("folded", "exact", large), half_hop(cast_fp16(large, _extremes(large)).model)]).guilty


def _extremes(model: ir.Model) -> dict[str, Range]:
    return collect(model, [IMAGES[:64]], identity={}, threads=1).ranges("minmax")


@pytest.mark.parametrize("kind", ["engine", "exact"])
def test_swapped_channels(chain: Chain, kind: str) -> None:
    def swap(images: Batch) -> Batch:
        return np.ascontiguousarray(images[:, ::-1])

    quantized = chain.quantized()
    hops = {
        "engine": [int8_hop(chain, quantized), engine_hop(quantized, swap)],
        "exact": [replace(hop("engine", "exact", chain.folded), run=lambda x: logits_of(chain.folded, swap(x)))],
    }[kind]
    found = judged([hop("folded", "exact", chain.folded), *hops])
    assert only_culprit(found) == ("engine", "input")
    assert "BGR" in blame_lines(found, [])[0]


# What is more than one fault, or none that a layer has


def test_an_engine_that_is_wrong_otherwise_is_guilty_without_a_layer(chain: Chain) -> None:
    quantized = chain.quantized()
    found = judged(
        [
            hop("folded", "exact", chain.folded),
            int8_hop(chain, quantized),
            engine_hop(quantized, lambda images: images * 0.1),
        ]
    )
    (step,) = found.guilty
    assert (step.hop, step.origin) == ("engine", None)
    assert "cannot be read" in step.note


@pytest.mark.parametrize("wrong", [True, False])
def test_a_graph_that_was_rescaled_is_judged_by_its_logits_alone(chain: Chain, wrong: bool) -> None:
    """Its scales are others by right."""
    quantized, _ = edited(chain.quantized(), "QuantizeLinear", 1, scaled(1, 4.0))
    if wrong:
        quantized, _ = edited(quantized, "Conv", 1, scaled(2, -4.0))
    rescaled = replace(int8_hop(chain, quantized), incomparable="its weights were equalized")
    (step,) = judged([hop("folded", "exact", chain.folded), rescaled]).steps
    assert (step.guilty, step.origin) == (wrong, None)
    assert step.note.startswith("its weights were equalized") == wrong


def test_of_two_guilty_hops_the_one_that_costs_more_images_goes_first(chain: Chain) -> None:
    def edit(node: ir.Node) -> None:
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)

    exported, _ = edited(chain.exported, "BatchNormalization", 0, edit)
    broken, name = edited(fold_batchnorm(exported).model, "Gemm", 1, transposed)
    found = judged([chain.source(), hop("exported", "exact", exported), hop("folded", "exact", broken)])
    assert [step.hop for step in found.guilty] == ["folded", "exported"]
    assert found.guilty[0].origin is not None
    assert found.guilty[0].origin.layer == name


def test_what_follows_a_hop_without_finite_logits_is_not_judged(chain: Chain) -> None:
    nothing = Hop("nothing", "fp16", lambda images: np.full((len(images), CLASSES), np.nan, np.float32))
    after = replace(hop("after", "exact", chain.folded), before="nothing")
    found = judged([hop("folded", "exact", chain.folded), nothing, after])
    assert [step.hop for step in found.guilty] == ["nothing"]
    assert (found.steps[1].parity, found.steps[1].guilty) == (None, False)
    assert "no finite logits" in found.steps[1].note


def test_a_source_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ParityError, match="NaN"):
        judged([Hop("source", "source", lambda images: np.full((len(images), 2), np.nan, np.float32))])


# PyTorch's activations


def test_activations_of_pytorch_are_those_of_the_modules(chain: Chain) -> None:
    activations = TorchActivations(chain.module, chain.exported, IMAGES)
    named = {"1/BatchNormalization": 1, "2/Relu": 2, "4/BatchNormalization": 4}
    assert named.keys() <= set(activations.tensors)
    found = activations(list(named))(IMAGES[:3])
    for name, index in named.items():
        with torch.inference_mode():
            expected = copy.deepcopy(chain.module)[: index + 1](torch.from_numpy(IMAGES[:3])).numpy()  # type: ignore[index]
        np.testing.assert_array_equal(found[name], expected)


def test_a_module_that_is_called_twice_is_left_out() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Linear(3 * SIDE * SIDE, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.relu(self.conv(self.relu(images))).flatten(1))
            return logits

    module = Twice().eval()
    exported = ir.from_proto(onnx.load_from_string(export_onnx(module, (3, SIDE, SIDE))))
    tensors = TorchActivations(module, exported, IMAGES).tensors
    assert any("conv" in name for name in tensors)
    assert not any("relu" in name for name in tensors)


# Report


def test_the_document_and_the_table_say_the_same(chain: Chain) -> None:
    folded, name = edited(chain.folded, "Gemm", 1, transposed)
    found = judged([hop("exported", "exact", chain.exported), hop("folded", "exact", folded)])
    document = blame_document(found, "net", "cpu", ["a note"])
    assert document["guilty"] == ["folded"]
    assert document["hops"][0]["origin"]["layer"] == name
    assert blame_table(found).row_count == 1
    lines = blame_lines(found, ["a note"])
    assert lines[0] == "note: a note"
    assert name in lines[1]
    assert lines[-1].startswith("folded loses the accuracy")
