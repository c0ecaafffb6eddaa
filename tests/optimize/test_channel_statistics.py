"""Statistics of channels, against numpy on the activations themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgewright.optimize.channel_statistics import channel_statistics
from edgewright.optimize.segments import LARGEST_BATCH, GraphRun
from textual_graphs import graph, normal

BODY = "[c] a = Conv (x, w) [r] r = Relu (a) [p] p = GlobalAveragePool (r) [f] f = Flatten (p) [g] y = Gemm (f, v)"
REDUCTIONS: Mapping[str, Callable[..., Any]] = {"ReduceMean": np.mean, "ReduceMin": np.min, "ReduceMax": np.max}
NAMES = ("a", "r", "p", "f", "y")


@pytest.mark.parametrize("operator", REDUCTIONS)
def test_one_number_for_each_image_and_channel(operator: str) -> None:
    model = graph(BODY, "float[N, 3, 8, 8] x", "float[N, M] y", w=(6, 3, 3, 3), v=(6, 5))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    x = normal("x", 2 * LARGEST_BATCH + 3, 3, 8, 8)
    found = channel_statistics(model, NAMES, x, operator, threads=1)
    activations = GraphRun(model, outputs=NAMES, threads=1).all({"x": x})
    assert tuple(found) == NAMES
    for name in NAMES:
        array: NDArray[Any] = activations[name]
        places = tuple(range(2, array.ndim))
        expected = REDUCTIONS[operator](array, axis=places) if places else array
        assert found[name].shape == (len(x), array.shape[1])
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
