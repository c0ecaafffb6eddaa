"""JUnit XML against what Jenkins' and Surefire's schemas allow, written down a second time; and on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from command import Command
from edgewright.junit_report import Case, cases_of, cases_of_device, error_case, reported_to, write_junit
from edgewright.outcome import EngineRow, Outcome, Reference
from edgewright.runtime.device.rows import DeviceReport, DeviceRow
from edgewright.runtime.errors import DataError, WorkspaceError
from edgewright.runtime.gates import judge
from edgewright.runtime.latency import Latency
from edgewright.runtime.verdict import STATUS_OF_VERDICT
from one_hot import parity_of

# What both schemas allow: children in this order, attributes that must be there, attributes that may.
# Surefire: maven-surefire-plugin/src/site/resources/xsd/surefire-test-report.xsd; Jenkins: xunit-plugin's junit-10.xsd.
SCHEMA: dict[str, tuple[Sequence[str], set[str], set[str]]] = {
    "testsuite": (
        ("properties", "testcase"),
        {"name", "tests", "errors", "skipped", "failures"},
        {"time", "group"},
    ),
    "properties": (("property",), set(), set()),
    "property": ((), {"name", "value"}, set()),
    "testcase": (("failure", "skipped", "error", "system-out", "system-err"), {"name", "time"}, {"classname", "group"}),
    "failure": ((), {"type"}, {"message"}),
    "error": ((), {"type"}, {"message"}),
    "skipped": ((), set(), {"message"}),
    "system-out": ((), set(), set()),
}


def row(backend: str, precision: str, status: str = "", lost: int = 0, **more: Any) -> EngineRow:
    """Of an engine that loses so many of 10,000 images; with a status, of one that was not run."""
    target = more.get("target")
    if status:
        code = more.get("code", "device_missing")
        return EngineRow(backend, precision, target, status, code, more.get("reason", "not here"))
    parity = parity_of(10_000 - lost, lost, 0, 0)
    verdict = judge(parity)
    latency = Latency(1, 2, 200, 123.4, 125.0, 130.0, 0.01)
    said = STATUS_OF_VERDICT[verdict.word], verdict.word, verdict.sentence
    return EngineRow(backend, precision, target, *said, None, None, parity, verdict, latency)


def outcome_of(*rows: EngineRow) -> Outcome:
    return Outcome("m", "random", "fail", None, (), Reference(1.0, 1.0, 10_000, True), rows)


WIDE = outcome_of(
    row("onnxruntime", "fp32"),
    row("onnxruntime", "int8", lost=2_430),
    row("openvino", "int8", lost=50),
    row("tensorrt-rtx", "fp32", "built_not_run", target="sm86"),
    row("tensorrt-rtx", "fp16", "simulated", target="sm86", code="pass"),
    row("tensorrt-rtx", "int8", "simulated", target="sm86", code="fail"),
    row("tensorrt", "int8", "skipped"),
    row("openvino", "bf16", "failed", code="build_failed", reason="refused node 7"),
)


def faults(element: ElementTree.Element) -> Iterator[str]:
    """What the schemas would refuse."""
    children, must, may = SCHEMA[element.tag]
    tags = [child.tag for child in element]
    if any(tag not in children for tag in tags) or tags != sorted(tags, key=children.index):
        yield f"{element.tag} has {tags}"
    if not must <= set(element.keys()) <= must | may:
        yield f"{element.tag} has the attributes {sorted(element.keys())}"
    for child in element:
        if child.tag in SCHEMA:
            yield from faults(child)


def written(path: Path) -> ElementTree.Element:
    """The root of a file, after the check."""
    root = ElementTree.parse(path).getroot()
    assert list(faults(root)) == []
    results = [child.tag for case in root.iter("testcase") for child in case if child.tag != "system-out"]
    assert root.get("tests") == str(len(list(root.iter("testcase"))))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert root.get(attribute) == str(results.count(tag))
    return root


@pytest.mark.parametrize(
    ("xml", "fault"),
    [
        ("<testsuite name='a' tests='1' errors='0' skipped='0'/>", "attributes"),
        ("<testcase name='a'/>", "attributes"),
        ("<testcase name='a' time='0'><properties/></testcase>", "testcase has"),
        ("<testcase name='a' time='0'><system-out/><failure type='t'/></testcase>", "testcase has"),
        ("<testcase name='a' time='0'><failure message='m'/></testcase>", "failure has the attributes"),
    ],
)
def test_the_check_can_fail(xml: str, fault: str) -> None:
    assert fault in "".join(faults(ElementTree.fromstring(xml)))


def test_a_case_per_row(tmp_path: Path) -> None:
    write_junit(tmp_path / "j.xml", "edgewright.m", cases_of(WIDE), seconds=1.5)
    root = written(tmp_path / "j.xml")
    found = {
        case.get("name"): [child.tag for child in case if child.tag != "system-out"] for case in root.iter("testcase")
    }
    assert found["onnxruntime fp32"] == []
    assert found["onnxruntime int8"] == ["failure"]
    assert found["openvino int8"] == ["failure"], "too few images to decide is not a pass"
    assert found["tensorrt int8"] == ["skipped"]
    assert found["tensorrt-rtx fp32 sm86"] == ["skipped"]
    assert found["tensorrt-rtx fp16 sm86"] == ["skipped"], "a simulation passes nothing"
    assert found["tensorrt-rtx int8 sm86"] == ["failure"], "but it can fail"
    assert found["openvino bf16"] == ["error"]
    assert (root.get("name"), root.get("time")) == ("edgewright.m", "1.500")
    failed = next(case for case in root.iter("testcase") if case.get("name") == "onnxruntime int8")
    assert failed[0].attrib == {"type": "fail", "message": "FAIL: loses at least 23.46 points (95 %), budget 0.5"}
    assert "exact McNemar p" in (failed[1].text or "")


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_a_verdict_without_a_guilty_engine_is_a_failure(tmp_path: Path, verdict: str) -> None:
    skipped = replace(outcome_of(row("tensorrt", "int8", "skipped")), verdict=verdict)
    write_junit(tmp_path / "j.xml", "s", cases_of(skipped))
    root = written(tmp_path / "j.xml")
    assert (root.get("failures"), root.get("skipped")) == ("1", "1")
    (failure,) = root.iter("failure")
    assert failure.get("message", "").startswith(f"{verdict.upper()}: no engine")


def test_a_pass_has_no_case_of_its_own() -> None:
    passed = replace(outcome_of(row("openvino", "fp32"), row("tensorrt", "int8", "skipped")), verdict="pass")
    assert [case.name for case in cases_of(passed)] == ["openvino fp32", "tensorrt int8"]


def test_a_device_on_which_nothing_is_kept_has_proven_nothing() -> None:
    report = DeviceReport("m", 1, "0", None, Path("cache"), (), ())
    assert [(case.name, case.result) for case in cases_of_device(report)] == [("self-test", "failure")]


def test_the_figures_are_properties_of_the_suite(tmp_path: Path) -> None:
    write_junit(tmp_path / "j.xml", "s", cases_of(WIDE))
    values = {each.get("name"): each.get("value") for each in written(tmp_path / "j.xml").iter("property")}
    assert values["onnxruntime int8: parity.top1"] == "0.757"
    assert values["onnxruntime int8: parity.delta"] == "-0.243"
    assert values["onnxruntime int8: gate.max_drop"] == "fail (limit 0.005)"
    assert values["onnxruntime fp32: latency_ms.p50"] == "123.4"
    assert values["tensorrt int8: status"] == "skipped"
    assert not any(name and "parity" in name for name in values if name and name.startswith("tensorrt int8"))


def test_the_rows_of_a_device(tmp_path: Path) -> None:
    rows = (
        DeviceRow("tensorrt", "fp16", "verified", "pass", "all well"),
        DeviceRow("tensorrt", "int8", "over_budget", "self_test_failed", "12.0 dB, at least 20.1 asked"),
    )
    cases = cases_of_device(DeviceReport("m", 1, "", None, tmp_path, rows, ()))
    write_junit(tmp_path / "j.xml", "m.bundle", cases)
    assert [len(case.findall("failure")) for case in written(tmp_path / "j.xml").iter("testcase")] == [0, 1]


def test_any_text_becomes_xml(tmp_path: Path) -> None:
    said = "a <b> & \"c\" 'd' \x1b[31mred\x00\ud800\ufffe ü 猫"
    write_junit(tmp_path / "j.xml", "s & <t>", [Case("n <1>", "failure", "fail", said, [said], (("p<q>", said),))])
    root = written(tmp_path / "j.xml")
    expected = "a <b> & \"c\" 'd' �[31mred��� ü 猫"
    assert root.get("name") == "s & <t>"
    assert root[1][0].get("message") == expected
    assert root[1].findtext("system-out") == expected
    assert root[0][0].get("value") == expected


def test_an_error_ends_in_the_file_too(tmp_path: Path) -> None:
    def fails() -> None:
        with reported_to(tmp_path / "j.xml", "m") as keep:
            keep([Case("a row", None, "pass", "")])
            raise DataError("no images", "give some")

    with pytest.raises(DataError):
        fails()
    (case,) = written(tmp_path / "j.xml").iter("testcase")
    assert case[0].attrib == {"type": "DataError", "message": "no images; give some"}
    with pytest.raises(ZeroDivisionError), reported_to(tmp_path / "j.xml", "m"):
        _ = 1 / 0
    (case,) = written(tmp_path / "j.xml").iter("testcase")
    assert case[0].tag == "error"
    assert error_case(DataError("a", "b")).result == "error"


def test_nothing_is_written_where_nothing_was_asked() -> None:
    with reported_to(None, "m") as keep:
        keep([Case("a", None, "", "")])


def test_what_a_run_before_left_does_not_stand_for_one_that_is_interrupted(tmp_path: Path) -> None:
    write_junit(tmp_path / "j.xml", "edgewright.m", [Case("a", None, "", "")])
    with pytest.raises(KeyboardInterrupt), reported_to(tmp_path / "j.xml", "m"):
        raise KeyboardInterrupt
    assert written(tmp_path / "j.xml").get("tests") == "0"


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkspaceError, match=r"j\.xml"), reported_to(tmp_path / "file" / "j.xml", "m"):
        raise AssertionError("before the stages")


# --- The command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "budget", "code", "failures"), [("engine", 8, 0, 1), ("verify", 0.5, 4, 2)])
def test_the_option_writes_the_verdicts(
    command: Command, build_dir: Path, images: Any, tmp_path: Path, name: str, budget: float, code: int, failures: int
) -> None:
    chosen = ("--backend", "onnxruntime", "--build-dir", build_dir, *images.options, "--max-drop", budget)
    done = command(name, "tiny", *chosen, "--junit", tmp_path / "new" / "j.xml")
    assert done.code == code
    root = written(tmp_path / "new" / "j.xml")
    assert [case.get("name") for case in root.iter("testcase")] == ["onnxruntime fp32", "onnxruntime int8"]
    assert root.get("failures") == str(failures)
    assert root.get("name") == "edgewright.tiny"


def test_an_error_of_the_command_is_in_the_file(command: Command, tmp_path: Path) -> None:
    done = command("verify", "tiny", "--evaluation", tmp_path / "none", "--junit", tmp_path / "j.xml")
    (case,) = written(tmp_path / "j.xml").iter("testcase")
    assert case[0].get("message") == done.error
