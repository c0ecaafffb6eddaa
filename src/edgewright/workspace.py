"""A build folder whose artefacts are reused by content.

Each stage has a key: the hash of its parts (weights, graph, images, options, source files, library versions). The key
and its parts stand in `STAGE.key.json` beside the artefacts, with the SHA-256 of each. A stage is reused if the key is
the same and every artefact still has its hash; otherwise the log names what changed. Time stamps play no role.

A key file carries a hash of itself. It is removed before its stage is made again, together with the old artefacts, and
written last: whatever stops a run, what has a key is whole and what has none is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgewright.runtime.errors import WorkspaceError
from edgewright.runtime.files import TEMPORARY_PREFIX, read_json, sha256_of, sha256_of_file, write_json

__all__ = ["FIRST_TIME", "Observer", "StageRun", "Workspace", "library_versions", "machine", "source_hash"]

LOCK_FILE = ".lock"
KEY_SUFFIX = ".key.json"
SCHEMA = "edgewright.stage/2"
FIRST_TIME = ("first build",)


@dataclass(frozen=True)
class StageRun:
    """What became of one stage.

    * seconds: of making it, now or when it was made; cached: whether it was reused
    * changed: the parts for which it was made again
    * facts: what the stage has to say, plain values
    * bytes: of the files that it wrote
    """

    name: str
    seconds: float
    cached: bool
    key: str
    changed: tuple[str, ...]
    facts: Mapping[str, Any]
    bytes: int = 0


class Observer:
    """What a caller wants to hear while the stages run; this one ignores everything."""

    def started(self, stage: str) -> None:
        """A stage is being made."""

    def progressed(self, stage: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps of a stage are finished."""

    def finished(self, run: StageRun) -> None:
        """A stage was made or reused."""


class Workspace:
    """The build folder of one model. Use `locked()` around whatever writes to it."""

    def __init__(self, folder: Path, observer: Observer | None = None) -> None:
        self.folder = folder
        self.observer = observer or Observer()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of this folder; the lock goes with the process, however that ends.

        Raises `WorkspaceError` if another run holds it or the folder cannot be written.
        """
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with self._explained():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove_leftovers()
            yield
        finally:
            os.close(handle)

    def path(self, name: str) -> Path:
        """The artefact `name` in this folder."""
        return self.folder / name

    def forget(self, *names: str) -> None:
        """Removes what no longer holds; names that do not exist are fine."""
        with self._explained():
            for name in names:
                self.path(name).unlink(missing_ok=True)

    def stage(
        self,
        name: str,
        parts: Mapping[str, str],
        outputs: Sequence[str],
        make: Callable[[], Mapping[str, Any]],
    ) -> StageRun:
        """Reuses the `outputs` of stage `name`, or calls `make`, which writes them and returns the stage's facts."""
        key = sha256_of("\n".join(f"{part}={parts[part]}" for part in sorted(parts)).encode())
        record = self._record(name)
        changed = self._changes(record, key, parts, outputs, name)
        if record and not changed:
            run = StageRun(name, record["seconds"], True, key, (), record["facts"], self._bytes(outputs))
        else:
            self.forget(f"{name}{KEY_SUFFIX}", *outputs)
            self.observer.started(name)
            began = time.monotonic()
            facts = dict(make())
            seconds = time.monotonic() - began
            content = {
                "schema": SCHEMA,
                "key": key,
                "parts": dict(parts),
                "outputs": {output: sha256_of_file(self.path(output)) for output in outputs},
                "seconds": seconds,
                "facts": facts,
            }
            write_json(self._record_path(name), content | {"sha256": _digest(content)})
            run = StageRun(name, seconds, False, key, changed, facts, self._bytes(outputs))
        self.observer.finished(run)
        return run

    def _bytes(self, outputs: Sequence[str]) -> int:
        return sum(self.path(output).stat().st_size for output in outputs)

    def _record_path(self, name: str) -> Path:
        return self.folder / f"{name}{KEY_SUFFIX}"

    def _record(self, name: str) -> dict[str, Any] | None:
        """What the key file says; None if it is damaged, empty if there is none."""
        path = self._record_path(name)
        if not os.path.lexists(path):
            return {}
        try:
            record = read_json(path)
        except WorkspaceError:
            return None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            return None
        return record if record.pop("sha256", None) == _digest(record) else None

    def _changes(
        self, record: Mapping[str, Any] | None, key: str, parts: Mapping[str, str], outputs: Sequence[str], name: str
    ) -> tuple[str, ...]:
        """The names of the parts or artefacts that differ from `record`; empty if all is as it was."""
        if record is None:
            return (f"{name}{KEY_SUFFIX}",)
        if not record:
            return FIRST_TIME
        if record["key"] != key:
            old = record["parts"]
            return tuple(sorted(part for part in {*old, *parts} if old.get(part) != parts.get(part)))
        return tuple(output for output in outputs if not self._is_intact(output, record["outputs"].get(output)))

    def _is_intact(self, output: str, expected: str | None) -> bool:
        try:
            return sha256_of_file(self.path(output)) == expected
        except OSError:
            return False

    def _remove_leftovers(self) -> None:
        for path in list(self.folder.rglob(f"{TEMPORARY_PREFIX}*")):
            if path.is_dir():  # of a run that was killed; nobody else holds the lock
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what an error of the file system means for this folder."""
        try:
            yield
        except BlockingIOError:
            raise WorkspaceError(
                f"another run is using {self.folder}", "wait for it to end, or choose another --build-dir"
            ) from None
        except OSError as error:
            place = "" if error.filename is None or Path(error.filename) == self.folder else f": {error.filename}"
            raise WorkspaceError(
                f"the build folder {self.folder} cannot be written ({error.strerror or error}{place})",
                "choose another --build-dir",
            ) from error


def _digest(record: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(record, sort_keys=True).encode())


def source_hash(*modules: str) -> str:
    """SHA-256 over the source files of modules or packages of Edgewright, such as "export" or "optimize/plan.py".

    A file of another kind, such as a template, is named with its suffix.
    """
    root = Path(__file__).parent
    files: list[Path] = []
    for module in modules:
        path = root / module
        found = [path] if path.suffix else sorted(path.rglob("*.py"))
        assert found, f"{module} has no source files"
        files += found
    return sha256_of("\n".join(f"{path.relative_to(root)} {sha256_of_file(path)}" for path in files).encode())


def library_versions(*distributions: str) -> str:
    """Installed versions as one string, such as "torch 2.6.0, onnx 1.17.0"; nothing is imported."""
    found: list[str] = []
    for distribution in distributions:
        try:
            found.append(f"{distribution} {metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    """The processor and its number of cores, which engines' numbers and speed depend on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the platform's name has to do
    return f"{model}, {os.cpu_count()} cores"
