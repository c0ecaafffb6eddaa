"""The verdict for CI systems: JUnit XML, a test case per engine.

There is no standard of it. This is what both Jenkins' junit-10.xsd and Maven's surefire-test-report.xsd allow: one
`testsuite` with its `properties` first, then a `testcase` for each row, whose figures stand in `system-out`. Neither
allows properties inside a test case, so that those of all rows are the suite's, each after the name of its row.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

from edgewright.outcome import EngineRow, Outcome
from edgewright.runtime.files import write_bytes
from edgewright.verdict_report import evidence_lines

if TYPE_CHECKING:
    from edgewright.runtime.device.rows import DeviceReport, DeviceRow

__all__ = ["Case", "cases_of", "cases_of_device", "error_case", "reported_to", "write_junit"]

Result = Literal["failure", "error", "skipped"]
RESULTS: Mapping[str, Result | None] = {
    "verified": None,
    "over_budget": "failure",
    "undecided": "failure",
    "built_not_run": "skipped",
    "simulated": "skipped",  # unless it fails in the simulation: then it is not worth taking to a device
    "skipped": "skipped",
    "failed": "error",
}
LATENCY_WORDS = ("batch", "threads", "p50", "p90", "p99")


@dataclass(frozen=True)
class Case:
    """A test case.

    * result: what became of it, None if it passed; kind: a fixed word, such as a row's reason_code; message: why
    * text: lines that a person reads; properties: figures by name
    """

    name: str
    result: Result | None
    kind: str
    message: str
    text: Sequence[str] = ()
    properties: tuple[tuple[str, str], ...] = ()


def cases_of(outcome: Outcome) -> list[Case]:
    """A case per engine of a run; and one of the verdict, where that is no PASS and no engine is to blame."""
    cases = [_case(row) for row in outcome.rows]
    if outcome.verdict == "pass" or any(case.result in ("failure", "error") for case in cases):
        return cases
    what = "no engine passes" if outcome.verdict == "fail" else "no engine could be run here"
    return [*cases, Case("verdict", "failure", outcome.verdict, f"{outcome.verdict.upper()}: {what}")]


def cases_of_device(report: DeviceReport) -> list[Case]:
    """A case per engine of a bundle that is kept on this device; one that fails, if there are none."""
    return [_device_case(row) for row in report.rows] or [
        Case("self-test", "failure", "nothing_proven", "no engine that was asked for is kept for this device")
    ]


def error_case(error: Exception) -> Case:
    """The case of a run that ended in an error."""
    return Case("run", "error", type(error).__name__, str(error))


@contextlib.contextmanager
def reported_to(path: Path | None, model: str) -> Iterator[Callable[[Sequence[Case]], None]]:
    """Gives what keeps the cases of a run; they, or the error that ends it, are written to `path`, if there is one.

    A suite without cases is written first, so that what a run before left does not stand for one that is killed, and a
    path that cannot be written is known before the slow stages.
    """
    kept: list[Case] = []
    suite, began = f"edgewright.{model}", time.monotonic()
    if path is not None:
        write_junit(path, suite, kept)
    try:
        yield kept.extend
    except Exception as error:  # also a fault of ours: a file without cases would look like success
        kept[:] = [error_case(error)]
        raise
    finally:
        if path is not None and kept:
            write_junit(path, suite, kept, seconds=time.monotonic() - began)


def write_junit(path: Path, suite: str, cases: Sequence[Case], *, seconds: float = 0.0) -> None:
    """Writes the file, whole or not at all; `suite` is its name. Raises `WorkspaceError` if it cannot be written."""
    results = [case.result for case in cases]
    root = ElementTree.Element(
        "testsuite",
        name=suite,
        tests=str(len(cases)),
        failures=str(results.count("failure")),
        errors=str(results.count("error")),
        skipped=str(results.count("skipped")),
        time=f"{seconds:.3f}",
    )
    properties = ElementTree.SubElement(root, "properties")
    for case in cases:
        for name, value in case.properties:
            ElementTree.SubElement(properties, "property", name=f"{case.name}: {name}", value=_allowed(value))
    for case in cases:
        _append(root, case, suite)
    ElementTree.indent(root)
    write_bytes(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _append(root: ElementTree.Element, case: Case, suite: str) -> None:
    element = ElementTree.SubElement(root, "testcase", name=case.name, classname=suite, time="0.000")
    if case.result == "skipped":
        ElementTree.SubElement(element, "skipped", message=_allowed(case.message))
    elif case.result is not None:
        ElementTree.SubElement(element, case.result, type=case.kind, message=_allowed(case.message))
    if case.text:
        ElementTree.SubElement(element, "system-out").text = _allowed("\n".join(case.text))


def _allowed(text: str) -> str:
    """Without what XML 1.0 has no way to write (section 2.2), such as the control characters of a terminal."""
    return "".join(letter if letter in "\t\n\r" or ord(letter) >= 0x20 else "�" for letter in text).translate(
        dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "�")
    )


def _case(row: EngineRow) -> Case:
    result = "failure" if row.status == "simulated" and row.reason_code == "fail" else RESULTS[row.status]
    text = [row.reason, *([] if row.parity is None else evidence_lines(row.parity, row.figures))]
    return Case(row.name, result, row.reason_code, row.reason, text, tuple(_properties(row)))


def _device_case(row: DeviceRow) -> Case:
    figures = {} if row.self_test is None else asdict(row.self_test)
    numbers = tuple(
        (name, f"{figures[name]:.9g}")
        for name in ("images", "sqnr_db", "agreement", "max_abs", "latency_ms")
        if figures.get(name) is not None
    )
    name = f"{row.backend} {row.precision}"
    return Case(
        name, RESULTS[row.status], row.reason_code, row.reason, [row.reason], (("status", row.status), *numbers)
    )


def _properties(row: EngineRow) -> Iterable[tuple[str, str]]:
    """Names and values as in the JSON document: shares are fractions, latencies milliseconds."""
    yield "status", row.status
    if row.parity is not None:
        for name, value in row.parity.to_json().items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield f"parity.{name}", f"{value:.9g}"
    for finding in row.verdict.findings if row.verdict is not None else ():
        yield f"gate.{finding.gate}", f"{finding.word} (limit {finding.limit:g})"
    if row.figures is not None and row.figures.calibration_error is not None:
        for name, value in vars(row.figures.calibration_error).items():
            if value is not None:
                yield f"calibration_error.{name}", f"{value:.9g}"
    if row.latency is not None:
        latency = row.latency.to_json()
        yield from ((f"latency_ms.{name}", f"{latency[name]:.9g}") for name in LATENCY_WORDS)
