"""Fine-tuning through fake quantization: what it recovers, what stays, and that what is written was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from edgewright.calibration.collect import collect
from edgewright.export.to_onnx import export_onnx
from edgewright.learned.fake_quantization import fake_quantized
from edgewright.learned.finetune import FinetuneSettings, LabelledBatch, finetuned
from edgewright.learned.graph_module import GraphModule
from edgewright.optimize.dialects import DIALECTS, Quantizer
from edgewright.optimize.fold_batchnorm import fold_batchnorm
from edgewright.optimize.qdq import weight_s8
from edgewright.optimize.repairs import Repairs
from edgewright.optimize.segments import logits_of
from edgewright.runtime.errors import DataError, QuantizationError
from edgewright.runtime.parity import Parity, compare
from textual_graphs import graph, normal
from tiny_modules import TinyNetwork, randomize

Array = NDArray[Any]

SHAPE = (3, 12, 12)
CLASSES = 6
STEPS = FinetuneSettings(steps=60, learning_rate=0.2, threads=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(count: int, seed: int) -> Array:
    """Noise around a random colour."""
    generator = np.random.default_rng(seed)
    colours = generator.normal(size=(count, 3, 1, 1))
    return (colours + generator.normal(size=(count, *SHAPE)) / 2).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """Folded; its channels are of very different sizes, which one scale for a weight cannot serve."""
    network = TinyNetwork(3, CLASSES, 16, linear=True)
    randomize(network, 4)
    with torch.no_grad():
        last = [module for module in network.features if isinstance(module, torch.nn.BatchNorm2d)][-1]
        last.weight.mul_(torch.logspace(-1.5, 1.5, 32))
    return fold_batchnorm(ir.from_proto(onnx.load_from_string(export_onnx(network.eval(), SHAPE)))).model


@pytest.fixture(scope="module")
def quantizer(model: ir.Model) -> Quantizer:
    """With ranges far too wide: a hundred times the largest value that is usual."""
    images = pictures(32, 1)
    images[0] *= 12
    return Quantizer("cpu", model, collect(model, [images], identity={}), method="minmax")


def unlabelled(size: int = 16) -> Callable[[int], Iterator[LabelledBatch]]:
    return lambda number: ((pictures(size, 100 * number + index), None) for index in range(20))


def again(quantizer: Quantizer, trained: ir.Model) -> Quantizer:
    """The quantizer of another graph of the same form, as the ladder makes it."""
    return Quantizer(quantizer.dialect, trained, quantizer.table, method=quantizer.method)


def judged(reference: ir.Model, quantizer: Quantizer) -> Parity:
    images = pictures(200, 2)
    expected = logits_of(reference, images, threads=1)
    return compare(expected, logits_of(quantizer.runnable(), images, threads=1), None)


def constants(model: ir.Model) -> dict[str, Array]:
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def test_a_network_that_lost_a_lot_comes_closer_to_its_teacher(model: ir.Model, quantizer: Quantizer) -> None:
    losses: list[float] = []
    before = {name: array.copy() for name, array in constants(model).items()}
    trained = finetuned(
        model, quantizer, unlabelled(), settings=STEPS, progress=lambda done, total, loss: losses.append(loss)
    )
    assert len(losses) == STEPS.steps
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    plain, tuned = judged(model, quantizer), judged(model, again(quantizer, trained))
    assert plain.sqnr_db is not None
    assert tuned.sqnr_db is not None
    assert tuned.sqnr_db > plain.sqnr_db + 3
    assert tuned.agreement >= plain.agreement
    after = constants(trained)
    assert {name: array.shape for name, array in after.items()} == {n: array.shape for n, array in before.items()}
    assert all(np.array_equal(array, before[name]) for name, array in constants(model).items())
    layers = [node for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    read = {value.name for node in layers for value in node.inputs[1:3] if value is not None}
    changed = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    assert changed == read & set(before)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_trained_is_what_is_written(model: ir.Model, quantizer: Quantizer, dialect: str) -> None:
    """The activations keep their scales, and those of the weights are the ones the student had."""
    quantizer = Quantizer(dialect, model, quantizer.table, method=quantizer.method)
    trained = finetuned(model, quantizer, unlabelled(), settings=replace(STEPS, steps=5))
    student, weights = fake_quantized(quantizer.runnable(), model)
    module = GraphModule(student, [weight.weight for weight in weights])
    with torch.no_grad():
        for name, array in constants(trained).items():
            module.constant(name).copy_(torch.from_numpy(np.array(array)))
    for weight in weights:
        weight.rescale(module)
    x = pictures(16, 5)
    written = again(quantizer, trained).runnable()
    old, new = constants(quantizer.runnable()), constants(written)
    moved = {name for name in old if name.endswith("::scale") and not np.array_equal(old[name], new[name])}
    assert moved == {weight.scale for weight in weights}
    with torch.no_grad():
        found = module(torch.from_numpy(x)).numpy()
    expected = logits_of(written, x, threads=1)
    assert np.median(np.abs(found - expected)) < 1e-4 * np.abs(expected).max()


def test_scales_follow_the_weights_as_the_quantizer_has_them() -> None:
    weight = normal("w", 4, 3, 1, 1)
    weight[1] = 0.0
    weight[2] *= 1e-9  # with a bias that needs room: its scale has a floor
    reference = graph(
        "[layer] y = Conv (x, w, b)",
        "float[N, 3, 4, 4] x",
        "float[N, 4, 4, 4] y",
        w=weight,
        b=np.array([0, 1, 1e3, 0], np.float32),
    )
    table = collect(reference, [normal("x", 4, 3, 4, 4)], identity={})
    quantized = Quantizer("cpu", reference, table).runnable()
    trained, (entry,) = fake_quantized(quantized, reference)
    module = GraphModule(trained, [entry.weight])
    first = module.constant(entry.scale).clone()
    entry.rescale(module)
    assert torch.equal(module.constant(entry.scale), first)
    assert first[1] == 1.0
    assert first[2] > 1e-6
    with torch.no_grad():
        module.constant(entry.weight).mul_(torch.tensor([3.0, 1.0, 1.0, 0.1]).reshape(4, 1, 1, 1))
    entry.rescale(module)
    expected = weight_s8(module.constant(entry.weight).detach().numpy(), 0).scale
    found = module.constant(entry.scale).numpy()
    np.testing.assert_allclose(found[[0, 3]], expected[[0, 3]], rtol=1e-6)
    assert torch.equal(module.constant(entry.scale)[1:3], first[1:3])


def test_labels_have_their_share(model: ir.Model, quantizer: Quantizer) -> None:
    """Wrong labels for everything are learned only where they count."""

    def mislabelled(number: int) -> Iterator[LabelledBatch]:
        for index in range(20):
            yield pictures(16, 100 * number + index), np.full(16, 2, np.int64)

    shares = []
    for label_share in (0.0, 1.0):
        settings = replace(STEPS, label_share=label_share, learning_rate=0.5)
        trained = finetuned(model, quantizer, mislabelled, settings=settings)
        shares.append((logits_of(trained, pictures(200, 2), threads=1).argmax(1) == 2).mean())
    assert shares[1] > shares[0] + 0.3


def test_the_same_batches_give_the_same_weights(model: ir.Model, quantizer: Quantizer) -> None:
    short = replace(STEPS, steps=4)
    first, second, other = (
        constants(finetuned(model, quantizer, batches, settings=short))
        for batches in (unlabelled(), unlabelled(), unlabelled(8))
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_layers_that_stay_float_learn_too(model: ir.Model, quantizer: Quantizer) -> None:
    left_out = {quantizer.layers[1]: "for the test"}
    short = replace(STEPS, steps=4)
    trained = constants(finetuned(model, quantizer, unlabelled(), settings=short, left_out=left_out))
    (node,) = (node for node in model.graph if node.name == quantizer.layers[1])
    weight = node.inputs[1]
    assert weight is not None
    assert not np.array_equal(trained[str(weight.name)], constants(model)[str(weight.name)])


def test_the_training_starts_from_the_repairs_of_the_layers_that_are_int8(
    model: ir.Model, quantizer: Quantizer
) -> None:
    """A learning rate of 0 leaves what the repaired quantizer writes, with no repairs beside it."""
    generator = np.random.default_rng(3)
    first, second = quantizer.layers[1:3]
    nearest = {node.name: array for node, array in int8_weights(quantizer.runnable())}
    moved = nearest[first] + generator.integers(-1, 2, nearest[first].shape) * (np.abs(nearest[first]) < 126)
    shifts = {layer: np.full(len(nearest[layer]), 0.5, np.float32) for layer in (first, second)}
    repaired = quantizer.repaired(Repairs(bias_shifts=shifts, integers={first: moved.astype(np.int8)}))
    left_out = {second: "for the test"}
    still = replace(STEPS, steps=1, learning_rate=0.0)
    trained = finetuned(model, repaired, unlabelled(), settings=still, left_out=left_out)
    images = pictures(50, 2)
    expected = logits_of(repaired.runnable(left_out), images, threads=1)
    found = logits_of(again(quantizer, trained).runnable(left_out), images, threads=1)
    unrepaired = logits_of(quantizer.runnable(left_out), images, threads=1)
    assert (compare(expected, unrepaired, None).sqnr_db or 0) < 25
    assert (compare(expected, found, None).sqnr_db or 0) > 60
    after = {node.name: array for node, array in int8_weights(again(quantizer, trained).runnable())}
    assert np.array_equal(after[first], moved)
    assert np.array_equal(after[second], nearest[second])


def test_large_and_small_channels_move_by_as_many_quantization_steps(model: ir.Model, quantizer: Quantizer) -> None:
    short = replace(STEPS, steps=10)
    before, after = constants(model), constants(finetuned(model, quantizer, unlabelled(), settings=short))
    name = max((name for name in before if before[name].ndim == 4), key=lambda name: spread(before[name]))
    assert spread(before[name]) > 100
    moved = np.abs(after[name] - before[name]).max((1, 2, 3))
    in_steps = moved / weight_s8(before[name], 0).scale
    assert moved.max() > 100 * moved.min()
    assert short.learning_rate < in_steps.min() <= in_steps.max() < short.steps * short.learning_rate


def spread(weight: Array) -> float:
    """How many times as large as the smallest of its output channels the largest is."""
    largest = np.abs(weight).max((1, 2, 3))
    return float(largest.max() / largest.min())


def int8_weights(model: ir.Model) -> Iterator[tuple[ir.Node, Array]]:
    """The layers of a quantized graph with their integers."""
    for node in model.graph:
        source = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        integers = source.inputs[0] if source is not None and source.op_type == "DequantizeLinear" else None
        if integers is not None and integers.const_value is not None:
            yield node, integers.const_value.numpy()


def test_the_settings_of_pytorch_are_as_before(model: ir.Model, quantizer: Quantizer) -> None:
    seen: list[int] = []
    finetuned(
        model,
        quantizer,
        unlabelled(),
        settings=replace(STEPS, steps=1, threads=2),
        progress=lambda done, total, loss: seen.append(torch.get_num_threads()),
    )
    assert seen == [2]
    assert torch.get_num_threads() == 1


def test_several_passes_are_made_and_none_may_be_empty(model: ir.Model, quantizer: Quantizer) -> None:
    passes: list[int] = []

    def one_batch(number: int) -> Iterator[LabelledBatch]:
        passes.append(number)
        yield pictures(4, number), None

    finetuned(model, quantizer, one_batch, settings=replace(STEPS, steps=3))
    assert passes == [0, 1, 2]
    with pytest.raises(DataError, match="no training images"):
        finetuned(model, quantizer, lambda number: iter(()), settings=STEPS)


def test_a_loss_that_is_not_finite_ends_the_training(model: ir.Model, quantizer: Quantizer) -> None:
    broken = np.full((4, *SHAPE), np.nan, np.float32)
    with pytest.raises(QuantizationError, match="the loss became nan in step 1"):
        finetuned(model, quantizer, lambda number: iter([(broken, None)]), settings=STEPS)


def test_a_network_that_pytorch_cannot_run_is_refused() -> None:
    wave = graph(
        "[layer] c = Conv (x, w) [wave] y = Sin (c)", "float[N, 3, 4, 4] x", "float[N, 4, 4, 4] y", w=(4, 3, 1, 1)
    )
    each = Quantizer("cpu", wave, collect(wave, [normal("x", 4, 3, 4, 4)], identity={}))
    with pytest.raises(QuantizationError, match="wave is a Sin"):
        finetuned(wave, each, unlabelled(), settings=STEPS)
