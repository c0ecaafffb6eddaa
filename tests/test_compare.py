"""Two builds held against each other: paired and unpaired, with what is not comparable, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from command import Command
from edgewright.compare import Comparison, EnginePair, compare_builds
from edgewright.compare_engines import Build
from edgewright.compare_report import compare_table
from edgewright.runtime.intervals import newcombe_paired_interval
from report_documents import HASH, IMAGES, engine, report_document

CANDIDATE = "openvino int8"


def document(*engines: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return report_document(engines=list(engines), recommended=None, **changes)


def compared(first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    return compare_builds(Build(Path("a"), first, None), Build(Path("b"), second, None))


def the_pair(found: Comparison) -> EnginePair:
    (pair,) = found.engines
    return pair


def build(folder: Path, wrong: int, *, lost: int, **changes: Any) -> Path:
    """A build folder whose engine is wrong on the first `wrong` images, and says that it loses `lost`."""
    labels, answers = np.zeros(IMAGES, np.int64), np.tile([[2.0, 0.0]], (IMAGES, 1))
    answers[:wrong] = [0.0, 2.0]
    (folder / "logits").mkdir(parents=True)
    np.save(folder / "logits" / "labels.npy", labels)
    np.save(folder / "logits" / "openvino-int8.npy", answers)
    row = engine("openvino", "int8", lost=lost)
    row["sha256"] = changes.pop("sha256", HASH)
    (folder / "report.json").write_text(json.dumps(document(row, **changes)))
    return folder


def test_the_same_build_is_no_regression() -> None:
    found = compared(report_document(), report_document())
    assert found.regressions == ()
    assert found.differences == {}
    assert all(pair.accuracy and pair.accuracy.loss == 0 for pair in found.engines)


def test_accuracy_is_paired_where_both_kept_their_answers(tmp_path: Path, command: Command) -> None:
    first, second = build(tmp_path / "a", 100, lost=0), build(tmp_path / "b", 112, lost=12)
    done = command("compare", first, second, "--json")
    assert done.code == 3
    (row,) = done.document["engines"]
    low, high = newcombe_paired_interval(IMAGES - 112, 12, 0, 100)
    assert row["accuracy"] == {
        **{"paired": True, "loss": 12 / IMAGES, "regression": True},
        **{"low": pytest.approx(low), "high": pytest.approx(high)},
    }
    assert done.document["regressions"] == [f"openvino int8 loses at least {100 * low:.2f} points against A (95 %)"]
    back = command("compare", second, first)
    assert back.code == 0
    assert "no regression" in back.out


def test_without_the_answers_the_same_difference_is_not_told(tmp_path: Path) -> None:
    """Six images more than the four that the first loses: by pairs that is worse, by independent losses not."""
    assert newcombe_paired_interval(IMAGES - 110, 6, 0, 104)[0] > 0
    found = compared(document(engine("openvino", "int8", lost=4)), document(engine("openvino", "int8", lost=10)))
    change = the_pair(found).accuracy
    assert change is not None
    assert not change.paired
    assert change.loss == pytest.approx(6 / IMAGES)
    assert change.low < 0 < change.high
    assert any("not paired" in note for note in found.notes)


def test_what_the_reference_loses_too_is_seen_without_the_answers() -> None:
    """Other weights, by which the reference and its engine answer 100 images more wrong: none is lost beside it."""
    first, second = document(engine("openvino", "int8", lost=0)), document(engine("openvino", "int8", lost=0))
    for place in (second["reference"], second["engines"][0]["parity"]):
        for name in ("top1", "reference_top1"):
            if name in place:
                place[name] = 0.90
    found = compared(first, second)
    change = the_pair(found).accuracy
    assert change is not None
    (low, high), (other_low, other_high) = (
        binomtest(wrong, IMAGES).proportion_ci(method="wilson") for wrong in (100, 200)
    )
    assert not change.paired
    assert change.loss == pytest.approx(0.05)
    assert change.low == pytest.approx(0.05 - np.hypot(0.10 - other_low, high - 0.05))
    assert change.high == pytest.approx(0.05 + np.hypot(other_high - 0.10, 0.05 - low))
    assert change.regression
    assert "the reference itself is right on 95.00 % in A and 90.00 % in B" in found.notes
    assert compared(second, first).regressions == ()


def test_answers_beside_a_report_are_found(tmp_path: Path, command: Command) -> None:
    first, second = build(tmp_path / "a", 100, lost=0), build(tmp_path / "b", 112, lost=12)
    done = command("compare", first / "report.json", second / "report.json", "--json")
    assert done.code == 3
    assert done.document["engines"][0]["accuracy"]["paired"] is True


def test_limits_of_independent_losses_add_in_squares() -> None:
    a, b = engine("openvino", "int8", lost=0), engine("openvino", "int8", lost=200)
    change = the_pair(compared(document(a), document(b))).accuracy
    assert change is not None
    first, second = a["parity"]["loss_ci95"], b["parity"]["loss_ci95"]
    below = np.sqrt((0.1 - second[0]) ** 2 + first[1] ** 2)
    above = np.sqrt((second[1] - 0.1) ** 2 + first[0] ** 2)
    assert change.low == pytest.approx(0.1 - below)
    assert change.high == pytest.approx(0.1 + above)
    assert change.regression


def test_answers_of_another_run_are_not_taken(tmp_path: Path, command: Command) -> None:
    first, second = build(tmp_path / "a", 100, lost=0), build(tmp_path / "b", 500, lost=12)
    (row,) = command("compare", first, second, "--json").document["engines"]
    assert row["accuracy"]["paired"] is False


def test_other_images_are_said(tmp_path: Path, command: Command) -> None:
    other = {**report_document()["provenance"], "evaluation": {"name": "x", "identity": "cd" * 32, "images": IMAGES}}
    first = build(tmp_path / "a", 100, lost=0)
    second = build(tmp_path / "b", 112, lost=12, provenance=other)
    done = command("compare", first, second, "--json")
    assert done.document["engines"][0]["accuracy"]["paired"] is False
    assert any("different images" in note for note in done.document["notes"])
    assert done.document["differences"]["evaluation images"] == {"a": HASH, "b": "cd" * 32}


def timed(p50: float, spread: float = 0.01, *, sha256: str = HASH, machine: str = "a CPU", threads: int = 2) -> Any:
    row = engine("openvino", "int8", lost=0)
    row["sha256"] = sha256
    row["latency_ms"] |= {"p50": p50, "p50_ci95": [p50 * (1 - spread), p50 * (1 + spread)], "threads": threads}
    return document(row, provenance={**report_document()["provenance"], "machine": machine})


@pytest.mark.parametrize(
    ("second", "regression"),
    [
        (timed(2.4, sha256="cd" * 32), True),
        (timed(2.05, sha256="cd" * 32), False),  # within a twentieth
        (timed(2.4, 0.2, sha256="cd" * 32), False),  # the median is not known well enough
        (timed(1.5, sha256="cd" * 32), False),
        (timed(2.4), False),  # the same file
        (timed(2.4, sha256="cd" * 32, machine="another"), False),
        (timed(2.4, sha256="cd" * 32, threads=1), False),
    ],
)
def test_slower_beyond_noise(second: dict[str, Any], regression: bool) -> None:
    found = compared(timed(2.0), second)
    assert bool(found.regressions) == regression
    if regression:
        assert found.regressions == ("openvino int8 takes 1.20 times as long as in A",)


def add_unchanged(build: dict[str, Any], **medians: float) -> None:
    """Engines that are one file in every build, by precision, with their median times in ms."""
    for precision, p50 in medians.items():
        row = engine("openvino", precision, lost=0)
        row["latency_ms"] |= {"p50": p50, "p50_ci95": [p50, p50]}
        build["engines"].append(row)


def test_a_machine_that_changed_is_seen_in_an_engine_that_did_not() -> None:
    """The same file takes 1.3 times as long, so 1.2 times says nothing."""
    first, second = timed(2.0), timed(2.4, sha256="cd" * 32)
    add_unchanged(first, fp32=1.0)
    add_unchanged(second, fp32=1.3)
    found = compared(first, second)
    assert found.regressions == ()
    assert any(
        note.startswith("engines that are the same in both take 1.30 times as long in B") for note in found.notes
    )


def test_one_engine_that_was_disturbed_excuses_nothing() -> None:
    """Of three files that are the same one takes 1.6 times as long."""
    first, second = timed(2.0), timed(3.0, sha256="cd" * 32)
    add_unchanged(first, fp32=1.0, bf16=1.0, fp16=1.0)
    add_unchanged(second, fp32=1.6, bf16=1.0, fp16=1.02)
    found = compared(first, second)
    assert found.regressions == ("openvino int8 takes 1.50 times as long as in A",)
    assert not any("become slower" in note for note in found.notes)


def with_version(build: dict[str, Any], **versions: str) -> dict[str, Any]:
    return build | {"provenance": build["provenance"] | {"versions": versions}}


def test_the_same_file_under_another_library_is_another_engine() -> None:
    first, second = with_version(timed(2.0), openvino="1.0"), with_version(timed(2.4), openvino="2.0")
    assert compared(first, second).regressions == ("openvino int8 takes 1.20 times as long as in A",)
    assert compared(first, with_version(timed(2.4), openvino="1.0", numpy="2.0")).regressions == ()


def test_a_machine_that_became_faster_excuses_nothing() -> None:
    """The same file takes half the time; an engine that is slower all the same is slower."""
    first, second = timed(2.0), timed(2.4, sha256="cd" * 32)
    add_unchanged(first, fp32=1.0)
    add_unchanged(second, fp32=0.5)
    assert compared(first, second).regressions == ("openvino int8 takes 1.20 times as long as in A",)


def failed(row: dict[str, Any], status: str = "failed") -> dict[str, Any]:
    nothing = dict.fromkeys(("parity", "latency_ms", "path", "bytes", "sha256"))
    return row | nothing | {"status": status, "reason": "the build stopped", "reason_code": "build_failed"}


def test_an_engine_that_passed_and_fails_now_is_worse() -> None:
    first, second = report_document(), report_document()
    second["engines"][1] = failed(second["engines"][1])
    found = compared(first, second)
    assert found.regressions == ("onnxruntime int8 is verified in A and failed in B",)
    assert compared(second, first).regressions == ()


def test_an_engine_over_the_same_budget_is_worse() -> None:
    first, second = report_document(), report_document()
    second["engines"][1] |= {"status": "over_budget", "reason": "FAIL: loses much"}
    assert compared(first, second).regressions == ("onnxruntime int8 is verified in A and over budget in B",)
    second["provenance"]["options"]["gates"] = {"max_drop": 0.0001}
    found = compared(first, second)
    assert found.regressions == ()
    assert "onnxruntime int8 is verified in A and over budget in B: FAIL: loses much" in found.notes


@pytest.mark.parametrize("status", ["skipped", "undecided"])
def test_an_engine_that_was_not_decided_again_is_told(status: str) -> None:
    first, second = report_document(), report_document()
    row = second["engines"][1]
    second["engines"][1] = failed(row, "skipped") if status == "skipped" else row | {"status": status}
    found = compared(first, second)
    assert found.regressions == ()
    assert any(note.startswith(f"onnxruntime int8 is verified in A and {status} in B: ") for note in found.notes)


def simulated(code: str) -> dict[str, Any]:
    row = engine("tensorrt-rtx", "int8", lost=5, target="sm86")
    return row | {"reason_code": code, "reason": f"its numerics were simulated: {code}"}


@pytest.mark.parametrize(("code", "word"), [("fail", "simulated (fail)"), ("", "failed")])
def test_a_simulated_engine_that_passed_and_fails_now_is_worse(code: str, word: str) -> None:
    first, second = document(simulated("pass")), document(simulated(code) if code else failed(simulated("pass")))
    found = compared(first, second)
    assert found.regressions == (f"tensorrt-rtx int8 sm86 is simulated (pass) in A and {word} in B",)
    second["provenance"] = second["provenance"] | {"options": {"gates": {"max_drop": 0.0001}}}
    assert bool(compared(first, second).regressions) is not bool(code), "a build that fails does so under any gates"


def test_a_target_without_an_engine_to_take_is_told() -> None:
    choice = {"backend": "tensorrt-rtx", "precision": "int8", "path": "engines/x.engine", "reason": "less bytes"}
    first, second = (document(simulated(code), targets=targets) for code, targets in (
        ("pass", {"sm86": choice, "sm89": choice}), ("inconclusive", {"sm89": choice}),
    ))  # fmt: skip
    found = compared(first, second)
    assert found.regressions == ()
    assert "for sm86 A has an engine to take, and B none" in found.notes
    assert not any("to take" in note for note in compared(second, first).notes)


def test_where_everything_failed_b_is_worse(tmp_path: Path, command: Command) -> None:
    second = report_document(verdict="fail", recommended=None)
    second["engines"] = [failed(row) for row in second["engines"]]
    for name, content in (("a", report_document()), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    done = command("compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert done.code == 3
    assert done.document["regressions"][0] == "no engine of B passes, one of A does"
    assert done.document["engines"][0]["b"]["status"] == "failed"
    assert command("compare", tmp_path / "a.json", tmp_path / "b.json").code == 3


def unlabelled(build: dict[str, Any]) -> dict[str, Any]:
    build["reference"] |= {"top1": None, "top5": None, "labelled": False}
    for row in build["engines"]:
        if row["parity"]:
            row["parity"] |= dict.fromkeys(("reference_top1", "reference_top5", "top1", "top5", "delta", "pairs"))
            row["parity"]["labelled"] = False
    return build


def test_what_nobody_can_compare_is_said(tmp_path: Path, command: Command) -> None:
    other = report_document()["provenance"] | {"machine": "another"}
    for name, content in (("a", unlabelled(report_document())), ("b", report_document(provenance=other))):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    done = command("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.code == 1
    for words in ("nothing of A and B can be compared", "A was judged without labels", "on different machines"):
        assert words in done.err


def test_agreement_is_shown_where_one_of_the_two_has_no_labels() -> None:
    first, second = unlabelled(report_document()), report_document()
    del first["engines"][1]
    found = compared(first, second)
    assert not found.labelled
    assert "accuracy is not compared: A was judged without labels" in found.notes
    assert not any("different images" in note for note in found.notes)
    table = compare_table(found)
    assert table.columns[2].header == "agree"
    cells = dict(zip(table.columns[0]._cells, table.columns[2]._cells, strict=True))
    assert cells["onnxruntime int8"] == "–\n99.35"  # 13 of 2,000 differ


def test_why_a_latency_is_not_compared_is_said_once() -> None:
    first, second = report_document(), report_document()
    for row in second["engines"][:4]:
        row["latency_ms"]["threads"] = 1
    notes = [note for note in compared(first, second).notes if "latencies" in note]
    assert notes == [
        "latencies are not compared, measured with 2 and 1 threads: onnxruntime fp32, onnxruntime int8, "
        "openvino bf16 and 1 more"
    ]
    older = report_document()
    del older["engines"][0]["latency_ms"]["p50_ci95"]
    notes = [note for note in compared(first, older).notes if "latencies" in note]
    assert notes == ["latencies are not compared, a report has no interval of the median: onnxruntime fp32"]


def test_a_build_without_an_engine_that_passes_is_worse() -> None:
    worse = report_document(verdict="fail", recommended=None)
    assert compared(report_document(), worse).regressions == ("no engine of B passes, one of A does",)
    assert compared(worse, report_document()).regressions == ()


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({"verdict": "inconclusive"}, True),  # as much was asked
        ({"verdict": "inconclusive", "options": {"gates": {"max_drop": 0.0001}}}, False),
        ({"verdict": "fail", "options": {"gates": {"max_drop": 0.0001}}}, False),
        ({"verdict": "inconclusive", "evaluation": {"name": "x", "identity": "cd" * 32, "images": 50}}, False),
        ({"verdict": "fail", "evaluation": {"name": "x", "identity": "cd" * 32, "images": 50}}, True),
    ],
)
def test_none_passes_where_as_much_was_asked(changes: dict[str, Any], worse: bool) -> None:
    verdict = changes.pop("verdict")
    second = report_document(verdict=verdict, recommended=None)
    second["provenance"] |= changes
    found = compared(report_document(), second)
    assert (found.regressions == ("no engine of B passes, one of A does",)) is worse
    noted = "no engine of B passes, one of A does; gates or images are not the same" in found.notes
    assert noted is not worse


def test_another_recommendation_is_a_difference() -> None:
    first, second = report_document(), report_document()
    second["recommended"] = {"backend": "onnxruntime", "precision": "fp32", "path": "engines/x.onnx"}
    assert compared(first, second).differences == {"recommended": ("openvino int8", "onnxruntime fp32")}


def test_engines_that_only_one_build_has(tmp_path: Path, command: Command) -> None:
    first = build(tmp_path / "a", 100, lost=0)
    (tmp_path / "b.json").write_text(json.dumps(report_document()))
    done = command("compare", first, tmp_path / "b.json", "--json")
    sides = {
        (row["backend"], row["precision"]): (row["a"] is None, row["b"] is None) for row in done.document["engines"]
    }
    assert sides[("openvino", "int8")] == (False, False)
    assert sides[("onnxruntime", "fp32")] == (True, False)


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"schema": "edgewright.engine/2"}'])
def test_what_is_no_report_is_refused(tmp_path: Path, command: Command, content: str) -> None:
    good = build(tmp_path / "a", 100, lost=0)
    (tmp_path / "b.json").write_text(content)
    refused = command("compare", good, tmp_path / "b.json").error
    assert "b.json" in refused
    assert "give a build folder" in refused
    assert "does not exist" in command("compare", good, tmp_path / "nothing").error


def test_a_damaged_report_is_refused(tmp_path: Path, command: Command) -> None:
    good, bad = build(tmp_path / "a", 100, lost=0), build(tmp_path / "b", 100, lost=0)
    content = json.loads((bad / "report.json").read_text())
    del content["engines"][0]["parity"]["loss_ci95"]
    (bad / "report.json").write_text(json.dumps(content))
    (bad / "logits" / "labels.npy").unlink()
    assert "damaged" in command("compare", good, bad).error


@pytest.mark.parametrize("p50", [0, 10**400, "fast"])
def test_a_time_that_is_none_is_a_damaged_report(tmp_path: Path, command: Command, p50: Any) -> None:
    for name, time in (("a", p50), ("b", 2.0)):
        content = timed(2.0)
        content["engines"][0]["latency_ms"]["p50"] = time
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert "damaged" in command("compare", tmp_path / "a.json", tmp_path / "b.json").error


def test_a_report_without_its_reference_is_damaged(tmp_path: Path, command: Command) -> None:
    good, bad = build(tmp_path / "a", 100, lost=0), report_document(reference=None)
    (tmp_path / "b.json").write_text(json.dumps(bad))
    assert "damaged" in command("compare", tmp_path / "b.json", good).error


def test_empty_logits_pair_nothing(tmp_path: Path, command: Command) -> None:
    folders = [build(tmp_path / name, 100, lost=0) for name in "ab"]
    for folder in folders:
        np.save(folder / "logits" / "labels.npy", np.zeros(0, np.int64))
        np.save(folder / "logits" / "openvino-int8.npy", np.zeros((0, 2)))
    done = command("compare", *folders, "--json")
    assert done.document["engines"][0]["accuracy"]["paired"] is False


def test_the_table_fits_80_columns(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, second = build(tmp_path / "a", 100, lost=0), build(tmp_path / "b", 112, lost=12, model="another")
    lines = command("compare", first, second).out.splitlines()
    assert max(map(len, lines[:4])) <= 80
    assert " ".join(lines[2].split()).startswith("openvino int8 A 95.00 ")
    assert lines[3].split()[:2] == ["B", "94.40"]
    assert "differs: model: a_network → another" in lines
    assert lines[-1].startswith("REGRESSION: openvino int8 loses at least ")


def test_nothing_is_cut_off_where_everything_differs(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for folder, lost, p50, size in (("a", 0, 0.0542, 102_400_000), ("b", 1234, 123.4, 6_258_503)):
        row = engine("tensorrt-rtx", "int8", lost=lost, target="sm120") | {"bytes": size}
        row["latency_ms"] = engine("openvino", "int8", lost=0, p50=p50)["latency_ms"]
        (tmp_path / f"{folder}.json").write_text(json.dumps(document(row)))
    lines = command("compare", tmp_path / "a.json", tmp_path / "b.json").out.splitlines()
    assert max(map(len, lines[:4])) <= 80
    assert not any("…" in line for line in lines[:4])
    assert lines[2].split()[:4] == ["tensorrt-rtx", "int8", "sm120", "A"]


def test_gates_and_other_options_differ_in_words(tmp_path: Path, command: Command) -> None:
    first, second = build(tmp_path / "a", 100, lost=0), build(tmp_path / "b", 100, lost=0)
    content = json.loads((second / "report.json").read_text())
    content["provenance"]["options"] |= {"gates": {"max_drop": 0.02, "min_sqnr": 20.0}, "budget": 0.02, "threads": 1}
    content["provenance"]["options"]["completion"] = {"mean": [0.5, 0.5], "std": None}
    (second / "report.json").write_text(json.dumps(content))
    lines = [line for line in command("compare", first, second).out.splitlines() if line.startswith("differs")]
    assert lines == [
        "differs: gates: max_drop 0.02 → max_drop 0.02, min_sqnr 20.0",
        "differs: threads: 2 → 1",
        "differs: completion: none → mean [0.5, 0.5]",
    ]


def test_values_that_differ_late_are_told_whole(tmp_path: Path, command: Command) -> None:
    first, second = (build(tmp_path / name, 100, lost=0, model=f"{'network-' * 5}{name}") for name in "ab")
    assert f"differs: model: {'network-' * 5}a → {'network-' * 5}b" in command("compare", first, second).out


def test_builds_without_a_common_engine_are_refused(tmp_path: Path, command: Command) -> None:
    one = build(tmp_path / "a", 0, lost=0)
    other = document(engine("onnxruntime", "fp32", lost=0))
    path = tmp_path / "b.json"
    path.write_text(json.dumps(other))
    done = command("compare", one, path)
    assert done.code == 1
    assert "A has openvino int8, B has onnxruntime fp32" in done.err
