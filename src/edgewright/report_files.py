"""The files of a report: `report.json` from a run, and from it alone the page and the Markdown."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewright.compare import Comparison, compare_builds
from edgewright.compare_engines import Build
from edgewright.evidence import GALLERY_FILE, evidence_of
from edgewright.outcome import HTML_FILE, MARKDOWN_FILE, Outcome
from edgewright.provenance import provenance_of
from edgewright.report import engine_document, stage_document
from edgewright.runtime.choice import REPORT_FILE
from edgewright.runtime.errors import WorkspaceError
from edgewright.runtime.files import read_json, sha256_of, sha256_of_file, write_bytes, write_json
from edgewright.workspace import library_versions, source_hash

if TYPE_CHECKING:
    from edgewright.pipeline import Pipeline

__all__ = ["compared", "published", "read_report", "rewritten", "write_pages"]

CODE = "report_files.py"
PAGE_CODE = (
    *(f"report_{part}.py" for part in ("answers", "figures", "markdown", "page", "view")),
    *(f"templates/report.{kind}" for kind in ("html.j2", "css")),
)
SCHEMA = "edgewright.engine/1"
REMEDY = "give a build folder of edgewright engine, or its report.json"
NEEDED = ("model", "verdict", "recommended", "reference", "engines")


def published(pipeline: Pipeline, outcome: Outcome, arguments: Sequence[str]) -> dict[str, Any]:
    """The document of a run, written as `report.json`, `report.html` and `report.md`; `arguments` are the command's."""
    fields = evidence_of(pipeline, outcome)
    document: dict[str, Any] = _in_unicode(
        {
            **engine_document(outcome),
            **fields,
            "stages": [stage_document(run) for run in pipeline.runs],
            "provenance": provenance_of(pipeline, arguments),
        }
    )
    write_json(pipeline.workspace.path(REPORT_FILE), document)
    write_pages(pipeline, document)
    return document


def _in_unicode(value: Any) -> Any:
    """Bytes of file names that are no UTF-8, which Python carries as lone surrogates, spelled out instead."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_in_unicode(name): _in_unicode(each) for name, each in value.items()}
    return [_in_unicode(each) for each in value] if isinstance(value, list | tuple) else value


def write_pages(pipeline: Pipeline, document: Mapping[str, Any]) -> None:
    """The stage that makes the page and the Markdown, where a fact of the document has changed."""
    parts = {
        "facts": _identity(document),
        "pictures": _digest(pipeline.workspace.path(GALLERY_FILE)),
        "page code": source_hash(*PAGE_CODE),
        "libraries": library_versions("jinja2", "matplotlib"),
    }

    def make() -> Mapping[str, Any]:
        _write(pipeline.workspace.folder, document)
        return {}

    pipeline.context.stage("report", parts, (HTML_FILE, MARKDOWN_FILE), make, code=CODE)


def rewritten(folder: Path) -> tuple[Path, Path]:
    """The page and the Markdown of a finished build folder, or of its `report.json`, made again from what is in it.

    Raises `WorkspaceError` if there is no report, or none that can be shown.
    """
    document = read_report(folder)
    with _explained(folder):
        return _write(folder if folder.is_dir() else folder.parent, document)


def compared(first: Path, second: Path) -> Comparison:
    """Two builds side by side, each a build folder or a `report.json`. Raises `WorkspaceError` as `read_report`."""
    builds = [Build(path, read_report(path), path if path.is_dir() else path.parent) for path in (first, second)]
    with _explained(first, second):
        return compare_builds(*builds)


@contextlib.contextmanager
def _explained(*paths: Path) -> Iterator[None]:
    """Says of a document that lacks what it must have that it is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        where = " or ".join(str(path) for path in paths)
        raise WorkspaceError(
            f"the report of {where} is damaged ({type(error).__name__}: {error})", "run edgewright engine again"
        ) from error


def read_report(path: Path) -> dict[str, Any]:
    """The document of a build folder, or of a `report.json` itself. Raises `WorkspaceError` if it is none."""
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        document = read_json(file)
    except WorkspaceError as error:
        raise WorkspaceError(error.message, REMEDY) from error
    missing = [name for name in NEEDED if not isinstance(document, dict) or name not in document]
    if missing or document.get("schema") != SCHEMA:
        raise WorkspaceError(f"{file} is no document {SCHEMA}", REMEDY)
    return dict(document)


def _write(folder: Path, document: Mapping[str, Any]) -> tuple[Path, Path]:
    from edgewright.report_markdown import report_markdown
    from edgewright.report_page import report_html

    page, text = folder / HTML_FILE, folder / MARKDOWN_FILE
    write_bytes(page, report_html(document, _thumbnails(folder)).encode(errors="backslashreplace"))
    write_bytes(text, report_markdown(document).encode(errors="backslashreplace"))
    return page, text


def _thumbnails(folder: Path) -> dict[int, str]:
    if not (folder / GALLERY_FILE).exists():
        return {}
    return {image["image"]: image["thumbnail"] for image in read_json(folder / GALLERY_FILE)["images"]}


def _identity(document: Mapping[str, Any]) -> str:
    """Of what a page shows that another run of the same would find again."""
    facts = {name: value for name, value in document.items() if name not in ("stages", "provenance")}
    provenance = {name: value for name, value in document["provenance"].items() if name != "made"}
    return sha256_of(json.dumps([facts, provenance], sort_keys=True).encode())


def _digest(file: Path) -> str:
    return sha256_of_file(file) if file.is_file() else ""
