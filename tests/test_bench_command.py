"""`edgewright bench`: the text at 80 columns, the document, saved ones, and one clear line where it cannot."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command import Command
from contract import BENCH_DOCUMENT, ERROR_DOCUMENT, differences
from edgewright import cli_bench
from edgewright.bench_report import bench_lines
from edgewright.runtime import latency
from edgewright.runtime.bench import Bench, machine
from fake_gpu import FakeGpu
from timed_engines import FakeEngines, adding_onnx, identity_onnx
from toy_build import put_engine, put_report

NOW = ("--seconds", "0", "--threads", "1")  # ten runs each


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder with two engines for onnxruntime, of which FP32 is recommended; in the current folder."""
    monkeypatch.chdir(tmp_path)
    put_engine(tmp_path / "build", "fp32")
    put_engine(tmp_path / "build", "int8")
    put_report(tmp_path / "build", "fp32")
    monkeypatch.setattr(latency, "_garbage_kept", contextlib.nullcontext)  # collecting what pytest holds takes longest
    return Path("build")


def test_the_recommended_engine(command: Command, build: Path) -> None:
    done = command("bench", build, *NOW)
    assert (done.code, done.err) == (0, "batch 1, 1 thread: onnxruntime fp32\n"), done
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "=== Device information ==="
    start = lines.index("=== Performance summary ===")
    assert re.fullmatch(r"Engine: onnxruntime fp32, 0\.0 MB, onnxruntime [\d.]+", lines[start + 1])
    assert lines[start + 2] == "  build (onnxruntime fp32 is the fastest engine that passed)"
    assert lines[start + 3] == "Set-up: batch 1, 1 thread, input 1x3x8x8"
    assert re.fullmatch(r"Throughput: \d+ images/s, \d+ qps", lines[start + 4])
    latency = " ".join(lines[start + 5 :])
    for name in ("min", "max", "mean", "median", "percentile(90%)", "percentile(95%)", "percentile(99%)"):
        assert re.search(rf"{re.escape(name)} = [\d.]+ ms", latency), name
    assert "=== Comparison ===" not in lines


def test_every_set_up_and_engine_in_the_document(command: Command, build: Path) -> None:
    done = command(
        "bench", build, "--precision", "fp32", "--precision", "int8", "--batch", "1,4", "--threads", "1,2",
        "--seconds", "0", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    document = done.document
    assert list(differences(document, BENCH_DOCUMENT)) == []
    measured = [
        (each["precision"], each["latency_ms"]["batch"], each["latency_ms"]["threads"]) for each in document["results"]
    ]
    assert measured == [
        (precision, batch, threads) for threads in (1, 2) for batch in (1, 4) for precision in ("fp32", "int8")
    ]
    for result in document["results"]:
        speed, batch = result["throughput"], result["latency_ms"]["batch"]
        assert speed["images_per_second"] == pytest.approx(batch * speed["qps"])
        assert speed["qps"] == pytest.approx(1e3 / result["latency_ms"]["mean"])
    assert [each["engine"]["precision"] for each in document["comparisons"]] == ["int8"] * 4
    assert all(each["paired"] and each["interval"][0] <= each["ratio"] for each in document["comparisons"])


def test_preprocessing_from_images_of_the_cameras_size(command: Command, build: Path) -> None:
    options = ("--preprocess", "--camera", "640x480", *NOW)
    out = command("bench", build, *options).out
    assert "Set-up: batch 1, 1 thread, from images of 640x480, input 1x3x8x8" in out
    assert re.search(r"^Preprocessing, a part of it: median = [\d.]+ ms$", out, re.MULTILINE)
    document = command("bench", build, *options, "--json").document
    assert list(differences(document, BENCH_DOCUMENT)) == []
    (result,) = document["results"]
    assert result["preprocessing"]["image"] == [640, 480]
    assert 0 < result["preprocessing"]["p50_ms"] < result["latency_ms"]["max"]


def test_more_threads_than_cores_are_noted(command: Command, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores_here", lambda: 1)
    assert command("bench", build, "--seconds", "0", "--json").document["notes"] == []
    document = command("bench", build, "--seconds", "0", "--threads", "0,2", "--json").document
    assert [result["latency_ms"]["threads"] for result in document["results"]] == [1, 2]
    assert document["notes"] == ["more threads (2) than cores (1)"]


def test_an_engine_on_a_gpu(command: Command, bundle: Path, device_cache: Path, gpu: FakeGpu) -> None:
    """A fake GPU with a fake TensorRT: what runs, runs on the processor."""
    assert command("build", bundle, "--cache", device_cache, "--backend", "tensorrt").code == 0
    options = ("--cache", device_cache, "--precision", "int8", *NOW)
    done = command("bench", bundle, *options)
    assert done.code == 0, done
    assert "GPU: Orin, sm87, MHz not known" in done.out
    assert "Engine: tensorrt int8" in done.out
    document = command("bench", bundle, *options, "--json").document
    assert list(differences(document, BENCH_DOCUMENT)) == []
    assert document["machine"]["gpu"] == "Orin, sm87"
    error = command("bench", bundle, *options, "--batch", "9").error
    assert re.search(r"tensorrt int8 of .* takes batches from \d+ to \d+, asked for was 9; give one in between", error)


def test_against_another_engine(command: Command, build: Path) -> None:
    identity_onnx(Path("net.onnx"), sides="N, 3, 8, 8")
    done = command("bench", "net.onnx", "--vs", build, "--precision", "int8", *NOW)
    assert done.code == 0, done
    assert done.err == "batch 1, 1 thread: onnxruntime net.onnx, onnxruntime int8, in turns\n"
    words = " ".join(done.out.split())
    assert re.search(
        r"onnxruntime net\.onnx takes [\d.]+ x the time of onnxruntime int8 \(95 % interval [\d.]+ to [\d.]+, 10 pairs",
        words,
    )


def test_against_a_saved_measurement(command: Command, build: Path) -> None:
    Path("saved.json").write_text(command("bench", build, *NOW, "--json").out)
    done = command("bench", build, *NOW, "--vs", "saved.json")
    assert done.code == 0, done
    words = " ".join(done.out.split())
    assert "onnxruntime fp32 takes" in words
    assert "the time of the one saved" in words
    assert "not measured in turns" in words
    assert max(map(len, done.out.splitlines())) <= 80

    again = ("bench", build, *NOW, "--batch", "2", "--vs", "saved.json")
    assert command(*again).error == (
        "not to be compared: here batch 2, 1 thread, there batch 1, 1 thread; measure both alike, or give --force"
    )
    forced = command(*again, "--force", "--json").document
    assert list(differences(forced, BENCH_DOCUMENT)) == []
    assert forced["comparisons"][0]["unlike"] == ["here batch 2, 1 thread, there batch 1, 1 thread"]


def test_another_machine_is_refused(command: Command, build: Path) -> None:
    document = command("bench", build, *NOW, "--json").document
    document["machine"]["processor"] = "Cortex-A78AE"
    Path("saved.json").write_text(json.dumps(document))
    error = command("bench", build, *NOW, "--vs", "saved.json").error
    assert re.fullmatch(r"not to be compared: processor is .+ here and Cortex-A78AE there; .*--force", error)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none",), "there is no none; give a build folder, a bundle"),
        (("text.onnx",), "text.onnx is not an ONNX file, or only a part of one; give"),
        (("text.txt",), "text.txt is nothing that can be run; give"),
        (("build", "--backend", "openvino"), "build has no openvino engine, it has onnxruntime fp32, onnxruntime int8"),
        (("build", "--vs", "text.txt"), "text.txt is nothing that can be run; give"),
        (("build", "--vs", "other.json"), "other.json is no saved result of edgewright bench"),
        (("build", "--vs", "build", "--backend", "onnxruntime"), "build stands for 2 engines"),
        (("net.onnx", "--batch", "8"), "onnxruntime net.onnx of net.onnx takes batches of 1, asked for was 8; give"),
        (("net.onnx", "--preprocess"), "net.onnx does not say how its images are preprocessed; leave out"),
        (("net.onnx", "--vs", "build"), "not to be compared: the images are 3x4x4 and 3x8x8; measure both alike"),
        (("net.onnx", "--precision", "int8"), "--precision says nothing about net.onnx; leave it out"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, tuple) else "",
)
def test_one_line_says_what_is_wrong(command: Command, build: Path, arguments: tuple[str, ...], said: str) -> None:
    identity_onnx(Path("net.onnx"), sides="1, 3, 4, 4")
    for name in ("text.onnx", "text.txt", "other.json"):
        Path(name).write_text("{}")
    assert command("bench", *arguments, *NOW).error.startswith(said)
    document = command("bench", *arguments, *NOW, "--json").document
    assert list(differences(document, ERROR_DOCUMENT)) == []


def test_weights_beside_an_onnx_file(command: Command, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = adding_onnx(Path("theirs/net.onnx"), np.zeros((3, 4, 4), np.float32))
    (result,) = command("bench", path, *NOW, "--json").document["results"]
    assert result["bytes"] > path.stat().st_size
    Path("theirs/weights.bin").unlink()
    assert command("bench", path, *NOW).error.startswith("the external data of 'w' in theirs/net.onnx cannot be found")
    monkeypatch.setattr(cli_bench, "READS_ONNX", ("not_installed",))
    error = command("bench", path, *NOW).error
    assert re.fullmatch(
        r"theirs/net.onnx: onnxruntime cannot load .*; .* where edgewright\[build\] is installed", error
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch", "0"), ("--batch", "1,"), ("--batch", "a"), ("--batch", "1025"), ("--threads", "-1"),
        ("--camera", "640"), ("--preprocess", "--camera", "0x3"), ("--camera", "640x480"), ("--seconds", "nan"),
        ("--seconds", "-1"), ("--seconds", "inf"),
    ],
    ids="-".join,
)  # fmt: skip
def test_usage(command: Command, build: Path, arguments: tuple[str, ...]) -> None:
    assert command("bench", build, *arguments).code == 2


def test_help_ends_with_an_example(command: Command) -> None:
    out = command("bench", "--help").out
    assert out.rstrip().splitlines()[-2:] == [
        "  Example:", "    edgewright bench build/lenet_bn --backend onnxruntime --backend openvino"
    ]  # fmt: skip


# --- the text of figures that a fake clock gives -----------------------------------------------------------------


def text(found: Bench) -> str:
    lines = list(bench_lines(found))
    assert max(map(len, lines)) <= 80
    return "\n".join(lines)


def test_figures_and_a_comparison_word_for_word() -> None:
    engines = FakeEngines()
    out = text(engines.bench(engines.engine("a", 4), engines.engine("b", 2.5), batches=(8,), notes=["c is left out"]))
    assert """\
=== Performance summary ===
Engine: fake a.onnx, 0.0 MB, fake 0
  a.onnx (a fake)
Set-up: batch 8, 1 thread, input 8x32x8x8
Throughput: 2000 images/s, 250 qps of 8 images
Latency: min = 4 ms, max = 4 ms, mean = 4 ms, median = 4 ms,
  percentile(90%) = 4 ms, percentile(95%) = 4 ms, percentile(99%) = 4 ms
Timed runs: 13, coefficient of variation = 0.0 %
""" in out  # fmt: skip
    assert out.endswith("""\
=== Comparison ===
batch 8, 1 thread: fake b.onnx takes 0.625 x the time of fake a.onnx (95 %
  interval 0.625 to 0.625, 13 pairs): faster, 1.60 x the speed

note: c is left out""")


@pytest.mark.parametrize(("cv", "warned"), [(0.0249, False), (0.0251, True)])
def test_a_restless_machine_is_warned_of(cv: float, warned: bool) -> None:
    engines = FakeEngines()
    found = engines.bench(engines.engine("a", 4))
    (result,) = found.results
    found = replace(found, results=(replace(result, latency=replace(result.latency, cv=cv)),))
    assert ("variation = 2.5 %, unstable" in text(found)) is warned
    assert ("warning: latency is unstable" in text(found)) is warned


@pytest.mark.parametrize(
    ("low", "ratio", "high", "verdict"),
    [
        (0.80, 0.81, 0.82, "faster, 1.23 x the speed"),
        (0.80, 0.81, 0.999, "faster, 1.23 x the speed"),
        (0.80, 0.90, 1.001, "no difference can be told"),
        (0.985, 0.986, 0.987, "faster, 1.01 x the speed"),
        (0.991, 0.992, 0.993, "equally fast, within 1 %"),
        (0.999, 1.0, 1.02, "no difference can be told"),
        (1.2, 1.25, 1.3, "slower, 0.80 x the speed"),
    ],
)
def test_verdicts(low: float, ratio: float, high: float, verdict: str) -> None:
    engines = FakeEngines()
    found = engines.bench(engines.engine("a", 4), engines.engine("b", 4))
    (comparison,) = found.comparisons
    found = replace(found, comparisons=(replace(comparison, low=low, ratio=ratio, high=high),))
    assert " ".join(text(found).split()).endswith(f"13 pairs): {verdict}")


def test_what_cannot_be_told_and_what_is_not_alike() -> None:
    engines = FakeEngines()
    found = engines.bench(engines.engine("a", 4), engines.engine("b", 4))
    (comparison,) = found.comparisons
    assert text(found).endswith("equally fast, within 1 %")
    found = replace(found, comparisons=(replace(comparison, unlike=("here x, there y",), high=1.1, confidence=0.5),))
    words = " ".join(text(found).split())
    assert words.endswith("no difference can be told; not alike: here x, there y")
    assert "(50 % interval 1.000 to 1.100, 13 pairs)" in words
