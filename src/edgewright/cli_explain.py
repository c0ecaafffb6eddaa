"""The commands that say what quantization does to each layer, and who on the way to the engine loses the accuracy."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from edgewright.cli_options import detail_wanted, pipeline_options, run_options
from edgewright.runtime.errors import ModelError

if TYPE_CHECKING:
    from edgewright.explain import ExplainedLayer, Explanation
    from edgewright.explain_layer import LayerDetail
    from edgewright.pipeline import Options, Pipeline
    from edgewright.workspace import Observer

__all__ = ["blame", "explain"]

WORST = 20
MEASURED = 5
"""Layers whose effect on the logits is measured without being asked: a run of most of the network for each."""

dialect_option = click.option(
    "--dialect",
    type=click.Choice(["cpu", "openvino", "tensorrt", "rtx"]),
    help="Which INT8 graph; default: that of --backend, or cpu.",
)
images_option = click.option(
    "--images",
    "count",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Calibration images to look at.",
)


@click.command()
@run_options
@dialect_option
@images_option
@click.option("--layer", metavar="NAME", help="This one in detail.")
@click.option("--all", "show_all", is_flag=True, help="All layers, and the effect of each left in float.")
def explain(
    as_json: bool, dialect: str | None, count: int, layer: str | None, show_all: bool, **arguments: Any
) -> None:
    """What INT8 does to each layer of MODEL, worst first, and why.

    Of every layer that can be INT8, as it is before anything is mended. Measured on calibration images against FP32,
    without labels; a GPU's dialects are simulated on this CPU.
    """
    from edgewright.console import ConsoleObserver, print_listing
    from edgewright.explain import explain_document
    from edgewright.explain_layer import detail_document
    from edgewright.explain_report import detail_lines, explain_lines, explain_table
    from edgewright.report import stage_document

    wanted = _dialect(dialect, **arguments)
    with ConsoleObserver(detail_wanted()) as observer:
        pipeline = _pipeline(pipeline_options(**arguments), observer)
        with pipeline.workspace.locked():
            found, detail = _explained(pipeline, wanted, count, layer, show_all=show_all)
            notes = _notes(pipeline)
    if as_json:
        document = explain_document(found, arguments["model"], notes)
        document |= {} if detail is None else {"detail": detail_document(detail)}
        click.echo(json.dumps({**document, "stages": [stage_document(stage) for stage in pipeline.runs]}, indent=1))
    elif detail is not None:
        click.echo("\n".join(detail_lines(found.layers[0], detail)))
    else:
        rows = found.worst_first if show_all else _integer(found)[:WORST]
        print_listing(functools.partial(explain_table, rows, found.logits.sqnr_db), explain_lines(found, rows, notes))


def _explained(
    pipeline: Pipeline, dialect: str, count: int, layer: str | None, *, show_all: bool
) -> tuple[Explanation, LayerDetail | None]:
    """All layers, with the effects of those that are worst or of all; or one alone, with its detail."""
    from edgewright.blame_hops import some_images
    from edgewright.calibration.calib_cache import read_calib_cache
    from edgewright.explain import check_layer, explain, with_effects
    from edgewright.explain_layer import layer_detail
    from edgewright.optimize.dialects import Quantizer
    from edgewright.optimize.plan import COMPUTE_OPERATORS

    options, progressed = pipeline.context.options, pipeline.context.observer.progressed
    _ = pipeline.calibrated
    model, table = pipeline.graphs.folded_and_table()
    cache = None if options.calib_cache is None else read_calib_cache(options.calib_cache)
    quantizer = Quantizer(dialect, model, table, method=options.method, remainder=options.remainder, cache=cache)
    known = [decision.node for decision in quantizer.plan.decisions if decision.operator in COMPUTE_OPERATORS]
    name = None if layer is None else check_layer(layer, known)  # before anything takes long
    images = some_images(pipeline, count)
    comparing = functools.partial(progressed, "compare layers")
    found = explain(quantizer, images, threads=options.threads, progress=comparing)
    integer = [each.name for each in _integer(found)]
    wanted = integer if show_all else integer[:MEASURED]
    leaving = functools.partial(progressed, "leave layers in float")
    found = with_effects(
        found, quantizer, images, wanted if name is None else [name], threads=options.threads, progress=leaving
    )
    if name is None:
        return found, None
    alone = replace(found, layers=tuple(each for each in found.layers if each.name == name))
    return alone, layer_detail(quantizer, name, images, threads=options.threads)


def _integer(found: Explanation) -> list[ExplainedLayer]:
    """The INT8 layers, worst first."""
    return [layer for layer in found.worst_first if layer.precision == "int8"]


def _notes(pipeline: Pipeline) -> tuple[str, ...]:
    """What the stages noticed, such as calibration images that look unlike the preprocessing."""
    return tuple(note for run in pipeline.runs for note in run.facts.get("notes", ()))


def _pipeline(options: Options, observer: Observer) -> Pipeline:
    """Raises `ModelError` for a graph that came quantized: there is nothing to hold its integers against."""
    from edgewright.pipeline import Pipeline

    pipeline = Pipeline(options, observer)
    if pipeline.context.source.quantized:
        raise ModelError(f"{options.model} is quantized already", "give the float graph that it was made from")
    return pipeline


def _dialect(given: str | None, backends: Sequence[str], precisions: Sequence[str], **others: Any) -> str:
    """What `--dialect` or `--backend` says. Raises `click.UsageError` where they do not mean one INT8 graph."""
    from edgewright.runtime.backends import BACKENDS

    if set(precisions) - {"int8"}:
        raise click.UsageError("this command looks at INT8 alone: leave out --precision")
    read = {BACKENDS[name].dialect for name in backends if name in BACKENDS}  # other names are refused by the pipeline
    if len(read | {given} - {None}) > 1:
        raise click.UsageError("--dialect and --backend name several INT8 graphs: give one of them")
    return given or next(iter(read), "cpu")


@click.command()
@run_options
@dialect_option
@images_option
def blame(as_json: bool, dialect: str | None, count: int, **arguments: Any) -> None:
    """Which hop from PyTorch to the INT8 engine of MODEL loses the accuracy, and in which layer.

    The same calibration images go through PyTorch, the exported and the folded graph, FP16 and INT8 as simulated on
    this CPU, and the engine where it runs here. Exit code 0, whoever is found.
    """
    from edgewright.blame import blame
    from edgewright.blame_hops import backend_of, hops_of, some_images
    from edgewright.blame_report import blame_document, blame_lines, blame_table
    from edgewright.console import ConsoleObserver, print_listing
    from edgewright.report import stage_document

    wanted = _dialect(dialect, **arguments)
    options = pipeline_options(**arguments)
    options = replace(options, backends=options.backends or (backend_of(wanted).name,), precisions=("int8",))
    with ConsoleObserver(detail_wanted()) as observer:
        pipeline = _pipeline(options, observer)
        with pipeline.workspace.locked():
            images = some_images(pipeline, count)
            hops, absent = hops_of(pipeline, wanted, images)
            notes = (*_notes(pipeline), *absent)
            found = blame(
                hops,
                images,
                threads=options.threads,
                progress=lambda hop, done, total: observer.progressed("blame", done, total, hop),
            )
    if as_json:
        document = blame_document(found, arguments["model"], wanted, notes)
        click.echo(json.dumps({**document, "stages": [stage_document(stage) for stage in pipeline.runs]}, indent=1))
    else:
        print_listing(lambda width: blame_table(found), blame_lines(found, notes))
