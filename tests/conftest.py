"""Fixtures that several folders share: a tiny network, its images, its finished build folder, and the command line."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command import Command, Completed
from edgewright import cli
from edgewright.export.models import MODELS
from edgewright.export.resolve import resolve
from edgewright.outcome import Outcome
from edgewright.pipeline import Options, Pipeline
from edgewright.runtime.gates import MaxDrop
from edgewright.workspace import source_hash
from stage_modules import replace_in_stages
from tiny_network import PREPROCESS, TINY_MODELS, place_by_rules, report_in_short, write_images

pytest_plugins = ["pytester", "cuda_objects", "device_fixtures", "own_process"]

BUDGET = 0.08  # with 60 images of which none is lost the upper bound is 0.06


@dataclass(frozen=True)
class Images:
    """Folders of calibration and evaluation images; the latter has a labels.csv, with the network's own predictions."""

    calibration: Path
    evaluation: Path

    @property
    def options(self) -> tuple[str, ...]:
        """For the command line."""
        return ("--calibration", str(self.calibration), "--evaluation", str(self.evaluation))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal gives it: a shell's background job, as some CI systems start one, ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _sources_as_they_were() -> Iterator[None]:
    """Somebody who edits a file while the tests run does not change the keys in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        replace_in_stages(patch, "source_hash", functools.cache(source_hash))
        yield


@pytest.fixture(scope="session", autouse=True)
def _placed_by_rules() -> Iterator[None]:
    """Placement by evidence takes seconds and differs from run to run; `tests/test_int8.py` has tests of it."""
    with pytest.MonkeyPatch.context() as patch:
        place_by_rules(patch.setattr)
        yield


@pytest.fixture(scope="session", autouse=True)
def _reported_in_short() -> Iterator[None]:
    """Layers, kernel times and figures take seconds; `tests/test_report_files.py` has tests of them."""
    with pytest.MonkeyPatch.context() as patch:
        report_in_short(patch.setattr)
        yield


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the tiny networks into the registry."""
    for name, entry in TINY_MODELS.items():
        monkeypatch.setitem(MODELS, name, entry)


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Not to be changed."""
    import torch

    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "calibration", 40, seed=1)
    evaluation = write_images(folder / "evaluation", 60, seed=2)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(MODELS, "tiny", TINY_MODELS["tiny"])
        logits = resolve("tiny").module()(torch.from_numpy(PREPROCESS.batch(evaluation)))
    rows = [f"{path.name},{int(label)}" for path, label in zip(evaluation, logits.argmax(1), strict=True)]
    (folder / "evaluation" / "labels.csv").write_text("\n".join(["file,index", *rows]))
    return Images(folder / "calibration", folder / "evaluation")


@pytest.fixture
def images(shared_images: Images, tmp_path: Path) -> Images:
    """The test's own copy."""
    copied = [Path(shutil.copytree(path, tmp_path / path.name)) for path in _folders(shared_images)]
    return Images(*copied)


@pytest.fixture(scope="session")
def finished(shared_images: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A build folder in which every stage of `tiny` for the CPU was made once, and what came out; not to be changed."""
    build_dir = tmp_path_factory.mktemp("finished")
    return build_dir, _proven("tiny", build_dir, shared_images, backends=("onnxruntime",))


@pytest.fixture(scope="session")
def finished_gpu(shared_images: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The same of `tiny_linear`, in which INT8 pays on TensorRT-RTX, with its engines for one GPU architecture."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("the package tensorrt-rtx is not installed")
    build_dir = tmp_path_factory.mktemp("finished_gpu")
    chosen: dict[str, Any] = {"backends": ("onnxruntime", "tensorrt-rtx"), "targets": ("sm86",)}
    return build_dir, _proven("tiny_linear", build_dir, shared_images, **chosen)


def _proven(model: str, build_dir: Path, images: Images, **options: Any) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, model, TINY_MODELS[model])
        given: dict[str, Any] = {
            "calibration": images.calibration,
            "evaluation": images.evaluation,
            "gates": (MaxDrop(BUDGET),),
        }
        stages = Pipeline(Options(model, build_dir=build_dir, **given, **options))
        with stages.workspace.locked():
            return stages.prove()


@pytest.fixture
def build_dir(finished: tuple[Path, Outcome], tmp_path: Path, tiny_models: None) -> Path:
    """The test's own copy of the finished build folder."""
    return Path(shutil.copytree(finished[0], tmp_path / "build"))


@pytest.fixture
def gpu_build_dir(finished_gpu: tuple[Path, Outcome], tmp_path: Path, tiny_models: None) -> Path:
    """The test's own copy of the finished build folder with engines for a GPU."""
    return Path(shutil.copytree(finished_gpu[0], tmp_path / "build"))


@pytest.fixture
def outcome(finished: tuple[Path, Outcome]) -> Outcome:
    """What came out of the run that made the finished build folder."""
    return finished[1]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny_models: None) -> Command:
    """Runs `edgewright ARGUMENTS…` in this process."""

    def run(*arguments: object) -> Completed:
        monkeypatch.setattr(sys, "argv", ["edgewright", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Completed(stop.value.code, *capfd.readouterr())

    return run


def _folders(images: Images) -> tuple[Path, Path]:
    return images.calibration, images.evaluation
