"""The Fashion-MNIST line-up beside LeNet. Oracles: the shapes that the book prints, arithmetic, functions of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewright.export.zoo.fashion_alexnet import fashion_alexnet
from edgewright.export.zoo.fashion_densenet import DenseBlock, fashion_densenet, transition
from edgewright.export.zoo.fashion_googlenet import Inception, fashion_googlenet
from edgewright.export.zoo.fashion_nin import fashion_nin, nin_block
from edgewright.export.zoo.fashion_resnet import Residual, fashion_resnet18
from edgewright.export.zoo.fashion_vgg import fashion_vgg11, vgg_block

Factory = Callable[[int], nn.Module]
Shape = tuple[int, ...]
SIDES: dict[Factory, int] = {
    fashion_alexnet: 224,
    fashion_vgg11: 224,
    fashion_nin: 224,
    fashion_googlenet: 96,
    fashion_resnet18: 96,
    fashion_densenet: 96,
}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def without_memory(factory: Factory, classes: int = 10) -> nn.Module:
    """The network on the device that knows shapes alone: two of them have 180 MB of weights."""
    with torch.device("meta"):
        return factory(classes).eval()


def blank(side: int, channels: int = 1) -> Tensor:
    return torch.empty((2, channels, side, side), device="meta")


def after_each(model: nn.Module, x: Tensor) -> list[tuple[str, Shape]]:
    """What the book prints: the name and the output shape of each part of `model`, without the batch."""
    found = []
    for name, part in model.named_children():
        x = part(x)
        found.append((name if not name.isdigit() else type(part).__name__, tuple(x.shape[1:])))
    return found


# Shapes


def test_shapes_of_alexnet() -> None:
    model = without_memory(fashion_alexnet)
    assert after_each(model.get_submodule("features"), blank(224)) == [
        *(("Conv2d", (96, 54, 54)), ("ReLU", (96, 54, 54)), ("MaxPool2d", (96, 26, 26))),
        *(("Conv2d", (256, 26, 26)), ("ReLU", (256, 26, 26)), ("MaxPool2d", (256, 12, 12))),
        *(("Conv2d", (384, 12, 12)), ("ReLU", (384, 12, 12))),
        *(("Conv2d", (384, 12, 12)), ("ReLU", (384, 12, 12))),
        *(("Conv2d", (256, 12, 12)), ("ReLU", (256, 12, 12)), ("MaxPool2d", (256, 5, 5))),
        ("Flatten", (6400,)),
    ]
    assert after_each(model.get_submodule("classifier"), torch.empty((2, 6400), device="meta")) == [
        *(("Linear", (4096,)), ("ReLU", (4096,)), ("Dropout", (4096,))),
        *(("Linear", (4096,)), ("ReLU", (4096,)), ("Dropout", (4096,))),
        ("Linear", (10,)),
    ]


def test_shapes_of_vgg() -> None:
    model = without_memory(fashion_vgg11)
    blocks = [(16, 112, 112), (32, 56, 56), (64, 28, 28), (128, 14, 14), (128, 7, 7)]
    expected = [*(("Sequential", shape) for shape in blocks), ("Flatten", (6272,))]
    assert after_each(model.get_submodule("features"), blank(224)) == expected


def test_shapes_of_nin() -> None:
    model = without_memory(fashion_nin)
    assert after_each(model.get_submodule("features"), blank(224)) == [
        *(("Sequential", (96, 54, 54)), ("MaxPool2d", (96, 26, 26))),
        *(("Sequential", (256, 26, 26)), ("MaxPool2d", (256, 12, 12))),
        *(("Sequential", (384, 12, 12)), ("MaxPool2d", (384, 5, 5))),
        ("Dropout", (384, 5, 5)),
    ]
    assert after_each(model.get_submodule("classifier"), blank(5, channels=384)) == [
        *(("Sequential", (10, 5, 5)), ("AdaptiveAvgPool2d", (10, 1, 1)), ("Flatten", (10,))),
    ]


@pytest.mark.parametrize(
    ("factory", "side", "expected"),
    [
        (fashion_googlenet, 96, [(64, 24, 24), (192, 12, 12), (480, 6, 6), (832, 3, 3), (1024, 3, 3), (10,)]),
        (fashion_resnet18, 96, [(64, 24, 24), (64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3), (10,)]),
        (fashion_resnet18, 224, [(64, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7), (10,)]),
        (fashion_resnet18, 32, [(64, 8, 8), (64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1), (10,)]),
    ],
)
def test_shapes_after_the_stages(factory: Factory, side: int, expected: list[Shape]) -> None:
    names = ("stem", "stage1", "stage2", "stage3", "stage4", "classifier")
    assert after_each(without_memory(factory), blank(side)) == list(zip(names, expected, strict=True))


def test_shapes_of_densenet() -> None:
    assert after_each(without_memory(fashion_densenet), blank(96)) == [
        ("stem", (64, 24, 24)),
        *(("stage1", (64 + 4 * 32, 24, 24)), ("transition1", (96, 12, 12))),
        *(("stage2", (96 + 4 * 32, 12, 12)), ("transition2", (112, 6, 6))),
        *(("stage3", (112 + 4 * 32, 6, 6)), ("transition3", (120, 3, 3))),
        *(("stage4", (120 + 4 * 32, 3, 3)), ("classifier", (10,))),
    ]


@pytest.mark.parametrize("factory", SIDES)
def test_as_many_logits_as_classes(factory: Factory) -> None:
    assert without_memory(factory, 7)(blank(SIDES[factory])).shape == (2, 7)


@pytest.mark.parametrize(
    ("factory", "smallest"),
    [(fashion_alexnet, 224), (fashion_vgg11, 224), (fashion_nin, 67), (fashion_densenet, 29)],
)
def test_a_smaller_image_is_refused(factory: Factory, smallest: int) -> None:
    model = without_memory(factory)
    assert model(blank(smallest)).shape == (2, 10)
    with pytest.raises(RuntimeError):
        model(blank(smallest - 1 if smallest < 100 else 96))


@pytest.mark.parametrize("factory", [fashion_googlenet, fashion_resnet18])
def test_any_size_will_do_where_the_pooling_is_global(factory: Factory) -> None:
    model = without_memory(factory)
    assert [model(blank(side)).shape for side in (1, 28, 225)] == [(2, 10)] * 3


# Parameters, by hand


def conv(inputs: int, outputs: int, side: int) -> int:
    return inputs * outputs * side * side + outputs


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def norm(channels: int) -> int:
    return 2 * channels


def inception(inputs: int, a: int, b1: int, b2: int, c1: int, c2: int, d: int) -> int:
    middle, wide = conv(inputs, b1, 1) + conv(b1, b2, 3), conv(inputs, c1, 1) + conv(c1, c2, 5)
    return conv(inputs, a, 1) + middle + wide + conv(inputs, d, 1)


def residual(inputs: int, outputs: int) -> int:
    shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
    return conv(inputs, outputs, 3) + norm(outputs) + conv(outputs, outputs, 3) + norm(outputs) + shortcut


def dense(inputs: int) -> int:
    return sum(norm(channels) + conv(channels, 32, 3) for channels in (inputs, inputs + 32, inputs + 64, inputs + 96))


def halved(inputs: int) -> int:
    return norm(inputs) + conv(inputs, inputs // 2, 1)


def nin(inputs: int, outputs: int, side: int) -> int:
    return conv(inputs, outputs, side) + 2 * conv(outputs, outputs, 1)


PARAMETERS: dict[Factory, int] = {
    fashion_alexnet: conv(1, 96, 11) + conv(96, 256, 5) + conv(256, 384, 3) + conv(384, 384, 3) + conv(384, 256, 3)
    + linear(6400, 4096) + linear(4096, 4096) + linear(4096, 10),
    fashion_vgg11: conv(1, 16, 3) + conv(16, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3) + conv(64, 128, 3)
    + 3 * conv(128, 128, 3) + linear(6272, 4096) + linear(4096, 4096) + linear(4096, 10),
    fashion_nin: nin(1, 96, 11) + nin(96, 256, 5) + nin(256, 384, 3) + nin(384, 10, 3),
    fashion_googlenet: conv(1, 64, 7) + conv(64, 64, 1) + conv(64, 192, 3)
    + inception(192, 64, 96, 128, 16, 32, 32) + inception(256, 128, 128, 192, 32, 96, 64)
    + inception(480, 192, 96, 208, 16, 48, 64) + inception(512, 160, 112, 224, 24, 64, 64)
    + inception(512, 128, 128, 256, 24, 64, 64) + inception(512, 112, 144, 288, 32, 64, 64)
    + inception(528, 256, 160, 320, 32, 128, 128) + inception(832, 256, 160, 320, 32, 128, 128)
    + inception(832, 384, 192, 384, 48, 128, 128) + linear(1024, 10),
    fashion_resnet18: conv(1, 64, 7) + norm(64) + 2 * residual(64, 64) + residual(64, 128) + residual(128, 128)
    + residual(128, 256) + residual(256, 256) + residual(256, 512) + residual(512, 512) + linear(512, 10),
    fashion_densenet: conv(1, 64, 7) + norm(64) + dense(64) + halved(192) + dense(96) + halved(224)
    + dense(112) + halved(240) + dense(120) + norm(248) + linear(248, 10),
}  # fmt: skip


@pytest.mark.parametrize("factory", SIDES)
def test_parameters_as_counted_by_hand(factory: Factory) -> None:
    assert sum(p.numel() for p in without_memory(factory).parameters()) == PARAMETERS[factory]


# What the blocks compute


def with_statistics(block: nn.Module) -> nn.Module:
    """`block` in evaluation mode, its batch norms far from the identity."""
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 2.0)
    return block.eval()


def tensors(block: nn.Module) -> Iterator[Tensor]:
    return iter([tensor for name, tensor in block.state_dict().items() if "num_batches" not in name])


def normalized(x: Tensor, state: Iterator[Tensor]) -> Tensor:
    gamma, beta, mean, variance = (next(state) for _ in range(4))
    return functional.batch_norm(x, mean, variance, gamma, beta)


def convolved(x: Tensor, state: Iterator[Tensor], stride: int = 1) -> Tensor:
    weight, bias = next(state), next(state)
    return functional.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)


@pytest.mark.parametrize(("channels", "stride"), [(6, 1), (8, 1), (8, 2), (6, 2)])
def test_a_residual_block_adds_before_its_last_relu(channels: int, stride: int) -> None:
    block, x = with_statistics(Residual(6, channels, stride=stride)), torch.randn(2, 6, 8, 8)
    state = tensors(block)
    inner = torch.relu(normalized(convolved(x, state, stride), state))
    result = normalized(convolved(inner, state), state)
    shortcut = x if (channels, stride) == (6, 1) else convolved(x, state, stride)
    assert next(state, None) is None
    torch.testing.assert_close(block(x), torch.relu(result + shortcut))


def test_an_inception_block_joins_four_branches() -> None:
    block, x = Inception(6, 2, (3, 4), (5, 7), 8), torch.randn(2, 6, 9, 9)
    state = tensors(block)
    point = torch.relu(convolved(x, state))
    middle = torch.relu(convolved(torch.relu(convolved(x, state)), state))
    wide = torch.relu(convolved(torch.relu(convolved(x, state)), state))
    pooled = torch.relu(convolved(functional.max_pool2d(x, 3, 1, 1), state))
    expected = torch.cat((point, middle, wide, pooled), 1)
    assert expected.shape[1] == block.out_channels == 2 + 4 + 7 + 8
    torch.testing.assert_close(block(x), expected)


def test_each_convolution_of_a_dense_block_sees_all_before_it() -> None:
    block, x = with_statistics(DenseBlock(3, 2, 10)), torch.randn(4, 3, 8, 8)
    state = tensors(block)
    first = convolved(torch.relu(normalized(x, state)), state)
    second = convolved(torch.relu(normalized(torch.cat((x, first), 1), state)), state)
    found = block(x)
    assert found.shape == (4, 23, 8, 8)  # the book's example
    torch.testing.assert_close(found, torch.cat((x, first, second), 1))


def test_a_transition_halves_the_side_by_averages() -> None:
    block, x = with_statistics(transition(23, 10)), torch.randn(4, 23, 8, 8)
    state = tensors(block)
    expected = functional.avg_pool2d(convolved(torch.relu(normalized(x, state)), state), 2)
    assert expected.shape == (4, 10, 4, 4)
    torch.testing.assert_close(block(x), expected)


def test_every_convolution_of_vgg_and_nin_has_a_relu() -> None:
    x = torch.randn(2, 3, 8, 8)
    for block, pooled in ((vgg_block(3, 4, 2), True), (nin_block(3, 4, 3, padding=1), False)):
        state, expected = tensors(block), x
        for _ in range(2 if pooled else 3):
            expected = torch.relu(convolved(expected, state))
        torch.testing.assert_close(block(x), functional.max_pool2d(expected, 2) if pooled else expected)


# Gradients


@pytest.mark.parametrize(
    ("factory", "side"),
    [(fashion_nin, 96), (fashion_googlenet, 32), (fashion_resnet18, 32), (fashion_densenet, 32)],
)
def test_a_gradient_reaches_every_parameter(factory: Factory, side: int) -> None:
    model = factory(10).eval()  # in training a bias before batch normalization has none
    torch.autograd.backward(functional.cross_entropy(model(torch.randn(2, 1, side, side)), torch.tensor([0, 1])))
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("factory", [fashion_alexnet, fashion_vgg11])
def test_every_parameter_of_the_large_ones_takes_part(factory: Factory) -> None:
    model = without_memory(factory)
    torch.autograd.backward(model(blank(224)).sum())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_resnet_learns_four_images_of_32_by_heart() -> None:
    model, images, labels = fashion_resnet18(10).train(), torch.randn(4, 1, 32, 32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 0.1
