"""Export through torch.onnx: networks that are refused, what the check of a graph notices, and what is left behind."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewright.export import to_onnx as module
from edgewright.export.to_onnx import export_onnx
from edgewright.runtime.errors import ExportError
from small_networks import (
    SHAPE,
    TOLERANCE,
    Net,
    conv_net,
    difference,
    disturbed,
    head,
    refused,
)

OLD_EXPORTER = torch.__version__ < "2.7"  # a TorchVersion, which compares as versions do


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return conv_net()


@pytest.fixture(scope="module")
def content(net: nn.Module) -> bytes:
    return export_onnx(net, SHAPE)


# Refused


def pooled(parts: nn.ModuleList, x: Tensor) -> Any:
    return parts[0](x.mean((2, 3)))


def control_flow(parts: nn.ModuleList, x: Tensor) -> Any:
    return pooled(parts, x) if x.sum() > 0 else -pooled(parts, x)


def raising(parts: nn.ModuleList, x: Tensor) -> Any:
    raise KeyError("my own\nmistake")


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (control_flow, "could not export Net: .*data-dependent.*control flow"),
        (raising, "cannot run a batch of 1: .*my own"),
        (lambda parts, x: (pooled(parts, x), x), "returns a tuple of 2, expected one tensor of logits"),
        (lambda parts, x: (pooled(parts, x),), "returns a tuple of 1, expected one tensor of logits"),
        (lambda parts, x: {"logits": pooled(parts, x)}, "returns a dict of 1, expected one tensor of logits"),
        (lambda parts, x: pooled(parts, x).view(2, 5), r"cannot run a batch of 1: .*invalid for input of size 5"),
        (lambda parts, x: pooled(parts, x).sum(0)[None].expand(2, 5), r"shape \[2, 5\], expected \[batch, classes\]"),
        (lambda parts, x: pooled(parts, x).reshape(-1, 10), "cannot run a batch of 1: RuntimeError: shape"),
        (lambda parts, x: x.mean((1, 2, 3)), r"shape \['batch'\], expected \[batch, classes\]"),
        (lambda parts, x: pooled(parts, x).double(), "of type DOUBLE, expected FLOAT"),
        (lambda parts, x: pooled(parts, x) + torch.rand_like(x[:, :1, 0, 0]), r"differs from PyTorch by 0\.\d+ of"),
        (lambda parts, x: (-pooled(parts, x).abs()).sqrt(), "differs from PyTorch by nan"),
    ],
    ids=[
        "control flow", "raising", "tuple", "tuple of one", "dict", "fixed batch", "mixed batch", "pairs",
        "no classes", "double", "random", "nan",
    ],
)  # fmt: skip
def test_models_that_are_refused(
    function: Callable[[nn.ModuleList, Tensor], Any], match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(disturbed(Net(function, nn.Linear(3, 5))), "." if OLD_EXPORTER else match)  # it refuses them in other words
    assert capfd.readouterr() == ("", "")


def test_a_model_for_other_images_is_refused() -> None:
    refused(disturbed(nn.Sequential(nn.Conv2d(1, 4, 3), head(4))), "cannot run a batch of 1: .*channels")


def test_half_precision_weights_are_refused() -> None:
    refused(disturbed(nn.Sequential(nn.Conv2d(3, 4, 3), head(4))).half(), "cannot run a batch of 1: .*type")


def test_a_padded_pooling_that_onnxruntime_computes_wrongly_is_refused() -> None:
    """onnxruntime makes the zeros pads of MaxPool, which are minus infinity; its engine would be wrong as well."""
    model = Net(lambda parts, x: parts[0](functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, 2) - 1), head(3))
    try:
        content = export_onnx(disturbed(model), SHAPE)
    except ExportError as error:
        differs = "differs from PyTorch" in error.message
    else:
        differs = difference(content, model) > TOLERANCE  # a version that has mended it must be right
        assert not differs
        return
    assert differs


# The check of what is returned can fail


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Callable[[Callable[[ir.Model], None]], None]:
    """Damages the graph where it is cleaned, without the exporter's second for each case."""

    def changing(damage: Callable[[ir.Model], None]) -> None:
        monkeypatch.setattr(module, "_exported", lambda *args: ir.from_proto(onnx.load_from_string(content)))
        monkeypatch.setattr(module, "canonicalize", damage)

    return changing


Change = Callable[[Callable[[ir.Model], None]], None]


def test_an_undamaged_graph_passes(net: nn.Module, change: Change, content: bytes) -> None:
    change(lambda model: None)
    assert export_onnx(net, SHAPE) == content


@pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf"), 0.0])
def test_a_corrupted_weight_is_caught(net: nn.Module, change: Change, factor: float) -> None:
    def corrupt(model: ir.Model) -> None:
        value = model.graph.initializers["1.2.weight"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)

    change(corrupt)
    refused(net, "differs from PyTorch by")


def test_a_fixed_batch_behind_a_dynamic_name_is_caught(
    net: nn.Module, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fix(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.numpy().tolist() == [0, 6]:
                value.const_value = ir.tensor(np.array([1, 6], np.int64), name=value.name)

    change(fix)
    monkeypatch.setattr(module, "_check_structure", lambda proto: None)
    refused(net, "onnxruntime cannot run the exported graph at batch 5")


def test_an_invalid_graph_is_caught(net: nn.Module, change: Change) -> None:
    def damage(model: ir.Model) -> None:
        model.graph[0].op_type = "Convolution"

    change(damage)
    refused(net, "not valid ONNX: .*Convolution")


def test_another_opset_than_asked_for_is_caught(
    net: nn.Module, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exporters do that lack a converter."""
    proto = onnx.load_from_string(content)
    proto.opset_import[0].version = 18
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: SimpleNamespace(model=ir.from_proto(proto)))
    refused(net, "wrote opset 18 instead of 19")


def test_an_exporter_that_returns_nothing_is_caught(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: None)
    refused(net, "returned nothing")


# What it leaves behind


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_logging_warnings_and_streams_are_as_before(
    error: type[BaseException] | None, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (sys.stdout, sys.stderr, warnings.filters[:], logging.root.manager.disable)
    with contextlib.suppress(ValueError, KeyboardInterrupt), module._quiet():
        print("a page")
        print("another", file=sys.stderr)
        warnings.warn("deprecated", stacklevel=1)
        logging.getLogger("torch._dynamo").critical("a third")
        if error is not None:
            raise error
    assert (sys.stdout, sys.stderr, warnings.filters[:], logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


def test_the_model_is_not_changed(net: nn.Module) -> None:
    fresh = conv_net().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
