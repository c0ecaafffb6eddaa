"""What all stages of one run share: what was asked for, the model's source, the build folder, and what was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgewright.calibration.calib_cache import read_calib_cache
from edgewright.calibration.datasets import image_folder
from edgewright.calibration.fashion_mnist import FASHION_MNIST
from edgewright.export.completion import Completion
from edgewright.export.entries import InputShape, ModelSource
from edgewright.export.resolve import ModelRequest, folder_name, resolve
from edgewright.runtime.backends import BACKENDS
from edgewright.runtime.errors import BuildError, EdgewrightError, ModelError
from edgewright.runtime.gates import DEFAULT_GATES, Gate, budget_of, check_labelled
from edgewright.runtime.preprocess import Preprocess
from edgewright.runtime.specs import BatchProfile
from edgewright.workspace import Observer, StageRun, Workspace, source_hash

__all__ = ["DEFAULT_TARGETS", "GRAPH_LIBRARIES", "VERDICT_NEEDS", "Options", "RunContext"]

DEFAULT_TARGETS = ("sm86", "sm89", "sm120")  # GeForce and RTX boxes of the last three generations
GRAPH_NEEDS = ("--input-shape",)
IMAGE_NEEDS = (*GRAPH_NEEDS, "--mean", "--std", "--resize")
VERDICT_NEEDS = (*IMAGE_NEEDS, "--labels")
"""What a person has to say, where the source does not, for a graph, for engines, and for a verdict on them."""
GRAPH_LIBRARIES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    * model, weights, model_options, completion: as in `ModelRequest`
    * calibration, evaluation: folders of images; None is what ships with the project, where it does
    * method: of the activation ranges; gates: what an engine has to reach, all of them
    * backends, precisions: which engines to build; empty means all
    * targets: the GPU architectures to build ahead of time for
    * remainder: what the layers of an INT8 engine that are not INT8 run in on NVIDIA's targets, "fp16" or "fp32"
    * profile: batch sizes of GPU engines; workspace: bytes of scratch memory for them, None for all there is
    * dla: the DLA core of a Jetson, None for the GPU
    * placement: "measured" leaves layers in float where INT8 does not pay on this machine, "rules" does not look
    * rescue: whether INT8 that is not within the budget is mended; seed: of what is learned or timed for it
    * finetune: a folder of training images or "fashion-mnist", to train INT8 that is not; None not to train
    * calib_cache: an old TensorRT calibration cache, whose ranges NVIDIA's dialects take
    * threads: of the CPU engines, 0 for all cores
    * already_quantized: "refuse" an ONNX file that is, or "pass" it on as it is
    """

    model: str
    weights: str = "default"
    build_dir: Path = Path("build")
    opset: int = 19
    calibration: Path | None = None
    evaluation: Path | None = None
    allow_overlap: bool = False
    method: str = "auto"
    gates: tuple[Gate, ...] = DEFAULT_GATES
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    targets: tuple[str, ...] = DEFAULT_TARGETS
    remainder: str = "fp16"
    profile: BatchProfile = field(default_factory=BatchProfile)
    workspace: int | None = None
    dla: int | None = None
    placement: str = "measured"
    rescue: bool = True
    finetune: str | None = None
    calib_cache: Path | None = None
    seed: int = 21
    threads: int = 0
    model_options: Mapping[str, Any] = field(default_factory=dict)
    completion: Completion = field(default_factory=Completion)
    already_quantized: str = "refuse"

    @property
    def budget(self) -> float:
        """The loss of top-1, a fraction, that all gates allow: what quantization aims at."""
        return budget_of(self.gates)

    @property
    def limits(self) -> dict[str, float]:
        """Of the gates, by their names: fractions, or decibels."""
        return {gate.name: gate.limit for gate in self.gates}

    @property
    def request(self) -> ModelRequest:
        """What is said about the network."""
        return ModelRequest(self.model, self.weights, self.model_options, self.completion, self.already_quantized)


class RunContext:
    """One run in one build folder. Raises at once where the options contradict what is known without work."""

    def __init__(self, options: Options, observer: Observer | None = None) -> None:
        self.options = options
        _check_choice("backend", options.backends, tuple(BACKENDS))
        _check_choice("precision", options.precisions, _all("precisions"))
        _check_choice("target", options.targets, _all("targets"))
        self.source: ModelSource = resolve(options.request)
        if options.calibration is not None:
            image_folder(options.calibration)  # says before the first stage what is wrong without knowing the labels
        if options.evaluation is not None:
            check_labelled(options.gates, labelled=image_folder(options.evaluation).labels is not None)
        if options.finetune is not None and options.finetune != FASHION_MNIST:
            image_folder(Path(options.finetune))
        if options.calib_cache is not None:
            read_calib_cache(options.calib_cache)
        self.observer = observer or Observer()
        self.workspace = Workspace(options.build_dir / folder_name(options.model), self.observer)
        self.runs: list[StageRun] = []
        self._failed: dict[str, EdgewrightError] = {}

    @property
    def input_shape(self) -> InputShape:
        """(C, H, W) of one image. Raises `ModelError` if nobody has said it."""
        self.ask_for(GRAPH_NEEDS)
        assert self.source.input_shape is not None
        return self.source.input_shape

    @property
    def preprocess(self) -> Preprocess:
        """What is done to an image. Raises `ModelError` that asks for what nobody has said."""
        self.ask_for(IMAGE_NEEDS)
        assert self.source.preprocess is not None
        return self.source.preprocess

    def ask_for(self, needs: Sequence[str]) -> None:
        """Raises one `ModelError` for all options in `needs` that are missing."""
        missing = [option for option in self.source.missing if option in needs]
        if missing:
            raise ModelError(f"{self.options.model} does not say all about its images", f"give {', '.join(missing)}")

    def stage(
        self,
        name: str,
        parts: Mapping[str, str],
        outputs: Sequence[str],
        make: Callable[[], Mapping[str, Any]],
        *,
        code: str,
    ) -> StageRun:
        """Makes or reuses a stage; `code` is the source file that makes it, so that its change is noticed."""
        if name in self._failed:
            raise self._failed[name]  # several engines need it, and once is enough
        parts = {**parts, "stage code": source_hash("context.py", code)}
        try:
            run = self.workspace.stage(name, parts, outputs, make)
        except EdgewrightError as error:
            self._failed[name] = error
            raise
        self.runs.append(run)
        return run


def _all(attribute: str) -> tuple[str, ...]:
    """The precisions or targets of all backends, each once, in order."""
    return tuple(dict.fromkeys(word for backend in BACKENDS.values() for word in getattr(backend, attribute)))


def _check_choice(kind: str, words: Sequence[str], known: Sequence[str]) -> None:
    for word in words:
        if word not in known:
            raise BuildError(f"unknown {kind} {word!r}", f"choose from {', '.join(known)}")
