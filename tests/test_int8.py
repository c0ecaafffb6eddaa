"""The stages that make INT8 graphs: where INT8 pays, by a fake backend, what remakes them, and with which images."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgewright import graphs, int8
from edgewright.int8 import Int8Graphs, Placed
from edgewright.optimize import placement, placement_rtx
from edgewright.optimize.placement_rtx import ListedPlacement
from edgewright.pipeline import Options, Pipeline
from edgewright.runtime.backends import BACKENDS, BuildRequest
from edgewright.runtime.errors import BuildError, CalibrationError
from edgewright.runtime.gates import MaxDrop
from fake_timing import FakeBackend, Milliseconds
from tiny_network import PREPROCESS, write_images

pytestmark = pytest.mark.usefixtures("tiny_models")

MEASURED = Int8Graphs.placed
"""As it is, before `tests/conftest.py` has everything placed by rules."""
FAST, SLOW = Milliseconds(2.0, 1.0), Milliseconds(1.0, 9.0)
PLAIN = {"rescue": False, "method": "minmax", "threads": 1}


class Folder:
    """Pipelines in the test's copy of the finished build folder."""

    def __init__(self, build_dir: Path, images: Any) -> None:
        self._given = {"build_dir": build_dir, "calibration": images.calibration, "evaluation": images.evaluation}

    def pipeline(self, **options: Any) -> Pipeline:
        return Pipeline(Options("tiny", **{**self._given, **PLAIN, **options}))

    def placed(self, dialect: str, **options: Any) -> tuple[Placed, dict[str, tuple[str, ...]]]:
        """What is placed, and the stages that were made for what."""
        pipeline = self.pipeline(**options)
        with pipeline.workspace.locked():
            found = pipeline.int8.placed(dialect)
        return found, made(pipeline)


def made(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    return {run.name: run.changed for run in pipeline.runs if not run.cached}


@pytest.fixture
def folder(build_dir: Path, images: Any) -> Folder:
    return Folder(build_dir, images)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Placement as it is, but by a fake backend on which layers take the times that a test gives."""

    def use(times: dict[str, Milliseconds], others: Milliseconds = FAST, **options: Any) -> FakeBackend:
        backend = FakeBackend(defaultdict(lambda: others, times), **options)
        monkeypatch.setattr(Int8Graphs, "placed", MEASURED)
        monkeypatch.setattr(int8, "PLACING_SECONDS", 0.0)
        monkeypatch.setattr(int8, "backend_reading", lambda dialect: backend)
        monkeypatch.setattr(placement, "placed", functools.partial(placement.placed, clock=backend.clock))
        return backend

    return use


def layers_of(folder: Folder) -> tuple[str, ...]:
    pipeline = folder.pipeline()
    with pipeline.workspace.locked():
        _ = pipeline.calibrated
        return pipeline.int8._quantizer("cpu").layers


# --- Where INT8 pays --------------------------------------------------------------------------------------------------


def test_a_layer_in_which_int8_is_slower_stays_float_with_what_it_took(folder: Folder, timed: Any) -> None:
    slow, *others = layers_of(folder)
    timed({slow: SLOW})
    pipeline = folder.pipeline()
    with pipeline.workspace.locked():
        quantized = pipeline.int8.quantized("cpu")
    plan = json.loads(pipeline.workspace.path("plan-cpu.json").read_text())
    reason = "INT8 is slower here: 9.000 against 1.000 ms with its conversions"
    assert plan["left_out"] == {slow: reason}
    decisions = {decision["node"]: decision for decision in plan["decisions"]}
    assert decisions[slow]["precision"] == "fp32"
    assert reason in decisions[slow]["reason"]
    assert quantized.int8_layers == len(others)
    evidence = json.loads(pipeline.workspace.path("placement-cpu.json").read_text())
    assert evidence["chosen"] == "placed"
    notes = [note for run in pipeline.runs for note in run.facts.get("notes", ())]
    assert any(f"1 of {1 + len(others)} layers stay in FP32, where INT8 does not pay" in note for note in notes)


def test_where_int8_pays_nowhere_there_is_no_such_engine(folder: Folder, timed: Any) -> None:
    timed({}, SLOW)
    pipeline = folder.pipeline(backends=("onnxruntime",), precisions=("int8",))
    with pipeline.workspace.locked():
        (row,) = pipeline.built
    assert (row.status, row.reason_code, row.path) == ("skipped", "nothing_to_gain", None)
    assert not pipeline.workspace.path("engines/onnxruntime-int8.onnx").exists()
    plan = json.loads(pipeline.workspace.path("plan-cpu.json").read_text())
    assert set(plan["left_out"]) == set(layers_of(folder))
    assert all("INT8 does not pay in this network" in reason for reason in plan["left_out"].values())


def test_rules_look_at_nothing(folder: Folder, timed: Any) -> None:
    backend = timed({}, SLOW)
    assert folder.placed("cpu", placement="rules") == (Placed({}, "fp32"), {})
    assert backend.built == []


def test_a_backend_that_is_not_here_measures_nothing(
    folder: Folder, timed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = timed({}, SLOW)
    monkeypatch.setattr(backend, "absence", lambda: int8_absence())
    assert folder.placed("cpu") == (Placed({}, "fp32"), {})


def int8_absence() -> Any:
    from edgewright.runtime.backends import Absence

    return Absence("backend_not_installed", "it is not here", "install it")


def test_bf16_of_the_placement_reaches_the_engine(folder: Folder, timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = BACKENDS["openvino"]
    if openvino.absence() is not None:
        pytest.skip("the package openvino is not installed")
    mixed = Milliseconds(2.0, 3.0, bf16=1.0)
    first, *others = layers_of(folder)
    timed({first: Milliseconds(3.0, 0.1, bf16=2.5)}, mixed, bf16=True)
    requests: list[BuildRequest] = []

    def refused(request: BuildRequest) -> Any:
        requests.append(request)
        raise BuildError("that is enough")

    monkeypatch.setattr(openvino, "compile", refused)
    pipeline = folder.pipeline(backends=("openvino",), precisions=("int8",))
    with pipeline.workspace.locked():
        (row,) = pipeline.built
    assert row.reason_code == "build_failed"
    (request,) = requests
    precisions = {layer.name: layer.precision for layer in request.planned}
    assert precisions[first] == "int8"
    assert {precisions[name] for name in others if name in precisions} == {"bf16"}
    assert request.precision == "int8"


# --- What remakes a stage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"seed": 5}, ("seed",)),
        ({"threads": 2}, ("threads",)),
        ({"gates": (MaxDrop(0.5),), "method": "mse", "rescue": True, "finetune": "fashion-mnist"}, ()),
        ({"remainder": "fp32", "targets": ("sm120",), "placement": "measured"}, ()),
    ],
    ids=["seed", "threads", "what mends", "of GPUs alone"],
)
def test_an_option_remakes_the_placement_only_if_it_depends_on_it(
    folder: Folder, timed: Any, options: dict[str, Any], cause: tuple[str, ...]
) -> None:
    timed({})
    first, stages = folder.placed("cpu")
    assert set(stages) == {"place cpu"}
    again, stages = folder.placed("cpu", **options)
    assert stages == ({"place cpu": cause} if cause else {})
    assert again == first


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"remainder": "fp32"}, ("remainder",)), ({"targets": ("sm120",)}, ("targets",)), ({"threads": 2, "seed": 9}, ())],
    ids=["remainder", "targets", "of CPUs alone"],
)
def test_a_listing_depends_on_the_targets_and_the_remainder(
    folder: Folder, timed: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], cause: tuple[str, ...]
) -> None:
    timed({})
    monkeypatch.setattr(placement_rtx, "placed_by_listing", lambda *_, **__: ListedPlacement({}, {}, {}, 1))
    assert set(folder.placed("rtx")[1]) == {"place rtx"}
    assert folder.placed("rtx", **options)[1] == ({"place rtx": cause} if cause else {})


def test_another_placement_remakes_the_graph(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = layers_of(folder)

    def quantized(placed: Placed) -> dict[str, tuple[str, ...]]:
        monkeypatch.setattr(Int8Graphs, "placed", lambda *_: placed)
        pipeline = folder.pipeline()
        with pipeline.workspace.locked():
            assert pipeline.int8.quantized("cpu").remainder == placed.remainder
        return made(pipeline)

    quantized(Placed({}, "fp32"))
    assert quantized(Placed({first: "slow"}, "fp32")) == {"quantize cpu": ("placement",)}
    assert quantized(Placed({first: "slow"}, "bf16")) == {}


def test_a_calibration_cache_is_of_nvidias_dialects_alone(folder: Folder, tmp_path: Path) -> None:
    cache = tmp_path / "calib.cache"
    cache.write_text("TRT-8501-EntropyCalibration2\nsome other tensor: 3c010a14\n")

    def quantized(dialect: str, **options: Any) -> dict[str, tuple[str, ...]]:
        pipeline = folder.pipeline(**options)
        with pipeline.workspace.locked():
            pipeline.quantized(dialect)
        return made(pipeline)

    quantized("cpu")
    quantized("tensorrt")
    assert quantized("cpu", calib_cache=cache) == {}
    assert quantized("tensorrt", calib_cache=cache) == {"quantize tensorrt": ("calibration cache",)}
    with pytest.raises(CalibrationError, match="cannot be read"):
        quantized("tensorrt", calib_cache=tmp_path / "none")


# --- With which images ------------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int) -> list[Path]:
    """Grey ones, but for every fourth, in the order of their names, which is as bright as can be."""
    folder.mkdir()
    for index in range(count):
        level = 255 if index % 4 == 3 else 160 + index
        Image.new("RGB", (16, 16), (level,) * 3).save(folder / f"{index:03}.png")
    return sorted(folder.iterdir())


def batch(paths: list[Path]) -> NDArray[np.float32]:
    return PREPROCESS.batch(paths)


def test_the_held_back_quarter_gives_no_ranges(folder: Folder, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "pictures", 12)
    pipeline = folder.pipeline(calibration=tmp_path / "pictures")
    with pipeline.workspace.locked():
        _ = pipeline.calibrated
        model, table = pipeline.graphs.folded_and_table()
    chosen = batch([path for index, path in enumerate(paths) if index % 4 != 3])
    assert table.samples == 9
    histogram = table.ranges("minmax", [model.graph.inputs[0].name])
    (interval,) = histogram.values()
    assert interval.high == pytest.approx(float(chosen.max()), rel=1e-6)
    assert interval.high < float(batch(paths).max()) - 0.5


def test_the_ladder_has_the_same_images_on_either_side(folder: Folder, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "pictures", 12)
    choosing, checking = folder.pipeline(calibration=tmp_path / "pictures").graphs.decoded_calibration
    np.testing.assert_array_equal(choosing, batch([path for index, path in enumerate(paths) if index % 4 != 3]))
    np.testing.assert_array_equal(checking, batch(paths[3::4]))


def test_only_so_many_images_are_kept_decoded(folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "pictures", 16)
    monkeypatch.setattr(graphs, "MOST_DECODED", 8)
    choosing, checking = folder.pipeline(calibration=tmp_path / "pictures").graphs.decoded_calibration
    np.testing.assert_array_equal(choosing, batch([path for index, path in enumerate(paths) if index % 4 != 3][::2]))
    np.testing.assert_array_equal(checking, batch(paths[3::8]))


def test_of_fewer_than_four_images_all_choose_and_check(folder: Folder, tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", 3, seed=4)
    pipeline = folder.pipeline(calibration=tmp_path / "pictures")
    choosing, checking = pipeline.graphs.decoded_calibration
    assert len(choosing) == 3
    np.testing.assert_array_equal(choosing, checking)
    with pipeline.workspace.locked():
        assert pipeline.int8.quantized("cpu").int8_layers > 0
        assert pipeline.graphs.folded_and_table()[1].samples == 3


def test_the_options_reach_the_ladder(folder: Folder) -> None:
    pipeline = folder.pipeline(gates=(MaxDrop(0.02),), remainder="fp32", seed=9)
    with pipeline.workspace.locked():
        _ = pipeline.calibrated
        aim = pipeline.int8._ladder._aim
    assert (aim.budget, aim.method, aim.remainder, aim.rescue) == (0.02, "minmax", "fp32", False)
    assert (aim.threads, aim.seed, aim.cache, aim.finetune) == (1, 9, None, None)
