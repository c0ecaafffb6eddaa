"""The stages on a tiny network: what they give, what is reused, and rows that cannot be built or run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from command import run_process
from edgewright import cli, graphs
from edgewright.calibration.image_set import ImageSet
from edgewright.context import DEFAULT_TARGETS
from edgewright.export.entries import ModelEntry, Task
from edgewright.export.models import MODELS
from edgewright.export.resolve import resolve
from edgewright.graphs import NVIDIA_DIALECTS
from edgewright.int8 import Int8Graphs
from edgewright.optimize import dialects
from edgewright.outcome import EngineRow, Outcome, conclusion
from edgewright.pipeline import Options, Pipeline
from edgewright.runtime.backends import BACKENDS, Absence, BuildRequest, Compiled, Runner
from edgewright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, OnnxRuntimeRunner
from edgewright.runtime.choice import REPORT_FILE
from edgewright.runtime.errors import (
    BuildError,
    CalibrationError,
    DataError,
    EngineError,
    ModelError,
    ParityError,
    QuantizationError,
)
from edgewright.runtime.gates import MaxDrop
from edgewright.runtime.latency import Latency
from edgewright.runtime.session import Session
from edgewright.runtime.specs import BatchProfile
from edgewright.workspace import FIRST_TIME, library_versions
from stage_modules import replace_in_stages
from tiny_network import LABELS, PREPROCESS, write_images

pytestmark = pytest.mark.usefixtures("tiny_models")

Changes = dict[str, tuple[str, ...]]
Prove = Callable[..., Outcome]

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
FP32, INT8 = "onnxruntime fp32", "onnxruntime int8"
BUILDS = (f"build {FP32}", f"build {INT8}")
VERIFICATIONS = (f"verify {FP32}", f"verify {INT8}")
INT8_GRAPH = "engine engines/onnxruntime-int8.onnx"
FP32_GRAPH = "engine engines/onnxruntime-fp32.onnx"


@pytest.fixture
def prove(build_dir: Path, images: Any) -> Prove:
    """Runs everything in the test's copy of the finished build folder."""

    def run(**options: Any) -> Outcome:
        given = {"build_dir": build_dir, "calibration": images.calibration, "evaluation": images.evaluation}
        chosen = {"gates": (MaxDrop(0.08),), "backends": ("onnxruntime",)}
        pipeline = Pipeline(Options("tiny", **{**chosen, **given, **options}))
        with pipeline.workspace.locked():
            return pipeline.prove()

    return run


def made(outcome: Outcome) -> Changes:
    """The stages that were made, not reused, and for what."""
    return {run.name: run.changed for run in outcome.stages if not run.cached}


def row_of(outcome: Outcome, backend: str, precision: str) -> EngineRow:
    (row,) = (row for row in outcome.rows if (row.backend, row.precision) == (backend, precision))
    return row


# What comes out


def test_the_stages_run_in_order(outcome: Outcome) -> None:
    assert tuple(run.name for run in outcome.stages) == STAGES
    assert made(outcome) == dict.fromkeys(STAGES, FIRST_TIME)


def test_figures_are_those_of_the_networks_own_logits(outcome: Outcome, shared_images: Any) -> None:
    import torch

    paths = sorted(shared_images.evaluation.glob("*.png"))
    with torch.inference_mode():
        expected = resolve("tiny").module()(torch.from_numpy(PREPROCESS.batch(paths))).numpy()
    assert len(set(expected.argmax(1))) > 1, "the network must not always say the same"
    assert (outcome.reference.top1, outcome.reference.images, outcome.reference.labelled) == (1.0, 60, True)
    fp32, int8 = row_of(outcome, *FP32.split()), row_of(outcome, *INT8.split())
    for row in (fp32, int8):
        assert row.parity is not None
        assert row.parity.top1 == row.parity.agreement, "labels are the network's own predictions"
    assert fp32.parity is not None
    assert int8.parity is not None
    assert fp32.parity.agreement == 1.0
    assert fp32.parity.max_abs is not None
    assert fp32.parity.max_abs <= 1e-4 * np.abs(expected).max()
    assert int8.parity.sqnr_db is not None
    assert 10 < int8.parity.sqnr_db < 60, "integers, neither lost nor exact"


def test_engines_are_what_they_say(outcome: Outcome) -> None:
    fp32, int8 = row_of(outcome, *FP32.split()), row_of(outcome, *INT8.split())
    assert fp32.info is not None
    assert int8.info is not None
    assert fp32.info.actual_precision == {"fp32": 6}
    assert int8.info.actual_precision == {"int8": 4, "fp32": 2}, "the gate's two convolutions stay float"
    assert fp32.info.labels == LABELS


def test_the_engines_of_the_folder_open_and_agree_with_the_table(
    finished: tuple[Path, Outcome], shared_images: Any
) -> None:
    paths = sorted(shared_images.evaluation.glob("*.png"))
    labels = [int(line.split(",")[1]) for line in (shared_images.evaluation / "labels.csv").read_text().split()[1:]]
    for precision in ("fp32", "int8"):
        with Session.open(finished[0] / "tiny", backend="onnxruntime", precision=precision) as session:
            found = [predictions[0].index for predictions in session.classify(paths)]
        parity = row_of(finished[1], "onnxruntime", precision).parity
        assert parity is not None
        assert np.mean(np.array(found) == labels) == parity.top1


def test_no_temporary_file_is_left(finished: tuple[Path, Outcome]) -> None:
    assert not list(finished[0].rglob(".partial-*"))


def test_one_channel(tmp_path: Path, images: Any) -> None:
    (images.evaluation / "labels.csv").unlink()
    folders = {"calibration": images.calibration, "evaluation": images.evaluation}
    options = Options(
        "tiny_gray", "default", tmp_path / "gray", 18, gates=(MaxDrop(1.0),), backends=("onnxruntime",), **folders
    )
    pipeline = Pipeline(options)
    with pipeline.workspace.locked():
        outcome = pipeline.prove()
    assert pipeline.exported.inputs[0].shape == (None, 1, 16, 16)
    assert outcome.verdict == "pass"
    assert [row.status for row in outcome.rows] == ["verified", "verified"]


# Reuse


def test_nothing_is_made_twice_and_the_answer_is_the_same(prove: Prove, outcome: Outcome) -> None:
    again = prove()
    assert made(again) == {}
    assert [run.key for run in again.stages] == [run.key for run in outcome.stages]
    assert (again.rows, again.reference, again.verdict) == (outcome.rows, outcome.reference, outcome.verdict)


def test_time_stamps_and_places_do_not_matter(prove: Prove, build_dir: Path, images: Any) -> None:
    for path in build_dir.rglob("*"):
        os.utime(path, (0, 0))
    moved = images.calibration.rename(images.calibration.with_name("elsewhere"))
    for index, path in enumerate(sorted(moved.iterdir())):
        path.rename(moved / f"renamed {index:03}.png")
    assert made(prove(calibration=moved)) == {}


def test_a_run_without_changes_imports_neither_torch_nor_onnx(build_dir: Path, images: Any, tmp_path: Path) -> None:
    file = tmp_path / "modules.json"
    arguments = (
        "engine",
        "tiny",
        "--build-dir",
        build_dir,
        *images.options,
        "--max-drop",
        8,
        "--json",
        "--backend",
        "onnxruntime",
    )
    done = run_process(*arguments, TINY_MODULES_TO=str(file))
    assert done.code == 0, done.err
    assert all(stage["cached"] for stage in done.document["stages"])
    imported = {name.partition(".")[0] for name in json.loads(file.read_text())}
    assert "numpy" in imported
    assert not imported & {"torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "scipy"}


def rebuilt(graphs: bool = True, *, int8: bool = True, cause: str = "graph", calibration: bool = True) -> Changes:
    """What follows when the folded graph, or only the integer one, is another."""
    changes: Changes = {}
    if graphs:
        changes |= {f"build {FP32}": (cause,), f"verify {FP32}": ("engine",)}
    if calibration:
        changes |= {"calibrate": (cause,)}
    if int8:
        changes |= {f"build {INT8}": (cause,), f"verify {INT8}": ("engine",)}
        changes |= {"latency": (FP32_GRAPH, INT8_GRAPH) if graphs else (INT8_GRAPH,)}
    return changes


ANOTHER_NETWORK = rebuilt() | {"fold": ("graph",), "quantize cpu": ("calibration", "graph")}
ANOTHER_CALIBRATION = rebuilt(graphs=False, calibration=False) | {"quantize cpu": ("calibration",)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": "other"}, ANOTHER_NETWORK | {"export": ("weights",), "reference": ("weights",)}),
        ({"opset": 20}, ANOTHER_NETWORK | {"export": ("opset",)}),
        (
            {"weights": "dim"},
            {
                "calibrate": ("preprocessing",),
                "quantize cpu": ("calibration",),
                f"build {FP32}": ("preprocessing",),
                f"build {INT8}": ("graph", "preprocessing"),
                "reference": ("preprocessing",),
                f"verify {FP32}": ("preprocessing",),
                f"verify {INT8}": ("engine", "preprocessing"),
                "latency": (INT8_GRAPH,),
            },
        ),
        ({"method": "minmax"}, rebuilt(graphs=False, calibration=False) | {"quantize cpu": ("method",)}),
        (
            {"threads": 1},
            dict.fromkeys(("quantize cpu", f"verify {FP32}", f"verify {INT8}", "latency"), ("threads",)),
        ),
        ({"gates": (MaxDrop(0.5),)}, {"quantize cpu": ("budget",)}),
        ({"seed": 5}, {"quantize cpu": ("seed",)}),
        ({"allow_overlap": True}, {}),
        ({"remainder": "fp32", "profile": BatchProfile(1, 1, 1), "targets": ("sm89",), "workspace": 1 << 20}, {}),
    ],
    ids=["weights", "opset", "preprocessing", "method", "threads", "budget", "seed", "overlap", "of GPUs alone"],
)
def test_an_option_remakes_what_depends_on_it(prove: Prove, options: dict[str, Any], expected: Changes) -> None:
    assert made(prove(**options)) == expected


def test_another_calibration_image_remakes_what_depends_on_it(prove: Prove, images: Any) -> None:
    Image.new("RGB", (9, 9), (250, 10, 200)).save(images.calibration / "new.png")
    assert made(prove()) == ANOTHER_CALIBRATION | {"calibrate": ("images",)}


def test_another_evaluation_image_remakes_what_depends_on_it(prove: Prove, images: Any) -> None:
    Image.new("RGB", (9, 9), (250, 10, 200)).save(images.evaluation / "000.png")
    assert made(prove()) == dict.fromkeys(("reference", f"verify {FP32}", f"verify {INT8}"), ("images",))


def test_other_labels_change_the_figures_but_no_artefact(prove: Prove, images: Any, outcome: Outcome) -> None:
    file = images.evaluation / "labels.csv"
    head, *rows = file.read_text().split()
    file.write_text("\n".join([head, *(f"{row.split(',')[0]},{3 - int(row.split(',')[1])}" for row in rows)]))
    other = prove()
    assert made(other) == {}
    assert other.reference.top1 == 0.0 != outcome.reference.top1


def test_labels_of_calibration_images_are_not_looked_at(prove: Prove, images: Any) -> None:
    for index, path in enumerate(sorted(images.calibration.glob("*.png"))):
        folder = images.calibration / f"no label of the model {index // 20}"
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    assert made(prove()) == {}


CODE = [
    ("export/to_onnx.py", {"export": ("export code",)}),
    ("export/models.py", {"export": ("export code",), "reference": ("reference code",)}),
    ("export/zoo/mbconv.py", {"export": ("export code",), "reference": ("reference code",)}),
    ("optimize/fold_batchnorm.py", {"fold": ("fold code",), "quantize cpu": ("rewriting code",)}),
    ("optimize/plan.py", {"quantize cpu": ("rewriting code",)}),
    ("optimize/work.py", {"quantize cpu": ("rewriting code",)} | dict.fromkeys(BUILDS, ("build code",))),
    ("calibration/collect.py", {"calibrate": ("calibration code",), "quantize cpu": ("ladder code",)}),
    ("calibration/ranges.py", {"calibrate": ("calibration code",), "quantize cpu": ("ladder code", "rewriting code")}),
    ("ladder.py", {"quantize cpu": ("ladder code",)}),
    ("learned/adaround.py", {"quantize cpu": ("ladder code",)}),
    ("runtime/audit.py", dict.fromkeys(BUILDS, ("build code",))),
    (
        "runtime/backends/base.py",
        dict.fromkeys(BUILDS, ("build code",))
        | dict.fromkeys(VERIFICATIONS, ("backend code",))
        | {"latency": ("latency code",)},
    ),
    ("runtime/latency.py", {"latency": ("latency code",)}),
    ("runtime/parity.py", {"quantize cpu": ("ladder code",)}),
    ("context.py", dict.fromkeys(STAGES, ("stage code",))),
    (
        "graphs.py",
        dict.fromkeys(("export", "fold", "calibrate"), ("stage code",)) | {"quantize cpu": ("ladder code",)},
    ),
    ("int8.py", {"quantize cpu": ("stage code",)}),
    ("engines.py", dict.fromkeys(BUILDS, ("stage code",))),
    ("proof.py", dict.fromkeys(("reference", *VERIFICATIONS, "latency"), ("stage code",))),
    ("pipeline.py", {}),
    ("outcome.py", {}),
    ("cli.py", {}),
]


@pytest.mark.parametrize(("file", "expected"), CODE, ids=[file for file, _ in CODE])
def test_changed_code_remakes_its_stages(
    prove: Prove, monkeypatch: pytest.MonkeyPatch, file: str, expected: Changes
) -> None:
    """What comes out is the same, so that nothing else is made again, except that calibration.json names its code."""
    original = vars(graphs)["source_hash"]

    def changed(*modules: str) -> str:
        touched = any(file == name or file.startswith(f"{name}/") for name in modules)
        return str(original(*modules)) + (" changed" if touched else "")

    replace_in_stages(monkeypatch, "source_hash", changed)
    found = made(prove())
    if "calibration code" in expected.get("calibrate", ()):
        quantize = found.pop("quantize cpu")
        assert "calibration" in quantize
        assert set(quantize) - {"calibration"} == set(expected.get("quantize cpu", ()))
        expected = {stage: changes for stage, changes in expected.items() if stage != "quantize cpu"}
    assert found == expected


@pytest.mark.parametrize(
    ("library", "stages"),
    [
        ("pillow", {"calibrate", "reference", f"verify {FP32}", f"verify {INT8}"}),
        ("torch", {"export", "quantize cpu", "reference"}),
        ("torchvision", {"export", "reference"}),
        ("onnx-ir", {"export", "fold", "calibrate", "quantize cpu"}),
    ],
)
def test_another_version_of_a_library_remakes_its_stages(
    prove: Prove, monkeypatch: pytest.MonkeyPatch, library: str, stages: set[str]
) -> None:
    original = library_versions

    def upgraded(*distributions: str) -> str:
        return original(*distributions) + (" upgraded" if library in distributions else "")

    replace_in_stages(monkeypatch, "library_versions", upgraded)
    found = made(prove())
    if "calibrate" in stages:
        stages = {*stages, "quantize cpu"}
    assert set(found) == stages
    for stage in stages - {"quantize cpu"}:
        assert found[stage] in (("libraries",), ("image libraries",))


def test_another_version_of_the_backend_remakes_its_engines(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntimeBackend, "version", lambda self: "99")
    engines = (f"build {FP32}", f"build {INT8}", f"verify {FP32}", f"verify {INT8}")
    assert made(prove()) == dict.fromkeys(engines, ("backend",)) | {"latency": ("backends",)}


def test_another_machine_remakes_engines_and_measurements(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_in_stages(monkeypatch, "machine", lambda: "another")
    own = {"export", "fold", "calibrate", "quantize cpu"}
    assert made(prove()) == dict.fromkeys([stage for stage in STAGES if stage not in own], ("machine",))


def test_a_report_does_not_outlive_the_engine_that_it_recommends(
    prove: Prove, build_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [build_dir / "tiny" / name for name in ("report.json", "report.html", "report.md")]
    for report in reports:
        report.write_text("{}")
    prove()
    assert all(report.exists() for report in reports)
    replace_in_stages(monkeypatch, "machine", lambda: "another")
    prove()
    assert not any(report.exists() for report in reports)


# Rows


class Fake(OnnxRuntimeBackend):
    """onnxruntime under another name, with faults."""

    name = "fake"
    precisions = ("int8",)  # type: ignore[assignment]

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def absence(self) -> Absence | None:
        if self.fault == "absent":
            return Absence("package_missing", "the package fake is not installed", "pip install fake")
        return super().absence()

    def compile(self, request: BuildRequest) -> Compiled:
        if self.fault == "build":
            raise BuildError("fake refused node 7", "take another model")
        return super().compile(request)

    def open(self, engine: bytes, *, threads: int = 0, provider: str = "", dla: int | None = None) -> Runner:
        if self.fault == "open":
            raise EngineError("fake has no device", "plug it in")
        runner = super().open(engine, threads=threads)
        return Disturbed(runner, self.fault) if self.fault in ("wrong", "nan") else runner


class Disturbed(Runner):
    def __init__(self, runner: Runner, fault: str) -> None:
        super().__init__(runner.inputs, runner.outputs)
        self.runner, self.fault = runner, fault

    def infer_impl(self, feeds: Any) -> dict[str, NDArray[np.float32]]:
        logits = self.runner.infer(feeds)
        if self.fault == "nan":
            return {name: np.full_like(value, np.nan) for name, value in logits.items()}
        return {name: -value for name, value in logits.items()}

    def close_impl(self) -> None:
        self.runner.close()


@pytest.fixture
def prove_with_fake(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Outcome]:
    def run(fault: str) -> Outcome:
        monkeypatch.setitem(BACKENDS, "fake", Fake(fault))
        return prove(backends=("onnxruntime", "fake"))

    return run


@pytest.mark.parametrize(
    ("fault", "status", "reason_code", "reason", "stages"),
    [
        ("absent", "skipped", "package_missing", "the package fake is not installed; pip install fake", ()),
        ("build", "failed", "build_failed", "fake refused node 7; take another model", ()),
        ("open", "failed", "run_failed", "fake has no device; plug it in", ("build fake int8",)),
        ("wrong", "over_budget", "fail", "FAIL: loses at least", ("build fake int8", "verify fake int8", "latency")),
        ("nan", "over_budget", "fail", "FAIL: loses at least", ("build fake int8", "verify fake int8", "latency")),
    ],
)
def test_a_row_that_goes_wrong_says_so_and_the_run_goes_on(
    prove_with_fake: Callable[[str], Outcome],
    outcome: Outcome,
    fault: str,
    status: str,
    reason_code: str,
    reason: str,
    stages: tuple[str, ...],
) -> None:
    found = prove_with_fake(fault)
    row = row_of(found, "fake", "int8")
    assert (row.status, row.reason_code) == (status, reason_code)
    assert row.reason.startswith(reason)
    assert tuple(made(found)) == stages
    assert (row.parity is None) == (row.latency is None) == (status in ("skipped", "failed"))
    assert found.verdict == "pass"
    assert found.recommended is not None
    assert found.recommended.backend == "onnxruntime"
    assert [replace(each, latency=None) for each in found.rows[:2]] == [
        replace(each, latency=None) for each in outcome.rows
    ]


def test_a_failed_row_is_tried_again(prove_with_fake: Callable[[str], Outcome]) -> None:
    prove_with_fake("build")
    assert row_of(prove_with_fake(""), "fake", "int8").status in ("verified", "undecided")


def test_a_build_gets_the_options_and_what_an_earlier_one_measured(
    prove: Prove, build_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[BuildRequest] = []

    class Measuring(Fake):
        dialect = "tensorrt"
        precisions = ("fp32",)

        def compile(self, request: BuildRequest) -> Compiled:
            requests.append(request)
            return replace(super().compile(request), timing_cache=f"measured {len(requests)}".encode())

    monkeypatch.setitem(BACKENDS, "fake", Measuring())
    options: dict[str, Any] = {"backends": ("fake",), "workspace": 1 << 20, "dla": 1}
    for sizes in ((1, 2, 4), (1, 2, 8)):
        found = prove(**options, profile=BatchProfile(*sizes))
        assert made(found)["build fake fp32"] == (FIRST_TIME if sizes[2] == 4 else ("build options",))
    first, second = requests
    assert (first.profile, first.workspace, first.dla, first.target) == (BatchProfile(1, 2, 4), 1 << 20, 1, None)
    assert [layer.precision for layer in first.planned] == ["fp32"] * 6
    assert (first.timing_cache, second.timing_cache) == (b"", b"measured 1")
    assert (build_dir / "tiny" / "engines" / "fake.timing").read_bytes() == b"measured 2"


def test_an_engine_that_departs_from_its_plan_is_no_engine(
    prove: Prove, build_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Fake):
        """Says of what it built that it is FP32."""

        def compile(self, request: BuildRequest) -> Compiled:
            built = super().compile(request)
            return replace(built, kernels=tuple(replace(kernel, precision="fp32") for kernel in built.kernels))

    monkeypatch.setitem(BACKENDS, "fake", Silent())
    row = row_of(prove(backends=("onnxruntime", "fake")), "fake", "int8")
    assert (row.status, row.reason_code, row.info) == ("failed", "build_failed", None)
    assert row.reason.startswith(
        "fake runs 0.0 % of the work in int8, planned were 99.8 %: features.0/Conv (int8 → fp32)"
    )
    assert not list((build_dir / "tiny" / "engines").glob("fake*"))


def test_stages_that_backends_share_are_listed_once(prove_with_fake: Callable[[str], Outcome]) -> None:
    names = [run.name for run in prove_with_fake("").stages]
    assert names.count("quantize cpu") == 1
    assert len(set(names)) == len(names)


def test_no_backend_at_all(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntimeBackend, "absence", lambda self: Absence("package_missing", "gone", "install it"))
    found = prove()
    assert [row.status for row in found.rows] == ["skipped", "skipped"]
    assert (found.verdict, found.recommended) == ("fail", None)


def test_a_graph_that_cannot_be_quantized_leaves_the_float_engine(
    prove: Prove, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Int8Graphs, dialect: str) -> None:
        raise QuantizationError("no range for conv_3", "calibrate again")

    monkeypatch.setattr(Int8Graphs, "_quantize", refuse)
    found = prove()
    row = row_of(found, *INT8.split())
    assert (row.status, row.reason_code) == ("failed", "quantization_failed")
    assert found.recommended == row_of(found, *FP32.split())


def test_an_int8_engine_of_an_earlier_graph_does_not_outlive_a_failed_row(
    prove: Prove, monkeypatch: pytest.MonkeyPatch, build_dir: Path
) -> None:
    engines = build_dir / "tiny" / "engines"
    prove()
    assert (engines / "onnxruntime-int8.onnx").exists()

    def refuse(self: Int8Graphs, dialect: str) -> None:
        raise CalibrationError("conv_3 was not measured", "calibrate again")

    monkeypatch.setattr(Int8Graphs, "_quantize", refuse)
    assert row_of(prove(), *INT8.split()).reason_code == "quantization_failed"
    assert sorted(path.name for path in engines.iterdir()) == ["onnxruntime-fp32.json", "onnxruntime-fp32.onnx"]


def test_every_engine_that_was_opened_is_closed(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    opened, closed = OnnxRuntimeBackend.open, OnnxRuntimeRunner.close_impl

    def open_noted(self: OnnxRuntimeBackend, engine: bytes, **options: Any) -> Runner:
        events.append("open")
        return opened(self, engine, **options)

    def close_noted(self: OnnxRuntimeRunner) -> None:
        events.append("close")
        closed(self)

    monkeypatch.setattr(OnnxRuntimeBackend, "open", open_noted)
    monkeypatch.setattr(OnnxRuntimeRunner, "close_impl", close_noted)
    prove(threads=1)
    assert events.count("open") == events.count("close") == 4, "two engines, each judged and timed"


def test_a_fold_that_fails_ends_the_run(prove: Prove, monkeypatch: pytest.MonkeyPatch, build_dir: Path) -> None:
    def refuse(*_: object, **__: object) -> float:
        raise QuantizationError("the graphs differ by 1")

    monkeypatch.setattr("edgewright.optimize.verify.check_equivalent", refuse)
    (build_dir / "tiny" / "folded.onnx").unlink()
    with pytest.raises(QuantizationError, match="differ by 1"):
        prove()
    assert not (build_dir / "tiny" / "folded.onnx").exists()


# The verdict


def engine_row(status: str, p50: float | None, backend: str = "b") -> EngineRow:
    latency = None if p50 is None else Latency(1, 2, 9, p50, p50, p50, 0.0)
    return EngineRow(backend, "int8", None, status, "", "", latency=latency)


@pytest.mark.parametrize(
    ("rows", "verdict", "recommended"),
    [
        ([], "fail", None),
        ([("skipped", None), ("failed", None)], "fail", None),
        ([("over_budget", 1.0)], "fail", None),
        ([("built_not_run", None), ("over_budget", 1.0)], "fail", None),
        ([("simulated", None)], "inconclusive", None),
        ([("verified", 2.0)], "pass", 0),
        ([("verified", 2.0), ("verified", 1.0)], "pass", 1),
        ([("verified", 2.0), ("over_budget", 1.0), ("undecided", 0.5)], "pass", 0),
        ([("verified", None), ("verified", 3.0)], "pass", 1),
        ([("undecided", 1.0), ("over_budget", 0.1)], "inconclusive", None),
    ],
)
def test_the_fastest_row_that_passes_is_recommended(
    rows: list[tuple[str, float | None]], verdict: str, recommended: int | None
) -> None:
    made_rows = [engine_row(*row, backend=str(index)) for index, row in enumerate(rows)]
    found, best = conclusion(made_rows)
    assert found == verdict
    assert best == (None if recommended is None else made_rows[recommended])


def test_verdicts_follow_the_budget(prove: Prove) -> None:
    assert prove(gates=(MaxDrop(0.001),)).verdict == "inconclusive"
    found = prove(gates=(MaxDrop(0.08),))
    assert (found.verdict, row_of(found, *FP32.split()).status) == ("pass", "verified")
    assert found.recommended is not None
    with pytest.raises(ParityError, match="max_drop is nan"):
        prove(gates=(MaxDrop(float("nan")),))


def test_all_rows_over_budget(prove: Prove, build_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "name", "onnxruntime")
    monkeypatch.setitem(BACKENDS, "onnxruntime", Fake("wrong"))
    (build_dir / "tiny" / "logits" / "onnxruntime-int8.npy").unlink()
    found = prove()
    assert [row.status for row in found.rows] == ["over_budget"]
    assert (found.verdict, found.recommended) == ("fail", None)


def test_without_labels_agreement_is_judged(prove: Prove, images: Any) -> None:
    (images.evaluation / "labels.csv").unlink()
    found = prove()
    assert made(found) == {}
    assert (found.reference.labelled, found.reference.top1, found.reference.top5) == (False, None, None)
    parity = row_of(found, *FP32.split()).parity
    assert parity is not None
    assert (parity.top1, parity.delta, parity.agreement) == (None, None, 1.0)


# Data and weights


def test_the_same_image_in_both_folders_is_named(prove: Prove, images: Any) -> None:
    shutil.copy(images.evaluation / "007.png", images.calibration / "twin.png")
    with pytest.raises(DataError, match=r"007\.png \(the same as .*twin\.png\); .*--allow-overlap"):
        prove()
    assert made(prove(allow_overlap=True))["calibrate"] == ("images",)


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
def test_a_model_without_images_asks_for_them(prove: Prove, use: str) -> None:
    with pytest.raises(DataError, match=f"brings no {use} images of its own; give --{use} DIR"):
        prove(**{use: None})


def test_missing_evaluation_images_are_noticed_before_anything_slow(prove: Prove, build_dir: Path) -> None:
    shutil.rmtree(build_dir / "tiny" / "engines")
    with pytest.raises(DataError, match="evaluation"):
        prove(evaluation=None)
    assert not (build_dir / "tiny" / "engines").exists()


def test_a_missing_folder_is_noticed_before_the_first_stage(prove: Prove, build_dir: Path, tmp_path: Path) -> None:
    shutil.rmtree(build_dir)
    with pytest.raises(DataError, match="does not exist"):
        prove(evaluation=tmp_path / "nowhere")
    assert not build_dir.exists()


def with_task(entry: ModelEntry, task: Task) -> ModelEntry:
    weights = {name: replace(weights, task=task) for name, weights in entry.weights.items()}
    return replace(entry, task=task, weights=weights)


def test_images_that_ship_with_the_project_are_taken_where_they_fit(
    prove: Prove, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = MODELS["tiny"]
    task = replace(entry.task, data="fashion_mnist")
    monkeypatch.setitem(MODELS, "tiny", with_task(entry, task))
    rng = np.random.default_rng(5)
    sets = [
        ImageSet.from_array(name, rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 4)
        for name, count in (("calibration", 12), ("test", 24))
    ]
    monkeypatch.setattr(graphs, "fashion_mnist_calibration", lambda: sets[0])
    monkeypatch.setattr(graphs, "fashion_mnist_test", lambda: sets[1])
    found = prove(calibration=None, evaluation=None)
    assert (found.reference.images, found.reference.labelled) == (24, True)
    mixed = prove(calibration=None)
    assert mixed.reference.images == 60
    monkeypatch.setattr(graphs, "fashion_mnist_test", lambda: sets[0])
    with pytest.raises(DataError, match="calibration images too"):
        prove(calibration=None, evaluation=None)


def test_random_weights_are_noted(prove: Prove, outcome: Outcome) -> None:
    random = "the weights are random (seed 0): predictions mean nothing"
    assert not any("random" in note for note in outcome.notes)
    assert random in prove(weights="random").notes


def test_a_size_that_depends_on_the_image_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = MODELS["tiny"]
    loose = replace(entry.task, preprocess=replace(PREPROCESS, resize=16))
    monkeypatch.setitem(MODELS, "tiny", with_task(entry, loose))
    pipeline = Pipeline(Options("tiny", build_dir=tmp_path))
    with pytest.raises(ModelError, match=r"tiny does not say all about its images; give --input-shape$"):
        _ = pipeline.exported


def test_evaluation_labels_are_those_of_the_model(prove: Prove, images: Any, tmp_path: Path) -> None:
    for index, label in enumerate(("blue", "red")):
        write_images(tmp_path / "named" / label, 6, seed=30 + index)
    found = prove(evaluation=tmp_path / "named")
    assert found.reference.images == 12
    (tmp_path / "named" / "red").rename(tmp_path / "named" / "purple")
    with pytest.raises(DataError, match="'purple'"):
        prove(evaluation=tmp_path / "named")


# Engines for a GPU that is not here

RTX = ("build tensorrt-rtx fp32 sm86", "build tensorrt-rtx fp16 sm86", "build tensorrt-rtx int8 sm86")
GPU_STAGES = (
    "export",
    "fold",
    "build onnxruntime fp32",
    "calibrate",
    "quantize cpu",
    "build onnxruntime int8",
    "build tensorrt-rtx fp32 sm86",
    "cast fp16",
    "build tensorrt-rtx fp16 sm86",
    "quantize rtx",
    "build tensorrt-rtx int8 sm86",
    "reference",
    "verify onnxruntime fp32",
    "verify onnxruntime int8",
    "simulate fp16",
    "simulate int8-rtx",
    "latency",
)


@pytest.fixture
def prove_gpu(gpu_build_dir: Path, images: Any) -> Prove:
    """Runs everything for `tiny_linear` and one GPU architecture in the test's copy of the finished build folder."""

    def run(model: str = "tiny_linear", **options: Any) -> Outcome:
        given = {"build_dir": gpu_build_dir, "calibration": images.calibration, "evaluation": images.evaluation}
        chosen = {"gates": (MaxDrop(0.08),), "backends": ("onnxruntime", "tensorrt-rtx"), "targets": ("sm86",)}
        pipeline = Pipeline(Options(model, **{**chosen, **given, **options}))
        with pipeline.workspace.locked():
            return pipeline.prove()

    return run


def gpu_rows(outcome: Outcome) -> dict[str, EngineRow]:
    return {row.precision: row for row in outcome.rows if row.backend == "tensorrt-rtx"}


@pytest.fixture
def without_gpu() -> None:
    if BACKENDS["tensorrt-rtx"].cannot_run() is None:
        pytest.skip("there is an RTX GPU here")


@pytest.mark.usefixtures("without_gpu")
def test_engines_for_a_gpu_are_built_and_simulated(finished_gpu: tuple[Path, Outcome]) -> None:
    build_dir, outcome = finished_gpu
    assert tuple(run.name for run in outcome.stages) == GPU_STAGES
    rows = gpu_rows(outcome)
    assert {name: row.status for name, row in rows.items()} == {
        "fp32": "built_not_run", "fp16": "simulated", "int8": "simulated"
    }  # fmt: skip
    assert (rows["fp32"].reason_code, rows["fp32"].parity) == ("device_missing", None)
    for row in rows.values():
        assert (row.target, row.latency, row.ran) == ("sm86", None, False)
        assert row.info is not None
        assert (build_dir / "tiny_linear" / str(row.path)).stat().st_size == row.info.bytes
        assert row.info.versions == {"tensorrt-rtx": BACKENDS["tensorrt-rtx"].version()}
        assert row.info.profile == BatchProfile(1, 8, 32)
        assert row.traffic is not None
    for precision in ("fp16", "int8"):
        parity = rows[precision].parity
        assert parity is not None
        assert (parity.source, parity.images) == ("simulation", 60)
        assert parity.sqnr_db is not None
        assert 10 < parity.sqnr_db < 90, "rounded, neither lost nor exact"
    plain, half, integer = (rows[name].info for name in ("fp32", "fp16", "int8"))
    assert plain is not None
    assert half is not None
    assert integer is not None
    assert (plain.actual_precision, half.actual_precision) == ({"fp32": 6}, {"fp16": 6})
    assert integer.actual_precision == {"int8": 1, "fp16": 5}, "the projection behind the gate"


@pytest.mark.usefixtures("without_gpu")
def test_what_did_not_run_here_is_a_choice_for_its_target_alone(finished_gpu: tuple[Path, Outcome]) -> None:
    outcome = finished_gpu[1]
    assert outcome.recommended is not None
    assert outcome.recommended.backend == "onnxruntime"
    (choice,) = outcome.targets
    rows = gpu_rows(outcome)
    assert choice.target == "sm86"
    assert choice.row in (rows["fp16"], rows["int8"])
    assert choice.row.reason_code == "pass"


@pytest.mark.usefixtures("without_gpu")
def test_nothing_for_a_gpu_is_made_twice(prove_gpu: Prove, finished_gpu: tuple[Path, Outcome]) -> None:
    again = prove_gpu()
    assert made(again) == {}
    assert (again.rows, again.targets) == (finished_gpu[1].rows, finished_gpu[1].targets)


def test_a_warm_run_with_gpu_rows_imports_no_library(gpu_build_dir: Path, images: Any, tmp_path: Path) -> None:
    file = tmp_path / "modules.json"
    chosen = ("--backend", "onnxruntime", "--backend", "tensorrt-rtx", "--target", "sm86", "--max-drop", 8, "--json")
    arguments = ("engine", "tiny_linear", "--build-dir", gpu_build_dir, *images.options, *chosen)
    done = run_process(*arguments, TINY_MODULES_TO=str(file))
    assert done.code == 0, done.err
    assert all(stage["cached"] for stage in done.document["stages"])
    assert {stage["name"] for stage in done.document["stages"]} >= {*RTX}
    imported = {name.partition(".")[0] for name in json.loads(file.read_text())}
    assert not imported & {"torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "scipy"}


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"profile": BatchProfile(1, 1, 4)}, dict.fromkeys(RTX, ("build options",))),
        ({"workspace": 1 << 28}, dict.fromkeys(RTX, ("build options",))),
        (
            {"remainder": "fp32"},
            {"quantize rtx": ("remainder",), RTX[2]: ("graph",), "simulate int8-rtx": ("graph",)},
        ),
        ({"precisions": ("fp32", "fp16")}, {"latency": ("backends", INT8_GRAPH)}),
    ],
    ids=["batch", "workspace", "remainder", "precision"],
)
def test_an_option_of_gpus_remakes_what_depends_on_it(
    prove_gpu: Prove, options: dict[str, Any], expected: Changes
) -> None:
    assert made(prove_gpu(**options)) == expected


@pytest.mark.usefixtures("without_gpu")
def test_the_remainder_may_stay_fp32(prove_gpu: Prove) -> None:
    row = gpu_rows(prove_gpu(remainder="fp32"))["int8"]
    assert row.info is not None
    assert row.info.actual_precision == {"int8": 1, "fp32": 5}
    assert row.status == "simulated"


def test_only_the_precisions_asked_for_are_built(prove_gpu: Prove) -> None:
    found = prove_gpu(precisions=("fp16", "int8"))
    assert [(row.backend, row.precision) for row in found.rows] == [
        ("onnxruntime", "int8"), ("tensorrt-rtx", "fp16"), ("tensorrt-rtx", "int8")
    ]  # fmt: skip


def test_another_target_is_a_row_of_its_own(prove_gpu: Prove) -> None:
    found = prove_gpu(precisions=("fp16",), targets=("sm89", "sm86"))
    assert [row.target for row in found.rows] == ["sm89", "sm86"]
    assert set(made(found)) == {"build tensorrt-rtx fp16 sm89"}, "one simulation serves both"
    assert {row.path for row in found.rows} == {
        f"engines/tensorrt-rtx-fp16-{target}.engine" for target in ("sm86", "sm89")
    }


def test_a_target_that_lacks_a_precision_is_skipped(prove_gpu: Prove) -> None:
    found = prove_gpu(backends=("tensorrt-rtx",), precisions=("fp32", "int8"), targets=("sm75",))
    assert [(row.status, row.reason_code) for row in found.rows] == [("skipped", "precision_unsupported")] * 2


def test_a_network_in_which_int8_pays_nowhere_is_not_built_in_it(prove_gpu: Prove, gpu_build_dir: Path) -> None:
    engines = gpu_build_dir / "tiny" / "engines"
    options: dict[str, Any] = {"backends": ("tensorrt-rtx",), "precisions": ("int8",)}
    (row,) = prove_gpu("tiny", **options).rows
    assert (row.status, row.reason_code, row.path) == ("skipped", "nothing_to_gain", None)
    assert row.reason.startswith("no layer of this network can be INT8 there, or gains by it")
    report = gpu_build_dir / "tiny" / REPORT_FILE
    report.write_text("{}")
    prove_gpu("tiny", **options)
    assert report.exists(), "nothing changed that it could recommend"
    engines.mkdir(exist_ok=True)
    (engines / "tensorrt-rtx-int8-sm86.engine").write_bytes(b"of an earlier graph")
    prove_gpu("tiny", **options)
    assert not report.exists()
    assert not list(engines.glob("*int8*"))


def test_a_backend_that_is_not_installed_is_skipped_with_its_reason(prove: Prove) -> None:
    absence = BACKENDS["tensorrt"].absence()
    if absence is None:
        pytest.skip("TensorRT is installed here")
    found = prove(backends=("onnxruntime", "tensorrt"))
    rows = [row for row in found.rows if row.backend == "tensorrt"]
    assert [row.precision for row in rows] == list(BACKENDS["tensorrt"].precisions)
    assert {(row.status, row.reason_code, row.reason) for row in rows} == {
        ("skipped", absence.reason_code, f"{absence.reason}; {absence.hint}")
    }
    assert found.verdict == "pass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ("abacus",)}, r"unknown backend 'abacus'; choose from onnxruntime, .*tensorrt-rtx, tensorrt"),
        ({"backends": ("onnxruntime", "")}, "unknown backend ''"),
        ({"precisions": ("int4",)}, "unknown precision 'int4'; choose from fp32, .*int8"),
        ({"targets": ("sm87",)}, "unknown target 'sm87'; choose from sm75, sm80, sm86, sm89, sm120, sm121"),
        ({"targets": ("sm86", "SM86")}, "unknown target 'SM86'"),
    ],
)
def test_unknown_choices_are_refused_before_anything_is_made(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        Pipeline(Options("tiny", build_dir=tmp_path, **options))
    assert list(tmp_path.iterdir()) == []


# What is not needed is not asked for, and what fails is tried once


def test_fp32_alone_needs_no_calibration_images(prove: Prove) -> None:
    outcome = prove(calibration=None, precisions=("fp32",))
    assert outcome.verdict == "pass"
    assert "calibrate" not in {run.name for run in outcome.stages}


def test_int8_without_calibration_images_is_refused_before_the_slow_stages(prove: Prove) -> None:
    with pytest.raises(DataError, match="brings no calibration images of its own; give --calibration DIR"):
        prove(calibration=None, precisions=("int8",))


def test_a_calibration_that_fails_is_tried_once(prove: Prove, build_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def broken(*arguments: Any, **options: Any) -> None:
        tries.append(1)
        raise CalibrationError("conv_3 was not measured", "calibrate again")

    monkeypatch.setattr("edgewright.calibration.collect.collect", broken)
    (build_dir / "tiny" / "calibrate.key.json").unlink()
    outcome = prove(backends=("onnxruntime", "openvino"))
    failed = [row for row in outcome.rows if row.reason_code == "quantization_failed"]
    assert {row.backend for row in failed} <= {"onnxruntime", "openvino"}
    assert row_of(outcome, "onnxruntime", "int8") in failed
    assert len(tries) == 1


def test_what_is_said_twice_is_the_same() -> None:
    """A run in which nothing changed imports neither onnx nor the stages of the command line's defaults."""
    assert set(NVIDIA_DIALECTS) == set(dialects.NVIDIA)
    target = next(option for option in cli.cli.commands["engine"].params if option.name == "target")
    assert target.default == ",".join(DEFAULT_TARGETS)
    assert {backend.dialect for backend in BACKENDS.values()} == set(dialects.DIALECTS)
