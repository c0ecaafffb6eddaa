"""What the registry and the other places that networks come from have to say about a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgewright.runtime.errors import ModelError
from edgewright.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["InputShape", "Labels", "ModelEntry", "ModelSource", "Task", "Weights"]

InputShape = tuple[int, int, int]
"""(C, H, W) of one preprocessed image."""
Labels = Sequence[str] | Callable[[], Sequence[str]]
"""A name for each class, in order, or a function that gives them where that takes an import."""


@dataclass(frozen=True)
class Task:
    """What a network is trained for: its classes, and what it expects of an image.

    * data: "fashion_mnist" if images ship with the project (training downloads the rest), else None
    """

    classes: int
    preprocess: Preprocess
    labels: Labels
    data: str | None = None


@dataclass(frozen=True)
class Weights:
    """One set of weights of a network; `load` fills a freshly built module, `fingerprint` identifies the content.

    * origin: where they come from, in a word or two; summary: the same in a sentence's part
    """

    summary: str
    task: Task
    load: Callable[[nn.Module], None]
    fingerprint: Callable[[], str]
    origin: str


@dataclass(frozen=True)
class ModelEntry:
    """A network that can be built for any number of classes.

    * build: `build(classes, **options)` gives an untrained module
    * task: what it is built for where no weights say otherwise
    * weights: its named checkpoints; "default" is what a run takes
    """

    summary: str
    build: Callable[..., nn.Module]
    task: Task
    weights: Mapping[str, Weights] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A network with its weights, and what the pipeline needs to know about it.

    A factory of one's own may return this instead of a module, to say what the module cannot:

        ModelSource(build=lambda: net, preprocess=Preprocess(…), labels=("cat", "dog"))

    * build: `() -> nn.Module` with its weights; onnx: the file of an existing graph; one of the two
    * input_shape: (C, H, W); taken from `preprocess` if left out
    * preprocess, labels: None if unknown; labels may be empty for a network that gives features, not classes
    * name, weights: what they are, in words; fingerprint: what identifies their content
    * data: "fashion_mnist" if calibration and evaluation images ship with the project, else None
    * trained: False of random weights, which remember no images
    * quantized: the graph holds integers already and is to be taken as it is
    * note: what a person who reads the results should know, or empty
    * missing: the options by which a person has to say what is still unknown before images can be used

    Raises `ModelError` if there is neither a module nor a graph, or both.
    """

    build: Callable[[], nn.Module] | None = None
    onnx: Path | None = None
    input_shape: InputShape | None = None
    preprocess: Preprocess | None = None
    labels: Labels | None = None
    name: str = ""
    weights: str = ""
    fingerprint: str = ""
    data: str | None = None
    trained: bool = True
    quantized: bool = False
    note: str = ""
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.build is None) == (self.onnx is None):
            raise ModelError(
                f"the model source {self.name!r} needs either a module or an ONNX file", "give one of them"
            )
        if self.input_shape is None and self.preprocess is not None:
            object.__setattr__(self, "input_shape", self.preprocess.input_shape)

    def module(self) -> nn.Module:
        """The PyTorch module in evaluation mode. Only for a source that is none of an ONNX file."""
        assert self.build is not None, "an ONNX file has no module"
        return self.build().eval()

    def class_names(self) -> tuple[str, ...] | None:
        """The labels, or None if nobody has said them."""
        labels = self.labels() if callable(self.labels) else self.labels
        return None if labels is None else tuple(labels)
