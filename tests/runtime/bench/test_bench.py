"""Whole measurements of fake engines by a fake clock: figures, pairs, baselines, refusals, and the document."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgewright.runtime import latency
from edgewright.runtime.bench import Bench, read_bench
from edgewright.runtime.errors import EngineError, InputError, ParityError
from edgewright.runtime.specs import TensorSpec
from timed_engines import FakeEngines


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> FakeEngines:
    monkeypatch.setattr(latency, "_garbage_kept", contextlib.nullcontext)  # collecting what pytest holds takes longest
    return FakeEngines()


def saved(found: Bench, **changes: Any) -> Bench:
    """As it would be read from a file."""
    return replace(Bench.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))), **changes)


def test_one_engine(engines: FakeEngines) -> None:
    (result,) = engines.bench(engines.engine("a", 4), batches=(8,)).results
    took = result.latency
    assert {took.min, took.p50, took.p99, took.max, took.p50_low, took.p50_high} == {4.0}
    assert (took.runs, took.cv, took.stable) == (25, 0.0, True)
    assert (result.qps, result.images_per_second) == pytest.approx((250, 2000))
    assert result.shape == (32, 8, 8)


def test_engines_in_turns_are_compared_with_the_first(engines: FakeEngines) -> None:
    found = engines.bench(engines.engine("a", 4), engines.engine("b", 2), engines.engine("c", 5))
    assert [result.words for result in found.results] == ["fake a.onnx", "fake b.onnx", "fake c.onnx"]
    pairs = [(each.engine.words, each.baseline.words, each.ratio, each.low, each.high) for each in found.comparisons]
    assert pairs == [("fake b.onnx", "fake a.onnx", 0.5, 0.5, 0.5), ("fake c.onnx", "fake a.onnx", 1.25, 1.25, 1.25)]
    assert all(
        each.paired and each.decided and each.rounds == found.results[0].latency.runs for each in found.comparisons
    )


def test_the_baseline_takes_turns_too_and_comes_last(engines: FakeEngines) -> None:
    a, b, other = engines.engine("a", 4), engines.engine("b", 2), engines.engine("other", 8)
    found = engines.bench(a, b, baseline=other, batches=(1, 4))
    assert [(each.words, each.setup.batch) for each in found.results] == [
        (f"fake {name}.onnx", batch) for batch in (1, 4) for name in ("a", "b", "other")
    ]
    assert [(each.baseline.path, each.ratio, each.engine.setup.batch) for each in found.comparisons] == [
        ("other.onnx", ratio, batch) for batch in (1, 4) for ratio in (0.5, 0.25)
    ]


def test_equal_engines_are_not_told_apart(engines: FakeEngines) -> None:
    (comparison,) = engines.bench(engines.engine("a", 4), engines.engine("b", 4)).comparisons
    assert not comparison.decided


def test_a_slow_engine_is_still_timed_ten_times(engines: FakeEngines) -> None:
    (result,) = engines.bench(engines.engine("a", 1000)).results
    assert result.latency.runs == 10


def test_a_saved_measurement_gives_no_pairs(engines: FakeEngines) -> None:
    before = engines.bench(engines.engine("a", 4))
    after = FakeEngines()
    (comparison,) = after.bench(after.engine("a", 3), baseline=saved(before)).comparisons
    assert (comparison.paired, comparison.rounds, comparison.confidence) == (False, None, 0.95)
    assert (comparison.ratio, comparison.low, comparison.high) == (0.75, 0.75, 0.75)


def test_a_saved_measurement_of_several_set_ups_and_engines(engines: FakeEngines) -> None:
    before = saved(engines.bench(engines.engine("a", 4), engines.engine("b", 2), batches=(1, 8)))
    after = FakeEngines()
    found = after.bench(after.engine("b", 4), batches=(8,), baseline=before)
    assert [(each.ratio, each.baseline.setup.batch) for each in found.comparisons] == [(2.0, 8)]
    with pytest.raises(ParityError, match=r"not clear which fake c\.onnx is compared with"):
        after.bench(after.engine("c", 4), batches=(8,), baseline=before)
    with pytest.raises(ParityError, match="what was saved has batch 1, 1 thread; batch 8, 1 thread, and not batch 2"):
        after.bench(after.engine("a", 4), batches=(2,), baseline=before)


def unlike(found: Bench, what: str) -> Bench:
    """The saved measurement on another machine, at other clocks, or in another set-up."""
    (result,) = found.results
    if what == "processor":
        return replace(found, machine=replace(found.machine, processor="Cortex-A78AE"))
    if what == "governor":
        return replace(found, before=replace(found.before, governor="powersave"))
    if what == "power_mode":
        return replace(found, before=replace(found.before, power_mode="15W"))
    if what == "batch":
        return replace(found, results=(replace(result, setup=replace(result.setup, batch=4)),))
    if what == "threads":
        return replace(found, results=(replace(result, setup=replace(result.setup, threads=4)),))
    if what == "images of":
        return replace(found, results=(replace(result, setup=replace(result.setup, image=(640, 480))),))
    assert what == "the images are"
    return replace(found, results=(replace(result, shape=(32, 9, 9)),))


@pytest.mark.parametrize(
    "what", ["processor", "governor", "power_mode", "batch", "threads", "images of", "the images are"]
)
def test_what_is_not_alike_is_refused_before_anything_runs_unless_told(engines: FakeEngines, what: str) -> None:
    before = unlike(saved(engines.bench(engines.engine("a", 4))), what)
    after = FakeEngines()
    with pytest.raises(ParityError, match=rf"not to be compared: .*{what}.*--force"):
        after.bench(after.engine("a", 2), baseline=before)
    assert after.now == 0
    (comparison,) = after.bench(after.engine("a", 2), baseline=before, force=True).comparisons
    assert comparison.ratio == 0.5
    assert what in " ".join(comparison.unlike)


def test_what_changes_by_itself_does_not_matter(engines: FakeEngines) -> None:
    before = saved(engines.bench(engines.engine("a", 4)))
    before = replace(before, before=replace(before.before, cpu_mhz=1.0, load=99.0))
    after = FakeEngines()
    (comparison,) = after.bench(after.engine("a", 2), baseline=before).comparisons
    assert comparison.unlike == ()


def test_engines_for_other_images_are_refused_unless_told(engines: FakeEngines) -> None:
    a, b = (
        engines.engine("a", 4),
        replace(engines.engine("b", 2), inputs=(TensorSpec("x", (None, 32, 9, 9), "float32"),)),
    )
    with pytest.raises(ParityError, match="the images are 32x9x9 and 32x8x8"):
        engines.bench(a, b)
    assert engines.now == 0


def test_a_batch_that_an_engine_does_not_take_is_refused_before_anything_runs(engines: FakeEngines) -> None:
    fixed = replace(engines.engine("a", 4), inputs=(TensorSpec("x", (1, 32, 8, 8), "float32"),))
    with pytest.raises(InputError, match="takes batches of 1, asked for was 8; give --batch 1"):
        engines.bench(fixed, batches=(1, 8))
    assert engines.now == 0


def test_who_fails_is_named(engines: FakeEngines) -> None:
    wrong = replace(engines.engine("a", 4), inputs=(TensorSpec("x", (None, 32, 9, 9), "float32"),))
    with pytest.raises(EngineError, match=r"a\.onnx, batch 1, 1 thread: input 'x' has shape"):
        engines.bench(wrong)


def test_the_document_holds_everything_but_the_comparisons(engines: FakeEngines) -> None:
    found = engines.bench(engines.engine("a", 4), engines.engine("b", 4), batches=(1, 2), notes=["left out"])
    assert saved(found) == replace(found, comparisons=())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "edgewright.engine/1"}, "its schema is 'edgewright.engine/1'"),
        ({"machine": {}}, "no 'processor'"),
        ({"results": [{}]}, "no 'latency_ms'"),
        ({"seconds": "3"}, "seconds"),
        ({"results": 3}, "not iterable"),
    ],
    ids=["schema", "machine", "results", "type", "list"],
)
def test_other_documents_are_refused(engines: FakeEngines, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    document = {**engines.bench(engines.engine("a", 4)).to_json(), **change}
    (tmp_path / "saved.json").write_text(json.dumps(document))
    with pytest.raises(ParityError, match=f"no saved result of edgewright bench .*{said}"):
        read_bench(tmp_path / "saved.json")


@pytest.mark.parametrize(
    "times", [{"p50": 0}, {"p50": 10**400}, {"p50": -4.0}, {"p50": 5e-324}, {"p50_low": 9.0, "p50_high": 3.0}]
)
def test_times_that_no_clock_has_measured_are_refused(
    engines: FakeEngines, tmp_path: Path, times: dict[str, Any]
) -> None:
    document = engines.bench(engines.engine("a", 4)).to_json()
    document["results"][0]["latency_ms"] |= times
    (tmp_path / "saved.json").write_text(json.dumps(document))
    with pytest.raises(ParityError, match="no saved result of edgewright bench"):
        read_bench(tmp_path / "saved.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_what_is_no_document_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "saved.json").write_text(content)
    with pytest.raises(ParityError, match=r"saved\.json is no"):
        read_bench(tmp_path / "saved.json")
    with pytest.raises(ParityError, match="does not exist"):
        read_bench(tmp_path / "none.json")
