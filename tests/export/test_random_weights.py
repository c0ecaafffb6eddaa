"""Random weights in which a batch normalization that is missing can be seen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgewright.export.random_weights import disturb_statistics, is_batch_norm
from edgewright.export.resolve import ModelRequest, resolve
from edgewright.export.zoo.lenet import lenet_bn, lenet_bn_scratch
from edgewright.export.zoo.residual import resnet18, resnet50
from edgewright.runtime.errors import ModelError

SHAPE = (3, 32, 32)
TOLERANCE = 1e-4  # of the largest logit: what the fold stage lets pass


@pytest.fixture
def images() -> torch.Tensor:
    """Noise, [2, 3, 32, 32]."""
    return torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(5))


def disturbed(build: Callable[[], nn.Module], shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
    torch.manual_seed(1)
    model = build()
    disturb_statistics(model, shape, seed)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_batch_norm(module)]


def test_each_normalization_alone_is_missed(images: torch.Tensor) -> None:
    model = disturbed(lambda: resnet18(10), SHAPE)
    with torch.inference_mode():
        intact = model(images)
        for norm in norms(model):
            hook = norm.register_forward_hook(lambda module, inputs, output: inputs[0])
            change = (model(images) - intact).abs().max() / intact.abs().max()
            hook.remove()
            assert change > 10 * TOLERANCE
    assert len(norms(model)) == 20


def test_in_a_fresh_network_it_would_not_be_missed(images: torch.Tensor) -> None:
    torch.manual_seed(1)
    fresh = resnet18(10).eval()
    norm = norms(fresh)[0]
    with torch.inference_mode():
        intact = fresh(images)
        norm.register_forward_hook(lambda module, inputs, output: inputs[0])
        assert (fresh(images) - intact).abs().max() / intact.abs().max() < TOLERANCE


def test_activations_keep_their_scale_in_depth(images: torch.Tensor) -> None:
    model = disturbed(lambda: resnet50(10), SHAPE)
    largest: list[float] = []
    for norm in norms(model):
        norm.register_forward_hook(lambda module, inputs, output: largest.append(float(output.abs().max())))
    with torch.inference_mode():
        logits = model(images)
    assert torch.isfinite(logits).all()
    assert len(largest) == 53
    assert max(largest) < 100


def test_statistics_are_those_of_the_noise_disturbed() -> None:
    """Each channel's own mean and variance, within what n / 4 and U(1/2, 3/2) allow."""
    convolution, norm = nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)
    offsets = torch.arange(64.0)
    with torch.no_grad():
        convolution.weight.normal_(generator=torch.Generator().manual_seed(2))
        assert convolution.bias is not None
        convolution.bias.copy_(offsets)
    disturb_statistics(nn.Sequential(convolution, norm), SHAPE, seed=3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    expected = convolution.weight.detach().square().sum((1, 2, 3))  # noise of unit variance in each of three channels
    ratio = norm.running_var / expected
    assert 0.45 < float(ratio.min()) < 0.7 < 1.3 < float(ratio.max()) < 1.55
    assert 0.15 < float(((norm.running_mean - offsets) / expected.sqrt()).std()) < 0.35


@pytest.mark.parametrize("build", [lenet_bn, lenet_bn_scratch])
def test_vectors_and_written_out_normalizations_are_found(build: Callable[[], nn.Module]) -> None:
    model = disturbed(build, (1, 28, 28))
    assert len(norms(model)) == 4
    for norm in norms(model):
        assert float(getattr(norm, "running_var").min()) > 0  # noqa: B009 - typed as a module
        assert float(getattr(norm, "weight").detach().std()) > 0.02  # noqa: B009


def test_the_number_of_threads_changes_nothing() -> None:
    states = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            states.append(disturbed(lambda: resnet18(10), SHAPE).state_dict())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_another_seed_gives_other_statistics() -> None:
    one, two = (disturbed(lambda: resnet18(10), SHAPE, seed) for seed in (0, 1))
    assert not torch.equal(one.get_buffer("bn1.running_mean"), two.get_buffer("bn1.running_mean"))


def test_zero_biases_are_filled_and_others_are_kept() -> None:
    empty, given = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    assert empty.bias is not None
    assert given.bias is not None
    with torch.no_grad():
        empty.bias.zero_()
    before = given.bias.detach().clone()
    disturb_statistics(nn.Sequential(empty, given), SHAPE, seed=0)
    assert 0 < float(empty.bias.detach().abs().min()) < float(empty.bias.detach().abs().max()) < 0.1
    assert torch.equal(given.bias, before)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 1_000_000_000, 1_000_000_000)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(
        ModelError, match=f"does not run on images of {shape[0]}×{shape[1]}×.*give another --input-shape"
    ):
        disturb_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), shape, seed=0)


def test_a_network_without_normalization_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4))
    before = copy.deepcopy(model.state_dict())
    disturb_statistics(model, SHAPE, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_are_gone_and_the_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    source = resolve(ModelRequest("lenet_bn", "random"))
    first, second = source.module(), source.module()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in first.modules())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
