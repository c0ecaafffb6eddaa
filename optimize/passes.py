"""What a pass over an ONNX graph is, and how passes compose: a readable list, no registry.

    PASSES = (fold_batchnorm, remove_identity)
    result = run_passes(model, PASSES)

A pass promises three things:

* it works on a copy (`ir.Model.clone`, which shares the tensors and is cheap): the model it is given stays as it was;
* the model it returns computes the same outputs, under the same names, from the same inputs;
* where it leaves alone what it could have been expected to change, it says so in `skipped`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["Pass", "PassResult", "Skip", "run_passes"]


@dataclass(frozen=True)
class Skip:
    """A node that a pass left as it was, and why.

    * node: the node's name; where it has none, the name of its first output
    * reason: a sentence's end, such as "weight conv.weight is shared with conv_7"
    """

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the new model, the number of places it changed, and the ones it skipped."""

    model: ir.Model
    changed: int
    skipped: tuple[Skip, ...]


Pass = Callable[[ir.Model], PassResult]


def run_passes(model: ir.Model, passes: Iterable[Pass]) -> PassResult:
    """The passes applied one after the other; `changed` is their sum, `skipped` theirs in order.

    `model` stays as it was. Without passes the result holds `model` itself.
    """
    changed = 0
    skipped: list[Skip] = []
    for apply in passes:
        result = apply(model)
        model = result.model
        changed += result.changed
        skipped.extend(result.skipped)
    return PassResult(model, changed, tuple(skipped))
