"""`explain` and `blame` as commands, and what they say of a layer against numpy."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from command import Command, Completed
from contract import STAGE, differences
from edgewright import blame as blaming
from edgewright.blame import Blame, Hop
from edgewright.calibration.collect import CalibrationTable, collect
from edgewright.calibration.ranges import METHODS
from edgewright.explain import check_layer, explain_document, with_effects
from edgewright.explain import explain as explained
from edgewright.explain_layer import layer_detail
from edgewright.explain_report import detail_lines, explain_lines, explain_table
from edgewright.optimize.dialects import Quantizer
from edgewright.optimize.segments import logits_of
from edgewright.runtime.errors import QuantizationError
from edgewright.runtime.parity import compare
from textual_graphs import graph, normal

NUMBER = "number"
FIDELITY = {"agreement": NUMBER, "sqnr_db": (NUMBER, None)}
INPUT = {
    "tensor": str, "low": NUMBER, "high": NUMBER, "method": str, "minimum": NUMBER, "maximum": NUMBER,
    "saturation": NUMBER,
}  # fmt: skip
LAYER = {
    "name": str, "operator": str, "tensor": str, "precision": ("int8", "fp16", "fp32"), "reason": str, "macs": int,
    "sqnr_db": NUMBER, "own_sqnr_db": NUMBER, "spread": (NUMBER, None), "input": (None, INPUT),
    "in_float": (None, FIDELITY),
}  # fmt: skip
EXPLAIN = {
    "schema": ("edgewright.explain/1",), "model": str, "dialect": ("cpu", "openvino", "tensorrt", "rtx"),
    "images": int, "logits": FIDELITY, "layers": [LAYER], "notes": [str], "stages": [STAGE],
}  # fmt: skip
DETAIL = {
    "histogram": {"edges": [NUMBER], "shares": [NUMBER]},
    "candidates": [{"method": str, "low": NUMBER, "high": NUMBER, "sqnr_db": NUMBER}],
    "weights": {"channels": (int, None), "widest": (NUMBER, None), "narrowest": (NUMBER, None)},
    "zero_channels": [int],
    "constant_channels": [{"channel": int, "value": NUMBER}],
}
ORIGIN = {"layer": str, "operator": str, "tensor": str, "own_sqnr_db": (NUMBER, None), "what": str}
HOP = {
    "name": str, "kind": ("exact", "fp16", "int8", "engine"), "against": str, "agreement": (NUMBER, None),
    "sqnr_db": (NUMBER, None), "nonfinite": (int, None), "guilty": bool, "origin": (None, ORIGIN), "note": str,
}  # fmt: skip
BLAME = {
    "schema": ("edgewright.blame/1",), "model": str, "dialect": ("cpu", "tensorrt"), "images": int,
    "guilty": [str], "hops": [HOP], "notes": [str], "stages": [STAGE],
}  # fmt: skip
WIDTH = 80
Tiny = Callable[..., Completed]


@pytest.fixture
def tiny(command: Command, build_dir: Path, images: Any, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A command on the tiny network in the test's copy of the finished build folder."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def run(name: str, *arguments: object) -> Completed:
        return command(name, "tiny", "--build-dir", build_dir, "--method", "mse", *images.options, *arguments)

    return run


# Commands


def test_the_document_of_explain_is_all_of_stdout(tiny: Tiny) -> None:
    done = tiny("explain", "--json", "--all", "--images", 16)
    assert done.code == 0, done.err
    assert list(differences(done.document, EXPLAIN)) == []
    document = done.document
    assert (document["images"], document["dialect"]) == (16, "cpu")
    own = [layer["own_sqnr_db"] for layer in document["layers"]]
    assert own == sorted(own), "worst first"
    integer = [layer for layer in document["layers"] if layer["precision"] == "int8"]
    assert integer
    assert all(layer["input"] and layer["in_float"] for layer in integer)
    assert all(layer["reason"] for layer in document["layers"])


def test_one_layer_in_detail_by_its_module(tiny: Tiny) -> None:
    done = tiny("explain", "--layer", "features.0", "--json", "--images", 16)
    assert done.code == 0, done.err
    document = done.document
    assert list(differences(document, {**EXPLAIN, "detail": DETAIL})) == []
    (layer,) = document["layers"]
    assert layer["name"] == "features.0/Conv"
    assert layer["in_float"] is not None
    assert sum(document["detail"]["histogram"]["shares"]) == pytest.approx(1.0)
    assert document["detail"]["weights"]["channels"] == 8


@pytest.mark.parametrize("arguments", [(), ("--layer", "features.3"), ("--dialect", "tensorrt")], ids=str)
def test_a_person_reads_eighty_columns(tiny: Tiny, arguments: tuple[str, ...]) -> None:
    done = tiny("explain", "--images", 16, *arguments)
    assert done.code == 0, done.err
    assert "features.3" in done.out
    tables = [line for line in done.out.splitlines() if "█" in line or "│" in line]
    assert tables or "tensorrt" in arguments
    assert max(map(len, tables), default=0) <= WIDTH


def test_an_unknown_layer_is_one_error_with_near_names(tiny: Tiny) -> None:
    error = tiny("explain", "--layer", "featuers.3/Conv", "--images", 8).error
    assert "featuers.3/Conv" in error
    assert "did you mean features.3/Conv" in error


@pytest.mark.parametrize("name", ["explain", "blame"])
@pytest.mark.parametrize(
    "arguments",
    [("--dialect", "cpu", "--backend", "openvino"), ("--backend", "onnxruntime", "--backend", "openvino"),
     ("--precision", "fp16")],
    ids=str,
)  # fmt: skip
def test_what_means_no_single_int8_graph_is_refused(tiny: Tiny, name: str, arguments: tuple[str, ...]) -> None:
    done = tiny(name, *arguments)
    assert done.code == 2
    assert "leave out --precision" in done.err or "give one of them" in done.err


def test_a_backend_stands_for_the_graph_that_it_reads(tiny: Tiny) -> None:
    document = tiny("explain", "--backend", "tensorrt", "--images", 4, "--json").document
    assert document["dialect"] == "tensorrt"
    assert "unknown backend 'x'" in tiny("explain", "--backend", "x").error


def test_a_calibration_cache_is_read(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "calib.cache").write_text("TRT-8501-EntropyCalibration2\nimages: 7fc00000\n")
    error = tiny("explain", "--dialect", "tensorrt", "--images", 4, "--calib-cache", tmp_path / "calib.cache").error
    assert "calib.cache: line 2 gives a scale of nan" in error


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_blame_goes_through_all_hops_and_finds_nobody(tiny: Tiny, dialect: str) -> None:
    done = tiny("blame", "--json", "--dialect", dialect, "--images", 40)
    assert done.code == 0, done.err
    assert list(differences(done.document, BLAME)) == []
    names = [hop["name"] for hop in done.document["hops"]]
    assert names[:4] == ["exported ONNX", "folded", "FP16 simulation", "INT8 simulation"]
    assert done.document["hops"][3]["against"] == ("folded" if dialect == "cpu" else "FP16 simulation")
    absent = [note for note in done.document["notes"] if note.startswith("no engine: ")]
    assert ("engine" in names) != bool(absent), "an engine, or why there is none"
    assert done.document["guilty"] == []


def test_the_int8_hop_is_judged_by_what_the_calibration_saw_and_what_was_changed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = blaming.blame, []

    def looked_at(hops: Sequence[Hop], *arguments: Any, **options: Any) -> Blame:
        seen.append(next(hop for hop in hops if hop.kind == "int8"))
        return original(hops, *arguments, **options)

    monkeypatch.setattr(blaming, "blame", looked_at)
    assert tiny("blame", "--images", 4).code == 0
    monkeypatch.setattr("edgewright.blame_hops.KEEPING", ())  # as if choosing ranges changed the weights
    assert tiny("blame", "--images", 4).code == 0
    plain, changed = seen
    assert "images" in plain.histograms
    assert plain.incomparable == ""
    assert changed.incomparable == "its weights and activations were changed on purpose (ranges)"


def test_blame_for_a_person(tiny: Tiny) -> None:
    done = tiny("blame", "--images", 16)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("nobody is to blame")
    assert max(map(len, done.out.splitlines()[:7])) <= WIDTH


# What is said of a layer

W1, W2 = normal("w1", 6, 3, 1, 1), normal("w2", 4, 6, 1, 1)
X = normal("x", 24, 3, 8, 8)


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    w1 = W1.copy()
    w1[0] *= 50
    w1[3] = 0
    model = graph(
        "c = Conv (x, w1) r = Relu (c) d = Conv (r, w2) g = GlobalAveragePool (d) y = Flatten (g)",
        outputs="float[N, 4] y", w1=w1, w2=W2,
    )  # fmt: skip
    for node in model.graph:
        node.name = f"block.{node.outputs[0].name}/{node.op_type}"
    return Quantizer("cpu", model, collect(model, [X], identity={}, threads=1), method="percentile-99.9")


def test_spread_range_and_saturation_are_those_of_numpy(quantizer: Quantizer) -> None:
    found = explained(quantizer, X, threads=1)
    first, second = found.layers
    largest = np.abs(W1[[0, 1, 2, 4, 5]]).max(axis=(1, 2, 3)) * np.array([50, 1, 1, 1, 1])
    assert first.spread == pytest.approx(largest.max() / largest.min(), rel=1e-5)
    largest = np.abs(W2).max(axis=(1, 2, 3))
    assert second.spread == pytest.approx(largest.max() / largest.min(), rel=1e-5)
    assert first.input is not None
    assert (first.input.tensor, first.input.method) == ("x", "percentile-99.9")
    assert (first.input.minimum, first.input.maximum) == (X.min(), X.max())
    half = (first.input.high - first.input.low) / 510
    outside = float((np.abs(X - np.clip(X, first.input.low, first.input.high)) > half).mean())
    assert first.input.saturation == pytest.approx(outside, abs=2e-4)
    assert outside > 0
    expected = compare(logits_of(quantizer.model, X), logits_of(quantizer.runnable(), X), None)
    assert found.logits.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.1)


def test_effects_are_measured_for_the_layers_that_are_asked_for(quantizer: Quantizer) -> None:
    found = with_effects(explained(quantizer, X, threads=1), quantizer, X, ["block.d/Conv"], threads=1)
    first, second = found.layers
    assert first.in_float is None
    assert second.in_float is not None
    kept = logits_of(quantizer.runnable({"block.d/Conv": ""}), X, threads=1)
    expected = compare(logits_of(quantizer.model, X, threads=1), kept, None)
    assert second.in_float.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.2)


def test_detail_names_candidates_and_channels(quantizer: Quantizer) -> None:
    detail = layer_detail(quantizer, "block.c/Conv", X, threads=1)
    assert {candidate.method for candidate in detail.candidates} == set(METHODS)
    order = [candidate.sqnr_db for candidate in detail.candidates]
    assert order == sorted(order, reverse=True)
    whole = next(candidate for candidate in detail.candidates if candidate.method == "minmax")
    step = (whole.high - whole.low) / 255
    assert whole.sqnr_db == pytest.approx(10 * np.log10((X**2).mean() / (step**2 / 12)), abs=0.5)
    assert detail.zero_channels == (3,)
    assert detail.constant_channels == {3: 0.0}
    assert detail.edges[0] == X.min()
    assert sum(detail.shares) == pytest.approx(1.0)
    layer = explained(quantizer, X, threads=1).layers[0]
    lines = detail_lines(layer, detail)
    assert any("1 channels without weights: 3" in line for line in lines)
    assert max(map(len, lines)) <= WIDTH + 20, "sentences may wrap"


def test_a_float_layer_says_why_and_has_no_range(quantizer: Quantizer) -> None:
    table = CalibrationTable({}, 24, {name: h for name, h in quantizer.table.histograms.items() if name != "d"})
    found = explained(Quantizer("cpu", quantizer.model, table, method="mse"), X, threads=1)
    second = found.layers[1]
    assert (second.precision, second.input) == ("fp32", None)
    assert "was not measured" in second.reason
    assert any("not INT8: block.d: d was not measured" in line for line in explain_lines(found, found.layers))


def test_the_table_shortens_names_and_keeps_figures(quantizer: Quantizer) -> None:
    found = explained(quantizer, X, threads=1)
    renamed = replace(found.layers[0], name=f"{'long.' * 20}c/Conv")
    console = Console(width=WIDTH, file=io.StringIO())
    with console.capture() as capture:
        console.print(explain_table([renamed, found.layers[1]], found.logits.sqnr_db, WIDTH))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].startswith("…")
    assert "long.c " in lines[2]
    assert lines[3].startswith("block.d ")
    for layer, line in zip(found.layers, lines[2:], strict=True):
        assert f"{layer.own_sqnr_db:.1f}" in line
        assert "p99.9" in line
    assert json.dumps(explain_document(found, "net"), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "expected"), [("features.0/Conv", "features.0/Conv"), ("features.0", "features.0/Conv")]
)
def test_layers_are_known_by_name_and_by_module(name: str, expected: str) -> None:
    assert check_layer(name, ["features.0/Conv", "features.1/Conv"]) == expected


@pytest.mark.parametrize("name", ["feature.1", "x", ""])
def test_other_names_are_refused_with_names_that_exist(name: str) -> None:
    with pytest.raises(QuantizationError, match=r"did you mean .*features\.[01]/Conv"):
        check_layer(name, ["features.0/Conv", "features.1/Conv"])


def test_a_module_with_two_layers_is_refused_with_both() -> None:
    with pytest.raises(QuantizationError, match=r"did you mean a/Conv, a/Conv_1\?"):
        check_layer("a", ["a/Conv", "a/Conv_1", "b/Conv"])


def test_the_graph_stays_as_it_was(quantizer: Quantizer) -> None:
    before = ir.to_proto(quantizer.model).SerializeToString(deterministic=True)
    explained(quantizer, X[:4], threads=1)
    assert ir.to_proto(quantizer.model).SerializeToString(deterministic=True) == before
