"""What an operator of a graph is in PyTorch, and how it reads integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Operation", "dimensions"]

Operation = Callable[..., Any]
"""Tensors of a node's inputs → the tensor of its output, or a tuple of those of its outputs."""


def dimensions(tensor: Tensor) -> list[int]:
    """The numbers of an integer tensor `[R]` or `[]`, such as a shape or axes."""
    return [int(number) for number in tensor.reshape(-1).tolist()]
