"""`edgewright pack`: what goes into a bundle, its version, and what is refused; keygen and unpack beside it."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from command import Command
from edgewright.export.models import MODELS
from edgewright.export.resolve import resolve
from edgewright.int8 import Int8Graphs
from edgewright.outcome import Outcome
from edgewright.pack import Packed, golden_indices, limits_of, pack
from edgewright.pack import _self_contained as self_contained
from edgewright.pipeline import Options, Pipeline
from edgewright.runtime.backends import backend_named
from edgewright.runtime.bundle import KeyPair, open_bundle, write_key_pair
from edgewright.runtime.errors import BuildError, BundleError, QuantizationError, RollbackError
from edgewright.runtime.files import sha256_of
from edgewright.runtime.gates import MaxDrop
from edgewright.runtime.parity import compare
from edgewright.runtime.specs import BatchProfile
from tiny_network import LABELS, PREPROCESS, TINY_MODELS

BUDGET = 0.08
FIRST_FILES = {"manifest.json", "manifest.dsse.json", "spec.json", "parity.json", "calibration.json"}


def pipeline_of(build_dir: Path, images: Any, model: str = "tiny", **changes: Any) -> Pipeline:
    given: dict[str, Any] = {
        "build_dir": build_dir,
        "calibration": images.calibration,
        "evaluation": images.evaluation,
        "gates": (MaxDrop(BUDGET),),
        "backends": ("onnxruntime",),
        **changes,
    }
    return Pipeline(Options(model, **given))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys") / "pair")


@pytest.fixture(scope="module")
def shared_packed(
    finished: tuple[Path, Outcome], shared_images: Any, keys: KeyPair, tmp_path_factory: pytest.TempPathFactory
) -> Packed:
    """A signed bundle of `tiny`, and the same in one file; not to be changed."""
    build_dir = Path(shutil.copytree(finished[0], tmp_path_factory.mktemp("packed") / "build"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", TINY_MODELS["tiny"])
        pipeline = pipeline_of(build_dir, shared_images)
        with pipeline.workspace.locked():
            return pack(pipeline, finished[1], signing_key=keys.private, archive=True)


@pytest.fixture
def packed_dir(shared_packed: Packed, tmp_path: Path, tiny_models: None) -> Path:
    """The test's own copy of the build folder with the bundle in it."""
    return Path(shutil.copytree(shared_packed.path.parent.parent, tmp_path / "packed"))


def test_a_bundle_holds_what_a_device_needs(shared_packed: Packed, keys: KeyPair) -> None:
    folder = shared_packed.path
    assert {path.name for path in folder.iterdir() if path.is_file()} == FIRST_FILES
    with open_bundle(folder, require_signature=keys.public) as bundle:
        assert (bundle.model, bundle.version, bundle.sha256) == ("tiny", 1, shared_packed.sha256)
        assert bundle.signed_by == shared_packed.signed_by == keys.fingerprint
        assert {"edgewright", "torch", "onnx", "onnxruntime", "python"} <= bundle.tools.keys()
        assert bundle.spec == shared_packed.spec
        assert bundle.spec.labels == LABELS
        assert bundle.spec.preprocess == PREPROCESS
        assert bundle.spec.input.shape == (None, 3, 16, 16)
        for graph in bundle.spec.graphs:
            onnx.checker.check_model(onnx.load_from_string(bundle.read(graph.path)), full_check=True)


def test_the_golden_logits_are_those_of_pytorch(shared_packed: Packed, shared_images: Any, tiny_models: None) -> None:
    with open_bundle(shared_packed.path) as bundle:
        golden = bundle.golden()
    files = sorted(shared_images.evaluation.glob("*.png"))
    assert len(golden.pixels) == len(files) == 60  # fewer than 64: all of them
    assert all((golden.pixels[row] == PREPROCESS.pixels(file)).all() for row, file in enumerate(files))
    with torch.inference_mode():
        expected = resolve("tiny").module()(torch.from_numpy(PREPROCESS.batch(files))).numpy()
    np.testing.assert_allclose(golden.logits, expected, rtol=1e-5, atol=1e-5)


def test_the_graphs_are_those_of_the_build_folder(shared_packed: Packed) -> None:
    workspace = shared_packed.path.parent
    with open_bundle(shared_packed.path) as bundle:
        assert bundle.read("graphs/fp32.onnx") == (workspace / "folded.onnx").read_bytes()
        assert bundle.read("graphs/fp16.onnx") == (workspace / "fp16.onnx").read_bytes()
        for graph in bundle.spec.graphs:
            wanted = {layer.precision for layer in graph.planned}
            assert graph.precision in wanted
            assert wanted <= {graph.precision, "fp32", "fp16"}
            assert sum(layer.macs for layer in graph.planned) > 0


def test_the_cpu_engine_is_the_recommended_one_and_keeps_its_limits(
    shared_packed: Packed, finished: tuple[Path, Outcome]
) -> None:
    best = finished[1].recommended
    assert best is not None
    with open_bundle(shared_packed.path) as bundle:
        (graph,) = (graph for graph in bundle.spec.graphs if graph.dialect == "cpu")
        assert graph.precision == best.precision
        assert bundle.engine_info(graph) == best.info
        golden = bundle.golden()
        with backend_named(best.backend).open(bundle.read(graph.path)) as runner:
            (logits,) = runner.infer({runner.inputs[0].name: PREPROCESS.normalize(golden.pixels)}).values()
    parity = compare(golden.logits, logits, None)
    assert parity.sqnr_db is not None
    assert graph.limits.sqnr_db <= parity.sqnr_db
    assert graph.limits.agreement < parity.agreement


def test_a_graph_that_gains_nothing_is_left_out_with_its_reason(shared_packed: Packed) -> None:
    assert [each.precision for each in shared_packed.left_out] == ["int8"]
    assert "no layer of this network can be INT8" in shared_packed.left_out[0].reason
    assert not (shared_packed.path / "graphs" / "int8.onnx").exists()


def test_int8_is_in_it_where_it_gains(
    build_dir: Path, shared_images: Any, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, tiny_models: None
) -> None:
    """The tiny network is too narrow for TensorRT's INT8; its graph for the CPU stands in."""
    quantized = Int8Graphs.quantized
    monkeypatch.setattr(Int8Graphs, "quantized", lambda graphs, dialect: quantized(graphs, "cpu"))
    pipeline = pipeline_of(build_dir, shared_images)
    with pipeline.workspace.locked():
        packed = pack(pipeline, outcome)
    assert packed.left_out == ()
    with open_bundle(packed.path) as bundle:
        int8, half = (bundle.spec.graph("tensorrt", precision) for precision in ("int8", "fp16"))
        assert int8 is not None
        assert half is not None
        assert "int8" in {layer.precision for layer in int8.planned}
        assert 0 < int8.limits.sqnr_db < half.limits.sqnr_db
        assert b"QuantizeLinear" in bundle.read(int8.path)
        assert b"QuantizeLinear" not in bundle.read(half.path)


def test_nothing_in_it_is_a_place_or_a_time(shared_packed: Packed, shared_images: Any) -> None:
    places = [str(path).encode() for path in (shared_packed.path.parent, shared_images.evaluation.parent, Path.home())]
    for path in filter(Path.is_file, shared_packed.path.rglob("*")):
        assert not [place for place in places if place in path.read_bytes()], path
    parity = json.loads((shared_packed.path / "parity.json").read_text())
    assert (parity["verdict"], parity["budget"]) == ("pass", BUDGET)
    assert parity["engines"]
    assert all("latency_ms" not in row and "path" not in row for row in parity["engines"])


def test_the_calibration_is_known_by_its_identity_alone(shared_packed: Packed) -> None:
    identity = json.loads((shared_packed.path / "calibration.json").read_text())
    table = (shared_packed.path.parent / "calibration.json").read_bytes()
    assert identity["sha256"] == sha256_of(table)
    assert identity["images"] == 30  # of 40: a quarter is held back
    assert identity["identity"] == json.loads(table)["identity"]
    assert "tensors" not in identity


def test_the_same_run_gives_the_same_bytes_and_a_changed_one_the_next_version(
    packed_dir: Path, shared_packed: Packed, shared_images: Any, outcome: Outcome, keys: KeyPair
) -> None:
    def again(version: int | None = None, **changes: Any) -> Packed:
        pipeline = pipeline_of(packed_dir, shared_images, **changes)
        with pipeline.workspace.locked():
            return pack(pipeline, outcome, version=version, signing_key=keys.private, archive=True)

    first = again()
    assert (first.version, first.sha256) == (1, shared_packed.sha256)
    assert first.archive is not None
    assert shared_packed.archive is not None
    assert first.archive.read_bytes() == shared_packed.archive.read_bytes()
    other = BatchProfile(1, 2, 4)
    assert again(profile=other).version == 2
    assert again(profile=other).version == 2
    assert again(7, profile=other).version == 7
    before = {path: path.read_bytes() for path in filter(Path.is_file, (packed_dir / "tiny").rglob("*"))}
    with pytest.raises(RollbackError, match="6 is below 7"):
        again(6)
    (packed_dir / "tiny" / "tiny.bundle" / "extra").write_bytes(b"")
    with pytest.raises(BundleError, match="no version to go on from"):
        again()
    (packed_dir / "tiny" / "tiny.bundle" / "extra").unlink()
    assert {path: path.read_bytes() for path in before} == before


def test_without_a_cpu_engine_nothing_is_packed(
    build_dir: Path, shared_images: Any, outcome: Outcome, tiny_models: None
) -> None:
    pipeline = pipeline_of(build_dir, shared_images)
    with pipeline.workspace.locked(), pytest.raises(BuildError, match="no engine of onnxruntime"):
        pack(pipeline, replace(outcome, rows=()))
    assert not (build_dir / "tiny" / "tiny.bundle").exists()


def test_without_a_verified_engine_the_cpu_engine_is_fp32(
    build_dir: Path, shared_images: Any, outcome: Outcome, tiny_models: None
) -> None:
    rows = tuple(replace(row, status="undecided") for row in outcome.rows)
    pipeline = pipeline_of(build_dir, shared_images)
    with pipeline.workspace.locked():
        packed = pack(pipeline, replace(outcome, verdict="inconclusive", recommended=None, rows=rows))
    assert packed.spec.graph("cpu", "fp32") is not None
    assert packed.signed_by is None
    assert packed.archive is None


def test_golden_images_are_evenly_spaced() -> None:
    assert golden_indices(3).tolist() == [0, 1, 2]
    assert golden_indices(64).tolist() == list(range(64))
    many = golden_indices(10_000)
    assert (len(many), many[0]) == (64, 0)
    assert {156, 157} == set(np.diff(many).tolist())
    assert many[-1] < 10_000


def test_limits_leave_room_for_another_order_of_summation() -> None:
    reference = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    assert limits_of(reference, reference).sqnr_db == 54.0
    assert limits_of(reference, reference).agreement == 62 / 64
    assert limits_of(reference, reference * np.float32(0.99)).sqnr_db == pytest.approx(40 - 6, abs=0.1)
    wrong = reference.copy()
    wrong[:3] *= -1
    assert limits_of(reference, wrong).agreement == 59 / 64
    assert limits_of(reference[:2], reference[:2]).agreement == 0


def test_logits_that_are_not_finite_have_no_limits() -> None:
    reference = np.ones((4, 3), np.float32)
    broken = reference.copy()
    broken[1, 2] = np.inf
    with pytest.raises(QuantizationError, match="1 of 4 golden inputs"):
        limits_of(reference, broken)


def _graph(**where: onnx.TensorProto) -> bytes:
    """A graph with a tensor as an initializer, as a constant, or as a constant in a branch."""
    value = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=where.get("constant", value))
    inner = onnx.helper.make_node("Constant", [], ["d"], value=where.get("branch", value))
    output = onnx.helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, [4])
    branch = onnx.helper.make_graph([inner], "branch", [], [output])
    choice = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    image = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BOOL, [])
    logits = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    graph = onnx.helper.make_graph([constant, choice], "g", [image], [logits], [where.get("initializer", value)])
    content: bytes = onnx.helper.make_model(graph).SerializeToString()
    return content


@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
def test_external_data_is_refused_wherever_it_is(place: str) -> None:
    outside = onnx.TensorProto(name="outside", dims=[4], data_type=onnx.TensorProto.FLOAT)
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(BuildError, match="keeps outside in a file of its own"):
        self_contained(_graph(**{place: outside}), "it.onnx")


def test_a_graph_that_holds_its_data_is_taken() -> None:
    assert self_contained(_graph(), "it.onnx") == _graph()


def test_the_command_packs_signs_and_unpacks(
    command: Command, packed_dir: Path, shared_images: Any, keys: KeyPair, tmp_path: Path
) -> None:
    options = ("tiny", "--build-dir", packed_dir, *shared_images.options, "--backend", "onnxruntime", "--max-drop", 8)
    result = command("pack", *options, "--sign", keys.private, "--archive", "--json")
    assert result.code == 0
    document = result.document
    assert (document["schema"], document["model"], document["verdict"]) == ("edgewright.pack/1", "tiny", "pass")
    bundle = document["bundle"]
    assert (bundle["version"], bundle["signed_by"], bundle["golden_images"]) == (1, keys.fingerprint, 60)
    assert [graph["path"] for graph in bundle["graphs"]][1:] == ["graphs/fp32.onnx", "graphs/fp16.onnx"]
    assert [each["precision"] for each in bundle["left_out"]] == ["int8"]
    assert all(stage["cached"] for stage in document["stages"])
    assert {"export", "quantize tensorrt"} <= {stage["name"] for stage in document["stages"]}

    unpacked = command("unpack", bundle["archive"], tmp_path / "out", "--require-signature", keys.public, "--json")
    assert unpacked.document == {
        "schema": "edgewright.unpack/1",
        "path": str(tmp_path / "out"),
        "model": "tiny",
        "version": 1,
        "sha256": bundle["sha256"],
        "signed_by": keys.fingerprint,
    }
    assert "exists" in command("unpack", bundle["archive"], tmp_path / "out").error
    assert "exists" in command("unpack", bundle["archive"]).error  # beside it, where the bundle itself is
    other = write_key_pair(tmp_path / "other")
    assert "trusted here is" in command(
        "unpack", bundle["archive"], tmp_path / "no", "--require-signature", other.public
    ).error  # fmt: skip


@pytest.mark.parametrize("folder", [".", "/", ""])
def test_a_folder_is_not_unpacked(command: Command, folder: str) -> None:
    assert "is a folder, expected a bundle in one file" in command("unpack", folder).error


def test_a_failed_verdict_is_packed_only_when_that_is_said(
    command: Command, packed_dir: Path, shared_images: Any, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "prove", lambda _: replace(outcome, verdict="fail", recommended=None))
    shutil.rmtree(packed_dir / "tiny" / "tiny.bundle")
    options = ("tiny", "--build-dir", packed_dir, *shared_images.options, "--backend", "onnxruntime")
    result = command("pack", *options, "--json")
    assert (result.code, result.document["verdict"], result.document["bundle"]) == (3, "fail", None)
    assert "not packed" in result.err
    assert not (packed_dir / "tiny" / "tiny.bundle").exists()
    result = command("pack", *options, "--allow-failed")
    assert result.code == 0
    assert "the verdict is FAIL" in result.out
    lines = result.out.replace(str(packed_dir), "build").splitlines()
    assert max(map(len, lines)) <= 80, lines
    assert "no int8 graph" in result.out
    with open_bundle(packed_dir / "tiny" / "tiny.bundle") as bundle:
        assert json.loads(bundle.read("parity.json"))["verdict"] == "fail"


def test_a_key_that_cannot_sign_is_said_before_the_first_stage(command: Command, keys: KeyPair, tmp_path: Path) -> None:
    for key, reason in ((tmp_path / "missing.key", "there is no key file"), (keys.public, "is no private key")):
        assert reason in command("pack", "tiny", "--build-dir", tmp_path / "build", "--sign", key).error
    assert not (tmp_path / "build").exists()


def test_keygen_writes_a_pair_once(command: Command, tmp_path: Path) -> None:
    result = command("keygen", tmp_path / "mine", "--json")
    document = result.document
    assert document["schema"] == "edgewright.keygen/1"
    assert (document["private"], document["public"]) == (str(tmp_path / "mine.key"), str(tmp_path / "mine.pub"))
    assert stat.S_IMODE((tmp_path / "mine.key").stat().st_mode) == 0o600
    assert "never overwritten" in command("keygen", tmp_path / "mine").error
