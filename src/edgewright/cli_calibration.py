"""The commands that look at calibration images without calibrating."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgewright.cli_options import detail_wanted, graph_options, method_option, network_options, threads_option
from edgewright.runtime.errors import DataError, ModelError

if TYPE_CHECKING:
    from edgewright.calibration.image_set import ImageSet
    from edgewright.calibration_check import CalibrationCheck
    from edgewright.pipeline import Pipeline

__all__ = ["calibration"]

PROBLEM_FOUND = 3


@click.group()
def calibration() -> None:
    """Look at calibration images before they are used."""


@calibration.command()
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option("--evaluation", type=click.Path(path_type=Path), metavar="DIR", help="What will judge the engines.")
@method_option
@threads_option
@network_options
def check(
    directory: Path | None, evaluation: Path | None, method: str, threads: int, as_json: bool, **source: Any
) -> int:
    """Are the images in DIR good to calibrate a network with, and enough?

    Finds files that cannot be read, pictures that are there twice or are evaluation images too, missing classes,
    outliers, too few images, and another preprocessing than that of the training. Without DIR the images that come with
    the network are checked.

    Exit code 0: no problem, perhaps warnings; 3: a problem; 1: an error.
    """
    from edgewright.calibration_report import check_document, check_lines
    from edgewright.console import ConsoleObserver
    from edgewright.pipeline import Pipeline
    from edgewright.report import stage_document

    options = replace(
        graph_options(**source), calibration=directory, evaluation=evaluation, method=method, threads=threads
    )
    with ConsoleObserver(detail_wanted()) as observer:
        pipeline = Pipeline(options, observer)
        with pipeline.workspace.locked():
            found = _checked(pipeline)
    if as_json:
        stages = [stage_document(stage) for stage in pipeline.runs]
        click.echo(json.dumps({**check_document(found, options.model), "stages": stages}, indent=1))
    else:
        click.echo("\n".join(check_lines(found, options.model)))
    return PROBLEM_FOUND if found.verdict == "problem" else 0


def _checked(pipeline: Pipeline) -> CalibrationCheck:
    import onnx_ir as ir

    from edgewright.calibration_check import check_calibration

    context = pipeline.context
    if context.source.quantized:
        raise ModelError(f"{context.options.model} came quantized", "there is nothing to calibrate")
    preprocess, labels = context.preprocess, pipeline.exported.labels
    images, evaluation, label_fault = _image_sets(pipeline)
    exported, folded = (ir.load(pipeline.workspace.path(each.path)) for each in (pipeline.exported, pipeline.folded))
    return check_calibration(
        exported if context.source.trained else None,
        folded,
        preprocess,
        labels,
        images,
        evaluation,
        label_fault=label_fault,
        method=context.options.method,
        threads=context.options.threads,
        progress=context.observer.progressed,
    )


def _image_sets(pipeline: Pipeline) -> tuple[ImageSet, ImageSet | None, str]:
    """The calibration images, those that judge, and why the labels of the first are not used, or "".

    Both are what was given, or else what comes with the weights.
    """
    from edgewright.calibration.datasets import image_folder
    from edgewright.calibration.fashion_mnist import fashion_mnist_calibration

    options, graphs = pipeline.context.options, pipeline.graphs
    judging = graphs.evaluation_images if options.evaluation is None and pipeline.context.source.data else None
    if options.evaluation is not None:
        judging = image_folder(options.evaluation)
    if options.calibration is None:
        return graphs.shipped(fashion_mnist_calibration, "calibration"), judging, ""
    images, fault = _labelled(options.calibration, pipeline.exported.labels)
    return images, judging, fault


def _labelled(folder: Path, labels: tuple[str, ...]) -> tuple[ImageSet, str]:
    """With labels where the folder tells the classes of the network, else why not: calibration needs none."""
    from edgewright.calibration.datasets import image_folder

    try:
        return image_folder(folder, labels), ""
    except DataError as error:
        return replace(image_folder(folder), labels=None), error.message
