"""What a run leaves to be read: report.json with all that explains it, the page, the Markdown, and both made again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnxruntime
import pytest

from command import Command, run_process
from edgewright import evidence, report_files
from edgewright.calibration.datasets import image_folder
from edgewright.runtime.errors import EngineError
from report_documents import SCHEMA_FILE
from tiny_network import PREPROCESS

CHOSEN = ("--backend", "onnxruntime", "--max-drop", "8")
EXPLAINING = ("compare layers cpu", "time kernels", "gallery")


@pytest.fixture(scope="module")
def whole(finished: Any, shared_images: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder of `tiny` with its whole report; not to be changed."""
    folder = Path(shutil.copytree(finished[0], tmp_path_factory.mktemp("whole") / "build"))
    arguments = ("engine", "tiny", "--build-dir", folder, *CHOSEN, *shared_images.options)
    done = run_process(*arguments, TINY_WHOLE_REPORT="1")
    assert done.code == 0, done.err
    return folder / "tiny"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The test's own copy."""
    return Path(shutil.copytree(whole, tmp_path / "build" / "tiny"))


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def test_the_document_is_that_of_the_schema(whole: Path) -> None:
    document = report_of(whole)
    jsonschema.validate(document, json.loads(SCHEMA_FILE.read_text()))
    assert {"calibration", "layers", "breakdown", "changed", "provenance"} <= document.keys()
    assert set(EXPLAINING) <= {stage["name"] for stage in document["stages"]}
    assert document["notes"] == [note for note in document["notes"] if "goes without" not in note]


def test_the_last_layer_is_as_far_from_fp32_as_its_logits_are(whole: Path, shared_images: Any) -> None:
    """onnxruntime runs both graphs as they lie in the folder."""
    layers = report_of(whole)["layers"]["cpu"]
    images = np.stack([PREPROCESS(image) for image in image_folder(shared_images.calibration)])
    assert layers["images"] == len(images)

    def logits(file: str) -> Any:
        session = onnxruntime.InferenceSession(str(whole / file), providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: images})[0]

    expected, found = logits("folded.onnx"), logits("int8-cpu.onnx")
    decibels = 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum())
    assert layers["layers"][-1]["sqnr_db"] == pytest.approx(decibels, abs=0.05)
    integer = [layer for layer in layers["layers"] if layer["precision"] == "int8"]
    assert integer
    assert all(layer["input"]["low"] < layer["input"]["high"] for layer in integer)


def test_kernel_times_are_there_for_every_engine(whole: Path) -> None:
    found = report_of(whole)["breakdown"]
    assert set(found["engines"]) == {"engines/onnxruntime-fp32.onnx", "engines/onnxruntime-int8.onnx"}
    for spent in found["engines"].values():
        assert sum(stage["milliseconds"] for stage in spent["stages"]) == pytest.approx(spent["milliseconds"])
        assert spent["milliseconds"] > 0
    weights = [sum(stage["weights"] for stage in engine["graph"]) for engine in found["engines"].values()]
    assert weights[1] < weights[0], "in INT8 they are smaller"


def test_labels_and_pictures_are_kept(whole: Path, shared_images: Any) -> None:
    labels = np.load(whole / "logits" / "labels.npy")
    assert labels.tolist() == image_folder(shared_images.evaluation, ("red", "green", "blue", "grey")).labels.tolist()  # type: ignore[union-attr]
    changed, gallery = report_of(whole)["changed"], json.loads((whole / "gallery.json").read_text())
    assert changed["total"] == gallery["total"]
    assert not any("thumbnail" in image for image in changed["images"])
    assert all("/" not in image["name"] for image in changed["images"]), "names, no places"


def test_a_run_in_which_nothing_changed_draws_nothing(whole: Path, shared_images: Any, tmp_path: Path) -> None:
    page, modules = (whole / "report.html").read_bytes(), tmp_path / "modules.json"
    arguments = ("engine", "tiny", "--json", "--build-dir", whole.parent, *CHOSEN, *shared_images.options)
    done = run_process(*arguments, TINY_WHOLE_REPORT="1", TINY_MODULES_TO=str(modules))
    assert done.code == 0, done.err
    assert all(stage["cached"] for stage in done.document["stages"])
    assert not {"torch", "onnx", "matplotlib", "jinja2"} & set(json.loads(modules.read_text()))
    command = done.document["provenance"]["command"]
    assert command.startswith("edgewright engine tiny --build-dir ")
    assert "--json" not in command
    options = done.document["provenance"]["options"]
    assert options["gates"] == {"max_drop": options["budget"]}
    assert (whole / "report.html").read_bytes() == page


def test_the_page_is_made_again_from_the_folder_alone(folder: Path, command: Command) -> None:
    pages = {name: (folder / name).read_bytes() for name in ("report.html", "report.md")}
    for name in pages:
        (folder / name).unlink()
    shutil.rmtree(folder / "engines")
    done = command("report", folder, "--json")
    assert done.document == {
        **{"schema": "edgewright.report/1", "html": str(folder / "report.html")},
        "markdown": str(folder / "report.md"),
    }
    assert {name: (folder / name).read_bytes() for name in pages} == pages
    assert command("report", folder).out.splitlines() == [str(folder / name) for name in pages]


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document["engines"][0].pop("status"),
        lambda document: document.update(engines=3),
        lambda document: document["engines"][0]["parity"].update(top1="a"),
        lambda document: document["reference"].pop("labelled"),
        lambda document: document["layers"]["cpu"]["layers"][0].pop("macs"),
        lambda document: document.pop("engines"),
        lambda document: document.update(schema="edgewright.engine/9"),
    ],
)
def test_a_damaged_report_is_one_line(folder: Path, command: Command, damage: Any) -> None:
    document = report_of(folder)
    damage(document)
    (folder / "report.json").write_text(json.dumps(document))
    assert "report.json" in command("report", folder).error.replace(str(folder), "report.json")


def test_the_page_is_made_beside_a_report_that_is_named(folder: Path, command: Command) -> None:
    for name in ("report.html", "report.md"):
        (folder / name).unlink()
    done = command("report", folder / "report.json", "--json")
    assert done.document["html"] == str(folder / "report.html")
    assert (folder / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_a_folder_without_a_report(tmp_path: Path, command: Command) -> None:
    assert "does not exist" in command("report", tmp_path).error
    assert "does not exist" in command("report", tmp_path / "nothing").error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EngineError("the profiler is broken", "mend it"), "the profiler is broken; mend it"),
        (IndexError("list index out of range\nin a library"), "IndexError: list index out of range"),
    ],
    ids=["ours", "of-a-library"],
)
def test_what_cannot_be_gathered_takes_no_verdict_away(
    error: Exception,
    words: str,
    folder: Path,
    shared_images: Any,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tiny_models: None,
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(report_files, "evidence_of", evidence.evidence_of)
    monkeypatch.setattr(evidence, "_breakdown", refuse)
    run = ("engine", "tiny", "--build-dir", folder.parent, *CHOSEN, *shared_images.options)
    done = command(*run, "--json")
    assert done.code == 0
    assert done.document["breakdown"] is None
    assert done.document["notes"][-1] == f"the report goes without kernel times: {words}"
    done = command(*run)
    assert f"note: the report goes without kernel times: {words}\n" in done.out
    assert done.out.splitlines()[-1].startswith("PASS")


def test_a_file_name_that_is_no_utf_8_takes_no_verdict_away(
    folder: Path, shared_images: Any, command: Command, tiny_models: None, tmp_path: Path
) -> None:
    evaluation = tmp_path / os.fsdecode(b"d\xe9j\xe0")
    shutil.copytree(shared_images.evaluation, evaluation)
    for file in evaluation.glob("*.png"):
        file.rename(evaluation / f"{file.stem}{os.fsdecode(bytes([255]))}.png")
    (evaluation / "labels.csv").unlink()
    calibration = ("--calibration", shared_images.calibration)
    done = command("engine", "tiny", "--build-dir", folder.parent, *CHOSEN, *calibration, "--evaluation", evaluation)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("PASS")
    document = report_of(folder)
    assert "d\\udce9j\\udce0" in document["provenance"]["command"]
    (folder / "report.json").write_text(json.dumps(document | {"notes": ["bad\udcff.png"]}))
    assert command("report", folder).code == 0
    for page in ("report.html", "report.md"):
        assert "udcff.png" in (folder / page).read_text()
