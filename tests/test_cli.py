"""The command line: documents and exit codes, `run`, what is seen while stages run, and interrupted runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import DRIVER, Command, Completed, run_process
from contract import AUDIT_DOCUMENT, ENGINE_DOCUMENT, ERROR_DOCUMENT, STAGE, differences
from edgewright.outcome import Outcome
from edgewright.runtime.errors import WorkspaceError
from edgewright.workspace import Workspace

STAGES = (
    "export",
    "fold",
    "build onnxruntime fp32",
    "calibrate",
    "quantize cpu",
    "build onnxruntime int8",
    "reference",
    "verify onnxruntime fp32",
    "verify onnxruntime int8",
    "latency",
)
CHOSEN = ("--max-drop", 8, "--backend", "onnxruntime")
Tiny = Callable[..., Completed]


@pytest.fixture
def tiny(command: Command, build_dir: Path, images: Any) -> Tiny:
    """A command on the tiny network in the test's copy of the finished build folder; the budget is 8 points."""

    def run(name: str, *arguments: object) -> Completed:
        return command(name, "tiny", "--build-dir", build_dir, *CHOSEN, *images.options, *arguments)

    return run


def without_times(document: dict[str, Any]) -> dict[str, Any]:
    """What two runs must agree on."""
    engines = [{**engine, "latency_ms": None} for engine in document["engines"]]
    stages = [stage["key"] for stage in document["stages"]]
    return {**document, "engines": engines, "stages": stages, "recommended": None, "provenance": None}


# Documents and exit codes


@pytest.mark.parametrize("name", ["engine", "verify"])
def test_the_document_is_all_of_stdout(tiny: Tiny, name: str, build_dir: Path) -> None:
    done = tiny(name, "--json")
    assert done.code == 0
    assert list(differences(done.document, ENGINE_DOCUMENT)) == []
    assert done.document == json.loads((build_dir / "tiny" / "report.json").read_text())
    assert [line.split()[0] for line in done.err.splitlines()] == [stage.split()[0] for stage in STAGES]


def test_the_document_of_a_first_run_in_a_process_of_its_own(
    tmp_path: Path, images: Any, outcome: Outcome, tiny: Tiny
) -> None:
    """Nothing that torch, onnx or onnxruntime print reaches stdout."""
    done = run_process("engine", "tiny", "--json", "--build-dir", tmp_path, *CHOSEN, *images.options)
    assert done.code == 0, done.err
    assert list(differences(done.document, ENGINE_DOCUMENT)) == []
    assert not any(stage["cached"] for stage in done.document["stages"])
    assert without_times(done.document) == without_times(tiny("engine", "--json").document), "two processes agree"
    assert len(done.err.splitlines()) == len(STAGES), "a line per stage and nothing else"


def test_the_option_may_stand_anywhere_behind_the_command(command: Command, tiny: Tiny, build_dir: Path) -> None:
    first = command("engine", "--json", "--weights", "default", "tiny", "--build-dir", build_dir / "none")
    assert list(differences(first.document, ERROR_DOCUMENT)) == []
    assert tiny("engine", "--json").code == 0


@pytest.mark.parametrize(("budget", "verdict", "code"), [(8, "pass", 0), (0.5, "inconclusive", 4)])
def test_the_verdict_is_the_exit_code(tiny: Tiny, budget: float, verdict: str, code: int) -> None:
    done = tiny("engine", "--json", "--max-drop", budget)
    assert (done.code, done.document["verdict"]) == (code, verdict)


def test_a_failed_verdict(tiny: Tiny, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright import pipeline

    monkeypatch.setattr(pipeline, "conclusion", lambda rows: ("fail", None))
    done = tiny("engine")
    assert done.code == 3
    assert done.out.splitlines()[-1].startswith("FAIL: ")


def test_the_table_ends_in_the_verdict(tiny: Tiny) -> None:
    done = tiny("engine")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("tiny on 60 images")
    assert max(map(len, lines[: lines.index("")])) <= 80
    assert lines[-1].startswith("PASS: ")
    assert "take onnxruntime" in lines[-1]


@pytest.mark.parametrize("arguments", [("--weights", "nothing"), ("--evaluation", "nowhere"), ("--opset", "9")])
def test_an_error_is_a_document_and_a_line(tiny: Tiny, arguments: tuple[str, ...]) -> None:
    done = tiny("engine", "--json", *arguments)
    assert list(differences(done.document, ERROR_DOCUMENT)) == []
    assert done.error == f"{done.document['message']}; {done.document['remedy']}"
    assert tiny("engine", *arguments).out == "", "without --json nothing is printed there"


@pytest.mark.parametrize(
    "arguments",
    [
        ("engine", "tiny", "--nonsense"),
        ("engine", "tiny", "--method", "magic"),
        ("engine", "tiny", "--max-drop", "101"),
        ("engine", "tiny", "--max-drop", "nan"),
        ("engine", "tiny", "--min-ratio", "nan"),
        ("verify", "tiny", "--min-agreement", "nan"),
        ("verify", "tiny", "--min-sqnr", "inf"),
        ("engine", "tiny", "--opset", "new"),
        ("engine", "tiny", "two"),
        ("nonsense",),
        ("run",),
        ("run", "x.png", "--top", "0"),
    ],
)
def test_wrong_usage(command: Command, arguments: tuple[str, ...]) -> None:
    plain, as_json = command(*arguments), command(*arguments, "--json")
    assert (plain.code, plain.out, as_json.code) == (2, "", 2)
    assert "Usage: " in plain.err
    assert list(differences(as_json.document, ERROR_DOCUMENT)) == []
    assert as_json.document["error"] == "UsageError"


@pytest.mark.parametrize("arguments", [("--help",), ("engine", "-h"), ("--version",)])
def test_help_and_version(command: Command, arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.code == 0
    assert done.out
    assert done.err == ""


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("export", {"path", "opset"}, "model.onnx"),
        ("fold", {"path", "folded", "left", "difference"}, "folded: 3"),
        ("calibrate", {"path", "images", "tensors", "notes"}, "images: 30"),  # of 40: a quarter is held back
        ("quantize", {"graphs"}, "int8-cpu"),
        ("build", {"engines"}, "4 × int8, 2 × fp32"),
    ],
)
def test_single_stages(tiny: Tiny, name: str, fields: set[str], text: str) -> None:
    done = tiny(name, "--json")
    assert done.code == 0
    document = done.document
    assert document.keys() == {"schema", "model", "stages"} | fields
    assert document["schema"] == f"edgewright.{name}/1"
    assert list(differences(document["stages"], [STAGE])) == []
    listed = document.get("graphs") or document.get("engines") or [document]
    for path in [each["path"] for each in listed]:
        assert Path(path).is_file()
    assert text in tiny(name).out


def test_models_are_listed(command: Command) -> None:
    listed = command("models", "--json").document["models"]
    assert {"mobilenet_effnet_b0", "efficientnet_lite0", "tiny"} <= {model["name"] for model in listed}
    lines = command("models").out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(listed)]] == [model["name"] for model in listed]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "torch is not installed here; pip install"),
        (ImportError("libcudart.so: cannot open"), 1, "cannot be imported: libcudart.so"),
        (MemoryError(), 1, "out of memory; use fewer --threads"),
        (OSError(28, "No space left on device", "/tmp/x"), 1, "No space left on device (/tmp/x)"),
        (KeyboardInterrupt(), 130, "interrupted; stages that are finished are kept"),
    ],
)
def test_other_errors(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Workspace, "stage", fail)
    done = tiny("engine", "--json")
    assert done.code == code
    assert words in done.err
    assert "Traceback" not in done.err
    assert list(differences(done.document, ERROR_DOCUMENT)) == []


def test_an_error_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise WorkspaceError("one\ntwo", "three\nfour")

    monkeypatch.setattr(Workspace, "stage", fail)
    assert tiny("engine").error == "one two; three four"


def test_a_reader_that_leaves(build_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_output_that_cannot_be_written(option: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, str(DRIVER), "models", *option], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 1
    assert "No space left on device" in process.stderr
    assert "Traceback" not in process.stderr


# Engines for a GPU, and the audit


@pytest.fixture
def linear(command: Command, gpu_build_dir: Path, images: Any) -> Tiny:
    """A command on the network with engines for a GPU, in the test's copy of the finished build folder."""
    chosen = ("--max-drop", 8, "--backend", "onnxruntime", "--backend", "tensorrt-rtx", "--target", "sm86")

    def run(name: str, *arguments: object) -> Completed:
        return command(name, "tiny_linear", "--build-dir", gpu_build_dir, *chosen, *images.options, *arguments)

    return run


def test_the_document_with_engines_for_a_gpu(linear: Tiny) -> None:
    done = linear("engine", "--json")
    assert done.code == 0
    assert list(differences(done.document, ENGINE_DOCUMENT)) == []
    rows = [engine for engine in done.document["engines"] if engine["target"] == "sm86"]
    assert [engine["precision"]["requested"] for engine in rows] == ["fp32", "fp16", "int8"]
    assert [engine["precision"]["actual"] for engine in rows] == [{"fp32": 6}, {"fp16": 6}, {"fp16": 5, "int8": 1}]
    for engine in rows:
        audit = engine["audit"]
        assert audit["share_planned"] == audit["share_actual"] > 0
        assert min(audit["kernels"], audit["bytes_read"], audit["bytes_written"]) > 0
        assert engine["parity"] is None or engine["parity"]["source"] in ("engine", "simulation")


def test_stages_say_what_they_gave(linear: Tiny) -> None:
    given = [re.sub(r"[0-9.]+ [kM]B", "MB", line) for line in linear("engine").err.splitlines()]
    lines = {line.split("  ")[1]: " ".join(line.split()) for line in given}
    for stage, note in (
        ("quantize cpu", "4 of 6 layers INT8: ranges"),
        ("quantize rtx", "1 of 6 layers INT8: ranges"),
        ("cast fp16", "2 casts"),
        ("build tensorrt-rtx fp16 sm86", "6 × fp16"),
        ("build tensorrt-rtx int8 sm86", "5 × fp16, 1 × int8 (31 %)"),
    ):
        assert lines[stage] == f"{stage} reused MB {note}"


def test_only_one_precision(tiny: Tiny) -> None:
    document = tiny("engine", "--json", "--precision", "fp32").document
    assert [engine["precision"]["requested"] for engine in document["engines"]] == ["fp32"]
    assert document["recommended"]["precision"] == "fp32"
    both = tiny("build", "--json", "--precision", "int8", "--precision", "fp32").document
    assert [engine["precision"] for engine in both["engines"]] == ["fp32", "int8"], "the order is that of the backend"


@pytest.mark.parametrize("columns", ["80", "50"])
def test_the_table_with_engines_for_a_gpu(linear: Tiny, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = linear("engine")
    assert done.code == 0
    lines = done.out.splitlines()
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= 80
    assert sum(line.startswith("tensorrt-rtx sm86") for line in table) == 3


def test_quantize_writes_only_what_the_backends_read(tiny: Tiny) -> None:
    document = tiny("quantize", "--json").document  # --backend onnxruntime
    assert [graph["graph"] for graph in document["graphs"]] == ["fp16", "int8-cpu"]


def test_quantize_writes_the_fp16_graph_and_one_for_each_dialect(tiny: Tiny) -> None:
    backends = [word for name in ("tensorrt-rtx", "tensorrt") for word in ("--backend", name)]
    document = tiny("quantize", "--json", *backends).document
    graphs = {Path(graph["path"]).name: graph for graph in document["graphs"]}
    assert {"fp16.onnx", "int8-cpu.onnx", "int8-rtx.onnx", "int8-tensorrt.onnx"} <= graphs.keys()
    assert (graphs["int8-cpu.onnx"]["int8_layers"], graphs["int8-cpu.onnx"]["layers"]) == (4, 6)
    assert graphs["int8-rtx.onnx"]["int8_layers"] == 0
    lines = [" ".join(line.split()) for line in tiny("quantize", *backends).out.splitlines()]
    assert lines[0] == f"graphs: {len(graphs)}"
    assert f"int8-cpu {graphs['int8-cpu.onnx']['path']} 4 6" in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backend", "abacus"), "unknown backend 'abacus'; choose from onnxruntime, "),
        (("--precision", "int4"), "unknown precision 'int4'; choose from fp32, "),
        (("--target", "sm87"), "unknown target 'sm87'; choose from sm75, sm80, sm86, sm89, sm120, sm121"),
        (("--target", "sm86,sm1"), "unknown target 'sm1'; "),
        (("--batch", "8,4,32"), "the batch sizes 8, 4, 32 are not in order; give 1 ≤ minimum ≤ optimum ≤ maximum"),
        (("--batch", "0"), "the batch sizes 0, 0, 0 are not in order; "),
        (("--precision", "fp16"), "no backend builds that: "),  # onnxruntime has no FP16
        (("--target", ",", "--precision", "fp16"), "no backend builds that: "),
    ],
)
def test_wrong_choices_of_engines(tiny: Tiny, arguments: tuple[str, ...], words: str) -> None:
    assert tiny("engine", *arguments).error.startswith(words)
    document = tiny("engine", "--json", *arguments).document
    assert list(differences(document, ERROR_DOCUMENT)) == []
    assert document["error"] == "BuildError"


@pytest.mark.parametrize("value", ["", "1,2", "1,2,3,4", "a", "1,b,3", "-1", "1.5", "1;2;3"])
def test_batch_sizes_that_are_none(command: Command, value: str) -> None:
    done = command("engine", "tiny", f"--batch={value}")
    assert done.code == 2
    assert f"{value!r} is neither one batch size nor three" in done.err


def test_batch_sizes_are_one_or_three(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewright import cli

    given: list[dict[str, Any]] = []

    def noted(**arguments: Any) -> int:
        given.append(arguments)
        return 0

    monkeypatch.setattr(cli, "_prove", noted)
    for value in ("4", "1, 8,32"):
        assert command("engine", "tiny", "--batch", value).code == 0
    assert command("engine", "tiny").code == 0
    assert [arguments["batch"] for arguments in given] == [(4, 4, 4), (1, 8, 32), (1, 8, 32)]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_is_audited(
    command: Command, gpu_build_dir: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    engine = gpu_build_dir / "tiny_linear" / "engines" / f"tensorrt-rtx-{precision}-sm86.engine"
    as_json = command("audit", engine, "--json")
    assert (as_json.code, as_json.err) == (0, "")
    document = as_json.document
    assert list(differences(document, AUDIT_DOCUMENT)) == []
    assert (document["engine"], document["target"]) == (str(engine), "sm86")
    assert document["share_actual"] == document["share_planned"]
    assert [layer["requested"] for layer in document["layers"]] == [layer["actual"] for layer in document["layers"]]
    assert document["bytes_read"] == sum(kernel["bytes_read"] for kernel in document["kernels"])
    text = command("audit", engine)
    assert text.code == 0
    *table, line = text.out.splitlines()
    assert max(map(len, table)) <= 80
    assert line.startswith(f"{100 * document['share_actual']:.1f} % of the work in {precision} ")
    assert f"{len(document['kernels'])} kernels" in line


def test_an_engine_for_the_cpu_is_audited(command: Command, build_dir: Path) -> None:
    done = command("audit", build_dir / "tiny" / "engines" / "onnxruntime-int8.onnx", "--json")
    assert list(differences(done.document, AUDIT_DOCUMENT)) == []
    assert done.document["precision"] == {"requested": "int8", "actual": {"int8": 4, "fp32": 2}}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncated", "is not the engine that was built (its SHA-256 differs); build it again"),
        ("description missing", "is not an engine: no onnxruntime-int8.json describes it; engines are in build/MODEL"),
        ("description broken", "no description of the engine: "),
        ("folder", "there is no engine "),
        ("missing", "there is no engine "),
        ("description named", "onnxruntime-int8.json is not an engine: no onnxruntime-int8.json describes it"),
        ("another graph", "is not an engine: no folded.json describes it"),
    ],
)
def test_an_audit_refuses(command: Command, build_dir: Path, damage: str, words: str) -> None:
    path = build_dir / "tiny" / "engines" / "onnxruntime-int8.onnx"
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-10])
        case "description missing":
            path.with_suffix(".json").unlink()
        case "description broken":
            path.with_suffix(".json").write_text("{")
        case "folder":
            path = path.parent
        case "missing":
            path = path.with_name("absent.onnx")
        case "description named":
            path = path.with_suffix(".json")
        case "another graph":
            path = build_dir / "tiny" / "folded.onnx"
    done = command("audit", path)
    assert words in done.error
    assert done.out == ""
    assert list(differences(command("audit", path, "--json").document, ERROR_DOCUMENT)) == []


def test_build_ends_with_1_if_a_row_failed(linear: Tiny) -> None:
    done = linear("build", "--json", "--opset", "18", "--backend", "tensorrt-rtx", "--precision", "int8")
    assert done.code == 1
    row = next(row for row in done.document["engines"] if row["status"] == "failed")
    assert row["reason_code"] == "quantization_failed"
    assert "opset" in row["reason"]


def test_a_dla_is_no_matter_of_rtx(linear: Tiny) -> None:
    done = linear("build", "--json", "--dla", "0", "--precision", "fp16")
    assert done.code == 0
    assert {(row["status"], row["reason_code"]) for row in done.document["engines"] if row["target"]} == {
        ("skipped", "target_unsupported")
    }


@pytest.mark.parametrize("stage", ["build tensorrt-rtx int8 sm86", "quantize rtx", "simulate int8-rtx"])
def test_a_run_killed_in_a_stage_for_a_gpu_goes_on(gpu_build_dir: Path, images: Any, stage: str) -> None:
    chosen = ("--max-drop", 8, "--backend", "onnxruntime", "--backend", "tensorrt-rtx", "--target", "sm86")
    arguments = ("engine", "tiny_linear", "--build-dir", gpu_build_dir, *chosen, *images.options, "--json")
    (gpu_build_dir / "tiny_linear" / f"{stage}.key.json").unlink()
    killed = run_process(*arguments, TINY_KILL_IN=stage)
    assert killed.code == -signal.SIGKILL, killed.err
    assert list(gpu_build_dir.rglob(".partial-*")), "the temporary file was there"
    done = run_process(*arguments)
    assert done.code == 0, done.err
    assert [each["name"] for each in done.document["stages"] if not each["cached"]] == [stage]
    assert not list(gpu_build_dir.rglob(".partial-*"))


# run


@pytest.fixture
def classify(command: Command, build_dir: Path, images: Any, tiny: Tiny) -> Tiny:
    """`edgewright run` on three evaluation images, after a run that left its report."""
    assert tiny("engine").code == 0
    files = sorted(images.evaluation.glob("*.png"))[:3]

    def run(*arguments: object, model: str = "tiny") -> Completed:
        return command("run", *files, "--build-dir", build_dir, "--model", model, *arguments)

    return run


def test_run_prints_every_image_with_its_classes(classify: Tiny, images: Any) -> None:
    done = classify("--top", 2)
    assert done.code == 0
    lines = done.out.splitlines()
    assert len(lines) == 9
    assert lines[0].endswith("000.png")
    assert [line.split()[1] for line in lines[1:3]] == ["%", "%"]
    assert "is the fastest engine that passed" in done.err


def test_run_documents_its_predictions(classify: Tiny, images: Any) -> None:
    document = classify("--json", "--precision", "fp32").document
    assert document["schema"] == "edgewright.run/1"
    assert document["engine"] == {"backend": "onnxruntime", "precision": "fp32"}
    rows = (images.evaluation / "labels.csv").read_text().split()[1:4]
    assert [entry["top"][0]["index"] for entry in document["images"]] == [int(row.split(",")[1]) for row in rows]
    for entry in document["images"]:
        probabilities = [prediction["probability"] for prediction in entry["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1.0)


def test_run_takes_an_engine_file(command: Command, build_dir: Path, images: Any) -> None:
    engine = build_dir / "tiny" / "engines" / "onnxruntime-int8.onnx"
    done = command("run", images.evaluation / "000.png", "--engine", engine, "--json")
    assert done.document["engine"]["precision"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "absent"), "there is no engine "),
        (("--precision", "fp16"), "has no fp16 engine; run edgewright engine MODEL"),
        (("--backend", "magic"), "has no magic engine"),
        (("--backend", "onnxruntime"), "several engines (onnxruntime fp32, onnxruntime int8)"),
        (("absent.png",), "absent.png"),
    ],
)
def test_run_refuses(classify: Tiny, arguments: tuple[str, ...], words: str) -> None:
    done = classify(*arguments)
    assert words in done.error
    assert done.out == ""
    assert list(differences(classify(*arguments, "--json").document, ERROR_DOCUMENT)) == []


def test_run_names_the_broken_one_of_several_images(classify: Tiny, images: Any) -> None:
    (images.evaluation / "001.png").write_bytes((images.evaluation / "001.png").read_bytes()[:-60])
    assert "001.png" in classify().error


@pytest.mark.parametrize("file", ["onnxruntime-fp32.onnx", "onnxruntime-fp32.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_run_refuses_a_tampered_engine(classify: Tiny, build_dir: Path, file: str, damage: str) -> None:
    path = build_dir / "tiny" / "engines" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes({"flip": bytes(content), "truncate": bytes(content[:-9]), "empty": b"", "delete": b""}[damage])
    if damage == "delete":
        path.unlink()
    engine = build_dir / "tiny" / "engines" / "onnxruntime-fp32.onnx"
    assert "fp32" in classify("--engine", engine).error


def test_run_needs_neither_torch_nor_onnx(build_dir: Path, images: Any, tmp_path: Path) -> None:
    file = tmp_path / "modules.json"
    engine = build_dir / "tiny" / "engines" / "onnxruntime-int8.onnx"
    done = run_process("run", images.evaluation / "000.png", "--engine", engine, TINY_MODULES_TO=str(file))
    assert done.code == 0, done.err
    imported = {name.partition(".")[0] for name in json.loads(file.read_text())}
    assert not imported & {"torch", "torchvision", "onnx", "onnx_ir", "rich", "scipy"}


# Interrupted runs


def test_two_runs_at_once(tiny: Tiny, build_dir: Path) -> None:
    with Workspace(build_dir / "tiny").locked():
        assert "another run is using" in tiny("engine").error
        assert "another run is using" in run_process("fold", "tiny", "--build-dir", build_dir).error
    assert tiny("engine").code == 0


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_a_stage(tiny: Tiny, build_dir: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The signal comes when the stage is about to rename its first file."""
    expected = without_times(tiny("engine", "--json").document)
    make_stage, replace = Workspace.stage, os.replace
    (build_dir / "tiny" / f"{stage}.key.json").unlink()

    def noticed(self: Workspace, name: str, *arguments: Any) -> Any:
        if name == stage:
            monkeypatch.setattr(os, "replace", interrupted)
        return make_stage(self, name, *arguments)

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Workspace, "stage", noticed)
    stopped = tiny("engine")
    assert stopped.code == 130
    assert stopped.out == ""
    assert stopped.err.splitlines()[-1] == "interrupted; stages that are finished are kept"
    assert "Traceback" not in stopped.err
    monkeypatch.setattr(Workspace, "stage", make_stage)
    monkeypatch.setattr(os, "replace", replace)
    assert not list(build_dir.rglob(".partial-*"))
    document = tiny("engine", "--json").document
    assert [each["name"] for each in document["stages"] if not each["cached"]] == [stage]
    assert without_times(document) == expected


def test_ctrl_c_from_a_terminal_while_libraries_load(tmp_path: Path, images: Any, tiny: Tiny) -> None:
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), "engine", "tiny", "--build-dir", str(tmp_path), *images.options],
        env={**os.environ, "TINY_READY": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err


def test_a_run_killed_in_every_stage_goes_on(tmp_path: Path, images: Any, tiny: Tiny) -> None:
    """One run after the other is killed, each a stage later than the one before; the last one finishes."""
    arguments = ("engine", "tiny", "--build-dir", tmp_path, *CHOSEN, *images.options)
    for stage in STAGES:
        killed = run_process(*arguments, TINY_KILL_IN=stage)
        assert killed.code == -signal.SIGKILL, killed.err
        assert killed.out == ""
        assert list((tmp_path / "tiny").rglob(".partial-*")), "the temporary file was there"
    done = run_process(*arguments, "--json")
    assert done.code == 0, done.err
    assert [stage["name"] for stage in done.document["stages"] if not stage["cached"]] == ["latency"]
    assert without_times(done.document) == without_times(tiny("engine", "--json").document)
    assert not list(tmp_path.rglob(".partial-*"))
