"""The networks of the stress set: as good as they should be, and the same when they are rescaled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import stress_networks
import torch
from numpy.typing import NDArray
from stress_networks import LARGEST_FACTOR, NETWORKS, PREPROCESS, rescaled, trained
from torch import nn

from edgewright.calibration.fashion_mnist import fashion_mnist_calibration, fashion_mnist_test
from edgewright.calibration.image_set import ImageSet

Array = NDArray[Any]


def images(image_set: ImageSet, count: int) -> Array:
    return PREPROCESS.batch([image_set[index] for index in range(count)])


def logits(network: nn.Module, x: Array) -> Array:
    with torch.inference_mode():
        result: Array = network(torch.from_numpy(x)).numpy()
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_is_small_and_recognizes_what_it_was_trained_for(name: str) -> None:
    assert (stress_networks.FOLDER / f"{name}.safetensors").stat().st_size <= 300_000
    network, test = trained(name), fashion_mnist_test()
    assert sum(parameter.numel() for parameter in network.parameters()) <= 150_000
    assert test.labels is not None
    right = logits(network, images(test, 1000)).argmax(axis=1) == test.labels[:1000]
    assert right.mean() > 0.87  # 88 % of all 10,000, which `benchmarks/stress.py` counts


@pytest.mark.parametrize("name", NETWORKS)
def test_rescaling_changes_the_channels_and_nothing_else(name: str) -> None:
    x = images(fashion_mnist_calibration(), 64)
    expected = logits(trained(name), x)
    network = rescaled(trained(name))
    changed = logits(network, x)
    assert np.abs(changed - expected).max() < 1e-5 * np.abs(expected).max()
    factors = [
        (after.weight / before.weight).detach()
        for (after, _), (before, _) in zip(network.pairs(), trained(name).pairs(), strict=True)
        if isinstance(after, nn.BatchNorm2d) and isinstance(before, nn.BatchNorm2d)
    ]
    assert len(factors) >= 5
    for factor in factors:
        assert 1 <= float(factor.min()) < 5, "the small ones"
        assert LARGEST_FACTOR / 5 < float(factor.max()) <= LARGEST_FACTOR * (1 + 1e-6), "the large ones"
