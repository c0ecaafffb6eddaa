"""Comparisons with known answers, made of logits whose top-1 is given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgewright.runtime.parity import Parity, compare

__all__ = ["one_hot", "parity_of", "unlabelled"]


def one_hot(predictions: list[int], classes: int = 3) -> NDArray[np.float32]:
    """Logits whose top-1 is given."""
    return np.eye(classes, dtype=np.float32)[predictions]


def parity_of(both: int, reference_only: int, engine_only: int, neither: int) -> Parity:
    """A comparison with these cells; where exactly one is right the two disagree, elsewhere they agree."""
    reference = [0] * (both + reference_only) + [1] * (engine_only + neither)
    candidate = [0] * both + [1] * reference_only + [0] * engine_only + [1] * neither
    return compare(one_hot(reference), one_hot(candidate), np.zeros(len(reference), np.int64))


def unlabelled(agreeing: int, disagreeing: int) -> Parity:
    """A comparison without labels."""
    return compare(one_hot([0] * (agreeing + disagreeing)), one_hot([0] * agreeing + [1] * disagreeing), None)
