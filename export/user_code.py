"""A person's own Python, found and run: `path/to/file.py:name` and `package.module:name`.

Importing a file runs it, with all rights of whoever started this process; nothing here protects from code that is
not trusted. A file is imported, so its `if __name__ == "__main__"` part does not run; else it is in its place as with
`python file.py`: it can import its neighbours, and there are no arguments in sys.argv. A module is found as `python -m`
would find it, in the current folder first. What the code prints goes to stderr: stdout belongs to the results.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from edgewright.runtime.errors import EdgewrightError, ModelError
from edgewright.runtime.files import sha256_of

__all__ = ["LIBRARIES", "Place", "UserCode", "attempted", "imported", "own_modules", "place_of"]

T = TypeVar("T")
PREFIXES = ("torchvision", "timm")  # of the other forms of a model's name, for who mistypes them
NAMES_SHOWN = 8
LIBRARIES = ("torch", "torchvision", "timm")  # known by their version, wherever they are
INSTALLED = tuple(f"{os.sep}{folder}{os.sep}" for folder in ("site-packages", "dist-packages"))
STANDARD = tuple(f"{Path(folder)}{os.sep}" for folder in (sysconfig.get_path("stdlib"), Path(os.__file__).parent))
RELATIVE_IMPORT = "attempted relative import with no known parent package"


@dataclass(frozen=True)
class Place:
    """Where a function is: in a file, or in a module found by its name.

    * folder: what is put in front of the import path
    """

    file: Path | None
    module: str
    name: str
    folder: Path

    def __str__(self) -> str:
        return self.module if self.file is None else str(self.file)


@dataclass(frozen=True)
class UserCode:
    """A name in an imported module.

    * file: the module's source file; None if it has none
    """

    value: Any
    file: Path | None


def place_of(model: str) -> Place:
    """The parts of `path/to/file.py:name` or `package.module:name`.

    Raises `ModelError` if a file is missing or no `.py`, if its name is left out (with those in the file), or if this
    is no module's name. Nothing is run.
    """
    if model.endswith(".py"):
        file = _existing(Path(model))
        raise ModelError(
            f"{model} is a file, and which of its functions gives the network is not said", _names_in(file)
        )
    place, _, name = model.rpartition(":")
    if place.endswith(".py"):
        if not name:
            raise ModelError(f"{model} names no function of the file", _names_in(_existing(Path(place))))
        file = _existing(Path(place))
        return Place(file, _unique_module_name(file), name, file.parent)
    if Path(place).is_file() or "/" in place or "\\" in place:
        raise ModelError(f"{place} is no Python file", "give path/to/file.py:factory")
    if not name or not all(part.isidentifier() for part in place.split(".")):
        raise ModelError(
            f"{model!r} is neither a network nor a function",
            "give path/to/file.py:factory or package.module:factory",
        )
    return Place(None, place, name, Path.cwd())


@contextmanager
def imported(place: Place) -> Iterator[UserCode]:
    """Imports the place's module; what holds for its code (see above) does so until the context is left.

    Raises `ModelError` if the module cannot be imported or lacks the name.
    """
    with _importable(place.folder), _without_arguments(place), redirect_stdout(sys.stderr), _noted_modules(place):
        module = attempted(f"{place} cannot be imported", place.folder, lambda: _module(place))
        if not hasattr(module, place.name):
            raise ModelError(f"{place} has no {place.name}", _nearest_names(module, place.name))
        source = getattr(module, "__file__", None)
        yield UserCode(getattr(module, place.name), None if source is None else Path(source))


def attempted(what: str, folder: Path, run: Callable[[], T]) -> T:
    """What `run` yields. Raises `ModelError`: `what`, and the error's type, message and line in `folder`.

    Errors of this project pass as they are; so does KeyboardInterrupt, but not SystemExit.
    """
    try:
        return run()
    except EdgewrightError:
        raise
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())
        if isinstance(error, SyntaxError):  # its message alone: the place follows, as for every other error
            words = error.msg
        reason = f"{type(error).__name__}: {words}" if words else type(error).__name__
        raise ModelError(f"{what}: {reason}{_where(error, folder)}", _remedy(words)) from error


def own_modules(package: str = "") -> dict[str, Path]:
    """The source files of the imported modules that are a person's own, by the modules' names.

    Left out are those of Python, of installed libraries and of this project; those of `package` count wherever it is.
    """
    found = {}
    for name, module in list(sys.modules.items()):
        source = getattr(module, "__file__", None)
        top = name.partition(".")[0]
        if not isinstance(source, str) or top in ("__main__", "edgewright", *LIBRARIES):
            continue
        installed = source.startswith(STANDARD) or any(folder in source for folder in INSTALLED)
        if (top == package or not installed) and Path(source).is_file():
            found[name] = Path(source)
    return found


_brought: set[str] = set()  # modules that the last file brought along


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts `folder` in front of the import path."""
    writes_bytecode = sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # it is valid by the second, and the folder may be read-only
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_bytecode
        if str(folder) in sys.path:  # the person's code may have changed it
            sys.path.remove(str(folder))


@contextmanager
def _without_arguments(place: Place) -> Iterator[None]:
    """Hides the arguments of this process, which are not for the person's code."""
    arguments = sys.argv
    sys.argv = [str(place)]
    try:
        yield
    finally:
        sys.argv = arguments


@contextmanager
def _noted_modules(place: Place) -> Iterator[None]:
    """Lets the code import its helpers anew: those of the file before may have the same names."""
    for name in _brought:
        sys.modules.pop(name, None)
    _brought.clear()
    if place.file is None:
        yield
        return
    before = set(sys.modules)
    try:
        yield
    finally:  # a package that was there stays whole
        _brought.update(name for name in own_modules() if name not in before and name.partition(".")[0] not in before)


def _module(place: Place) -> ModuleType:
    if place.file is None:
        return _module_by_name(place.module)
    spec = importlib.util.spec_from_file_location(place.module, place.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[place.module] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[place.module]
        raise
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports what is not
        near = difflib.get_close_matches(name, PREFIXES, n=1)
        hint = f"did you mean {near[0]}:…?" if near else "looked for in the current folder and among what is installed"
        raise ModelError(f"there is no module {error.name}", hint) from None


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ModelError(f"there is no file {file}", "give path/to/file.py:factory")
    return file.resolve()


def _unique_module_name(file: Path) -> str:
    return f"edgewright_factory_{sha256_of(str(file).encode())[:12]}"


def _names_in(file: Path) -> str:
    """A remedy that names what stands in the file, read without running it."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError, OSError):
        body = []
    names = [
        statement.name
        for statement in body
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) and not statement.name.startswith("_")
    ]
    if not names:
        return f"give {file.name}:factory; no function is defined there"
    return f"give {' or '.join(f'{file.name}:{name}' for name in names[:NAMES_SHOWN])}"


def _remedy(words: str) -> str:
    if words.startswith(RELATIVE_IMPORT):
        return "a file alone is in no package: give package.module:factory, from the folder that holds the package"
    return "correct it there"


def _nearest_names(module: ModuleType, name: str) -> str:
    public = [word for word, value in vars(module).items() if callable(value) and not word.startswith("_")]
    near = difflib.get_close_matches(name, public, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(near)}?"
    own = [word for word in public if getattr(vars(module)[word], "__module__", None) == module.__name__]
    return f"there are {', '.join(own[:NAMES_SHOWN])}" if own else "it defines no function"


def _where(error: BaseException, folder: Path) -> str:
    """The line in `folder` that led to the error, where there is one; else the line that raised it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(folder.resolve())]
    for frame in reversed(theirs or frames):
        if frame.filename != __file__ and "importlib" not in frame.filename:
            return f" ({frame.filename}:{frame.lineno})"
    return ""
