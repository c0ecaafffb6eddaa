"""The published schema of `edgewright.engine/1`: real documents are valid, damaged ones are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgewright.outcome import Outcome
from edgewright.report import engine_document
from report_documents import SCHEMA_FILE, report_document

VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
Damage = Callable[[dict[str, Any]], object]


def places(document: dict[str, Any]) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(document)]


def test_the_schema_is_one() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)


def test_the_documents_hold_the_schema_that_ships() -> None:
    documented = Path(__file__).parent.parent / "docs" / SCHEMA_FILE.name
    assert documented.read_text() == SCHEMA_FILE.read_text()


def test_whole_documents_are_valid(outcome: Outcome) -> None:
    assert places(report_document()) == []
    assert places(json.loads(json.dumps(engine_document(outcome)))) == []


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda it: it.pop("verdict"), "$"),
        (lambda it: it.update(schema="edgewright.engine/2"), "$.schema"),
        (lambda it: it.update(verdict="PASS"), "$.verdict"),
        (lambda it: it["recommended"].pop("path"), "$.recommended"),
        (lambda it: it["engines"][0].update(status="ok"), "$.engines[0].status"),
        (lambda it: it["engines"][0].update(sha256="none"), "$.engines[0].sha256"),
        (lambda it: it["engines"][0]["parity"].update(agreement=94.3), "$.engines[0].parity"),
        (lambda it: it["engines"][0]["parity"].update(loss_ci95=[0.1]), "$.engines[0].parity"),
        (lambda it: it["engines"][0]["latency_ms"].pop("p50"), "$.engines[0].latency_ms"),
        (lambda it: it["engines"][0]["latency_ms"].update(quantiles="fast"), "$.engines[0].latency_ms"),
        (lambda it: it["engines"][0]["gates"][0].update(gate="speed"), "$.engines[0].gates[0].gate"),
        (lambda it: it["engines"][0]["gates"][0].update(ci95=[0.1]), "$.engines[0].gates[0].ci95"),
        (lambda it: it["engines"][0]["figures"]["crossings"][0].update(rose=12), "$.engines[0].figures"),
        (lambda it: it["engines"][0]["figures"]["worst_class"].pop("label"), "$.engines[0].figures"),
        (lambda it: it["provenance"]["options"].update(gates=[0.5]), "$.provenance.options.gates"),
        (lambda it: it["stages"][0].update(cached="no"), "$.stages[0].cached"),
        (lambda it: it["layers"]["cpu"]["layers"][1]["input"].pop("high"), "$.layers.cpu.layers[1].input"),
        (lambda it: it["breakdown"]["graph"][0].update(macs=-1), "$.breakdown"),
        (lambda it: it["changed"]["images"][0].update(effect="bad"), "$.changed"),
        (lambda it: it["calibration"]["methods"].update(cpu=[]), "$.calibration"),
        (lambda it: it["provenance"].pop("command"), "$.provenance"),
        (lambda it: it["targets"]["sm86"].update(precision="int4"), "$.targets.sm86.precision"),
    ],
)
def test_damaged_documents_are_not(damage: Damage, place: str) -> None:
    document = report_document()
    damage(document)
    assert places(document) == [place]


def test_fields_may_be_added() -> None:
    document = report_document()
    document["engines"][0]["parity"]["worst_class"] = {"label": "bag"}
    assert places(document | {"later": 1}) == []
