"""How each network is trained: the hyperparameters, and which networks have any.

The learning rates of the LeNets were chosen on the last 5,000 training images, held out for it (`docs/training.md`);
those of the deeper networks are common values. The test images had no part in any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgewright.export.entries import ModelEntry
from edgewright.export.models import MODELS, entry_named
from edgewright.runtime.errors import DataError, ModelError

__all__ = ["LARGEST_SEED", "OPTIMIZERS", "Phase", "Recipe", "default_start", "recipe_of", "trainable"]

OPTIMIZERS = ("adamw", "sgd")
LARGEST_SEED = 2**32 - 1  # what NumPy takes; an epoch's own seed, a thousand times that, is in PyTorch's 64 bits
LARGEST_RATE = 1e3  # of learning and decay; their product must be a float32, and no training is stable at a tenth


@dataclass(frozen=True)
class Phase:
    """`epochs` passes over the training images at `scale` times the final image size."""

    scale: float
    epochs: int


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training run; the defaults are those of the shipped checkpoint.

    * phases: what image size for how long; the last one is the size that the checkpoint is for
    * optimizer: "adamw", whose β1 the schedule moves against the rate, from 0.95 at its lowest to 0.85 at the peak; or
      "sgd" with Nesterov momentum of 0.9 throughout
    * peak_learning_rate, warmup_share: of the one-cycle schedule, the share of all steps that the rate rises
    * weight_decay: of matrices and filters only
    * stochastic_depth: largest probability that a residual branch is dropped, where the network has that
    * augment: flip and shift; crop_share: the largest shift as a share of the image size
    * ema_decay: of the moving average of the weights, per step; None keeps the weights of the last step
    * seed: of the first weights and of what is random in each epoch, from 0 to 2³² − 1

    Raises `DataError` for values that no training can have.
    """

    phases: tuple[Phase, ...] = (Phase(0.5, 2), Phase(0.75, 3), Phase(1.0, 4))
    optimizer: str = "adamw"
    batch_size: int = 64
    peak_learning_rate: float = 2e-3
    warmup_share: float = 0.2
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    stochastic_depth: float = 0.05
    augment: bool = True
    crop_share: float = 1 / 16
    ema_decay: float | None = 0.998
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise DataError(f"unknown optimizer {self.optimizer!r}", f"choose from {', '.join(OPTIMIZERS)}")
        for word, count in (("epochs", self.epochs), ("batch size", self.batch_size)):
            if count < 1:
                raise DataError(f"{word} is {count}, expected at least 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise DataError(f"seed is {self.seed}, expected from 0 to {LARGEST_SEED}")
        if not 0 < self.peak_learning_rate <= LARGEST_RATE:
            raise DataError(f"learning rate is {self.peak_learning_rate}, expected above 0, at most {LARGEST_RATE:g}")
        if not 0 <= self.weight_decay <= LARGEST_RATE:
            raise DataError(f"weight decay is {self.weight_decay}, expected from 0 to {LARGEST_RATE:g}")
        if not 0 <= self.label_smoothing < 1:
            raise DataError(f"label smoothing is {self.label_smoothing}, expected from 0 to below 1")

    @property
    def epochs(self) -> int:
        """Passes over the training images in all phases together."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def scales(self) -> tuple[float, ...]:
        """The share of the final image size in each epoch."""
        return tuple(phase.scale for phase in self.phases for _ in range(phase.epochs))

    def with_epochs(self, epochs: int) -> Recipe:
        """The same phases, each as long in proportion as before; what does not divide goes to the later ones."""
        total, before, phases = self.epochs, 0, []
        ends = [sum(phase.epochs for phase in self.phases[: index + 1]) for index in range(len(self.phases))]
        for phase, end in zip(self.phases, ends, strict=True):
            phases.append(Phase(phase.scale, epochs * end // total - before))
            before = epochs * end // total
        return replace(self, phases=tuple(phase for phase in phases if phase.epochs))


CLASSIC = Recipe(
    phases=(Phase(1.0, 10),),
    batch_size=128,
    peak_learning_rate=2e-3,
    weight_decay=0.01,
    label_smoothing=0.0,
    stochastic_depth=0.0,
    ema_decay=None,
)
NORMALIZED_LENET = replace(CLASSIC, peak_learning_rate=1e-2, augment=False)
DEEP = replace(CLASSIC, weight_decay=0.05, label_smoothing=0.05)

RECIPES: Mapping[str, Recipe] = {
    "lenet": replace(CLASSIC, peak_learning_rate=2e-2, augment=False),  # sigmoids pass little: large steps
    "lenet_bn": NORMALIZED_LENET,
    "lenet_bn_scratch": NORMALIZED_LENET,
    "fashion_alexnet": replace(CLASSIC, peak_learning_rate=5e-4),
    "fashion_vgg11": replace(CLASSIC, peak_learning_rate=1e-3),
    "fashion_nin": replace(CLASSIC, peak_learning_rate=1e-3),
    "fashion_googlenet": CLASSIC,
    "fashion_resnet18": DEEP,
    "fashion_densenet": DEEP,
    "mobilenet_effnet_b0": Recipe(),
}


def trainable() -> tuple[str, ...]:
    """The networks of the registry that Fashion-MNIST can train, in its order."""
    return tuple(name for name, entry in MODELS.items() if entry.task.data == "fashion_mnist")


def recipe_of(name: str, *, epochs: int | None = None, **changes: Any) -> Recipe:
    """The recipe of network `name` with what is given changed: `epochs` in all, and fields of `Recipe`.

    A change of None is none. Raises `ModelError` for an unknown network or one without a recipe, `DataError` for values
    that no training can have.
    """
    trainable_entry(name)
    recipe = RECIPES.get(name, CLASSIC)
    if epochs is not None:
        if epochs < 1:
            raise DataError(f"epochs is {epochs}, expected at least 1")
        recipe = recipe.with_epochs(epochs)
    return replace(recipe, **{field: value for field, value in changes.items() if value is not None})


def trainable_entry(name: str) -> ModelEntry:
    """The entry of a network that can be trained. Raises `ModelError`, naming those that can, for any other."""
    entry = entry_named(name)
    if entry.task.data != "fashion_mnist":
        raise ModelError(f"there is no training recipe for {name}", f"train one of {', '.join(trainable())}")
    return entry


def default_start(name: str) -> str:
    """What a network's weights start from unless it is said: "lite0" for the one that has such a start, else "none"."""
    return "lite0" if name == "mobilenet_effnet_b0" else "none"
