"""The tables of the report about the engines' answers: cells against figures counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from edgewright.report_answers import classes_table, confusion_rows, figures_table, gate_rows
from report_documents import engine


def unlabelled(row: dict[str, Any]) -> dict[str, Any]:
    figures = row["figures"] | {"worst_class": None, "calibration_error": None, "confusion_changes": []}
    return row | {"figures": figures}


def test_the_figures_of_a_row() -> None:
    table = figures_table([engine("openvino", "int8", lost=12, gained=5)])
    cells = dict(zip(table["headings"], table["rows"][0][1], strict=True))
    assert table["rows"][0][0] == "openvino int8"
    assert cells["Agreement"] == "99.15 %"  # 17 of 2,000 differ
    assert cells["McNemar p"] == "0.143"  # 2 · P(X ≤ 5), X binomial(17, ½): 2 · 9,402 / 131,072
    assert cells["Not finite"] == "0"


def test_what_was_not_judged_has_no_row() -> None:
    row = engine("openvino", "int8", lost=12)
    unjudged = row | {"parity": None, "figures": None}
    assert figures_table([unjudged]) == {"headings": [], "rows": []}
    assert classes_table([unjudged])["rows"] == []


def test_the_class_that_loses_most_and_the_confidences() -> None:
    table = classes_table([engine("openvino", "int8", lost=12, gained=5)])
    cells = dict(zip(table["headings"], table["rows"][0][1], strict=True))
    assert cells["Class that loses most"] == "coat"
    assert cells["Its accuracy, %"] == "95.00 → 94.65"  # of 2,000: 1,900 and 1,893
    assert cells["Its loss, points [95 %]"].startswith("0.35 [")
    # logits 2 : 0 give a confidence of 0.8808, 1,900 of 2,000 right: 0.95 − 0.8808; the engine's 1.9 : 0.1 give 0.8581,
    # 1,888 of 1,983 right, and 1 : 0 give 0.7311, 5 of 17: (1,888 − 1,701.66 + 12.43 − 5) / 2,000
    assert cells["Calibration error, %"] == "6.92 → 9.69"
    assert (cells["Crosses 0.5, %"], cells["Crosses 0.9, %"]) == ("0.00", "0.00")


def test_without_labels_only_confidences_are_left() -> None:
    table = classes_table([unlabelled(engine("openvino", "int8", lost=12))])
    assert table["headings"] == ["Crosses 0.5, %", "Crosses 0.9, %"]


def test_where_no_class_loses_none_is_named() -> None:
    cells = classes_table([engine("openvino", "fp32", lost=0, gained=2)])["rows"][0][1]
    assert cells[:3] == ["none", "", ""]


def test_a_class_without_a_name_has_a_number() -> None:
    row = engine("openvino", "int8", lost=12)
    row["figures"]["worst_class"]["label"] = ""
    assert classes_table([row])["rows"][0][1][0] == "class 0"


def test_an_engine_that_never_answers_has_no_calibration_error() -> None:
    row = engine("openvino", "int8", lost=12)
    row["figures"]["calibration_error"]["engine"] = None
    assert classes_table([row])["rows"][0][1][3].endswith("→ none")


def test_confusions_are_counted() -> None:
    assert confusion_rows(engine("openvino", "int8", lost=12, gained=5)) == [("coat", "shirt", "100", "107")]
    assert confusion_rows(None) == confusion_rows({}) == []


@pytest.mark.parametrize("gates", [[], [{"verdict": "pass", "claim": "loses nothing"}]])
def test_one_gate_needs_no_list(gates: list[dict[str, str]]) -> None:
    assert gate_rows({"gates": gates}) == []
    assert gate_rows(None) == []


def test_several_gates_are_listed() -> None:
    gates = [{"verdict": "pass", "claim": "a"}, {"verdict": "fail", "claim": "b"}]
    assert gate_rows({"gates": gates}) == [("pass", "a"), ("fail", "b")]
