"""AdaRound: which weights of one layer to round up and which down, so that its output errs least.

Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization":
each weight is s · (⌊w/s⌋ + h(v)) with the rectified sigmoid h(v) = clip(σ(v)·(ζ − γ) + γ, 0, 1), and v is learned:

    minimize ‖f(W x) − f(W̃ x̂)‖² + λ mean (1 − |2 h(v) − 1|^β)

x̂ is what the layer sees of a network that is quantized in front of it, f its activation. β falls, so that h is free at
first and driven to 0 or 1 at the end. Each output channel is a problem of its own: here its error is measured in units
of what rounding to nearest gives it, so that one λ serves all layers, and rows that took no part decide channel by
channel whether the learned rounding is the better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AdaRoundSettings", "RoundingProblem", "learned_rounding"]

ZETA, GAMMA = 1.1, -0.1  # of the rectified sigmoid, as in the paper
ON_GRID = 1e-4  # of a step: nearer to an integer, a weight has nothing to choose
STUCK = 20.0  # |v| at which h is 0 or 1 and has no gradient
LARGEST_INTEGER = 127
MOST_FLIPS = 4096  # of one output; they end by themselves long before
ROWS_PER_WEIGHT = 4  # that a step needs at most, for each weight of a filter: those of depthwise layers have 9 or 25


@dataclass(frozen=True)
class AdaRoundSettings:
    """How rounding is learned.

    * iterations: steps of Adam for each layer; batch_rows: rows of each step; rows: of each layer, in all
    * learning_rate: of Adam; regularization: λ above; beta: first and last β
    * warm_start: share of the iterations without regularization
    * seed: of the rows and their order
    * device: "cpu" or "cuda", where the learning runs
    * memory_bytes: of the activations that are kept, and as much again while a layer learns
    """

    iterations: int = 1000
    rows: int = 4096
    batch_rows: int = 256
    learning_rate: float = 1e-2
    regularization: float = 10.0
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    seed: int = 0
    device: str = "cpu"
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class RoundingProblem:
    """One layer of G groups with O outputs and K inputs each, and R rows of what it sees; all float32.

    * rows: x̂, `[G, R, K]`; expected: f(W x), `[G, R, O]`
    * products: W x, before f, `[G, R, O]`
    * weights: W in units of their scales, `[G, O, K]`; scales `[G, O, 1]`; bias `[G, 1, O]`
    * activation: f
    * held_back: how many of the rows, the last ones, only check; the others come in a random order
    """

    rows: Tensor
    products: Tensor
    expected: Tensor
    weights: Tensor
    scales: Tensor
    bias: Tensor
    activation: Callable[[Tensor], Tensor]
    held_back: int


def learned_rounding(problem: RoundingProblem, settings: AdaRoundSettings) -> Tensor:
    """Integers `[G, O, K]`, int8, each next to its weight; the nearest ones in channels where learning did not help."""
    nearest = _saturated(problem.weights.round())
    if bool(((problem.weights - nearest).abs() <= ON_GRID).all()):
        return nearest.to(torch.int8)
    check = slice(problem.rows.shape[1] - problem.held_back, None)
    chosen, error = nearest, _channel_errors(problem, nearest, check)
    for found in _candidates(problem, nearest, settings):
        other = _channel_errors(problem, found, check)
        chosen = torch.where((other < error)[..., None], found, chosen)
        error = torch.minimum(error, other)
    return chosen.to(torch.int8)


def _candidates(problem: RoundingProblem, nearest: Tensor, settings: AdaRoundSettings) -> Iterator[Tensor]:
    start = descended(problem, nearest)
    yield start
    if settings.iterations:
        yield _learned(problem, start, nearest, settings)


def descended(problem: RoundingProblem, start: Tensor) -> Tensor:
    """Integers `[G, O, K]` from which no single flip of a weight between down and up reduces ‖W x − W̃ x̂‖².

    The paper's quadratic problem in binary unknowns, one for each output, by steepest descent: with H = x̂ᵀ x̂ and g half
    the slope of the error, a flip by δ changes it by 2 δ g + δ² H_kk. Each round flips the best weight of every output.
    f is left out: only the gradients of `_learned` know it.
    """
    taught = slice(problem.rows.shape[1] - problem.held_back)
    rows = problem.rows[:, taught]
    moments = rows.mT @ rows
    own = moments.diagonal(dim1=1, dim2=2)[:, None]
    integers, other = start.clone(), _other_neighbour(problem.weights, start)
    slope = (integers * problem.scales) @ moments - (problem.products[:, taught] - problem.bias).mT @ rows
    for _ in range(MOST_FLIPS):
        step = (other - integers) * problem.scales
        gain, best = (step * (2 * slope + step * own)).min(dim=2, keepdim=True)
        helps = gain < 0
        if not bool(helps.any()):
            break
        columns = moments.gather(1, best.expand(-1, -1, moments.shape[2]))
        slope += step.gather(2, best) * helps * columns
        before, after = integers.gather(2, best), other.gather(2, best)
        integers.scatter_(2, best, torch.where(helps, after, before))
        other.scatter_(2, best, torch.where(helps, before, after))
    return integers


def _other_neighbour(weights: Tensor, integers: Tensor) -> Tensor:
    """The integer on the other side of each weight; the same where a weight is on the grid."""
    other = _saturated(integers + (weights - integers).sign())
    return torch.where((weights - integers).abs() <= ON_GRID, integers, other)


def _learned(problem: RoundingProblem, start: Tensor, nearest: Tensor, settings: AdaRoundSettings) -> Tensor:
    taught = problem.rows.shape[1] - problem.held_back
    lower = problem.weights.floor()
    unit = _channel_errors(problem, nearest, slice(taught)).clamp_min(torch.finfo(torch.float32).tiny)
    v = _start((problem.weights + start) / 2, lower)
    optimizer = torch.optim.Adam([v], settings.learning_rate, fused=True)
    warm = round(settings.warm_start * settings.iterations)
    strength = settings.regularization / problem.rows.shape[2]
    batches = _batches(taught, min(settings.batch_rows, ROWS_PER_WEIGHT * problem.rows.shape[2]))
    for step in range(settings.iterations):
        rows = batches[step % len(batches)]
        h = rectified_sigmoid(v)
        slope = _slope(problem, (lower + h) * problem.scales, rows, unit) * problem.scales
        if step >= warm:
            share = (step - warm) / (settings.iterations - warm)
            slope += strength * _regularizer_slope(h, _annealed(settings.beta, share))
        v.grad = slope * _sigmoid_slope(h)
        optimizer.step()
    return _saturated(lower + (rectified_sigmoid(v) > 0.5))


def _batches(rows: int, size: int) -> list[slice]:
    """All full batches of consecutive rows, or all rows if they are fewer."""
    return [slice(start, start + size) for start in range(0, rows - size + 1, size)] or [slice(rows)]


def _start(weights: Tensor, lower: Tensor) -> Tensor:
    """Such v that h(v) = w/s − ⌊w/s⌋; weights on the grid are stuck at the integer that they are."""
    fraction = weights - lower
    v = torch.logit((fraction - GAMMA) / (ZETA - GAMMA))
    v = torch.where(fraction <= ON_GRID, -STUCK, v)
    return torch.where(fraction >= 1 - ON_GRID, STUCK, v)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v)."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)


def _sigmoid_slope(h: Tensor) -> Tensor:
    """∂h/∂v: with σ = (h − γ) / (ζ − γ), (ζ − γ) σ (1 − σ) where nothing is clipped."""
    slope = (h - GAMMA) * (ZETA - h) / (ZETA - GAMMA)
    return slope.masked_fill_((h == 0) | (h == 1), 0)


def _regularizer_slope(h: Tensor, beta: float) -> Tensor:
    """∂/∂h of 1 − |2 h − 1|^β."""
    distance = 2 * h - 1
    return (-2 * beta) * distance.abs().pow_(beta - 1).copysign_(distance)


def _slope(problem: RoundingProblem, weights: Tensor, rows: slice, unit: Tensor) -> Tensor:
    """∂/∂w̃ of the mean squared error over some rows, in units of `unit` for each channel."""
    weights.requires_grad_()
    given = _outputs(problem, weights, problem.rows[:, rows])
    error = ((given - problem.expected[:, rows]).square().mean(1) / unit).sum()
    (slope,) = torch.autograd.grad(error, weights)
    return slope


def _annealed(beta: tuple[float, float], share: float) -> float:
    """From the first to the last of `beta` along half a cosine, `share` of the way."""
    first, last = beta
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _channel_errors(problem: RoundingProblem, integers: Tensor, rows: slice) -> Tensor:
    """Mean squared error of each output channel over some rows, `[G, O]`."""
    given = _outputs(problem, integers * problem.scales, problem.rows[:, rows])
    return (given - problem.expected[:, rows]).square().mean(1)


def _outputs(problem: RoundingProblem, weights: Tensor, rows: Tensor) -> Tensor:
    """f(W̃ x̂), `[G, R, O]`."""
    return problem.activation(torch.baddbmm(problem.bias, rows, weights.mT))


def _saturated(integers: Tensor) -> Tensor:
    return integers.clamp(-LARGEST_INTEGER, LARGEST_INTEGER)
