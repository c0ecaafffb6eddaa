"""Released weights of a network, made to fit the module that was built for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from edgewright.export.weights import head_names

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["fitting"]

OLD_DENSE_LAYER = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)")
"""torchvision's DenseNet files say norm.1 where the module says norm1 (`torchvision.models.densenet`)."""
AUXILIARY_HEADS = ("aux1", "aux2", "AuxLogits")  # of GoogLeNet and Inception; for training only


def fitting(state: Mapping[str, Tensor], model: nn.Module, build: Callable[[int], nn.Module]) -> dict[str, Tensor]:
    """`state` under today's names, without the auxiliary heads and the classifier where `model` has none.

    `build(classes)` gives the network with its classifier. Everything else is for `load_into` to check.
    """
    state = {OLD_DENSE_LAYER.sub(r"\1\2", name): value for name, value in state.items()}
    own = model.state_dict()
    unknown = {name for name in state if name not in own}
    unwanted = {name for name in unknown if name.partition(".")[0] in AUXILIARY_HEADS}
    if unknown > unwanted:
        unwanted |= unknown.intersection(head_names(build))
    return {name: value for name, value in state.items() if name not in unwanted}
