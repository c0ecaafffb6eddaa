"""`Session`: an engine, its preprocessing and its labels behind a few calls, on any device, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import backend_named
from .backends.base import Backend
from .backends.runner import Counters, Runner
from .choice import chosen
from .errors import DataError, EngineError
from .preprocess import ImageLike
from .specs import EngineInfo, TensorSpec

__all__ = ["Prediction", "Session"]

CLASSIFY_BATCH = 16


@dataclass(frozen=True)
class Prediction:
    """One class for one image; probability is the softmax of the logits, 0…1."""

    index: int
    label: str
    probability: float


class Session:
    """A loaded engine. Use it in a `with`, or close it. One thread at a time uses it; for several, see `SessionPool`.

    >>> with Session.open("build/mobilenet_effnet_b0") as session:
    ...     (predictions,) = session.classify(["shoe.png"], top=3)
    """

    def __init__(self, runner: Runner, info: EngineInfo, why: str, *, device_preprocessing: bool = False) -> None:
        """Takes over `runner`, also where it raises."""
        self._runner = runner
        self._first_input = runner.inputs[0].name
        self._preprocess_ns = 0
        self._device_preprocessing = device_preprocessing
        self.info = info
        self.why = why
        if device_preprocessing:
            try:
                runner.preprocess_on_device(info.preprocess)
            except BaseException:
                runner.close()
                raise

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: str | None = None,
        precision: str | None = None,
        threads: int = 0,
        provider: str | None = None,
        require_signature: str | Path | None = None,
        allow_older: bool = False,
        cache: str | Path | None = None,
        device_preprocessing: bool = False,
    ) -> Session:
        """Opens an engine file, a bundle, or the engine of a build folder that was asked for or is recommended there.

        * threads: of the processor, 0 for all cores; provider: of onnxruntime ("cpu", "cuda", "tensorrt")
        * require_signature, allow_older: of a bundle, see `edgewright.runtime.bundle`; cache: where engines that were
          built on this device are
        * device_preprocessing: `classify` resizes and normalizes on the GPU

        `why` says what was picked and for what reason. What is verified is what is loaded: the file is read once,
        its hash compared with the one beside it, and the engine loaded from the same bytes.
        Raises `EngineError` if there is no such engine, it was changed, or its backend is not installed.
        """
        choice = chosen(
            Path(path),
            backend,
            precision,
            provider=provider,
            require_signature=require_signature,
            allow_older=allow_older,
            cache=cache,
        )
        loader = backend_named(choice.info.backend)
        _check_provider(loader, provider)
        runner = loader.open(choice.engine, threads=threads, provider=provider or "", dla=choice.info.dla)
        return cls(runner, choice.info, choice.why, device_preprocessing=device_preprocessing)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of the inputs."""
        return self._runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of the outputs."""
        return self._runner.outputs

    @property
    def counters(self) -> Counters:
        """What was done so far, and how long each part of it took."""
        return replace(self._runner.counters, preprocess_ms=self._preprocess_ns / 1e6)

    def infer(self, batch: Any) -> dict[str, NDArray[np.float32]]:
        """Outputs by name for a float32 batch `[N, C, H, W]`, or for inputs by name; new arrays, the caller's own.

        A batch is a numpy array, or anything with DLPack or `__cuda_array_interface__`: what lies on the GPU is used
        there. Raises `InputError` if it does not fit, `ClosedError` if the session is closed.
        """
        return self._runner.infer(self._feeds(batch))

    def submit(self, batch: Any) -> None:
        """Begins a batch, as for `infer`, and returns: while it is computed the next can be prepared.

        At most two are in flight; each stays as it is until its `result`. Raises `EngineError` if two are.
        """
        self._runner.submit(self._feeds(batch))

    def result(self) -> dict[str, NDArray[np.float32]]:
        """The outputs of the batch that was submitted first, or its exception; there must be one."""
        return self._runner.result()

    def drop(self) -> None:
        """Waits for what was submitted, and forgets it and its errors."""
        self._runner.drop()

    def classify(self, images: Sequence[ImageLike], top: int = 5) -> list[list[Prediction]]:
        """The `top` most probable classes of each image, best first; fewer if there are fewer classes.

        `images` are paths, PIL images or uint8 arrays `[H, W, C]`. Raises `DataError` naming an unreadable image, or
        if `top` is below 1 or `images` is a single path.
        """
        if isinstance(images, str | Path):
            raise DataError(f"images is the single path {images}, expected several", "put it into a list")
        _check_top(top)
        results: list[list[Prediction]] = []
        for start in range(0, len(images), CLASSIFY_BATCH):
            results += self.predictions(self._answers(images[start : start + CLASSIFY_BATCH]), top)
        return results

    def preprocess(self, images: Sequence[ImageLike]) -> NDArray[np.float32]:
        """A batch for `infer` and `submit`, float32 `[N, C, H, W]`, made on the processor.

        `images` as for `classify`. Raises `DataError` naming an unreadable image.
        """
        begun = perf_counter_ns()
        batch = self.info.preprocess.batch(images)
        self._preprocess_ns += perf_counter_ns() - begun
        return batch

    def predictions(self, outputs: Mapping[str, NDArray[np.float32]], top: int = 5) -> list[list[Prediction]]:
        """The `top` most probable classes of each image of a batch, from what `infer` or `result` gave."""
        _check_top(top)
        (logits,) = outputs.values()
        return [self._ranked(row, top) for row in logits]

    def sibling(self) -> Session:
        """Another session over the same loaded engine, for another thread; each is closed on its own."""
        runner = self._runner.sibling()
        return Session(runner, self.info, self.why, device_preprocessing=self._device_preprocessing)

    def close(self) -> None:
        """Frees the engine and drops what is in flight; closing twice does nothing."""
        self._runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _feeds(self, batch: Any) -> Mapping[str, Any]:
        return batch if isinstance(batch, Mapping) else {self._first_input: batch}

    def _answers(self, images: Sequence[ImageLike]) -> dict[str, NDArray[np.float32]]:
        if not self._device_preprocessing:
            return self.infer(self.preprocess(images))
        begun = perf_counter_ns()
        pixels = [self.info.preprocess.source_pixels(image) for image in images]
        self._preprocess_ns += perf_counter_ns() - begun
        return self._runner.infer_images(pixels)

    def _ranked(self, logits: NDArray[np.float32], top: int) -> list[Prediction]:
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = shifted / shifted.sum()
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [Prediction(int(i), self.info.labels[i], float(probabilities[i])) for i in order]


def _check_top(top: int) -> None:
    if top < 1:
        raise DataError(f"top is {top}, expected at least 1")


def _check_provider(loader: Backend, provider: str | None) -> None:
    if provider is None or provider in loader.providers:
        return
    there = ", ".join(loader.providers) or "none"
    raise EngineError(f"{loader.name} has no provider {provider!r}, it has {there}", "leave it out")
