"""What a path stands for in a measurement: engines of a build folder or of a bundle, an engine file, an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..backends import BACKENDS, Runner, backend_named
from ..backends.base import Absence, Backend
from ..choice import Choice, chosen, stands_for_bundle
from ..device.identity import GPU_DIALECTS
from ..engine_files import ENGINES_FOLDER, read_info
from ..errors import EngineError
from ..files import sha256_of
from ..specs import EngineInfo, TensorSpec
from .results import engine_words

__all__ = ["Candidate", "Selection", "baseline_of", "bytes_of_file", "candidates_of", "selections_for"]

ONNX_SUFFIX = ".onnx"
OF_ONNX_FILES = "onnxruntime"
WHAT_RUNS = "a build folder, a bundle, an engine with its .json beside it, or an .onnx file"
WHOLE = "is it a whole ONNX file? Weights beside it are read where edgewright[build] is installed"
PARTS = {
    "backends": "--backend",
    "precisions": "--precision",
    "everything": "--all",
    "trust": "what is asked of a bundle",
}


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
        return engine_words(self.backend.name, self.precision, self.path)

    @property
    def precision(self) -> str:
        """The one it was built for, "" for an ONNX file."""
        return "" if self.info is None else self.info.precision

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of one image as the first input takes it, such as `(3, 64, 64)`; empty if there is none."""
        return self.inputs[0].shape[1:] if self.inputs else ()

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
            remedy = WHOLE if self.info is None else error.remedy
            raise EngineError(f"{self.path}: {error.message}", remedy) from error


@dataclass(frozen=True)
class Selection:
    """Which engines of a build folder or bundle are meant.

    * backends, precisions: empty for what is recommended; of several each combination that is there
    * everything: all of a build folder that run here
    * trust: further arguments of `chosen`, for a bundle
    """

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    everything: bool = False
    trust: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.backends:
            backend_named(name)
        given = {name: value for name, value in self.trust.items() if value}
        object.__setattr__(self, "trust", given)

    def __str__(self) -> str:
        return " ".join(word for word in ("/".join(self.backends), "/".join(self.precisions)) if word) or "any"

    def meant_for(self, path: Path) -> Selection:
        """Without what says nothing about `path`: an engine says what it is, and only a bundle needs to be trusted."""
        bundle = stands_for_bundle(path)
        several = bundle or path.is_dir()
        return Selection(
            backends=self.backends if several or not _is_engine(path) else (),
            precisions=self.precisions if several else (),
            everything=self.everything and several and not bundle,
            trust=self.trust if bundle else {},
        )


def selections_for(selection: Selection, *paths: Path) -> tuple[Selection, ...]:
    """What of `selection` is meant for each of the paths. Raises `EngineError` if a part says nothing about any."""
    found = tuple(selection.meant_for(path) for path in paths)
    for name, words in PARTS.items():
        if getattr(selection, name) and not any(getattr(each, name) for each in found):
            raise EngineError(f"{words} says nothing about {' or '.join(map(str, paths))}", "leave it out")
    return found


def bytes_of_file(path: Path) -> bytes:
    """Raises `EngineError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}", "check the path") from error


def candidates_of(
    path: Path, selection: Selection, *, graph_of: Callable[[Path], bytes] = bytes_of_file
) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """The engines that `path` stands for, in the order in which they were asked for, and notes on those left out.

    `graph_of` reads an ONNX file, with all its weights. What it raises is passed on.

    An engine that cannot run here is left out where others can. Raises `EngineError` if there is none to run, it is not
    what it should be, or `path` is nothing that can be run; `BundleError` and its kinds if a bundle is not taken.
    """
    (selection,) = selections_for(selection, path)
    if stands_for_bundle(path):
        return _runnable(path, _of_bundle(path, selection))
    if path.is_dir():
        choices = _of_folder(path, selection)
        found, absent = _runnable(path, choices)
        return found, (*absent, *_unmatched(path, selection, choices))
    if not path.is_file():
        raise EngineError(f"there is no {path}", f"give {WHAT_RUNS}")
    if _is_engine(path):
        return _runnable(path, [(str(path), _named(path))])
    if path.suffix.lower() != ONNX_SUFFIX:
        raise EngineError(f"{path} is nothing that can be run", f"give {WHAT_RUNS}")
    return _of_graph(str(path), graph_of(path), selection.backends or (OF_ONNX_FILES,)), ()


def baseline_of(path: Path, selection: Selection, *, graph_of: Callable[[Path], bytes] = bytes_of_file) -> Candidate:
    """The one engine that `path` stands for, to compare others with. Raises `EngineError` as `candidates_of` does."""
    found, _ = candidates_of(path, replace(selection, everything=False), graph_of=graph_of)
    if len(found) > 1:
        names = ", ".join(candidate.words for candidate in found)
        raise EngineError(
            f"{path} stands for {len(found)} engines ({names}), and one is to be compared with",
            "name it with --backend and --precision, or its file",
        )
    return found[0]


def _of_bundle(path: Path, selection: Selection) -> Iterator[tuple[str, Choice]]:
    for backend, precision in product(selection.backends or (None,), selection.precisions or (None,)):
        yield str(path), chosen(path, backend, precision, **selection.trust)


def _of_folder(folder: Path, selection: Selection) -> list[tuple[str, Choice]]:
    """The recommended engine, or all that fit; a folder that recommends none has to be told."""
    if not (folder / ENGINES_FOLDER).is_dir():
        raise EngineError(f"{folder} is no build folder: it has no {ENGINES_FOLDER}/", f"give {WHAT_RUNS}")
    if not (selection.backends or selection.precisions or selection.everything):
        return [(str(folder), chosen(folder))]
    infos = {path: read_info(path) for path in sorted((folder / ENGINES_FOLDER).glob("*.json"))}
    wanted = [
        described.with_suffix(backend.suffix)
        for backend in map(backend_named, selection.backends or BACKENDS)
        for precision in selection.precisions or backend.precisions
        for described, info in infos.items()
        if (info.backend, info.precision) == (backend.name, precision)
    ]
    if not wanted:
        there = ", ".join(dict.fromkeys(f"{info.backend} {info.precision}" for info in infos.values()))
        raise EngineError(f"{folder} has no {selection} engine, it has {there or 'none'}", "name one that is there")
    return [(str(path), _named(path)) for path in wanted]


def _unmatched(folder: Path, selection: Selection, choices: Sequence[tuple[str, Choice]]) -> Iterator[str]:
    """What was named and is not there, beside what is."""
    built = {name for _, choice in choices for name in (choice.info.backend, choice.info.precision)}
    for name in (*selection.backends, *selection.precisions):
        if name not in built:
            yield f"{folder} has no {name} engine"


def _named(engine: Path) -> Choice:
    return replace(chosen(engine), why="named")


def _of_graph(path: str, graph: bytes, backends: Iterable[str]) -> tuple[Candidate, ...]:
    found = []
    for name in backends:
        backend = backend_named(name)
        unread = Candidate(path, backend, backend.engine_of(graph), None, "an ONNX file, run as it is", ())
        with unread.open(threads=1) as runner:
            found.append(replace(unread, inputs=runner.inputs))
    return tuple(found)


def _runnable(path: Path, choices: Iterable[tuple[str, Choice]]) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """Those that can run here, and why the others cannot. Raises `EngineError` if none can."""
    found: list[Candidate] = []
    absent: dict[Absence, list[str]] = {}
    for place, choice in choices:
        info, backend = choice.info, backend_named(choice.info.backend)
        absence = backend.absence() or backend.cannot_run(info.target)
        if absence is None:
            found.append(Candidate(place, backend, choice.engine, info, choice.why, info.inputs))
        else:
            words = (info.backend, info.precision, info.target)
            absent.setdefault(absence, []).append(" ".join(word for word in words if word))
    notes = {absence: f"{', '.join(names)} cannot run here: {absence.reason}" for absence, names in absent.items()}
    if not found:
        absence, note = next(iter(notes.items()))
        raise EngineError(f"nothing of {path} to run: {note}", absence.hint)
    return tuple(found), tuple(notes.values())


def _is_engine(path: Path) -> bool:
    """Whether a JSON file beside it says that it is an engine."""
    described = path.with_suffix(".json")
    if path == described or not described.is_file():
        return False
    if path.suffix.lower() != ONNX_SUFFIX or path.parent.name == ENGINES_FOLDER:
        return True
    try:
        read_info(described)
    except EngineError:
        return False  # beside an ONNX file it may be anything
    return True
