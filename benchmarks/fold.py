"""Seconds to fold 10, 100 and 1,000 blocks, and to export and fold two large networks as the pipeline's stages do.

The blocks are a convolution, batch normalization and ReLU each; folding is to take the same time for each of them,
however many there are. Sizes take turns and the fastest round counts, since whatever else runs only adds to it. Each
network is exported in a fresh interpreter, with every check: outputs equal to PyTorch's, and to those before folding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from figures import Figure, run_python

from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.passes import run_passes
from edgewright.optimize.recognize_batchnorm import recognize_batchnorm

BLOCKS = (10, 100, 1000)
CHANNELS = 16
ROUNDS = 7
PASSES = (recognize_batchnorm, fold_batchnorm)
NETWORKS = {"resnet50": 15.0, "densenet201": 45.0}
CODE = """
import os, sys, time
import numpy as np, onnx, onnx_ir as ir, torch, torchvision
from edgewright.export.conventions import INPUT_NAME
from edgewright.export.to_onnx import export_onnx
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.passes import run_passes
from edgewright.optimize.recognize_batchnorm import recognize_batchnorm
from edgewright.optimize.verify import check_equivalent
torch.manual_seed(0)
network = torchvision.models.get_model(sys.argv[1], weights=None)
began, before = time.perf_counter(), sum(os.times()[:2])
model = ir.from_proto(onnx.load_from_string(export_onnx(network, (3, 224, 224))))
folded = ir.to_proto(run_passes(model, (recognize_batchnorm, fold_batchnorm)).model)
images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
check_equivalent(ir.to_proto(model), folded, feeds={INPUT_NAME: images})
print(time.perf_counter() - began, sum(os.times()[:2]) - before)
"""


def measure() -> Iterator[Figure]:
    """Milliseconds for each block, their ratio, and wall seconds for each network."""
    models = {count: _blocks(count) for count in BLOCKS}
    seconds = {count: float("inf") for count in BLOCKS}
    for _ in range(ROUNDS):
        for count, model in models.items():
            seconds[count] = min(seconds[count], _seconds(model, count))
    for count in BLOCKS:
        yield Figure(f"recognize and fold, {count} blocks, each", seconds[count] / count * 1e3, "ms")
    ratio = seconds[1000] / 1000 / (seconds[100] / 100)
    yield Figure("one of 1,000 blocks against one of 100", ratio, "", bound=2.0, note="10 if the passes were quadratic")
    for network, bound in NETWORKS.items():
        wall, processor = map(float, run_python(CODE, network).split())
        yield Figure(f"export and fold {network}", wall, "s", bound=bound, note=f"{processor:.1f} s of processor time")


def _seconds(model: ir.Model, count: int) -> float:
    began = time.perf_counter()
    result = run_passes(model, PASSES)
    elapsed = time.perf_counter() - began
    assert result.changed == count
    return elapsed


def _blocks(count: int) -> ir.Model:
    """`count` convolutions of 16 channels, each with its batch normalization and ReLU."""
    rng = np.random.default_rng(0)
    value = images = ir.val("images", ir.DataType.FLOAT, ["N", CHANNELS, 8, 8])
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []

    def constant(*shape: int) -> ir.Value:
        name = f"constant_{len(constants)}"
        array = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        constants.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return constants[-1]

    for index in range(count):
        weight = constant(CHANNELS, CHANNELS, 1, 1)
        statistics = [constant(CHANNELS) for _ in range(4)]
        for operator, inputs in (("Conv", [weight]), ("BatchNormalization", statistics), ("Relu", [])):
            node = ir.node(operator, [value, *inputs], name=f"{index}/{operator}")
            (value,) = node.outputs
            value.name = node.name
            nodes.append(node)
    graph = ir.Graph([images], [value], nodes=nodes, initializers=constants, opset_imports={"": 19})
    return ir.Model(graph, ir_version=10)
