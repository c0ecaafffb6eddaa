"""AlexNet for 1×224×224 images (Krizhevsky et al. 2012; section 8.1 of Zhang et al., Dive into Deep Learning)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from edgewright.export.zoo.initialization import xavier_initialized

__all__ = ["fashion_alexnet"]


def fashion_alexnet(classes: int = 10, *, hidden: int = 4096) -> nn.Module:
    """AlexNet with `hidden` units in its two hidden layers; input `[N, 1, 224, 224]` float32, output `[N, classes]`."""
    features = nn.Sequential(
        *(nn.Conv2d(1, 96, 11, stride=4, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        nn.Flatten(),
    )
    classifier = nn.Sequential(
        *(nn.Linear(256 * 5 * 5, hidden), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(hidden, classes),
    )
    return xavier_initialized(nn.Sequential(OrderedDict(features=features, classifier=classifier)))
