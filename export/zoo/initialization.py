"""Initial weights that the Fashion-MNIST line-up shares."""

from __future__ import annotations

from torch import nn

__all__ = ["xavier_initialized"]


def xavier_initialized(model: nn.Module) -> nn.Module:
    """`model`, the weights of its convolutions and linear layers redrawn by Glorot & Bengio 2010, equation 16.

    They keep the variance of activations and gradients from layer to layer. Torch's default has a third of theirs where
    a layer is as wide as the one before it: too little for sigmoids, and for depth without normalization. Biases stay.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
    return model
