"""`Session` on a build folder made by hand: what it picks, what it refuses, and what it says about images."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax

import edgewright.runtime
from edgewright.runtime import Counters, EngineInfo, Session
from edgewright.runtime import session as module
from edgewright.runtime.backends import Runner, backend_named
from edgewright.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from edgewright.runtime.choice import REPORT_FILE
from edgewright.runtime.engine_files import ENGINES_FOLDER
from edgewright.runtime.errors import DataError, EngineError
from edgewright.runtime.files import write_json
from edgewright.runtime.session import Prediction
from toy_build import INPUT, LABELS, OUTPUT, PREPROCESS, expected_logits, normal, photograph, put_engine, put_report

Array = NDArray[Any]


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build folder with two engines, the integer one recommended."""
    for precision in ("fp32", "int8"):
        put_engine(tmp_path, precision)
    put_report(tmp_path, "int8")
    return tmp_path


# --- What is opened ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_a_folder_opens_its_recommended_engine_and_says_why(build: Path, as_text: bool) -> None:
    with Session.open(str(build) if as_text else build) as session:
        assert session.info.precision == "int8"
        assert session.why == "onnxruntime int8 is the fastest engine that passed"
        assert (session.inputs, session.outputs) == ((INPUT,), (OUTPUT,))
        batch = normal("batch", 2, 3, 8, 8)
        np.testing.assert_allclose(session.infer(batch)["logits"], expected_logits("int8", batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wish",
    [{"precision": "fp32"}, {"precision": "fp32", "backend": "onnxruntime"}, {"precision": "int8"}],
)
def test_a_folder_opens_the_engine_that_was_asked_for(build: Path, wish: dict[str, Any]) -> None:
    with Session.open(build, **wish) as session:
        assert session.info.precision == wish["precision"]
        assert session.why == f"onnxruntime {wish['precision']} is the only engine that was asked for"


def test_a_folder_with_one_engine_needs_no_report(tmp_path: Path) -> None:
    put_engine(tmp_path, "fp32")
    with Session.open(tmp_path) as session:
        assert session.info.precision == "fp32"
        assert "only engine" in session.why


@pytest.mark.parametrize("wish", [{}, {"backend": "onnxruntime", "precision": "int8"}, {"precision": "int8"}])
def test_an_engine_file_opens_by_itself(build: Path, wish: dict[str, Any]) -> None:
    with Session.open(build / ENGINES_FOLDER / "onnxruntime-int8.onnx", **wish) as session:
        assert session.info.precision == "int8"
        assert session.why == "onnxruntime-int8.onnx was named"


def test_number_of_threads_reaches_the_engine(build: Path) -> None:
    with Session.open(build, threads=1) as session:
        assert vars(vars(session)["_runner"])["_session"].get_session_options().intra_op_num_threads == 1


# --- What is refused ---------------------------------------------------------------------------------------------


def refused(path: Path, message: str, **wish: Any) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        Session.open(path, **wish)
    assert "\n" not in str(caught.value)


def test_several_engines_without_a_recommendation_are_ambiguous(build: Path) -> None:
    put_report(build, None)
    refused(build, r"several engines \(onnxruntime fp32, onnxruntime int8\).*name one, such as --precision fp32")
    (build / REPORT_FILE).unlink()
    refused(build, r"several engines \(onnxruntime fp32, onnxruntime int8\)")
    refused(build, "several engines", backend="onnxruntime")


@pytest.mark.parametrize(("here", "opened"), [("sm86", "sm86"), ("sm89", "sm89"), ("sm120", None), ("", None)])
def test_of_several_targets_that_of_the_gpu_here_is_taken(
    build: Path, monkeypatch: pytest.MonkeyPatch, here: str, opened: str | None
) -> None:
    backend = backend_named("onnxruntime")  # stands in for one of a GPU
    monkeypatch.setattr(backend, "device", lambda: here)
    (build / REPORT_FILE).unlink()
    folder = build / ENGINES_FOLDER
    for target in ("sm86", "sm89"):
        for suffix in (".onnx", ".json"):
            shutil.copy(folder / f"onnxruntime-int8{suffix}", folder / f"onnxruntime-int8-{target}{suffix}")
        described = folder / f"onnxruntime-int8-{target}.json"
        described.write_text(json.dumps(json.loads(described.read_text()) | {"target": target}))
    for suffix in (".onnx", ".json"):
        (folder / f"onnxruntime-int8{suffix}").unlink()
    if opened is None:
        refused(build, r"several engines \(onnxruntime int8 sm86, onnxruntime int8 sm89\)", precision="int8")
        return
    with Session.open(build, precision="int8") as session:
        assert session.info.target == opened


@pytest.mark.parametrize("wish", [{"precision": "bf16"}, {"backend": "tensorrt"}, {"backend": "x", "precision": "y"}])
def test_an_engine_that_is_not_there_is_refused_by_what_was_asked(build: Path, wish: dict[str, Any]) -> None:
    refused(build, f"has no {' '.join(wish.values())} engine; run edgewright engine", **wish)


def test_an_empty_folder_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "has no recommended engine; run edgewright engine")
    refused(tmp_path / "nothing", r"there is no engine .*nothing; run edgewright engine")


def test_a_file_of_another_precision_or_backend_is_refused(build: Path) -> None:
    path = build / ENGINES_FOLDER / "onnxruntime-int8.onnx"
    refused(path, "is onnxruntime int8, asked for was any fp32", precision="fp32")
    refused(path, "is onnxruntime int8, asked for was tensorrt any", backend="tensorrt")


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_changed_byte_is_refused_before_anything_is_loaded(
    build: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    class FakeBackend(OnnxRuntimeBackend):
        def open(self, *arguments: Any, **keywords: Any) -> Any:
            raise AssertionError("a changed engine was loaded")

    path = build / ENGINES_FOLDER / "onnxruntime-int8.onnx"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(module, "backend_named", lambda name: FakeBackend())
    refused(build, r"int8\.onnx is not the engine that was built \(its SHA-256 differs\); build it again")
    refused(path, "SHA-256 differs")


@pytest.mark.parametrize(
    ("bound", "built_with", "refusal"),
    [
        (True, "1.0", "the engine was built with onnxruntime 1.0, here is 2.0; build it again here"),
        (True, None, "the engine was built with onnxruntime None, here is 2.0"),
        (True, "2.0", ""),
        (False, "1.0", ""),
    ],
)
def test_an_engine_of_another_version_is_refused_where_that_matters(
    build: Path, monkeypatch: pytest.MonkeyPatch, bound: bool, built_with: str | None, refusal: str
) -> None:
    description = build / ENGINES_FOLDER / "onnxruntime-int8.json"
    content = json.loads(description.read_text())
    write_json(description, content | {"versions": {} if built_with is None else {"onnxruntime": built_with}})
    monkeypatch.setattr(OnnxRuntimeBackend, "version_bound", bound)
    monkeypatch.setattr(OnnxRuntimeBackend, "version", lambda self: "2.0")
    if refusal:
        refused(build, refusal)
    else:
        Session.open(build).close()


def test_the_engine_file_is_read_once_so_that_what_is_checked_is_what_is_loaded(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = Path.read_bytes

    def noted(path: Path) -> bytes:
        reads.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    Session.open(build).close()
    assert reads.count("onnxruntime-int8.onnx") == 1


def test_a_missing_engine_file_is_refused(build: Path) -> None:
    (build / ENGINES_FOLDER / "onnxruntime-int8.onnx").unlink()
    refused(build, r"cannot read .*int8\.onnx: No such file.*build it again")


DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[:-30], "not valid JSON"),
    "empty": (lambda text: "", "not valid JSON"),
    "a list": (lambda text: "[]", "does not describe an engine"),
    "a word": (lambda text: '"engine"', "does not describe an engine"),
    "null": (lambda text: "null", "does not describe an engine"),
    "no labels": (lambda text: text.replace('"labels"', '"names"'), "does not describe an engine"),
    "labels a number": (lambda text: json.dumps(json.loads(text) | {"labels": 3}), "does not describe an engine"),
    "layers of another kind": (lambda text: json.dumps(json.loads(text) | {"layers": [{"a": 1}]}), "does not describe"),
    "no outputs": (lambda text: json.dumps(json.loads(text) | {"outputs": []}), "does not describe an engine"),
    "a backend of another kind": (lambda text: json.dumps(json.loads(text) | {"backend": [1]}), "does not describe"),
    "half a letter": (lambda text: json.dumps(json.loads(text) | {"labels": ["\ud800"]}), "does not describe"),
    "nested without end": (lambda text: "[" * 100_000, "no description of the engine: .* is not valid JSON"),
    "preprocessing a word": (lambda text: json.dumps(json.loads(text) | {"preprocess": "x"}), "does not describe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_refused(build: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    path = build / ENGINES_FOLDER / "onnxruntime-int8.json"
    path.write_text(change(path.read_text()))
    refused(build, message)
    refused(build / ENGINES_FOLDER / "onnxruntime-int8.onnx", message)


def test_a_missing_description_is_refused(build: Path) -> None:
    (build / ENGINES_FOLDER / "onnxruntime-int8.json").unlink()
    refused(build, r"no description of the engine: .*int8\.json does not exist; build it again")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"recommended": {}}', '{"recommended": "int8"}', '{"recommended": {"path": 3}}']
)
def test_a_damaged_report_is_refused(build: Path, text: str) -> None:
    (build / REPORT_FILE).write_text(text)
    refused(build, r"report\.json.*run edgewright engine MODEL again")


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    put_engine(tmp_path, backend="abacus")
    refused(tmp_path, "unknown backend 'abacus'")


def test_an_engine_that_does_not_load_is_refused(tmp_path: Path) -> None:
    put_engine(tmp_path, content=b"no graph at all")
    refused(tmp_path, "onnxruntime cannot load the graph")


def test_an_absent_backend_is_refused_with_the_hint(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    refused(build, r"onnxruntime is not installed; pip install 'edgewright\[cpu\]'")


# --- infer -------------------------------------------------------------------------------------------------------


def test_infer_takes_an_array_or_a_mapping(build: Path) -> None:
    batch = normal("batch", 3, 3, 8, 8)
    with Session.open(build) as session:
        one, other = session.infer(batch), session.infer({"image": batch})
        np.testing.assert_array_equal(one["logits"], other["logits"])
        assert not np.shares_memory(one["logits"], other["logits"])
        kept = one["logits"].copy()
        session.infer(-batch)
        np.testing.assert_array_equal(one["logits"], kept)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (normal("b", 3, 8, 8), r"expected \[N, 3, 8, 8\]"),
        (normal("b", 1, 3, 8, 9), r"expected \[N, 3, 8, 8\]"),
        (np.zeros((0, 3, 8, 8), np.float32), r"has shape \[0, 3, 8, 8\]"),
        (np.zeros((1, 3, 8, 8), np.uint8), "is uint8, expected float32"),
        ({"pixels": normal("b", 1, 3, 8, 8)}, "input 'image' is missing"),
    ],
)
def test_infer_refuses_what_does_not_fit(build: Path, batch: Any, message: str) -> None:
    with Session.open(build) as session, pytest.raises(EngineError, match=message):
        session.infer(batch)


def test_a_session_closes_with_its_context(build: Path) -> None:
    with Session.open(build) as session:
        pass
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.infer(normal("b", 1, 3, 8, 8))
    with pytest.raises(EngineError, match="closed"):
        session.classify([photograph()])


# --- classify ----------------------------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_the_logits_in_order(build: Path) -> None:
    pictures = [photograph(seed) for seed in range(5)]
    with Session.open(build) as session:
        found = session.classify(pictures, top=6)
    expected = softmax(expected_logits("int8", PREPROCESS.batch(pictures)), axis=1)
    assert len(found) == 5
    for predictions, row in zip(found, expected, strict=True):
        assert [prediction.index for prediction in predictions] == list(np.argsort(-row))
        assert [prediction.label for prediction in predictions] == [LABELS[i] for i in np.argsort(-row)]
        np.testing.assert_allclose([p.probability for p in predictions], np.sort(row)[::-1], rtol=1e-4)
        assert sum(p.probability for p in predictions) == pytest.approx(1.0, abs=1e-12)
    wrong = softmax(expected_logits("fp32", PREPROCESS.batch(pictures)), axis=1)  # a mutant: the other engine
    assert np.abs(wrong - expected).max() > 0.01


@pytest.mark.parametrize(("top", "count"), [(1, 1), (3, 3), (5, 5), (6, 6), (100, 6)])
def test_top_gives_as_many_as_there_are(build: Path, top: int, count: int) -> None:
    with Session.open(build) as session:
        (every,) = session.classify([photograph()], top=100)
        (found,) = session.classify([photograph()], top=top)
    assert found == every[:count]
    assert all(isinstance(p, Prediction) and isinstance(p.index, int) for p in found)


def test_paths_pictures_and_arrays_mean_the_same(build: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(photograph()).save(path)
    with Session.open(build) as session:
        results = session.classify([path, str(path), Image.open(path), photograph()])
    assert results[0] == results[1] == results[2] == results[3]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33])
def test_any_number_of_images_comes_back_in_order(build: Path, count: int) -> None:
    pictures = [photograph(seed) for seed in range(count)]
    with Session.open(build) as session:
        together = session.classify(pictures, top=2)
        alone = [session.classify([picture], top=2)[0] for picture in pictures]
    assert [[p.index for p in row] for row in together] == [[p.index for p in row] for row in alone]


def test_an_unreadable_image_is_named(build: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(photograph()).save(good)
    bad.write_bytes(good.read_bytes()[:60])
    with Session.open(build) as session:
        with pytest.raises(DataError, match=r"bad\.png"):
            session.classify([good, bad])
        with pytest.raises(DataError, match=r"none\.png"):
            session.classify([tmp_path / "none.png"])
        assert len(session.classify([good])) == 1  # and it goes on


class FakeRunner(Runner):
    """Gives the logits that it was made with."""

    def __init__(self, logits: Array) -> None:
        super().__init__((INPUT,), (OUTPUT,))
        self.logits = logits

    def infer_impl(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"logits": self.logits[: len(feeds["image"])]}

    def close_impl(self) -> None:
        pass


@pytest.fixture
def info(tmp_path: Path) -> EngineInfo:
    path = put_engine(tmp_path)
    return EngineInfo.from_json(json.loads(path.with_suffix(".json").read_text()))


@pytest.mark.parametrize(
    "row", [[1000, 999, 0, 0, 0, -1000], [-1e30, -1e30, -1e30, -1e30, -1e30, 0], [3.4e38, 0, 0, 0, 0, -3.4e38]]
)
def test_large_logits_do_not_overflow(info: EngineInfo, row: list[float]) -> None:
    logits = np.array([row], np.float32)
    (found,) = Session(FakeRunner(logits), info, "").classify([photograph()], top=6)
    expected = np.sort(softmax(logits.astype(np.float64)[0]))[::-1]
    np.testing.assert_allclose([p.probability for p in found], expected, rtol=1e-12, atol=0)


def test_equal_logits_keep_the_order_of_the_classes(info: EngineInfo) -> None:
    session = Session(FakeRunner(np.array([[1, 2, 1, 2, 1, 2]], np.float32)), info, "")
    (found,) = session.classify([photograph()], top=6)
    assert [p.index for p in found] == [1, 3, 5, 0, 2, 4]


def test_preprocessing_is_that_of_the_description(info: EngineInfo) -> None:
    class FakeEcho(FakeRunner):
        def infer_impl(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            self.logits = feeds["image"]
            return {"logits": np.zeros((len(feeds["image"]), 6), np.float32)}

    other = replace(PREPROCESS, mean=(0.0, 0.0, 0.0), interpolation="bicubic")
    for preprocess in (PREPROCESS, other):
        runner = FakeEcho(np.zeros((1, 6), np.float32))
        Session(runner, replace(info, preprocess=preprocess), "").classify([photograph()])
        np.testing.assert_array_equal(runner.logits, preprocess.batch([photograph()]))


# --- two batches in flight, counters, options --------------------------------------------------------------------


def test_batches_are_submitted_and_their_results_taken(build: Path) -> None:
    first, second = normal("first", 2, 3, 8, 8), normal("second", 3, 3, 8, 8)
    with Session.open(build) as session:
        session.submit(first)
        session.submit({"image": second})
        with pytest.raises(EngineError, match="2 batches are in flight already; take a result first"):
            session.submit(first)
        for batch in (first, second):
            np.testing.assert_allclose(session.result()["logits"], expected_logits("int8", batch), rtol=1e-4, atol=1e-4)
        session.submit(first)
        session.drop()
        with pytest.raises(EngineError, match="nothing is in flight"):
            session.result()


def test_the_steps_of_classify_can_be_taken_one_by_one(build: Path) -> None:
    pictures = [photograph(seed) for seed in range(3)]
    with Session.open(build) as session:
        wanted = session.classify(pictures, top=2)
        batch = session.preprocess(pictures)
        np.testing.assert_array_equal(batch, PREPROCESS.batch(pictures))
        session.submit(batch)
        assert session.predictions(session.result(), top=2) == wanted
        with pytest.raises(DataError, match="top is 0"):
            session.predictions(session.infer(batch), top=0)


def test_counters_know_preprocessing_and_computing(build: Path) -> None:
    with Session.open(build) as session:
        assert session.counters == Counters()
        session.infer(normal("batch", 2, 3, 8, 8))
        assert session.counters.preprocess_ms == 0
        session.classify([photograph(seed) for seed in range(17)])
        counters = session.counters
    assert (counters.batches, counters.images) == (3, 19)
    assert 0 < counters.preprocess_ms < 5000
    assert 0 < counters.compute_ms < 5000


def test_a_sibling_answers_the_same_and_counts_for_itself(build: Path) -> None:
    batch = normal("batch", 2, 3, 8, 8)
    with Session.open(build) as session:
        other = session.sibling()
        wanted = session.infer(batch)["logits"]
    np.testing.assert_array_equal(other.infer(batch)["logits"], wanted)
    assert (other.info, other.why, other.counters.batches) == (session.info, session.why, 1)
    other.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "abacus"}, r"onnxruntime has no provider 'abacus', it has cpu, cuda, tensorrt; leave it out"),
        ({"device_preprocessing": True}, "no device to preprocess on; leave out device_preprocessing"),
    ],
)
def test_options_that_the_backend_lacks_are_refused(build: Path, options: dict[str, Any], message: str) -> None:
    refused(build, message, **options)


def test_the_provider_reaches_the_backend(build: Path) -> None:
    with Session.open(build, provider="cpu") as session:
        assert session.info.backend == "onnxruntime"


# --- A light import ----------------------------------------------------------------------------------------------

HEAVY = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "scipy", "rich", "onnxruntime", "click")


@pytest.mark.parametrize("statement", ["import edgewright.runtime", "from edgewright.runtime.backends import BACKENDS"])
def test_the_runtime_imports_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


def test_the_check_for_heavy_imports_can_fail() -> None:
    code = f"import edgewright.runtime, scipy\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "['scipy']"


def test_the_runtime_folder_works_copied_elsewhere(build: Path, tmp_path: Path) -> None:
    # relative imports only: the folder may go into somebody's product under another name
    source = Path(edgewright.runtime.__file__).parent
    product = tmp_path / "product"
    for path in source.rglob("*.py"):
        target = product / "vendored" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    code = f"""
import sys
from vendored import Session
with Session.open({str(build)!r}) as session:
    print(session.classify([{str(tmp_path / "photo.png")!r}], top=1)[0][0].index)
assert not any(name.startswith("edgewright") for name in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=product)
    with Session.open(build) as session:
        assert int(ended.stdout) == session.classify([photograph()], top=1)[0][0].index


def test_top_must_be_positive(build: Path) -> None:
    with Session.open(build) as session, pytest.raises(DataError, match="top is 0"):
        session.classify([np.zeros((8, 8, 3), np.uint8)], top=0)


def test_a_single_path_is_no_list_of_images(build: Path) -> None:
    with Session.open(build) as session, pytest.raises(DataError, match=r"single path shoe\.png.* list"):
        session.classify("shoe.png")


def test_labels_must_fit_the_classes(build: Path) -> None:
    for path in (build / ENGINES_FOLDER).glob("*.json"):
        content = json.loads(path.read_text())
        write_json(path, content | {"labels": content["labels"][:-1]})
    with pytest.raises(EngineError, match="labels for"):
        Session.open(build)


def test_a_graph_that_is_no_engine_says_where_engines_are(build: Path) -> None:
    graph = build / "folded.onnx"
    graph.write_bytes(b"a graph")
    with pytest.raises(EngineError, match=r"folded\.onnx is not an engine: .* engines are in build/MODEL/engines"):
        Session.open(graph)
