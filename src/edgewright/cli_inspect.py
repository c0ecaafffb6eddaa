"""The commands that look: at a network, at an engine, at the list of networks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgewright.cli_options import detail_wanted, graph_options, json_option, source_options

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["audit", "inspect", "models"]


@click.command()
@source_options
@click.option("--folded", is_flag=True, help="The graph after folding, not as exported.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Memory and MACs by layer, .svg or .png.")
def inspect(as_json: bool, folded: bool, plot: Path | None, **arguments: Any) -> None:
    """What MODEL is made of: layers by stage, output, parameters, MACs, receptive field, bytes moved.

    MODEL may be any ONNX file too, such as build/resnet50/int8-cpu.onnx.
    """
    from edgewright.inspect_plot import check_plot_path, save_plot
    from edgewright.inspect_report import inspect_document, inspect_lines, inspect_table
    from edgewright.optimize.summary import summary

    if plot is not None:
        check_plot_path(plot)
    layers = summary(_inspected(folded, **arguments), arguments["input_shape"])
    if plot is not None:
        save_plot(layers, plot, arguments["model"])
    if as_json:
        document = inspect_document(layers)
        click.echo(json.dumps({"schema": document["schema"], "model": arguments["model"], **document}, indent=1))
        return
    from edgewright.console import print_listing

    print_listing(functools.partial(inspect_table, layers), inspect_lines(layers))


def _inspected(folded: bool, **arguments: Any) -> ir.Model:
    """The graph of a person's own file as it is; of anything else, and folded, as the stages make it."""
    import onnx_ir as ir

    if arguments["model"].lower().endswith(".onnx") and not folded:
        from edgewright.export.from_onnx import check_request
        from edgewright.export.onnx_files import load_onnx

        check_request(graph_options(**arguments).request)
        return ir.from_proto(load_onnx(Path(arguments["model"])))
    from edgewright.console import ConsoleObserver
    from edgewright.pipeline import Pipeline

    with ConsoleObserver(detail_wanted()) as observer:
        pipeline = Pipeline(graph_options(**arguments), observer)
        with pipeline.workspace.locked():
            artifact = pipeline.folded if folded else pipeline.exported
            return ir.load(pipeline.workspace.path(artifact.path))


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@json_option
def audit(engine: Path, as_json: bool) -> None:
    """What an ENGINE file really runs: each kernel, what was fused into it, its precision and its traffic."""
    from edgewright.report import audit_document, audit_line, audit_table
    from edgewright.runtime.engine_files import description_of, read_info, verified_bytes

    info = read_info(description_of(engine))
    verified_bytes(engine, info)
    if as_json:
        click.echo(json.dumps(audit_document(info, str(engine)), indent=1))
        return
    from edgewright.console import print_audit

    print_audit(audit_table(info), audit_line(info))


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the networks: parameters, MACs, input, and where their weights come from."""
    from edgewright.models_report import models_document, models_lines

    click.echo(json.dumps(models_document(), indent=1) if as_json else "\n".join(models_lines()))
