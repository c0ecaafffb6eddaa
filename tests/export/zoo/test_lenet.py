"""The LeNet family. Oracles: plain functions of torch, `nn.BatchNorm`, and the shapes that the book prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewright.export import to_onnx
from edgewright.export.canonicalize import canonicalize
from edgewright.export.zoo.lenet import BatchNorm, batch_norm, lenet, lenet_bn, lenet_bn_scratch, state_for

Factory = Callable[[int], nn.Module]
FAMILY = (lenet, lenet_bn, lenet_bn_scratch)
EXACT = 1e-11  # the two differ in double precision by the order of their sums alone


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((count, 1, 28, 28), dtype=dtype, generator=torch.Generator().manual_seed(1))


def shapes_after_each(layers: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    found = []
    for layer in layers.children():
        x = layer(x)
        found.append(tuple(x.shape[1:]))
    return found


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BatchNorm | nn.BatchNorm1d | nn.BatchNorm2d)]


def pair() -> tuple[nn.Module, nn.Module]:
    """The two networks with batch normalization in double precision, with equal tensors far from 0 and 1."""
    layers, written = lenet_bn(10).double(), lenet_bn_scratch(10).double()
    with torch.no_grad():
        for norm in norms(layers):
            for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
                if name != "num_batches_tracked":
                    tensor.uniform_(0.5, 2.0)
    written.load_state_dict(state_for(written, layers.state_dict()))
    return layers, written


# Structure


def test_lenet_has_the_shapes_of_the_book() -> None:
    model = lenet()
    with torch.inference_mode():
        features = shapes_after_each(model.get_submodule("features"), images())
        classifier = shapes_after_each(model.get_submodule("classifier"), torch.zeros(2, 400))
    assert features == [(6, 28, 28), (6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 10, 10), (16, 5, 5), (400,)]
    assert classifier == [(120,), (120,), (84,), (84,), (10,)]


@pytest.mark.parametrize("factory", [lenet_bn, lenet_bn_scratch])
def test_the_networks_with_batch_normalization_do_not_pad(factory: Factory) -> None:
    with torch.inference_mode():
        features = shapes_after_each(factory(10).eval().get_submodule("features"), images())
    first, second = [(6, 24, 24)] * 3 + [(6, 12, 12)], [(16, 8, 8)] * 3 + [(16, 4, 4)]
    assert features == [*first, *second, (256,)]


def test_parameters_as_counted_by_hand() -> None:
    convolutions = (6 * 25 + 6) + (16 * 6 * 25 + 16)
    tail = (120 * 84 + 84) + (84 * 10 + 10)
    scales_and_shifts = 2 * (6 + 16 + 120 + 84)
    normalized = convolutions + (256 * 120 + 120) + tail + scales_and_shifts
    expected = [convolutions + (400 * 120 + 120) + tail, normalized, normalized]
    assert [sum(p.numel() for p in factory().parameters()) for factory in FAMILY] == expected


def test_lenet_is_what_plain_functions_compute() -> None:
    model = lenet()
    (w1, b1, w2, b2, w3, b3, w4, b4, w5, b5) = model.parameters()
    x = functional.avg_pool2d(torch.sigmoid(functional.conv2d(images(), w1, b1, padding=2)), 2)
    x = functional.avg_pool2d(torch.sigmoid(functional.conv2d(x, w2, b2)), 2).flatten(1)
    x = torch.sigmoid(torch.sigmoid(x @ w3.T + b3) @ w4.T + b4) @ w5.T + b5
    torch.testing.assert_close(model(images()), x)


@pytest.mark.parametrize("factory", FAMILY)
@pytest.mark.parametrize("classes", [1, 7])
def test_as_many_logits_as_classes(factory: Factory, classes: int) -> None:
    with torch.inference_mode():
        logits = factory(classes).eval()(images(3))
    assert logits.shape == (3, classes)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("factory", FAMILY)
def test_a_gradient_reaches_every_parameter(factory: Factory) -> None:
    model = factory(10).eval()  # in training a bias before batch normalization has none
    torch.autograd.backward(functional.cross_entropy(model(images()), torch.tensor([0, 1])))
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("factory", FAMILY)
def test_weights_begin_as_glorot_and_bengio_draw_them(factory: Factory) -> None:
    model = factory(10)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
        receptive = layer.weight[0, 0].numel()
        bound = (6 / (receptive * (layer.weight.shape[0] + layer.weight.shape[1]))) ** 0.5
        assert 0.85 * bound < float(layer.weight.detach().abs().max()) <= bound


def test_images_of_three_channels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="to have 1 channels, but got 3 channels"):
        lenet()(torch.zeros(2, 3, 28, 28))


# Batch normalization from its formula


def test_the_formula_on_numbers() -> None:
    x, gamma, beta = torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0]]), torch.tensor([[10.0]])
    mean, variance = torch.tensor([[3.0]]), torch.tensor([[3.75]])
    found = batch_norm(x, gamma, beta, mean, variance, epsilon=0.25)  # sqrt(3.75 + 0.25) = 2
    assert found.tolist() == [[10 + 3 * -1.0], [10 + 3 * 1.0]]


def test_both_networks_agree_in_evaluation() -> None:
    layers, written = (model.eval() for model in pair())
    before = {name: tensor.clone() for name, tensor in written.state_dict().items()}
    with torch.inference_mode():
        found, expected = written(images(5, torch.double)), layers(images(5, torch.double))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in written.state_dict().items())


def test_both_networks_agree_in_training_gradients_included() -> None:
    layers, written = (model.train() for model in pair())
    found, expected = written(images(5, torch.double)), layers(images(5, torch.double))
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    torch.autograd.backward(found.square().sum())
    torch.autograd.backward(expected.square().sum())
    gradients = {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}
    for name, parameter in written.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name].reshape(parameter.shape), rtol=1e-9, atol=EXACT)


def test_both_networks_agree_after_several_steps_of_training() -> None:
    layers, written = pair()
    begun = {name: tensor.clone() for name, tensor in written.state_dict().items()}
    labels = torch.arange(8) % 10
    for model in (layers, written):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
        for step in range(5):
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(images(8, torch.double) + step), labels))
            optimizer.step()
    found, expected = written.state_dict(), state_for(written, layers.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-10)
        assert not torch.allclose(tensor, begun[name], rtol=1e-4)


@pytest.mark.parametrize("setting", [{"momentum": 0.2}, {"epsilon": 1e-3}], ids=["momentum", "epsilon"])
def test_another_momentum_or_epsilon_is_seen(setting: dict[str, float]) -> None:
    x = torch.randn(4, 3, 5, 5)
    layer, written = nn.BatchNorm2d(3), BatchNorm((1, 3, 1, 1), **setting)
    same_output = torch.allclose(written(x), layer(x), rtol=1e-4, atol=1e-4)
    assert layer.running_mean is not None
    same_mean = torch.allclose(written.running_mean.flatten(), layer.running_mean, rtol=1e-4, atol=1e-6)
    assert (same_output, same_mean) == ("epsilon" not in setting, "momentum" not in setting)


def test_the_moving_averages_take_no_part_in_the_gradient() -> None:
    norm = BatchNorm((1, 3))
    torch.autograd.backward(norm(torch.randn(4, 3, requires_grad=True)).sum())
    assert not norm.running_mean.requires_grad
    assert not norm.running_var.requires_grad


@pytest.mark.parametrize(("shape", "x"), [((1, 3), (1, 3)), ((1, 3, 1, 1), (1, 3, 1, 1))], ids=["vector", "map"])
def test_one_value_per_channel_is_refused_in_training_alone(shape: tuple[int, ...], x: tuple[int, ...]) -> None:
    norm = BatchNorm(shape)
    with pytest.raises(ValueError, match="one value per channel"):
        norm(torch.ones(x))
    assert norm.eval()(torch.ones(x)).shape == x


@pytest.mark.parametrize("x", [(2, 1, 4, 4), (2, 4, 4, 4), (3, 3), (3, 4, 4)])
def test_an_input_that_would_only_broadcast_is_refused(x: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected an input that fits \[1, 3, 1, 1\]"):
        BatchNorm((1, 3, 1, 1))(torch.ones(x))


def test_a_state_goes_to_the_other_network_and_back() -> None:
    layers, written = pair()
    there = state_for(written, layers.state_dict())
    assert there["features.1.running_var"].shape == (1, 6, 1, 1)
    assert there["classifier.1.weight"].shape == (1, 120)
    back = lenet_bn(10).double()
    back.load_state_dict(state_for(back, written.state_dict()))
    for name, tensor in layers.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_state_of_another_network_does_not_load() -> None:
    written = lenet_bn_scratch()
    with pytest.raises(RuntimeError, match="Missing key"):
        written.load_state_dict(state_for(written, {"features.0.weight": torch.zeros(6, 1, 5, 5)}))


# Export


def test_the_written_formula_stands_in_the_graph_and_its_root_is_computed() -> None:
    model = to_onnx._exported(lenet_bn_scratch().eval(), (1, 28, 28), 19)
    normalization = ["Sub", "Add", "Sqrt", "Div", "Mul", "Add"]
    operators = [node.op_type for node in model.graph if node.op_type in {*normalization, "Conv", "Gemm"}]
    assert operators == ["Conv", *normalization] * 2 + ["Gemm", *normalization] * 2 + ["Gemm"]
    canonicalize(model)
    counts = Counter(node.op_type for node in model.graph)
    assert {name: counts[name] for name in ("Sub", "Sqrt", "Div", "Mul", "Add", "Reshape")} == {
        "Sub": 4, "Sqrt": 0, "Div": 4, "Mul": 4, "Add": 4, "Reshape": 1,
    }  # fmt: skip
