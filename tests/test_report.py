"""The JSON document against the contract, the table at 80 columns, the sentences below it, and the lines of stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contract import AUDIT_DOCUMENT, ENGINE_DOCUMENT, differences
from edgewright.console import print_audit, print_outcome
from edgewright.outcome import EngineRow, Outcome, Reference, target_choices
from edgewright.report import (
    EXIT_CODES,
    audit_document,
    audit_line,
    audit_table,
    engine_document,
    remarks,
)
from edgewright.runtime.figures import further_figures
from edgewright.runtime.gates import judge
from edgewright.runtime.latency import Latency
from edgewright.runtime.parity import compare
from edgewright.runtime.specs import EngineInfo, Kernel, LayerPrecision
from edgewright.runtime.verdict import STATUS_OF_VERDICT
from edgewright.verdict_report import verdict_line
from edgewright.workspace import StageRun

IMAGES = 10_000


def measured(p50: float) -> Latency:
    return Latency(1, 2, 200, p50, p50, p50, 0.01)


def info(backend: str, precision: str, size: int, kernels: tuple[Kernel, ...] = (), share: int = 1000) -> EngineInfo:
    """An engine whose two convolutions are 1,000 MACs, of which `share` run in `precision`."""
    rest = "fp32" if precision == "bf16" else "fp16"
    layers: tuple[LayerPrecision, ...] = (
        LayerPrecision("conv", "Conv", precision, precision, share, "conv_kernel"),
        LayerPrecision("rest", "Conv", rest, rest, 1000 - share, "rest_kernel"),
    )
    layers = layers if share < 1000 else layers[:1]
    return EngineInfo(backend, precision, None, (), (), _any(), ("a", "b"), "", "", size, layers, kernels)


def moving(kernels: int, bytes_moved: int) -> tuple[Kernel, ...]:
    """So many kernels that together read and write so many bytes."""
    first = Kernel("conv_kernel", "correlation", ("conv", "relu"), "int8", bytes_moved - 1000, 1000, True)
    return (first, *(Kernel(f"copy_{index}", "kgen", (), "fp16", 0, 0) for index in range(kernels - 1)))


def _any() -> Any:
    return None


def row(backend: str, precision: str, status: str, *, lost: int = 0, p50: float | None = 2.0, **more: Any) -> EngineRow:
    """An engine that loses `lost` of 10,000 images, all of which the reference gets right."""
    if status in ("skipped", "failed"):
        return EngineRow(backend, precision, None, status, "package_missing", more.get("reason", "not here; install"))
    known = info(backend, precision, more.get("size", 16_100_000), more.get("kernels", ()), more.get("share", 1000))
    path = f"engines/{backend}-{precision}.onnx"
    if status == "built_not_run":
        return EngineRow(backend, precision, "sm86", status, "no_device", "no GPU here", path, known)
    labels = np.zeros(IMAGES, np.int64) if more.get("labelled", True) else None
    reference, engine = np.tile([[1.0, 0.0]], (IMAGES, 1)), np.tile([[0.9, 0.1]], (IMAGES, 1))
    engine[:lost] = [0.0, 1.0]
    parity = compare(reference, engine, labels, source="simulation" if status == "simulated" else "engine")
    verdict = judge(parity)
    if status == "simulated":
        words = f"simulated: {verdict.sentence}"
        return EngineRow(backend, precision, "sm86", status, verdict.word, words, path, known, parity, verdict)
    assert STATUS_OF_VERDICT[verdict.word] == status
    latency = None if p50 is None else measured(p50)
    figures = further_figures(reference, engine, labels, ("shoe", "shirt"))
    return EngineRow(
        backend, precision, None, status, verdict.word, verdict.sentence, path, known, parity, verdict, latency, figures
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
SIMULATED = (
    row("tensorrt-rtx", "fp32", "built_not_run", kernels=moving(52, 48_000_000)),
    row("tensorrt-rtx", "fp16", "simulated", kernels=moving(52, 24_000_000)),
    row("tensorrt-rtx", "int8", "simulated", kernels=moving(52, 20_000_000), share=305),
)
GPU = outcome_of(row("onnxruntime", "fp32", "verified"), *SIMULATED, targets=target_choices(SIMULATED))
ALL = {
    "wide": WIDE,
    "GPU": GPU,
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
        (lambda document: document.pop("targets"), ".targets is missing"),
        (lambda document: document["targets"]["sm86"].pop("reason"), "targets.sm86.reason is missing"),
        (lambda document: document["targets"].update(sm89=None), "targets.sm89 is None, not an object"),
        (lambda document: document["engines"][1]["audit"].update(kernels=[]), "engines[].audit.kernels is []"),
        (lambda document: document["engines"][1].pop("audit"), "engines[].audit is missing"),
    ],
)
def test_the_check_of_the_document_can_fail(damage: Any, difference: str) -> None:
    document = json.loads(json.dumps(engine_document(GPU)))
    damage(document)
    (found,) = differences(document, ENGINE_DOCUMENT)
    assert found.startswith(difference)


def test_the_sign_of_the_loss() -> None:
    parity = engine_document(WIDE)["engines"][1]["parity"]
    assert parity["delta"] == -0.243
    assert parity["loss_ci95"][0] < 0.243 < parity["loss_ci95"][1]


def test_the_audit_of_each_engine_stands_in_the_document() -> None:
    plain, _, half, int8 = (engine["audit"] for engine in engine_document(GPU)["engines"])
    assert plain == {
        "share_planned": 1.0, "share_actual": 1.0, "kernels": 0, "bytes_read": None, "bytes_written": None
    }  # fmt: skip
    assert (half["kernels"], half["bytes_read"], half["bytes_written"]) == (52, 23_999_000, 1000)
    assert (int8["share_planned"], int8["share_actual"]) == (0.305, 0.305)
    assert engine_document(WIDE)["engines"][-1]["audit"] is None, "it was not built"


def test_a_simulated_row_says_so_in_the_document() -> None:
    engine = engine_document(GPU)["engines"][2]
    assert (engine["status"], engine["target"], engine["parity"]["source"]) == ("simulated", "sm86", "simulation")
    assert engine["latency_ms"] is None


def test_the_engine_to_take_for_a_target() -> None:
    document = engine_document(GPU)
    assert document["targets"] == {
        "sm86": {
            "backend": "tensorrt-rtx",
            "precision": "int8",
            "path": "engines/tensorrt-rtx-int8.onnx",
            "reason": "int8 52 kernels and 20.0 MB, fp16 52 kernels and 24.0 MB",
        }
    }
    assert document["recommended"]["backend"] == "onnxruntime", "what did not run here is not recommended"


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
    assert lines[1] == "backend type MB top-1 loss, % [95 %] ms status"
    assert "PyTorch fp32 93.12 reference" in lines
    assert "onnxruntime fp32 16.1 100.00 0.00 [-0.04, 0.04] 123 verified" in lines
    assert "onnxruntime int8 16.1 75.70 24.30 [23.47, 25.15] 1234 over_budget" in lines
    assert "tensorrt-rtx sm86 int8 16.1 built_not_run" in lines
    assert "tensorrt int8 skipped" in lines


@pytest.mark.usefixtures("_eighty_columns")
def test_the_table_says_how_much_of_the_work_is_int8(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [" ".join(line.split()) for line in printed(GPU, capsys)]
    assert "tensorrt-rtx sm86 fp16 16.1 100.00 0.00 [-0.04, 0.04] simulated" in lines
    assert "tensorrt-rtx sm86 int8 30% 16.1 100.00 0.00 [-0.04, 0.04] simulated" in lines


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
    assert "agree" in text.splitlines()[1]
    assert "differs, % [95 %]" in text.splitlines()[1]
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
        (outcome_of(verdict="fail"), "FAIL: no engine passes; none is recommended"),
        (
            outcome_of(
                row("openvino", "int8", "over_budget", lost=950),
                row("onnxruntime", "int8", "over_budget", lost=900),
                verdict="fail",
            ),
            "FAIL: no engine passes; the closest is onnxruntime int8: loses at least ",
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
        explained = [
            line for line in lines if line.startswith(f"{each.backend} ") and line.endswith(f": {each.reason}")
        ]
        assert len(explained) == (each.status != "verified"), each
        assert all(each.precision in line.partition(":")[0] for line in explained)


def test_rows_with_the_same_reason_share_a_line() -> None:
    assert "tensorrt-rtx fp16, int8 for sm86: no GPU here" in remarks(WIDE)
    others = [replace(each, target="sm89") for each in WIDE.rows if each.status == "built_not_run"]
    assert "tensorrt-rtx fp16, int8 for sm86, sm89: no GPU here" in remarks(outcome_of(*WIDE.rows, *others))


def test_the_engine_to_take_elsewhere_is_named() -> None:
    assert remarks(GPU)[-1] == (
        "sm86: take tensorrt-rtx int8 there, engines/tensorrt-rtx-int8.onnx "
        "(int8 52 kernels and 20.0 MB, fp16 52 kernels and 24.0 MB)"
    )


@pytest.mark.parametrize(
    ("int8", "said"),
    [
        (moving(52, 24_000_000), False),
        (moving(53, 20_000_000), True),
        (moving(40, 24_000_001), True),
        ((Kernel("k", "", (), "int8"),), False),  # what it moves is not known
    ],
)
def test_int8_that_needs_more_than_fp16_is_named(int8: tuple[Kernel, ...], said: bool) -> None:
    rows = (SIMULATED[1], row("tensorrt-rtx", "int8", "simulated", kernels=int8))
    assert any("tensorrt-rtx int8 for sm86 needs more than fp16" in line for line in remarks(outcome_of(*rows))) == said


def test_notes_come_first() -> None:
    assert remarks(outcome_of(notes=("the weights are random",))) == ["note: the weights are random"]


@pytest.mark.parametrize(("int8", "said"), [(2.0, False), (2.03, False), (2.05, True), (1.0, False)])
def test_an_engine_slower_than_its_float_sibling_is_named(int8: float, said: bool) -> None:
    outcome = outcome_of(row("b", "fp32", "verified", p50=2.0), row("b", "int8", "verified", p50=int8))
    assert any("slower than fp32" in line for line in remarks(outcome)) == said


def test_engines_of_other_backends_are_not_compared() -> None:
    outcome = outcome_of(row("a", "fp32", "verified", p50=1.0), row("b", "int8", "verified", p50=9.0))
    assert remarks(outcome) == []


# The audit of one engine

AUDITED = replace(
    info("tensorrt-rtx", "int8", 1_000_000, moving(3, 21_000), share=305),
    target="sm86",
    versions={"tensorrt-rtx": "1.7"},
)


def test_the_document_of_an_audit() -> None:
    document = json.loads(json.dumps(audit_document(AUDITED, "engines/e.engine"), allow_nan=False))
    assert list(differences(document, AUDIT_DOCUMENT)) == []
    assert document["precision"] == {"requested": "int8", "actual": {"fp16": 1, "int8": 1}}
    assert (document["share_planned"], document["share_actual"]) == (0.305, 0.305)
    assert (document["bytes_read"], document["bytes_written"], len(document["kernels"])) == (20_000, 1000, 3)
    unknown = audit_document(replace(AUDITED, kernels=(Kernel("k", "", (), "int8"),)), "e")
    assert (unknown["bytes_read"], unknown["bytes_written"]) == (None, None)


@pytest.mark.parametrize(
    ("damage", "difference"),
    [
        (lambda document: document.pop("kernels"), ".kernels is missing"),
        (lambda document: document["kernels"][0].update(sources="conv"), "kernels[].sources is 'conv', not a list"),
        (lambda document: document["layers"][0].pop("actual"), "layers[].actual is missing"),
        (lambda document: document["versions"].update(cuda=13), "versions.cuda is 13, not str"),
    ],
)
def test_the_check_of_an_audit_can_fail(damage: Any, difference: str) -> None:
    document = json.loads(json.dumps(audit_document(AUDITED, "e")))
    damage(document)
    assert next(differences(document, AUDIT_DOCUMENT)) == difference


def test_an_audit_in_one_line() -> None:
    assert audit_line(AUDITED) == (
        "30.5 % of the work in int8 (planned 30.5 %): 1 × fp16, 1 × int8; "
        "3 kernels, 0.0 MB read, 0.0 written at batch 1"
    )
    silent = audit_line(replace(AUDITED, kernels=(Kernel("k", "", (), "int8"),)))
    assert silent.endswith("; 1 kernels at batch 1"), "bytes that are not known are not made up"


@pytest.mark.usefixtures("_eighty_columns")
def test_the_table_of_an_audit_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    long = Kernel("__myl_" + "Slic" * 30, "runtime_fusion_of_many", ("features.12.block.3/Conv",) * 5, "fp16", 10**9, 5)
    print_audit(audit_table(replace(AUDITED, kernels=(*AUDITED.kernels, long))), audit_line(AUDITED))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80, "\n".join(lines)
    (first,) = (line for line in lines if line.startswith("conv"))
    assert "correlation" in first
    assert "30.5 %" in first
    assert [word for word in first.split() if word == "kB"] == ["kB", "kB"]
    assert lines[-1] == audit_line(AUDITED)


@pytest.mark.usefixtures("_eighty_columns")
def test_layers_that_share_a_kernel_are_added_up(capsys: pytest.CaptureFixture[str]) -> None:
    shared = tuple(replace(layer, kernel="conv_kernel") for layer in AUDITED.layers)
    print_audit(audit_table(replace(AUDITED, layers=shared)), "")
    (first,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("conv"))
    assert "int8/fp16 int8" in first, "planned for both, run in one"
    assert "100.0 %" in first
