"""What a path stands for in a measurement: engines of a build folder or of a bundle, an engine file, an ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..backends import BACKENDS, Runner, backend_named
from ..backends.base import Backend
from ..choice import Choice, chosen, stands_for_bundle
from ..device.identity import GPU_DIALECTS
from ..engine_files import ENGINES_FOLDER, read_info
from ..errors import EdgewrightError, EngineError
from ..files import sha256_of
from ..specs import EngineInfo, TensorSpec
from .results import engine_words

__all__ = ["Candidate", "Selection", "baseline_of", "candidates_of"]

ONNX_SUFFIX = ".onnx"
OF_ONNX_FILES = "onnxruntime"


@dataclass(frozen=True)
class Candidate:
    """An engine that is to be measured, verified and not yet loaded.

    * path, why: as in `Result`; info: None for an ONNX file that is run as it is
    * engine: the bytes that the backend opens
    * inputs: what it takes
    """

    path: str
    backend: Backend
    engine: bytes
    info: EngineInfo | None
    why: str
    inputs: tuple[TensorSpec, ...]

    @property
    def words(self) -> str:
        """The engine for a person, such as "onnxruntime int8"."""
        return engine_words(self.backend.name, self.precision)

    @property
    def precision(self) -> str:
        """The one it was built for, "" for an ONNX file."""
        return "" if self.info is None else self.info.precision

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of one image as the first input takes it, such as `(3, 64, 64)`."""
        return self.inputs[0].shape[1:]

    @property
    def sha256(self) -> str:
        """Of the engine."""
        return sha256_of(self.engine) if self.info is None else self.info.engine_sha256

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.backend.dialect in GPU_DIALECTS

    def open(self, threads: int) -> Runner:
        """Loads it. Raises `EngineError` that names it."""
        dla = None if self.info is None else self.info.dla
        try:
            return self.backend.open(self.engine, threads=threads, dla=dla)
        except EngineError as error:
            remedy = "is it a whole ONNX file, with its weights inside?" if self.info is None else error.remedy
            raise EngineError(f"{self.path}: {error.message}", remedy) from error


@dataclass(frozen=True)
class Selection:
    """Which engines of a build folder or bundle are meant.

    * backends, precisions: empty for what is recommended; of several each combination that is there
    * everything: all that run here
    * trust: further arguments of `chosen`, for a bundle
    """

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    everything: bool = False
    trust: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.backends:
            backend_named(name)

    def __str__(self) -> str:
        return " ".join(word for word in ("/".join(self.backends), "/".join(self.precisions)) if word) or "any"


def candidates_of(path: Path, selection: Selection) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """The engines that `path` stands for, in the order in which they were asked for, and a note on each left out.

    An engine that cannot run here is left out where others can. Raises `EngineError` if there is none to run, it is not
    what it should be, or `path` is nothing that can be run; `BundleError` and its kinds if a bundle is not taken.
    """
    if not path.exists() and not path.suffix:
        raise EngineError(f"there is no {path}", "give a build folder, a bundle, an engine or an .onnx file")
    if stands_for_bundle(path):
        return _runnable(path, _of_bundle(path, selection))
    if path.is_dir():
        return _runnable(path, _of_folder(path, selection))
    if _is_engine(path):
        choices = [(str(path), chosen(path, *_single(path, selection), **_given(selection.trust)))]
        return _runnable(path, choices)
    return _of_onnx_file(path, selection), ()


def baseline_of(path: Path, selection: Selection) -> Candidate:
    """The one engine that `path` stands for, to compare others with. Raises `EngineError` as `candidates_of` does."""
    if path.is_file() and (_is_engine(path) or path.suffix.lower() == ONNX_SUFFIX):
        backends = () if _is_engine(path) else selection.backends  # a file says what it is
        selection = Selection(backends)
    found, _ = candidates_of(path, selection)
    if len(found) > 1:
        names = ", ".join(candidate.words for candidate in found)
        raise EngineError(
            f"{path} stands for {len(found)} engines ({names}), and one is to be compared with",
            "name it with --backend and --precision, or its file",
        )
    return found[0]


def _of_bundle(path: Path, selection: Selection) -> Iterator[tuple[str, Choice]]:
    if selection.everything:
        raise EngineError(
            f"{path} is a bundle: which of its engines run here is known only for those that are named",
            "name them with --backend and --precision",
        )
    for backend, precision in product(selection.backends or (None,), selection.precisions or (None,)):
        yield str(path), chosen(path, backend, precision, **_given(selection.trust))


def _of_folder(folder: Path, selection: Selection) -> list[tuple[str, Choice]]:
    """The recommended engine, or all that fit; a folder that recommends none has to be told."""
    if not (folder / ENGINES_FOLDER).is_dir():
        raise EngineError(
            f"{folder} is no build folder: it has no {ENGINES_FOLDER}/", "give build/MODEL of edgewright engine MODEL"
        )
    trust = _given(selection.trust)
    if not (selection.backends or selection.precisions or selection.everything):
        choice = chosen(folder, **trust)
        return [(str(folder), choice)]
    infos = {path: read_info(path) for path in sorted((folder / ENGINES_FOLDER).glob("*.json"))}
    backends = selection.backends or tuple(BACKENDS)
    precisions = selection.precisions or tuple(dict.fromkeys(info.precision for info in infos.values()))
    wanted = [
        path.with_suffix(backend_named(backend).suffix)
        for backend, precision in product(backends, precisions)
        for path, info in infos.items()
        if (info.backend, info.precision) == (backend, precision)
    ]
    if not wanted:
        there = ", ".join(engine_words(info.backend, info.precision) for info in infos.values()) or "none"
        raise EngineError(f"{folder} has no {selection} engine, it has {there}", "name one of those")
    return [(str(path), chosen(path, **trust)) for path in wanted]


def _of_onnx_file(path: Path, selection: Selection) -> tuple[Candidate, ...]:
    if path.suffix.lower() != ONNX_SUFFIX:
        raise EngineError(
            f"{path} is neither a build folder, a bundle, an engine with its .json beside it, nor an .onnx file",
            "give one of those",
        )
    if selection.precisions or selection.everything:
        raise EngineError(
            f"{path} is one ONNX file and is run as it is, in no other precision",
            "leave out --precision and --all, or give the build folder",
        )
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}", "check the path") from error
    found = []
    for name in selection.backends or (OF_ONNX_FILES,):
        backend = backend_named(name)
        engine = backend.engine_of(graph)
        absence = backend.absence()
        if absence is not None:
            raise EngineError(f"{path} cannot be run by {name}: {absence.reason}", absence.hint)
        unread = Candidate(str(path), backend, engine, None, "an ONNX file, run as it is", ())
        with unread.open(threads=1) as runner:
            found.append(replace(unread, inputs=runner.inputs))
    return tuple(found)


def _runnable(path: Path, choices: Iterable[tuple[str, Choice]]) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """Those that can run here, and why the others cannot; the reason of the first is the error if none can."""
    found: list[Candidate] = []
    notes: list[str] = []
    failures: list[EdgewrightError] = []
    for place, choice in choices:
        backend = backend_named(choice.info.backend)
        words = " ".join(word for word in (choice.info.backend, choice.info.precision, choice.info.target) if word)
        absence = backend.absence() or backend.cannot_run(choice.info.target)
        if absence is None:
            found.append(Candidate(place, backend, choice.engine, choice.info, choice.why, choice.info.inputs))
        else:
            failures.append(EngineError(f"{words} of {path} cannot run here: {absence.reason}", absence.hint))
            notes.append(f"{words} cannot run here: {absence.reason}")
    if not found:
        raise failures[0]
    return tuple(found), tuple(notes)


def _is_engine(path: Path) -> bool:
    """Whether a JSON file beside it says that it is an engine."""
    described = path.with_suffix(".json")
    if path == described or not described.is_file():
        return False
    if path.suffix.lower() != ONNX_SUFFIX:
        return True
    try:
        read_info(described)
    except EngineError:
        return path.parent.name == ENGINES_FOLDER  # a damaged one; elsewhere the JSON is somebody else's
    return True


def _single(path: Path, selection: Selection) -> Sequence[str | None]:
    """The backend and precision that an engine file is expected to be."""
    if len(selection.backends) > 1 or len(selection.precisions) > 1:
        raise EngineError(f"{path} is one engine, asked for were several ({selection})", "give the build folder")
    return [*selection.backends, None][0], [*selection.precisions, None][0]


def _given(trust: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in trust.items() if value}
