"""The JSON document against the contract, the table at 80 columns, the sentences below it, and the lines of stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contract import ENGINE_DOCUMENT, differences
from edgewright.console import print_outcome
from edgewright.outcome import EngineRow, Outcome, Reference
from edgewright.report import EXIT_CODES, engine_document, remarks, stage_line, verdict_line
from edgewright.runtime.latency import Latency
from edgewright.runtime.parity import STATUS_OF_VERDICT, compare, judge
from edgewright.runtime.specs import EngineInfo, LayerPrecision
from edgewright.workspace import FIRST_TIME, StageRun

IMAGES = 10_000


def measured(p50: float) -> Latency:
    return Latency(1, 2, 200, p50, p50, p50, 0.01)


def info(backend: str, precision: str, size: int) -> EngineInfo:
    layers = (LayerPrecision("conv", "Conv", precision),)
    return EngineInfo(backend, precision, None, (), (), _any(), ("a", "b"), "", "", size, layers)


def _any() -> Any:
    return None


def row(backend: str, precision: str, status: str, *, lost: int = 0, p50: float | None = 2.0, **more: Any) -> EngineRow:
    """An engine that loses `lost` of 10,000 images, all of which the reference gets right."""
    if status in ("skipped", "failed"):
        return EngineRow(backend, precision, None, status, "package_missing", more.get("reason", "not here; install"))
    known = info(backend, precision, more.get("size", 16_100_000))
    path = f"engines/{backend}-{precision}.onnx"
    if status == "built_not_run":
        return EngineRow(backend, precision, "sm86", status, "no_device", "no GPU here", path, known)
    labels = np.zeros(IMAGES, np.int64) if more.get("labelled", True) else None
    reference, engine = np.tile([[1.0, 0.0]], (IMAGES, 1)), np.tile([[0.9, 0.1]], (IMAGES, 1))
    engine[:lost] = [0.0, 1.0]
    parity = compare(reference, engine, labels)
    verdict = judge(parity)
    assert STATUS_OF_VERDICT[verdict.word] == status
    latency = None if p50 is None else measured(p50)
    return EngineRow(
        backend, precision, None, status, verdict.word, verdict.sentence, path, known, parity, verdict, latency
    )


def outcome_of(*rows: EngineRow, verdict: str = "pass", labelled: bool = True, **more: Any) -> Outcome:
    top1, top5 = (0.9312, 0.998) if labelled else (None, None)
    passing = [row for row in rows if row.status == "verified"]
    return Outcome(
        model="mobilenet_effnet_b0",
        weights="Fashion-MNIST",
        verdict=verdict,
        recommended=passing[0] if passing else None,
        stages=(StageRun("export", 6.1, False, "00ff", ("weights",), {}),),
        reference=Reference(top1, top5, IMAGES, labelled),
        rows=rows,
        **more,
    )


WIDE = outcome_of(
    row("onnxruntime", "fp32", "verified", p50=123.4),
    row("onnxruntime", "int8", "over_budget", lost=2430, p50=1234.5),
    row("openvino", "bf16", "over_budget", lost=IMAGES),
    row("openvino", "int8", "undecided", lost=50, size=1_234_500_000),
    row("tensorrt-rtx", "fp16", "built_not_run"),
    row("tensorrt-rtx", "int8", "built_not_run"),
    row("tensorrt", "int8", "skipped"),
)
ALL = {
    "wide": WIDE,
    "empty": outcome_of(verdict="fail"),
    "unlabelled": outcome_of(row("openvino", "int8", "over_budget", lost=9000, labelled=False), labelled=False),
}


# The document


@pytest.mark.parametrize("name", ALL)
def test_the_document_is_that_of_the_contract(name: str) -> None:
    document = json.loads(json.dumps(engine_document(ALL[name]), allow_nan=False))
    assert list(differences(document, ENGINE_DOCUMENT)) == []


def test_the_document_of_a_real_run(outcome: Outcome) -> None:
    document = json.loads(json.dumps(engine_document(outcome), allow_nan=False))
    assert list(differences(document, ENGINE_DOCUMENT)) == []
    low, high = document["engines"][0]["parity"]["loss_ci95"]
    assert low <= 0.0 <= high
    assert document["recommended"]["path"] in [engine["path"] for engine in document["engines"]]


@pytest.mark.parametrize(
    ("damage", "difference"),
    [
        (lambda document: document.pop("verdict"), ".verdict is missing"),
        (lambda document: document.update(extra=1), ".extra is unknown"),
        (lambda document: document["stages"][0].update(cached="no"), "stages[].cached is 'no', not bool"),
        (lambda document: document["engines"][0].update(status="ok"), "engines[].status is 'ok', not 'verified'"),
        (lambda document: document["engines"][0]["parity"].pop("cosine"), "engines[].parity.cosine is missing"),
        (lambda document: document["engines"][0]["latency_ms"].update(p50="1"), "engines[].latency_ms.p50"),
        (lambda document: document["reference"].update(images=True), "reference.images is True, not int"),
    ],
)
def test_the_check_of_the_document_can_fail(damage: Any, difference: str) -> None:
    document = json.loads(json.dumps(engine_document(WIDE)))
    damage(document)
    (found,) = differences(document, ENGINE_DOCUMENT)
    assert found.startswith(difference)


def test_the_sign_of_the_loss() -> None:
    parity = engine_document(WIDE)["engines"][1]["parity"]
    assert parity["delta"] == -0.243
    assert parity["loss_ci95"][0] < 0.243 < parity["loss_ci95"][1]


def test_exit_codes() -> None:
    assert EXIT_CODES == {"pass": 0, "fail": 3, "inconclusive": 4}


# The table


def printed(outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_outcome(outcome, Path("build/model"))
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("_eighty_columns")
@pytest.mark.parametrize("name", ALL)
def test_the_table_fits_80_columns_and_cuts_nothing_off(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(ALL[name], capsys)
    table = lines[: next(index for index, line in enumerate(lines) if index > 2 and not line.strip())]
    assert "…" not in "\n".join(lines)
    assert max(map(len, table)) <= 80, "\n".join(table)


@pytest.mark.usefixtures("_eighty_columns")
def test_the_table_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [" ".join(line.split()) for line in printed(WIDE, capsys)]
    assert lines[0] == "mobilenet_effnet_b0 on 10,000 images"
    assert "PyTorch fp32 93.12 reference" in lines
    assert "onnxruntime fp32 16.1 MB 100.00 0.00 [-0.04, 0.04] 123 ms verified" in lines
    assert "onnxruntime int8 16.1 MB 75.70 24.30 [23.47, 25.15] 1234 ms over_budget" in lines
    assert "tensorrt-rtx int8 16.1 MB built_not_run" in lines
    assert "tensorrt int8 skipped" in lines


def test_a_narrow_terminal_cuts_nothing_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    wide = printed(WIDE, capsys)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = printed(WIDE, capsys)
    assert [line.rstrip() for line in narrow] == [line.rstrip() for line in wide]


def test_an_unlabelled_table_speaks_of_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(printed(ALL["unlabelled"], capsys))
    assert "unlabelled" in text
    assert "agree %" in text
    assert "top-1" not in text
    assert "10.00" in text


# The sentences


def test_the_last_line_names_the_engine_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    best = WIDE.recommended
    assert best is not None
    assert verdict_line(WIDE, "build/m").startswith("PASS: loses at most ")
    assert verdict_line(WIDE, "build/m").endswith("take onnxruntime fp32: build/m/engines/onnxruntime-fp32.onnx")
    assert printed(WIDE, capsys)[-1] == verdict_line(WIDE, "build/model")


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        (outcome_of(verdict="fail"), "FAIL: no engine stays within the budget; none is recommended"),
        (
            outcome_of(row("onnxruntime", "int8", "over_budget", lost=900), verdict="fail"),
            "FAIL: no engine stays within the budget; none is recommended",
        ),
        (
            outcome_of(row("openvino", "int8", "undecided", lost=45), verdict="inconclusive"),
            "INCONCLUSIVE: about ",
        ),
    ],
)
def test_a_verdict_without_recommendation(outcome: Outcome, sentence: str) -> None:
    assert verdict_line(outcome, "build/m").startswith(sentence)


def test_every_row_that_is_not_verified_is_explained() -> None:
    lines = remarks(WIDE)
    for each in WIDE.rows:
        mentioned = any(line.startswith(f"{each.backend} {each.precision}: ") for line in lines)
        assert mentioned == (each.status != "verified"), each


def test_notes_come_first() -> None:
    assert remarks(outcome_of(notes=("the weights are random",))) == ["note: the weights are random"]


@pytest.mark.parametrize(("int8", "said"), [(2.0, False), (2.03, False), (2.05, True), (1.0, False)])
def test_an_engine_slower_than_its_float_sibling_is_named(int8: float, said: bool) -> None:
    outcome = outcome_of(row("b", "fp32", "verified", p50=2.0), row("b", "int8", "verified", p50=int8))
    assert any("slower than fp32" in line for line in remarks(outcome)) == said


def test_engines_of_other_backends_are_not_compared() -> None:
    outcome = outcome_of(row("a", "fp32", "verified", p50=1.0), row("b", "int8", "verified", p50=9.0))
    assert remarks(outcome) == []


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (StageRun("export", 6.14, False, "", FIRST_TIME, {}), ["export", "6.1", "s", "a", "note"]),
        (StageRun("export", 6.14, True, "", (), {}), ["export", "reused", "a", "note"]),
        (
            StageRun("fold", 0.01, False, "", ("graph", "fold code"), {}),
            ["fold", "0.0", "s", "a", "note", "changed:", "graph,", "fold", "code"],
        ),
    ],
)
def test_the_line_of_a_stage(run: StageRun, words: list[str]) -> None:
    assert stage_line(run, "a note").split() == words
    assert stage_line(replace(run, name="a name of more than 24 letters"), "").split()[0] == "a"
