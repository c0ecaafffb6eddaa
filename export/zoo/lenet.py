"""The LeNet family: LeNet-5 for 1×28×28 images, and with batch normalization, from its formula and from `nn`.

LeNet-5 (LeCun et al. 1998) with sigmoids and average pooling, as section 7.6 of Zhang et al., Dive into Deep Learning,
has it; section 8.5 adds batch normalization (Ioffe & Szegedy 2015, algorithm 1) before each sigmoid:

    y = γ · (x − mean) / sqrt(variance + ε) + β

with the mean and biased variance of the batch in training, and their moving averages in evaluation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from edgewright.export.zoo.initialization import xavier_initialized

__all__ = ["BatchNorm", "batch_norm", "lenet", "lenet_bn", "lenet_bn_scratch", "state_for"]

BN_EPSILON = 1e-5  # torch.nn.BatchNorm2d default, and the book's
BN_MOMENTUM = 0.1  # the same; the share of the newest batch in the moving averages


def lenet(classes: int = 10) -> nn.Module:
    """LeNet-5; input `[N, 1, 28, 28]` float32, output logits `[N, classes]`."""
    features = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Flatten(),
    )
    classifier = nn.Sequential(
        *(nn.Linear(16 * 5 * 5, 120), nn.Sigmoid()),
        *(nn.Linear(120, 84), nn.Sigmoid()),
        nn.Linear(84, classes),
    )
    return xavier_initialized(nn.Sequential(OrderedDict(features=features, classifier=classifier)))


def lenet_bn(classes: int = 10) -> nn.Module:
    """LeNet with `nn.BatchNorm2d` and `nn.BatchNorm1d`; input `[N, 1, 28, 28]` float32, output `[N, classes]`."""
    return _normalized_lenet(classes, nn.BatchNorm2d, nn.BatchNorm1d)


def lenet_bn_scratch(classes: int = 10) -> nn.Module:
    """LeNet with batch normalization written out; the same numbers and module names as `lenet_bn`."""
    return _normalized_lenet(
        classes,
        norm_of_maps=lambda channels: BatchNorm((1, channels, 1, 1)),
        norm_of_vectors=lambda features: BatchNorm((1, features)),
    )


def _normalized_lenet(
    classes: int, norm_of_maps: Callable[[int], nn.Module], norm_of_vectors: Callable[[int], nn.Module]
) -> nn.Module:
    features = nn.Sequential(
        *(nn.Conv2d(1, 6, 5), norm_of_maps(6), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), norm_of_maps(16), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Flatten(),
    )
    classifier = nn.Sequential(
        *(nn.Linear(16 * 4 * 4, 120), norm_of_vectors(120), nn.Sigmoid()),
        *(nn.Linear(120, 84), norm_of_vectors(84), nn.Sigmoid()),
        nn.Linear(84, classes),
    )
    return xavier_initialized(nn.Sequential(OrderedDict(features=features, classifier=classifier)))


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    """γ · (x − mean) / sqrt(variance + ε) + β; all but `x` broadcast to it, `[1, C, 1, 1]` to `[N, C, H, W]`."""
    return gamma * ((x - mean) / torch.sqrt(variance + epsilon)) + beta


class BatchNorm(nn.Module):
    """Batch normalization from its formula; equal to `nn.BatchNorm2d` for `shape` (1, C, 1, 1), 1d for (1, C).

    Names of `nn.BatchNorm2d`: γ is `weight`, β is `bias`, the moving averages are `running_mean` and `running_var`.
    All have `shape`, float32, so that they broadcast to the input without a reshape in the exported graph.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, shape: tuple[int, ...], *, epsilon: float = BN_EPSILON, momentum: float = BN_MOMENTUM) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalized by channel, `[N, C, H, W]` or `[N, C]`; in training the moving averages follow.

        Raises `ValueError` for an input whose channels are not the layer's, which might broadcast nevertheless, and in
        training where a channel has a single value, whose variance says nothing.
        """
        if x.ndim != self.weight.ndim or x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"expected an input that fits {list(self.weight.shape)}, got {list(x.shape)}")
        mean, variance = self._batch_statistics(x) if self.training else (self.running_mean, self.running_var)
        return batch_norm(x, self.weight, self.bias, mean, variance, self.epsilon)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over all axes but the channel, with the parameters' shape."""
        count = x.numel() // x.shape[1]
        if count == 1:
            raise ValueError(f"batch normalization cannot train on one value per channel, got {list(x.shape)}")
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
        with torch.no_grad():  # the unbiased variance, as nn.BatchNorm2d keeps it; the book keeps the biased one
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return mean, variance


def state_for(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of one of the two networks with batch normalization as the other, `model`, loads it.

    The names are the same; the shapes of the normalizations differ, `[C]` or `[1, C, 1, 1]`, and the count of batches,
    which only `nn.BatchNorm2d` keeps and does not use, is kept where `model` has it.
    """
    return {name: state[name].reshape(like.shape) for name, like in model.state_dict().items() if name in state}
