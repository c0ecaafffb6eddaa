"""Recipes: every network of the line-up has one, options change them, values that no training can have are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgewright.recipes import RECIPES, Phase, Recipe, default_start, recipe_of, trainable
from edgewright.runtime.errors import DataError, ModelError


def test_every_network_for_fashion_mnist_has_a_recipe_and_no_other() -> None:
    assert set(trainable()) == set(RECIPES)
    assert {"lenet", "lenet_bn_scratch", "fashion_densenet", "mobilenet_effnet_b0"} <= set(RECIPES)
    for name in RECIPES:
        assert recipe_of(name) == RECIPES[name]


def test_the_recipe_of_the_shipped_checkpoint() -> None:
    """What its published accuracy belongs to; `edgewright train mobilenet_effnet_b0` must go on giving it."""
    assert recipe_of("mobilenet_effnet_b0") == Recipe(
        phases=(Phase(0.5, 2), Phase(0.75, 3), Phase(1.0, 4)),
        optimizer="adamw",
        batch_size=64,
        peak_learning_rate=2e-3,
        warmup_share=0.2,
        weight_decay=0.05,
        label_smoothing=0.05,
        stochastic_depth=0.05,
        augment=True,
        crop_share=1 / 16,
        ema_decay=0.998,
        seed=0,
    )
    assert default_start("mobilenet_effnet_b0") == "lite0"


def test_the_others_are_ten_epochs_from_fresh_weights() -> None:
    for name in set(RECIPES) - {"mobilenet_effnet_b0"}:
        assert RECIPES[name].scales == (1.0,) * 10
        assert default_start(name) == "none"


def test_what_is_given_is_changed_and_nothing_else() -> None:
    changed = recipe_of("lenet", epochs=3, optimizer="sgd", augment=False, seed=None, weight_decay=0.0)
    assert changed == replace(
        RECIPES["lenet"], phases=(Phase(1.0, 3),), optimizer="sgd", augment=False, weight_decay=0.0
    )


@pytest.mark.parametrize(
    ("epochs", "scales"),
    [
        (1, (1.0,)),
        (2, (0.75, 1.0)),
        (3, (0.75, 1.0, 1.0)),
        (5, (0.5, 0.75, 1.0, 1.0, 1.0)),
        (9, (0.5,) * 2 + (0.75,) * 3 + (1.0,) * 4),
        (18, (0.5,) * 4 + (0.75,) * 6 + (1.0,) * 8),
    ],
)
def test_the_phases_share_the_epochs_and_the_last_is_never_left_out(epochs: int, scales: tuple[float, ...]) -> None:
    recipe = Recipe().with_epochs(epochs)
    assert recipe.scales == scales
    assert recipe.epochs == epochs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; choose from adamw, sgd"),
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"batch_size": 0}, "batch size is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296, expected from 0 to 4294967295"),
        ({"peak_learning_rate": 0.0}, "learning rate is 0.0, expected above 0, at most 1000"),
        ({"peak_learning_rate": 1e300}, r"learning rate is 1e\+300, expected above 0, at most 1000"),
        ({"peak_learning_rate": float("nan")}, "learning rate is nan"),
        ({"weight_decay": -0.1}, "weight decay is -0.1, expected from 0 to 1000"),
        ({"weight_decay": float("inf")}, "weight decay is inf"),
        ({"label_smoothing": 1.0}, "label smoothing is 1.0, expected from 0 to below 1"),
        ({"label_smoothing": float("nan")}, "label smoothing is nan"),
    ],
)
def test_values_that_no_training_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recipe_of("lenet", **changes)


def test_a_recipe_without_phases_is_refused() -> None:
    with pytest.raises(DataError, match="epochs is 0"):
        Recipe(phases=())


def test_only_networks_with_a_recipe_are_trained() -> None:
    with pytest.raises(ModelError, match=r"no training recipe for efficientnet_lite0; train one of .*lenet.*"):
        recipe_of("efficientnet_lite0")
    with pytest.raises(ModelError, match="mobilenet_effnet_b0"):
        recipe_of("mobilenet_efnet_b0")
