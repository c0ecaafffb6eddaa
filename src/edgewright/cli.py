"""The command line: a thin shell that prints what the library returns.

The stages of the workstation are imported only by the commands that use them; `run` needs no more than the base
install and one backend's package.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgewright.cli_bench import bench
from edgewright.cli_bundle import keygen, pack, unpack
from edgewright.cli_calibration import calibration
from edgewright.cli_device import build_engines, doctor_lines, or_bundle, verify_engines
from edgewright.cli_explain import blame, explain
from edgewright.cli_help import add_help, completion
from edgewright.cli_inspect import audit, inspect, models
from edgewright.cli_options import (
    DEFAULT_MODEL,
    bundle_options,
    cache_option,
    detail_wanted,
    json_option,
    junit_option,
    pipeline_options,
    rebuild_option,
    run_options,
)
from edgewright.cli_report import compare, report
from edgewright.cli_train import train
from edgewright.runtime.errors import EdgewrightError, EngineError, WorkspaceError

if TYPE_CHECKING:
    from edgewright.pipeline import Pipeline

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="edgewright")
def cli() -> None:
    """Takes a PyTorch image classifier to an edge device and proves its accuracy there."""


OUTSIDE = (
    *(audit, bench, blame, calibration, compare, completion, explain),
    *(inspect, keygen, models, pack, report, train, unpack),
)
for outside in OUTSIDE:
    cli.add_command(outside)


def staged(run: Callable[[Pipeline], dict[str, Any]]) -> Callable[..., int]:
    """What makes stages and says what they gave; `run` returns the document's own fields."""

    @functools.wraps(run)
    def command(as_json: bool, **arguments: Any) -> int:
        from edgewright.console import ConsoleObserver
        from edgewright.pipeline import Pipeline
        from edgewright.report import stage_document

        with ConsoleObserver(detail_wanted()) as observer:
            pipeline = Pipeline(pipeline_options(**arguments), observer)
            with pipeline.workspace.locked():
                fields = run(pipeline)
        schema = f"edgewright.{click.get_current_context().info_name}/1"
        document = {
            "schema": schema,
            "model": arguments["model"],
            **fields,
            "stages": [stage_document(stage) for stage in pipeline.runs],
        }
        if as_json:
            click.echo(json.dumps(document, indent=1))
        else:
            click.echo("\n".join(_lines(fields)))
        return int(any(engine["status"] == "failed" for engine in fields.get("engines", ())))

    return command


def pipeline_command(run: Callable[[Pipeline], dict[str, Any]]) -> Callable[..., int]:
    """A command for a MODEL, with the options of all stages."""
    return cli.command()(run_options(staged(run)))


def _lines(fields: Mapping[str, Any]) -> Iterator[str]:
    """A line per field for a person, one per item where a field is a list."""
    for name, value in fields.items():
        if isinstance(value, list):
            yield f"{name}: {len(value)}"
            for item in value:
                words = item.values() if isinstance(item, dict) else (item,)
                yield "  " + "  ".join(_words(word) for word in words if word)
        elif value is not None:
            yield f"{name}: {_words(value)}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} × {name}" for name, count in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@pipeline_command
def export(pipeline: Pipeline) -> dict[str, Any]:
    """Export MODEL to ONNX, checked against PyTorch."""
    return {"path": str(pipeline.workspace.path(pipeline.exported.path)), "opset": pipeline.exported.opset}


@pipeline_command
def fold(pipeline: Pipeline) -> dict[str, Any]:
    """Fold batch normalization into the convolutions."""
    path = pipeline.workspace.path(pipeline.folded.path)
    facts = pipeline.runs[-1].facts
    return {
        "path": str(path),
        "folded": facts["folded"],
        "left": [f"{skip['node']}: {skip['reason']}" for skip in facts["skipped"]],
        "difference": facts["difference"],
    }


@pipeline_command
def calibrate(pipeline: Pipeline) -> dict[str, Any]:
    """Measure the range of every activation on calibration images."""
    _ = pipeline.calibrated
    facts = pipeline.runs[-1].facts
    return {"path": str(pipeline.workspace.path("calibration.json")), **facts}


@pipeline_command
def quantize(pipeline: Pipeline) -> dict[str, Any]:
    """Write the FP16 graph and the INT8 graphs with explicit Q/DQ, one for each dialect."""
    graphs: list[dict[str, Any]] = [{"graph": "fp16", "path": str(pipeline.workspace.path(pipeline.half.path))}]
    for dialect in pipeline.dialects:
        artifact = pipeline.quantized(dialect)
        facts = pipeline.runs[-1].facts
        graphs.append(
            {
                "graph": f"int8-{dialect}",
                "path": str(pipeline.workspace.path(artifact.path)),
                "int8_layers": facts["int8_layers"],
                "layers": facts["layers"],
            }
        )
    return {"graphs": graphs}


@cli.command()
@run_options
@bundle_options
@rebuild_option
@or_bundle(build_engines)
@staged
def build(pipeline: Pipeline) -> dict[str, Any]:
    """Build an engine for every backend that is installed.

    On a device MODEL is a bundle: its engines are built for the device, proven on its golden inputs, and kept.
    Exit code then 0: all are proven; 3: a self-test failed or nothing is proven; 1: an error.
    """
    rows = pipeline.built
    return {
        "engines": [
            {
                "backend": row.backend,
                "precision": row.precision,
                "target": row.target,
                "path": row.path and str(pipeline.workspace.path(row.path)),
                "actual": row.info.actual_precision if row.info else {},
                "status": row.status,
                "reason_code": row.reason_code,
                "reason": row.reason,
            }
            for row in rows
        ]
    }


def _prove(as_json: bool, junit: Path | None = None, **arguments: Any) -> int:
    from edgewright.console import ConsoleObserver, print_outcome
    from edgewright.junit_report import cases_of, reported_to
    from edgewright.pipeline import Pipeline
    from edgewright.report import EXIT_CODES
    from edgewright.report_files import published

    with ConsoleObserver(detail_wanted()) as observer, reported_to(junit, arguments["model"]) as report:
        pipeline = Pipeline(pipeline_options(**arguments), observer)
        with pipeline.workspace.locked():
            outcome = pipeline.prove()
            report(cases_of(outcome))
            document = published(pipeline, outcome, sys.argv[1:])
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        noted = replace(outcome, notes=tuple(document["notes"]))
        print_outcome(noted, pipeline.workspace.folder, detail_wanted())
    return EXIT_CODES[outcome.verdict]


@cli.command()
@run_options
@junit_option
def engine(**arguments: Any) -> int:
    """Everything: export, fold, calibrate, quantize, build, and prove every engine against PyTorch.

    Exit code 0: the recommended engine passes; 3: none passes; 4: more images are needed; 1: an error.
    """
    return _prove(**arguments)


@cli.command()
@run_options
@junit_option
@bundle_options
@or_bundle(verify_engines)
def verify(**arguments: Any) -> int:
    """Compare every engine with PyTorch on the evaluation images; builds what is missing.

    What is quantized aims at the gates: stricter ones than before quantize anew, and replace the INT8 engines.
    On a device MODEL is a bundle: the self-test of every engine that is kept for it is repeated.
    """
    return _prove(**arguments)


@cli.command()
@cache_option
@json_option
def doctor(cache: Path | None, as_json: bool) -> None:
    """What this machine has, and which backends are ready on it."""
    from edgewright.runtime.device.doctor import examination

    found = examination(cache=cache)
    if as_json:
        click.echo(json.dumps({"schema": "edgewright.doctor/1", **found.to_json()}, indent=1))
        return
    click.echo("\n".join(doctor_lines(found)))


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--engine", "path", type=click.Path(path_type=Path), help="Engine file, build folder or bundle.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Use build/MODEL when --engine is not given.")
@click.option("--build-dir", type=click.Path(path_type=Path), default=Path("build"), show_default=True)
@click.option("--backend", help="Instead of the recommended one.")
@click.option("--precision", help="Instead of the recommended one.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to name.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads; 0: all cores.")
@click.option("--provider", help="What onnxruntime runs on: cpu, cuda or tensorrt.")
@bundle_options
@json_option
def run(
    images: tuple[Path, ...],
    path: Path | None,
    model: str,
    build_dir: Path,
    backend: str | None,
    precision: str | None,
    top: int,
    threads: int,
    provider: str | None,
    as_json: bool,
    **bundle: Any,
) -> None:
    """Classify IMAGES with a built engine."""
    from edgewright.export.resolve import folder_name
    from edgewright.runtime.session import Session

    folder = path or build_dir / folder_name(model)
    options: dict[str, Any] = {"threads": threads, "provider": provider, **bundle}
    with Session.open(folder, backend=backend, precision=precision, **options) as session:
        click.echo(f"engine: {session.why}", err=True)
        results = session.classify(images, top)
        if as_json:
            document = {
                "schema": "edgewright.run/1",
                "engine": {"backend": session.info.backend, "precision": session.info.precision},
                "images": [
                    {"image": str(image), "top": [vars(prediction) for prediction in predictions]}
                    for image, predictions in zip(images, results, strict=True)
                ],
            }
            click.echo(json.dumps(document, indent=1))
            return
    for image, predictions in zip(images, results, strict=True):
        click.echo(str(image))
        for prediction in predictions:
            click.echo(f"  {100 * prediction.probability:6.2f} %  {prediction.label}")


add_help(cli)


def main() -> None:
    """Entry point of the `edgewright` command: errors are one line on stderr, or a JSON document with --json."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text, nor a label of this locale
    try:
        code = _exit_code()
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again on its way out
        if error.errno != errno.EPIPE:  # of a pipe the reader left; there is nobody to tell
            click.echo(f"error: cannot write the output ({error.strerror})", err=True)
        code = 1
    sys.exit(code)


def _exit_code() -> int:
    """Runs the command; what it returns is its exit code."""
    try:
        return cli(standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        if _wants_json():
            _echo_error("UsageError", error.format_message(), "see edgewright --help")
        return error.exit_code
    except EdgewrightError as error:
        return _reported(error)
    except (KeyboardInterrupt, click.Abort):
        fact, remedy = "interrupted", "stages that are finished are kept"
        if _wants_json():
            _echo_error("Interrupted", fact, remedy)
        click.echo(f"{fact}; {remedy}", err=True)
        return INTERRUPTED
    except MemoryError:
        return _reported(WorkspaceError("out of memory", "use fewer --threads or a smaller input"))
    except ModuleNotFoundError as error:
        return _reported(EngineError(f"{error.name} is not installed here", "pip install 'edgewright[build,cpu]'"))
    except ImportError as error:
        return _reported(EngineError(f"a library cannot be imported: {error}", "install it again"))
    except OSError as error:  # of a temporary folder, a cache or an unusual file system; ours are explained where used
        place = f" ({error.filename})" if error.filename else ""
        return _reported(WorkspaceError(f"{error.strerror or error}{place}", "mend that and run again"))


def _wants_json() -> bool:
    options = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return "--json" in options


def _reported(error: EdgewrightError) -> int:
    if _wants_json():
        _echo_error(type(error).__name__, error.message, error.remedy)
    click.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
    return 1


def _echo_error(kind: str, message: str, remedy: str) -> None:
    """The document `edgewright.error/1` of the contract."""
    document = {"schema": "edgewright.error/1", "error": kind, "message": message, "remedy": remedy}
    click.echo(json.dumps(document))
