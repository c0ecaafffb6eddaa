"""Seeded random weights that are worth exporting: batch normalization has something to do, activations stay finite.

A freshly built network has running means of 0, variances of 1, and scales of 1 and shifts of 0: a graph from which its
batch normalization was dropped gives the same, and so hides every mistake of folding. Statistics drawn at random
instead would let the activations of a deep residual network grow without bound. So one forward pass visits each
normalization in order, takes mean μ and standard deviation σ of each channel of what it is given, and sets

    running mean = μ + σ · n / 4,   running variance = σ² · u,   γ = v,   β = n' / 4

with n, n' from N(0, 1), u from U(1/2, 3/2) and v from U(1/10, 1/5). So activations keep their scale at any depth. With
a larger γ a deep residual network becomes chaotic: at U(1/2, 1) the rounding errors of float32 alone grow to 2e-4 of
the largest logit of a ResNet-152, here to 3e-6.

Biases that are all zero, as many networks begin, get small values for the same reason: a graph without them would be
the same graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgewright.export.conventions import first_line
from edgewright.runtime.errors import ModelError

__all__ = ["disturb_statistics", "is_batch_norm"]

PARTS = ("running_mean", "running_var", "weight", "bias")
IMAGES = 2
FEATURES = 16  # samples that statistics of a vector of features need at least; one forward pass has few images
BIAS_SPREAD = 0.02
SMALLEST_VARIANCE = 1e-4  # of a channel that is constant on these images


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `module` normalizes by running statistics, `nn.BatchNorm2d` or one that is written out."""
    return isinstance(getattr(module, "running_var", None), Tensor) and isinstance(module.weight, Tensor)


def disturb_statistics(model: nn.Module, input_shape: tuple[int, int, int], seed: int) -> None:
    """Gives every batch normalization of `model` statistics, scales and shifts that change what passes through it.

    One forward pass of noise images `[2, C, H, W]` in evaluation mode. Raises `ModelError` if the network does not run
    on them.
    """
    generator = torch.Generator().manual_seed(seed)
    _fill_zero_biases(model, generator)
    norms = [module for module in model.modules() if is_batch_norm(module)]

    def before(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _disturb(norm, inputs[0], generator)

    hooks = [norm.register_forward_pre_hook(before) for norm in norms]
    try:
        with torch.inference_mode():
            model.eval()(torch.randn((IMAGES, *input_shape), generator=generator))
    except (RuntimeError, ValueError) as error:  # what torch says of shapes, and of more memory than there is
        raise ModelError(
            f"the network does not run on images of {'×'.join(map(str, input_shape))}: {first_line(error)}",
            "give another --input-shape",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _fill_zero_biases(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None and not module.bias.any():
            with torch.no_grad():
                module.bias.normal_(std=BIAS_SPREAD, generator=generator)


def _disturb(norm: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    mean, variance, gamma, beta = (getattr(norm, name) for name in PARTS)
    channels = variance.shape.numel()
    normal = torch.randn((2, channels), generator=generator)
    uniform = torch.rand((2, channels), generator=generator)
    flat = x.movedim(1, 0).flatten(1)
    few = flat.shape[1] < FEATURES  # then the channels together say more than each of them
    mu = flat.mean().expand(channels) if few else flat.mean(1)
    spread = (flat.var(correction=0).expand(channels) if few else flat.var(1, correction=0)).clamp(SMALLEST_VARIANCE)
    values = (
        (mean, mu + spread.sqrt() * normal[0] / 4),
        (variance, spread * (0.5 + uniform[0])),
        (gamma, (1 + uniform[1]) / 10),
        (beta, normal[1] / 4),
    )
    for target, value in values:
        # Sums depend on the number of threads in their last bits; eight bits of mantissa do not.
        target.copy_(value.to(torch.bfloat16).reshape(target.shape))
