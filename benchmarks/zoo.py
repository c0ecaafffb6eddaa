"""All networks of the registry through the pipeline: `make zoo`, or `python benchmarks/zoo.py resnet18 --jobs 2`.

Each runs in a process of its own (`zoo_network.py`). What is done is not done again while the code and the libraries
stay the same. With all networks done, the table becomes `docs/zoo.md`, and what `edgewright models` says of each
network's size becomes `export/line_up.json`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from figures import ROOT

from edgewright.export.models import MODELS
from edgewright.report import in_short
from edgewright.runtime.files import sha256_of_file, write_json
from edgewright.workspace import library_versions, machine, source_hash

FOLDER = ROOT / "build" / "zoo"
DOCUMENT = ROOT / "docs" / "zoo.md"
LINE_UP = ROOT / "export" / "line_up.json"
SCRIPT = Path(__file__).parent / "zoo_network.py"
LIBRARIES = ("torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "tensorrt-rtx")
MB = 1e6

INTRODUCTION = """# The line-up, measured

`make zoo` takes every network of `edgewright models` through the pipeline: export, fold, calibrate, quantize, build
with onnxruntime, OpenVINO and TensorRT-RTX (for {target}, without a GPU). Weights are random and seeded, and so are the
statistics of batch normalization, which are far from those of a fresh network; calibration takes eight noise images,
which serve for this and nothing else. So the table says nothing about accuracy, but that every network goes through,
and that the folded graph is the network:

- *max-abs*: the largest difference between the folded graph in onnxruntime and PyTorch, over all logits of two images;
  *relative*: the same as a share of the largest logit; more than 1e-4 is a failure.
- *drop*: each batch normalization in turn is left out of the PyTorch network; this is the smallest change of the
  logits, as a share of the largest. Above 1e-4 the check above notices a single one that is missing. (Images of more
  than 240 pixels a side are replaced by smaller ones here.)
- *BN*: batch normalizations folded, and left. None is left that alone reads the result of a linear operator, which is
  looked for apart from the fold pass.
- *seconds*: of making the stages, {jobs} networks at a time on {machine}, one thread each.
- *INT8*: layers in INT8 of all convolutions and matrix products, onnxruntime · OpenVINO · TensorRT-RTX; a dash where no
  INT8 engine is built because none of the layers gains by it.
- *kernels*: of the TensorRT-RTX engines, FP16 · INT8.

{libraries}.
"""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--jobs", type=click.IntRange(1), default=max(1, (os.cpu_count() or 1)), help="Networks at a time.")
@click.option("--keep", is_flag=True, help="Take what was measured with earlier code too.")
def main(names: Sequence[str], jobs: int, keep: bool) -> None:
    """Runs the networks in NAMES, or all; exit code 1 if anything does not hold."""
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise click.BadParameter(f"unknown networks {', '.join(unknown)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(functools.partial(_result, keep=keep), names or MODELS))
    if not names and all("parameters" in result for result in results):
        _write(results, jobs)
    problems = [f"{result['name']}: {problem}" for result in results for problem in result["problems"]]
    print("\n".join(problems) or f"{len(results)} networks, nothing to object")
    sys.exit(bool(problems))


def _result(name: str, *, keep: bool) -> dict[str, Any]:
    """What was measured of a network, now or before with the same code."""
    file = FOLDER / f"{name}.json"
    key = f"{source_hash('.', 'export', 'calibration', 'optimize', 'runtime')} {sha256_of_file(SCRIPT)} {_libraries()}"
    if file.is_file():
        known: dict[str, Any] = json.loads(file.read_text())
        if known.get("key") == key or (keep and not known["problems"]):
            return known
    file.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, name, FOLDER], env=environment, capture_output=True, text=True, check=False
    )
    if file.is_file():
        result = json.loads(file.read_text())
    else:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        result = {"name": name, "problems": [last]}
    shutil.rmtree(FOLDER / name, ignore_errors=True)  # a gigabyte each
    if "parameters" in result:  # what was interrupted is tried again
        file.write_text(json.dumps({**result, "key": key}))
    print(f"{name}: {'; '.join(result['problems']) or 'good'}", flush=True)
    return {**result, "key": key}


def _libraries() -> str:
    return library_versions(*LIBRARIES)


def _write(results: Sequence[dict[str, Any]], jobs: int) -> None:
    text = INTRODUCTION.format(target="sm86", jobs=jobs, machine=machine(), libraries=_libraries())
    DOCUMENT.write_text("\n".join([text, *_table(results), "", *_left(results)]) + "\n")
    write_json(LINE_UP, {row["name"]: {key: row[key] for key in ("parameters", "macs", "input")} for row in results})


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "network": lambda row: row["name"],
    "params": lambda row: in_short(row["parameters"]),
    "MACs": lambda row: in_short(row["macs"]),
    "input": lambda row: "×".join(map(str, row["input"])),
    "export, s": lambda row: _stage_seconds(row, "export"),
    "fold, s": lambda row: _stage_seconds(row, "fold"),
    "calibrate, quantize, s": lambda row: _stage_seconds(row, "calibrate", "cast", "quantize"),
    "build, s": lambda row: _stage_seconds(row, "build"),
    "BN": lambda row: f"{row['folded']}, {row['batch_norms'] - row['folded']}" if row["batch_norms"] else "none",
    "max-abs": lambda row: f"{row['max_abs']:.0e}",
    "relative": lambda row: f"{row['relative']:.0e}",
    "drop": lambda row: f"{row['smallest_effect']:.0e}" if row["smallest_effect"] is not None else "",
    "MB FP32": lambda row: _megabytes(_engine(row, "onnxruntime", "fp32")),
    "MB INT8": lambda row: _megabytes(_engine(row, "onnxruntime", "int8")),
    "INT8": lambda row: " · ".join(
        _int8_layers(_engine(row, backend, "int8")) for backend in ("onnxruntime", "openvino", "tensorrt-rtx")
    ),
    "kernels": lambda row: " · ".join(
        str(_engine(row, "tensorrt-rtx", precision)["kernels"] or "–") for precision in ("fp16", "int8")
    ),
}


def _table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|---|{'---:|' * (len(COLUMNS) - 1)}"
    for row in results:
        yield f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |"


def _left(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Normalizations that are left, and why"
    yield ""
    for row in results:
        for reason, count in row["left"].items():
            yield f"- {row['name']}: {count} × {reason}"


def _stage_seconds(row: dict[str, Any], *stages: str) -> str:
    return f"{sum(row['seconds'].get(stage, 0.0) for stage in stages):.1f}"


def _engine(row: dict[str, Any], backend: str, precision: str) -> dict[str, Any]:
    wanted = (backend, precision)
    engine: dict[str, Any] = next(e for e in row["engines"] if (e["backend"], e["precision"]) == wanted)
    return engine


def _megabytes(engine: dict[str, Any]) -> str:
    return f"{engine['bytes'] / MB:.1f}" if engine["bytes"] else "–"


def _int8_layers(engine: dict[str, Any]) -> str:
    return f"{engine['in_precision']}/{engine['layers']}" if engine["layers"] else "–"


if __name__ == "__main__":
    main()
