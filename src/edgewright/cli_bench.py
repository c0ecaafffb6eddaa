"""`edgewright bench`: how fast engines are here. It needs no more than the base install and a backend's package."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgewright.cli_options import bundle_options, finite, json_option

__all__ = ["bench"]

CAMERA = "1280x720"
MOST_IMAGES, MOST_THREADS = 1024, 1024
SAVED_SUFFIX = ".json"
READS_ONNX = ("onnx", "onnx_ir")


def _counts(least: int, most: int) -> Callable[..., Any]:
    """A callback that reads whole numbers with commas between them, each once."""

    def parse(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
        words = [word.strip() for word in value.split(",")]
        if not all(re.fullmatch(r"[0-9]{1,9}", word) and least <= int(word) <= most for word in words):
            raise click.BadParameter(f"{value!r} is not numbers from {least} to {most} with commas between them")
        return tuple(dict.fromkeys(map(int, words)))

    return parse


def _size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not WIDTHxHEIGHT, such as {CAMERA}")
    return int(found[1]), int(found[2])


def _graph_of(path: Path) -> bytes:
    """The ONNX file, with the weights that stand beside it where the extra `build` is installed."""
    from edgewright.runtime.bench import bytes_of_file

    if not all(map(importlib.util.find_spec, READS_ONNX)):
        return bytes_of_file(path)
    from edgewright.export.onnx_files import self_contained

    return self_contained(path)


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="BUILD|BUNDLE|ENGINE|FILE.onnx")
@click.option(
    "--vs",
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="Compare with this one, in turns; or with the FILE.json of an earlier bench.",
)
@click.option("--backend", "backends", multiple=True, help="Instead of the recommended one; may be repeated.")
@click.option("--precision", "precisions", multiple=True, help="Instead of the recommended one; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="All engines of the build folder that run here.")
@click.option(
    "--batch",
    "batches",
    callback=_counts(1, MOST_IMAGES),
    default="1",
    show_default=True,
    metavar="N,…",
    help="Images per run.",
)
@click.option(
    "--threads",
    callback=_counts(0, MOST_THREADS),
    default="0",
    show_default=True,
    metavar="N,…",
    help="CPU threads; 0: all cores.",
)
@click.option("--preprocess", is_flag=True, help="Begin each run with decoded images, not with tensors.")
@click.option(
    "--camera",
    callback=_size,
    default=CAMERA,
    show_default=True,
    metavar="WxH",
    help="Size in pixels of the images of --preprocess.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600),
    callback=finite,
    default=3.0,
    show_default=True,
    help="For each engine in each set-up, warm-up apart.",
)
@click.option("--force", is_flag=True, help="Compare what was not measured alike.")
@bundle_options
@json_option
def bench(
    path: Path, vs: Path | None, backends: tuple[str, ...], precisions: tuple[str, ...], everything: bool,
    batches: tuple[int, ...], threads: tuple[int, ...], preprocess: bool, camera: tuple[int, int], seconds: float,
    force: bool, as_json: bool, **trust: Any,
) -> None:  # fmt: skip
    """How fast an engine is on this machine, in the words of trtexec.

    Warm-up until the times are stable; several engines take turns and are compared in pairs, the first or OTHER being
    the baseline. Without --backend, --precision or --all the recommended engine of a folder is taken. An ONNX file is
    run as it is, by onnxruntime or, with --backend, by openvino.
    """
    from edgewright.bench_report import bench_lines, progress_lines
    from edgewright.runtime.bench import Selection, SetUp, baseline_of, candidates_of, read_bench, selections_for
    from edgewright.runtime.bench import bench as measured
    from edgewright.runtime.bench.machine import cores_here

    if not preprocess and click.get_current_context().get_parameter_source("camera") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--camera says nothing without --preprocess")
    selection = Selection(backends, precisions, everything, trust)
    saved = vs is not None and vs.suffix == SAVED_SUFFIX
    meant, *of_other = selections_for(selection, *([path] if vs is None or saved else [path, vs]))
    candidates, notes = candidates_of(path, meant, graph_of=_graph_of)
    baseline = None if vs is None else read_bench(vs) if saved else baseline_of(vs, *of_other, graph_of=_graph_of)
    counts = dict.fromkeys(count or cores_here() for count in threads)
    crowded = [f"more threads ({count}) than cores ({cores_here()})" for count in counts if count > cores_here()]
    found = measured(
        candidates,
        [SetUp(batch, count, camera if preprocess else None) for count, batch in product(counts, batches)],
        baseline=baseline,
        seconds=seconds,
        force=force,
        notes=[*notes, *crowded],
        say=lambda line: click.echo("\n".join(progress_lines(line)), err=True),
    )
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(bench_lines(found)))
