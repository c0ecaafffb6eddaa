"""A graph that is quantized already: refused with a count, or taken as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgewright.calibration.collect import collect
from edgewright.export.from_onnx import import_onnx, onnx_source, reference_of
from edgewright.export.onnx_header import quantized_operators
from edgewright.export.onnx_session import cpu_session
from edgewright.export.resolve import ModelRequest
from edgewright.optimize.already_quantized import nvidia_refusal
from edgewright.optimize.dialects import quantized_graph
from edgewright.runtime.errors import ModelError
from textual_graphs import graph, model_of, normal

SHAPE = (3, 8, 8)


def plain() -> ir.Model:
    body = """[c] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [r] p = Relu (a) [c2] e = Conv (p, v)
    [g] g = GlobalAveragePool (e) [f] h = Flatten (g) [head] y = Gemm <transB = 1> (h, u, z)"""
    shapes: dict[str, Any] = {"w": (16, 3, 3, 3), "b": (16,), "v": (16, 16, 3, 3), "u": (4, 16), "z": (4,)}
    return graph(body, "float[N, 3, 8, 8] x", "float[N, 4] y", **shapes)


def quantized(dialect: str) -> ir.Model:
    model = plain()
    table = collect(model, [normal("images", 4, *SHAPE)], identity={}, threads=1)
    return quantized_graph(dialect, model, table, remainder="fp32").model


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_a_quantized_graph_is_refused_or_taken_as_it_is(dialect: str, tmp_path: Path) -> None:
    proto = ir.to_proto(quantized(dialect))
    onnx.save(proto, path := tmp_path / "q.onnx")
    counts = Counter(node.op_type for node in proto.graph.node)
    with pytest.raises(
        ModelError, match=r"quantized already: it holds .*; give the float graph, or --already"
    ) as caught:
        onnx_source(ModelRequest(str(path)))
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        assert f"{counts[operator]} {operator}" in caught.value.message
    for read in (lambda: import_onnx(path, SHAPE, opset=19), lambda: reference_of(path)):
        with pytest.raises(ModelError, match="quantized already"):
            read()
    source = onnx_source(ModelRequest(str(path), already_quantized="pass"))
    assert source.quantized
    content = import_onnx(path, SHAPE, opset=19, fingerprint=source.fingerprint, quantized=True)
    assert Counter(node.op_type for node in onnx.load_from_string(content).graph.node) == counts
    images = normal("others", 3, *SHAPE)
    (found,) = cpu_session(content, "it").run(None, {"images": images})
    np.testing.assert_allclose(found, reference_of(path, quantized=True)(images), rtol=1e-5, atol=1e-5)


def test_a_float_graph_is_the_same_with_either_option(tmp_path: Path) -> None:
    onnx.save(ir.to_proto(plain()), path := tmp_path / "f.onnx")
    assert not onnx_source(ModelRequest(str(path))).quantized
    assert not onnx_source(ModelRequest(str(path), already_quantized="pass")).quantized


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (
            "q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z)",
            {"DynamicQuantizeLinear": 1, "DequantizeLinear": 1},
        ),
        ("i = Cast <to = 2> (x) c = ConvInteger (i, w) y = Cast <to = 1> (c)", {"ConvInteger": 1}),
        ("y = Relu (x)", {}),
    ],
)
def test_every_kind_of_integer_operator_is_counted(body: str, found: dict[str, int]) -> None:
    weights = {"w": np.ones((2, 3, 1, 1), np.uint8)} if "w)" in body else {}
    assert quantized_operators(model_of(body, "float[N, 3, 8, 8] x", "float[N, C, H, L] y", **weights)) == found


def test_nvidia_reads_its_own_dialect_and_not_that_of_the_cpu() -> None:
    assert nvidia_refusal("tensorrt", quantized("tensorrt")) == ""
    assert "zero-point" in nvidia_refusal("tensorrt", quantized("cpu"))
    assert "zero-point" in nvidia_refusal("rtx", quantized("cpu"))
