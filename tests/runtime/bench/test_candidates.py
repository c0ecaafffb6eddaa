"""What a path stands for: engines of build folders made by hand, of a toy bundle, and ONNX files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewright.export.onnx_files import self_contained
from edgewright.runtime.backends import BACKENDS, Absence
from edgewright.runtime.bench import Selection, baseline_of, candidates_of, selections_for
from edgewright.runtime.errors import BundleError, EngineError
from timed_engines import adding_onnx, identity_onnx
from toy_build import engine, put_engine, put_report


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build folder with three engines, of which FP32 is recommended."""
    folder = tmp_path / "build"
    for backend, precision in (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "int8")):
        put_engine(folder, precision, backend)
    put_report(folder, "fp32")
    return folder


@pytest.fixture(autouse=True)
def _openvino_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened here but ONNX files by onnxruntime."""
    monkeypatch.setattr(BACKENDS["openvino"], "absence", lambda: None)


def names(path: Path, **wanted: Any) -> list[str]:
    return [candidate.words for candidate in candidates_of(path, Selection(**wanted))[0]]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, ["onnxruntime fp32"]),
        ({"precisions": ("int8",)}, ["onnxruntime int8", "openvino int8"]),
        ({"precisions": ("int8", "fp32")}, ["onnxruntime int8", "onnxruntime fp32", "openvino int8"]),
        ({"backends": ("openvino", "onnxruntime")}, ["openvino int8", "onnxruntime fp32", "onnxruntime int8"]),
        ({"backends": ("openvino",), "precisions": ("int8",)}, ["openvino int8"]),
        ({"everything": True}, ["onnxruntime fp32", "onnxruntime int8", "openvino int8"]),
    ],
    ids=["recommended", "precision", "precisions", "backends", "both", "all"],
)
def test_engines_of_a_build_folder(build: Path, wanted: dict[str, Any], found: list[str]) -> None:
    assert names(build, **wanted) == found


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        ({"precisions": ("fp32", "bf16")}, ["bf16"]),
        ({"backends": ("onnxruntime", "tensorrt")}, ["tensorrt"]),
        ({"precisions": ("fp32", "int8")}, []),
        ({}, []),
    ],
)
def test_what_was_named_and_is_not_there_is_told(build: Path, wanted: dict[str, Any], missing: list[str]) -> None:
    _, notes = candidates_of(build, Selection(**wanted))
    assert list(notes) == [f"{build} has no {name} engine" for name in missing]


def test_candidates_hold_the_verified_bytes(build: Path) -> None:
    ((found,), notes) = candidates_of(build, Selection(precisions=("fp32",)))
    assert found.engine == engine("fp32")
    assert found.path == str(build / "engines" / "onnxruntime-fp32.onnx")
    assert (found.shape, found.on_gpu, notes) == ((3, 8, 8), False, ())


def test_an_engine_file_is_that_engine(build: Path) -> None:
    assert names(build / "engines" / "onnxruntime-int8.onnx") == ["onnxruntime int8"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            {"backends": ("tensorrt",)},
            "has no tensorrt engine, it has onnxruntime fp32, onnxruntime int8, openvino int8",
        ),
        ({"precisions": ("fp16",)}, "has no fp16 engine"),
        ({"backends": ("openvino",), "precisions": ("fp32",)}, "has no openvino fp32 engine"),
    ],
    ids=["backend", "precision", "both"],
)
def test_engines_that_are_not_there(build: Path, wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        names(build, **wanted)


def test_an_unknown_backend_is_refused_at_once() -> None:
    with pytest.raises(EngineError, match="unknown backend 'onnx'"):
        Selection(("onnx",))


def test_nothing_recommended_has_to_be_told(build: Path) -> None:
    put_report(build, None)
    with pytest.raises(EngineError, match="several engines"):
        names(build)


def test_a_changed_engine_is_refused(build: Path) -> None:
    with (build / "engines" / "onnxruntime-fp32.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(EngineError, match="is not the engine that was built"):
        names(build)
    assert names(build, precisions=("int8",)) == ["onnxruntime int8", "openvino int8"]


def test_what_cannot_run_here_is_left_out_with_its_reason(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absence = Absence("device_missing", "there is no GPU", "plug one in")
    monkeypatch.setattr(BACKENDS["openvino"], "cannot_run", lambda target=None: absence)
    found, notes = candidates_of(build, Selection(everything=True))
    assert [each.words for each in found] == ["onnxruntime fp32", "onnxruntime int8"]
    assert notes == ("openvino int8 cannot run here: there is no GPU",)
    with pytest.raises(EngineError, match="openvino int8 cannot run here: there is no GPU; plug one in"):
        names(build, backends=("openvino",))


def test_a_bundle(bundle: Path, device_cache: Path) -> None:
    found, _ = candidates_of(bundle, Selection(trust={"cache": device_cache}))
    assert [each.words for each in found] == ["onnxruntime fp32"]
    with pytest.raises(EngineError, match=r"no int8 engine of .* is proven on this device; run edgewright build"):
        names(bundle, precisions=("int8",), trust={"cache": device_cache})
    (bundle / "more").write_bytes(b"")
    with pytest.raises(BundleError, match="more is not in the bundle's manifest"):
        names(bundle, trust={"cache": device_cache})


def test_an_onnx_file_is_run_as_it_is(tmp_path: Path) -> None:
    path = identity_onnx(tmp_path / "net.onnx")
    ((found,), _) = candidates_of(path, Selection())
    assert (found.words, found.precision, found.info, found.shape) == ("onnxruntime net.onnx", "", None, (3, 4, 4))
    batch = np.ones((2, 3, 4, 4), np.float32)
    with found.open(1) as runner:
        np.testing.assert_array_equal(runner.infer({"x": batch})["y"], batch)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_beside_an_onnx_file(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(backend)
    monkeypatch.undo()
    values = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    path = adding_onnx(tmp_path / "theirs" / "net.onnx", values)
    adding_onnx(tmp_path / "net.onnx", -values)
    monkeypatch.chdir(tmp_path)  # where weights of the same name are
    ((found,), _) = candidates_of(path, Selection((backend,)), graph_of=self_contained)
    assert len(found.engine) > path.stat().st_size
    with found.open(1) as runner:
        np.testing.assert_array_equal(runner.infer({"x": np.zeros((1, 3, 4, 4), np.float32)})["y"], values[None])


def test_somebody_elses_json_beside_an_onnx_file(tmp_path: Path) -> None:
    path = identity_onnx(tmp_path / "net.onnx")
    path.with_suffix(".json").write_text(json.dumps({"classes": 3}))
    assert names(path) == ["onnxruntime net.onnx"]


@pytest.mark.parametrize("name", ["none.onnx", "none", "text.onnx", "text.txt", "empty", "net.onnx.json"])
def test_what_cannot_be_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("text.onnx", "text.txt", "net.onnx.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(EngineError, match=rf"{name}.*; (give a build folder|is it a whole ONNX file)"):
        names(tmp_path / name)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_an_onnx_file_for_a_gpu_has_to_be_built(tmp_path: Path, backend: str) -> None:
    with pytest.raises(EngineError, match=f"{backend} does not run an ONNX file; build an engine of it"):
        names(identity_onnx(tmp_path / "net.onnx"), backends=(backend,))


def test_openvino_runs_an_onnx_file_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.undo()
    ((found,), _) = candidates_of(identity_onnx(tmp_path / "net.onnx"), Selection(("openvino",)))
    batch = np.full((1, 3, 4, 4), 1 + 2**-20, np.float32)  # BF16 would give 1
    with found.open(1) as runner:
        np.testing.assert_array_equal(runner.infer({"x": batch})["y"], batch)


def test_one_engine_to_compare_with(build: Path) -> None:
    assert baseline_of(build, Selection()).words == "onnxruntime fp32"
    assert baseline_of(build, Selection(("openvino",), everything=True)).words == "openvino int8"
    with pytest.raises(EngineError, match=r"stands for 2 engines \(onnxruntime int8, openvino int8\)"):
        baseline_of(build, Selection(precisions=("int8",)))


def test_each_path_takes_what_says_something_about_it(build: Path, bundle: Path, tmp_path: Path) -> None:
    file = identity_onnx(tmp_path / "net.onnx")
    asked = Selection(("onnxruntime",), ("int8",), trust={"allow_older": True, "cache": None})
    of_file, of_folder = selections_for(asked, file, bundle)
    assert of_file == Selection(("onnxruntime",))
    assert of_folder == asked
    assert (
        selections_for(Selection(("onnxruntime",)), build / "engines" / "onnxruntime-fp32.onnx", build)[0]
        == Selection()
    )


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (Selection(precisions=("int8",)), "--precision says nothing"),
        (Selection(everything=True), "--all says nothing"),
        (Selection(trust={"allow_older": True}), "what is asked of a bundle says nothing"),
    ],
    ids=["precision", "all", "trust"],
)
def test_what_says_nothing_is_refused(tmp_path: Path, selection: Selection, said: str) -> None:
    with pytest.raises(EngineError, match=rf"{said} about .*net\.onnx"):
        candidates_of(identity_onnx(tmp_path / "net.onnx"), selection)
