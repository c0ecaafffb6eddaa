"""What the documents show: every command and program is run, or says why not; every link leads somewhere."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from command import Command
from document_commands import ROOT, faults, make_targets
from documents import Block, anchors, blocks, commands, file_name, holds_commands, links
from edgewright.cli import cli
from edgewright.cli_help import commands_of
from edgewright.pipeline import Options, Pipeline

COMMANDED = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
)
WIDTH = 80
LINKED = sorted([*COMMANDED, "CHANGELOG.md"])


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", COMMANDED)
def test_every_command_is_right_and_run_or_marked(document: str) -> None:
    found = list(faults(document, read(document)))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("document", LINKED)
def test_links_lead_somewhere(document: str) -> None:
    broken = [f"{document}:{line}: {target}" for line, target in links(read(document)) if _is_broken(document, target)]
    assert not broken, "\n" + "\n".join(broken)


def _is_broken(document: str, target: str) -> bool:
    if re.match(r"[a-z]+:", target):
        return False
    path, _, fragment = target.partition("#")
    file = (ROOT / document).parent / unquote(path) if path else ROOT / document
    if not file.exists():
        return True
    return bool(fragment) and fragment not in anchors(file.read_text(encoding="utf-8"))


# What documents and help must not leave out


def test_make_help_explains_every_target_and_variable() -> None:
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert max(map(len, told)) <= WIDTH
    targets = [line.split()[1] for line in told if line.startswith("  make ") and len(line.split()) > 2]
    assert sorted(targets) == sorted(make_targets())
    variables = re.findall(r"^([A-Z]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert variables
    assert variables == [line.split()[0] for line in told if re.match(r"  [A-Z]+ ", line)]


def test_formats_name_every_schema() -> None:
    sources = [path.read_text() for path in (ROOT / "src/edgewright").rglob("*.py")]
    schemas = {found for source in sources for found in re.findall(r'"edgewright\.([a-z-]+/\d+)"', source)}
    assert "stage/2" in schemas
    told = read("docs/formats.md") + read("docs/contract.md")
    printed = {words.split()[-1] for words in dict(commands_of(cli))}  # edgewright.COMMAND/1, in contract.md
    assert [
        name for name in sorted(schemas) if f"edgewright.{name}" not in told and name.split("/")[0] not in printed
    ] == []


def test_formats_name_every_file_of_a_build_folder(lenet: Path) -> None:
    told = re.sub(r"[A-Z]{3,}", "*", " ".join(re.findall(r"`([^`]+)`", read("docs/formats.md"))))
    patterns = [pattern.replace("[-*]", "*") for pattern in told.split()]
    folder = lenet / "lenet"
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert len(files) > 5
    assert [str(file) for file in files if not any(fnmatch(str(file), pattern) for pattern in patterns)] == []


# Running


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of `lenet`; not to be changed."""
    build_dir = tmp_path_factory.mktemp("lenet")
    stages = Pipeline(Options("lenet", build_dir=build_dir, backends=("onnxruntime",), threads=1))
    with stages.workspace.locked():
        stages.prove()
    return build_dir


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a document's commands are run: an empty folder but for `shoe.png`; modules made there are forgotten."""
    Image.linear_gradient("L").resize((28, 28)).save(tmp_path / "shoe.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("EDGEWRIGHT_CACHE", str(tmp_path / "cache"))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.mark.parametrize("document", [name for name in COMMANDED if any(b.mark is None for b in blocks(read(name)))])
def test_what_it_shows_runs(document: str, scratch: Path, command: Command, request: pytest.FixtureRequest) -> None:
    shown = [block for block in blocks(read(document)) if block.mark is None or file_name(block)]
    if any("lenet" in block.text for block in shown if _is_run(block)):
        shutil.copytree(request.getfixturevalue("lenet"), scratch / "build")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in shown:
        if block.language == "python":
            _run_python(block, document, names, scratch)
        elif holds_commands(block):
            for line, words in commands(block):
                _run_command(words, f"{document}:{line}", command)


def _is_run(block: Block) -> bool:
    return block.language == "python" or holds_commands(block)


def _run_python(block: Block, document: str, names: dict[str, object], scratch: Path) -> None:
    name = file_name(block)
    if name:
        (scratch / name).write_text(block.text, encoding="utf-8")
        return
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, document, "exec"), names)


def _run_command(words: list[str], place: str, command: Command) -> None:
    if words[0] != "edgewright":
        runpy.run_path(words[1], run_name="__main__")
        return
    arguments, output = (words[1:-2], Path(words[-1])) if ">" in words else (words[1:], None)
    done = command(*arguments)
    assert done.code == 0, f"{place}: `{' '.join(words)}` ended with {done.code}:\n{done.err or done.out}"
    if output is not None:
        output.write_text(done.out)
