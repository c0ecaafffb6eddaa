"""`Session`: an engine, its preprocessing and its labels behind three calls, on any device, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import backend_named
from .backends.base import Backend, Runner
from .engine_files import ENGINES_FOLDER, description_of, read_info, verified_bytes
from .errors import DataError, EngineError, WorkspaceError
from .files import read_json
from .preprocess import ImageLike
from .specs import EngineInfo, TensorSpec

__all__ = ["REPORT_FILE", "Prediction", "Session"]

REPORT_FILE = "report.json"
CLASSIFY_BATCH = 16
REBUILD = "run edgewright engine MODEL again"


@dataclass(frozen=True)
class Prediction:
    """One class for one image; probability is the softmax of the logits, 0…1."""

    index: int
    label: str
    probability: float


class Session:
    """A loaded engine. Use it in a `with`, or close it.

    >>> with Session.open("build/mobilenet_effnet_b0") as session:
    ...     (predictions,) = session.classify(["shoe.png"], top=3)
    """

    def __init__(self, runner: Runner, info: EngineInfo, why: str) -> None:
        self._runner = runner
        self.info = info
        self.why = why

    @classmethod
    def open(
        cls, path: str | Path, *, backend: str | None = None, precision: str | None = None, threads: int = 0
    ) -> Session:
        """Opens an engine file, or the engine of a build folder that was asked for or is recommended there.

        `why` says what was picked and for what reason. What is verified is what is loaded: the file is read once,
        its hash compared with the one beside it, and the engine loaded from the same bytes.
        Raises `EngineError` if there is no such engine, it was changed, or its backend is not installed.
        """
        path = Path(path)
        if path.is_dir():
            described, why = _pick(path, backend, precision)
        else:
            described, why = description_of(path), f"{path.name} was named"
        info = read_info(described)
        if (backend or info.backend) != info.backend or (precision or info.precision) != info.precision:
            raise EngineError(
                f"{path} is {info.backend} {info.precision}, asked for was {backend or 'any'} {precision or 'any'}"
            )
        loader = backend_named(info.backend)
        _check_version(loader, info)
        engine = verified_bytes(described.with_suffix(loader.suffix), info)
        classes = info.outputs[0].shape[-1]
        if classes != len(info.labels):
            raise EngineError(f"{described} names {len(info.labels)} labels for {classes} classes", "build it again")
        return cls(loader.open(engine, threads=threads), info, why)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of the inputs."""
        return self._runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of the outputs."""
        return self._runner.outputs

    def infer(self, batch: NDArray[np.float32] | Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Outputs by name for a float32 batch `[N, C, H, W]`, or for inputs by name; new arrays, the caller's own."""
        return self._runner.infer(batch if isinstance(batch, Mapping) else {self.inputs[0].name: batch})

    def classify(self, images: Sequence[ImageLike], top: int = 5) -> list[list[Prediction]]:
        """The `top` most probable classes of each image, best first; fewer if there are fewer classes.

        `images` are paths, PIL images or uint8 arrays `[H, W, C]`. Raises `DataError` naming an unreadable image, or
        if `top` is below 1 or `images` is a single path.
        """
        if top < 1:
            raise DataError(f"top is {top}, expected at least 1")
        if isinstance(images, str | Path):
            raise DataError(f"images is the single path {images}, expected several", "put it into a list")
        results: list[list[Prediction]] = []
        for start in range(0, len(images), CLASSIFY_BATCH):
            batch = self.info.preprocess.batch(images[start : start + CLASSIFY_BATCH])
            (logits,) = self.infer(batch).values()
            results += [self._ranked(row, top) for row in logits]
        return results

    def _ranked(self, logits: NDArray[np.float32], top: int) -> list[Prediction]:
        shifted = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = shifted / shifted.sum()
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [Prediction(int(i), self.info.labels[i], float(probabilities[i])) for i in order]

    def close(self) -> None:
        """Frees the engine; closing twice does nothing."""
        self._runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_version(loader: Backend, info: EngineInfo) -> None:
    """Says in our words what a library would say of another version's engine, if it noticed."""
    built_with = info.versions.get(loader.name)
    if loader.version_bound and loader.absence() is None and built_with != loader.version():
        raise EngineError(
            f"the engine was built with {loader.name} {built_with}, here is {loader.version()}", "build it again here"
        )


def _pick(folder: Path, backend: str | None, precision: str | None) -> tuple[Path, str]:
    """The description of one engine of a build folder, and why it is this one."""
    report = _report_of(folder)
    recommended = report.get("recommended")
    if backend is None and precision is None and recommended is not None:
        try:
            path = (folder / recommended["path"]).with_suffix(".json")
            return path, f"{recommended['backend']} {recommended['precision']} is the fastest engine that passed"
        except (KeyError, TypeError) as error:
            raise EngineError(f"{folder / REPORT_FILE} is damaged ({error!r})", REBUILD) from error
    fitting: list[tuple[Path, EngineInfo]] = []
    for path in sorted((folder / ENGINES_FOLDER).glob("*.json")):
        info = read_info(path)
        if backend in (None, info.backend) and precision in (None, info.precision):
            fitting.append((path, info))
    wanted = " ".join(word for word in (backend, precision) if word) or "recommended"
    if not fitting:
        raise EngineError(f"{folder} has no {wanted} engine", "run edgewright engine MODEL to build it")
    if len(fitting) > 1:  # of GPU engines the one for the GPU that is here
        here = [(path, info) for path, info in fitting if info.target in (None, backend_named(info.backend).device())]
        fitting = here if len(here) == 1 else fitting
    if len(fitting) > 1:
        words = ([info.backend, info.precision, info.target or ""] for _, info in fitting)
        found = ", ".join(" ".join(word for word in each if word) for each in words)
        raise EngineError(
            f"{folder} has several engines ({found}), and it is not clear which is meant by {wanted}",
            "name one, such as --precision fp32, or its file",
        )
    ((path, info),) = fitting
    return path, f"{info.backend} {info.precision} is the only engine that was asked for"


def _report_of(folder: Path) -> dict[str, Any]:
    if not (folder / REPORT_FILE).exists():
        return {}
    try:
        report = read_json(folder / REPORT_FILE)
    except WorkspaceError as error:
        raise EngineError(error.message, REBUILD) from error
    if not isinstance(report, dict):
        raise EngineError(f"{folder / REPORT_FILE} is not a report", REBUILD)
    return report
