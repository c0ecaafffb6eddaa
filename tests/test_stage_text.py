"""What a stage says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from edgewright.stage_text import stage_details, stage_line
from edgewright.workspace import FIRST_TIME, StageRun

CALIBRATED = {"images": 96, "tensors": 240, "notes": ["too few"]}
FOLDED = {"folded": 49, "skipped": [], "difference": 4e-7}
RUNGS = [
    {"name": "ranges", "taken": True, "note": "3 × mse", "seconds": 1.24, "sqnr_db": 19.91},
    {"name": "equalization", "taken": False, "note": "no pair", "seconds": 0.04, "sqnr_db": 19.91},
    {"name": "AdaRound", "taken": True, "note": "rounding of 4 layers learned", "seconds": 41.0, "sqnr_db": 26.7},
]


def stage(name: str, **facts: Any) -> StageRun:
    return StageRun(name, 6.14, False, "", FIRST_TIME, facts, 15_340_000)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (stage("export"), "export 6.1 s 15.3 MB"),
        (StageRun("export", 6.14, True, "", (), {}, 15_340_000), "export reused 15.3 MB"),
        (StageRun("latency", 6.14, False, "", FIRST_TIME, {}), "latency 6.1 s"),
        (StageRun("reference", 0.04, False, "", FIRST_TIME, {}, 100_000), "reference 0.0 s 0.1 MB"),
        (StageRun("place rtx", 5.5, False, "", FIRST_TIME, {"left_out": {}}, 99_940), "place rtx 5.5 s 99.9 kB"),
        (stage("calibrate", **CALIBRATED), "calibrate 6.1 s 15.3 MB 96 images, 240 activations"),
        (
            StageRun("fold", 0.01, False, "", ("graph", "fold code"), FOLDED, 2_000_000),
            "fold 0.0 s 2.0 MB 49 batch norms, error 4e-07 changed: graph, fold code",
        ),
        (stage("fold", folded=0, skipped=[], difference=0.0), "fold 6.1 s 15.3 MB no batch norm folded"),
        (stage("place cpu", left_out={"a": "slower"}, layers=5), "place cpu 6.1 s 15.3 MB INT8 pays in 4 of 5 layers"),
        (stage("gallery", changed=1200), "gallery 6.1 s 15.3 MB 1,200 answers changed"),
        (
            stage("build openvino int8", actual={"int8": 45, "fp32": 37}, share=0.963),
            "build openvino int8 6.1 s 15.3 MB 45 × int8, 37 × fp32 (96 %)",
        ),
        (
            stage("cast fp16", casts=2, nodes=82, fp32=[{"node": "head", "reason": "overflow"}]),
            "cast fp16 6.1 s 15.3 MB 2 casts, 1 of 82 nodes in fp32",
        ),
        (
            stage("quantize cpu", int8_layers=4, layers=5, rungs=RUNGS, left_out={}),
            "quantize cpu 6.1 s 15.3 MB 4 of 5 layers INT8: ranges, AdaRound",
        ),
        (
            stage("quantize rtx", int8_layers=0, layers=5, rungs=RUNGS[:1], left_out={}),
            "quantize rtx 6.1 s 15.3 MB 0 of 5 layers INT8",
        ),
    ],
)
def test_the_line_of_a_stage(run: StageRun, words: str) -> None:
    assert " ".join(stage_line(run).split()) == words


def test_what_the_main_network_s_stages_say_fits_80_columns() -> None:
    runs = (
        stage("build tensorrt-rtx int8 sm86", actual={"fp16": 66, "int8": 16}, share=0.39),
        stage("quantize openvino", int8_layers=45, layers=82, rungs=RUNGS[:1], left_out={}),
        stage("calibrate", images=768, tensors=240, notes=[]),
        stage("cast fp16", casts=2, nodes=82, fp32=[{"node": "head", "reason": "overflow"}]),
        stage("place openvino", left_out=dict.fromkeys("abcde"), layers=50),
    )
    assert max(len(stage_line(run)) for run in runs) <= 80


def test_a_long_name_keeps_its_columns_apart() -> None:
    line = stage_line(stage("verify tensorrt-rtx int8 sm120 and more"))
    assert line.split()[-4:] == ["6.1", "s", "15.3", "MB"]


def test_the_details_of_folding_are_what_was_left() -> None:
    skipped = [{"node": "bn7", "reason": "two readers"}]
    assert list(stage_details(stage("fold", folded=1, skipped=skipped, difference=0.0))) == [
        "batch norm left: bn7: two readers"
    ]


def test_the_details_of_casting_are_what_stays() -> None:
    found = list(stage_details(stage("cast fp16", casts=2, nodes=9, fp32=[{"node": "head", "reason": "overflow"}])))
    assert found == ["stays fp32: head: overflow"]


def test_a_rung_without_a_note_and_without_an_error() -> None:
    rung = {"name": "ranges", "taken": True, "note": "", "seconds": 0.01, "sqnr_db": 300.0}
    run = stage("quantize rtx", int8_layers=0, layers=5, rungs=[rung], left_out={})
    assert list(stage_details(run)) == ["ranges: exact, 0.0 s"]


def test_the_details_of_quantizing_are_all_rungs_and_what_stays_float() -> None:
    run = stage(
        "quantize cpu", int8_layers=4, layers=5, rungs=RUNGS, left_out={"stem": "slower"}, notes=["in words", "1 stays"]
    )
    assert list(stage_details(run)) == [
        "ranges: 3 × mse, 19.9 dB, 1.2 s",
        "equalization, not taken: no pair, 19.9 dB, 0.0 s",
        "AdaRound: rounding of 4 layers learned, 26.7 dB, 41.0 s",
        "1 stays",
    ]


def test_the_details_of_placing_are_what_stays_float_and_why() -> None:
    run = stage("place cpu", left_out={"stem": "slower"}, layers=5, notes=["1 of 5 layers stay in FP32"])
    assert list(stage_details(run)) == ["stays float: stem: slower", "1 of 5 layers stay in FP32"]


def test_the_details_of_calibrating_are_its_warnings() -> None:
    assert list(stage_details(stage("calibrate", **CALIBRATED))) == ["too few"]


def test_most_stages_have_no_details() -> None:
    assert list(stage_details(stage("export"))) == []
