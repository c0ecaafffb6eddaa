"""What each kernel takes, as the backends time it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from edgewright.optimize.work import planned_layers
from edgewright.runtime.backends import BACKENDS, BuildRequest
from edgewright.runtime.errors import EngineError
from textual_graphs import model_of, normal

NET = """[small] a = Conv <pads = [1, 1, 1, 1]> (x, w) [relu] r = Relu (a)
[large] b = Conv <pads = [1, 1, 1, 1]> (r, v) [silu] s = Sigmoid (b) [product] y = Mul (b, s)"""


@pytest.fixture(scope="module")
def graph() -> bytes:
    weights = {"w": normal("w", 64, 3, 3, 3), "v": normal("v", 256, 64, 3, 3)}
    content: bytes = model_of(NET, "float[N, 3, 32, 32] x", "float[N, C, H, L] y", **weights).SerializeToString()
    return content


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_kernels_come_in_their_order_and_the_larger_layer_takes_longer(name: str, graph: bytes) -> None:
    backend = BACKENDS[name]
    if backend.absence() is not None:
        pytest.skip(f"{name} is not installed")
    planned = planned_layers(ir.from_proto(onnx.load_from_string(graph)))
    compiled = backend.build(BuildRequest(graph, "fp32", planned)).compiled
    times = backend.kernel_times(compiled.engine, planned, threads=1, runs=9)
    assert [timed.kernel.name for timed in times] == [kernel.name for kernel in compiled.kernels]
    taken = {timed.kernel.sources: timed.milliseconds for timed in times if timed.kernel.computes}
    assert list(taken) == [("small",), ("large",)]
    assert taken["large",] > 2 * taken["small",] > 0  # 85 times the work
    assert all(0 <= timed.milliseconds < 1e3 for timed in times)
    with pytest.raises(EngineError, match="load"):
        backend.kernel_times(b"no engine", planned, threads=1, runs=1)


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_where_no_kernel_can_be_timed_there_is_none(name: str) -> None:
    assert BACKENDS[name].kernel_times(b"", (), threads=1, runs=1) == ()
