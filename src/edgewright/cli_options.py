"""The options that several commands share, and what they mean to the library."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from edgewright.runtime.errors import DataError

if TYPE_CHECKING:
    from edgewright.console import Detail
    from edgewright.export.resolve import ModelRequest
    from edgewright.pipeline import Options

__all__ = [
    "BUNDLE_ONLY",
    "DEFAULT_MODEL",
    "bundle_options",
    "cache_option",
    "detail_wanted",
    "finite",
    "graph_options",
    "json_option",
    "junit_option",
    "method_option",
    "network_options",
    "pipeline_options",
    "rebuild_option",
    "run_options",
    "source_options",
    "threads_option",
]

DEFAULT_MODEL = "mobilenet_effnet_b0"
Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

METHODS = [
    "auto",
    "minmax",
    "percentile",
    "percentile-99.9",
    "percentile-99.999",
    "percentile-99.9999",
    "entropy",
    "mse",
]
BUNDLE_ONLY = ("require_signature", "allow_older", "cache", "rebuild")
"""Parameters that mean something for a bundle alone."""

junit_option = click.option(
    "--junit",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also as JUnit XML, for CI systems.",
)
DETAIL = "edgewright.detail"
"""Where a context keeps how much of the stages is told."""

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def _noting(detail: Detail) -> Callable[[click.Context, click.Parameter, bool], None]:
    def note(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given and context.meta.setdefault(DETAIL, detail) != detail:
            raise click.UsageError("--verbose and --quiet contradict each other")

    return note


DETAIL_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_noting("verbose"),
        help="Also what the passes of each stage did.",
    ),
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_noting("quiet"), help="Only the verdict."
    ),
)  # fmt: skip


def detail_wanted() -> Detail:
    """What the command that runs was asked for."""
    wanted: Detail = click.get_current_context().meta.get(DETAIL, "usual")
    return wanted


def _numbers(kind: type[int] | type[float], counts: Sequence[int]) -> Callable[..., Any]:
    """A callback that reads numbers with commas between them, as many as one of `counts`."""

    def parse(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(kind(word) for word in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in counts:
            allowed = " or ".join(map(str, counts))
            raise click.BadParameter(f"{value!r} is not {allowed} numbers with commas between them")
        if kind is int and min(numbers) < 1:
            raise click.BadParameter(f"{value!r}: a size is at least 1")
        return numbers

    return parse


def _keywords(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it reads as JSON, else the text itself."""
    keywords: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
        try:
            keywords[name] = json.loads(value)
        except ValueError:
            keywords[name] = value
    return keywords


def _batch_sizes(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int, int]:
    """Three batch sizes, such as 1,8,32, or one for all three."""
    words = [word.strip() for word in value.split(",")]
    if len(words) not in (1, 3) or not all(word.isdigit() for word in words):
        raise click.BadParameter(f"{value!r} is neither one batch size nor three")
    smallest, usual, largest = [int(word) for word in words] * (3 // len(words))
    return smallest, usual, largest


NETWORK_OPTIONS: tuple[Decorator, ...] = (
    click.option("--weights", default="default", help="default, random, a .safetensors or .pth file, or a name."),
    click.option(
        "--option", "model_options", multiple=True, callback=_keywords, metavar="NAME=VALUE",
        help="A keyword argument of the network's builder; may be repeated.",
    ),
    click.option("--input-shape", callback=_numbers(int, (3,)), metavar="C,H,W", help="Of one preprocessed image."),
    click.option("--mean", callback=_numbers(float, (1, 3)), metavar="R,G,B", help="Of the pixels, which are 0 to 1."),
    click.option("--std", callback=_numbers(float, (1, 3)), metavar="R,G,B", help="Standard deviation, likewise."),
    click.option("--resize", callback=_numbers(int, (1, 2)), metavar="SIDE|H,W", help="Shorter side, or both."),
    click.option("--crop", callback=_numbers(int, (1, 2)), metavar="SIDE|H,W", help="Centre crop, in pixels."),
    click.option(
        "--interpolation", type=click.Choice(["nearest", "bilinear", "bicubic", "lanczos"]), help="Of the resize."
    ),
    click.option("--labels", type=click.Path(path_type=Path), metavar="FILE", help="A class name per line, in order."),
)  # fmt: skip


def model_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Networks of the line-up that begin so; else it may be a file."""
    from edgewright.export.models import MODELS

    names = [CompletionItem(name) for name in MODELS if name.startswith(incomplete)]
    return names or [CompletionItem(incomplete, type="file")]


SOURCE_OPTIONS: tuple[Decorator, ...] = (
    click.argument("model", default=DEFAULT_MODEL, shell_complete=model_names),
    *NETWORK_OPTIONS,
)


def finite(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuses NaN, which a range lets through, and infinity."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number")
    return value


model_option = click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    shell_complete=model_names,
    help="As for `edgewright engine`.",
)

ENGINE_OPTIONS: tuple[Decorator, ...] = (
    click.option("--backend", "backends", multiple=True, help="Only this backend; may be repeated."),
    click.option("--precision", "precisions", multiple=True, help="Only this precision; may be repeated."),
    click.option(
        "--target", default="sm86,sm89,sm120", show_default=True, help="GPU architectures to build ahead of time for."
    ),
    click.option(
        "--remainder",
        type=click.Choice(["fp16", "fp32"]),
        default="fp16",
        show_default=True,
        help="What the layers of an INT8 engine that are not INT8 run in on a GPU.",
    ),
    click.option(
        "--batch",
        callback=_batch_sizes,
        default="1,8,32",
        show_default=True,
        help="GPU: smallest, usual and largest batch, or one size.",
    ),
    click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="GPU: the most scratch memory of a layer."),
    click.option("--dla", type=click.IntRange(0), metavar="CORE", help="Jetson: run on this DLA core."),
)

GRAPH_OPTIONS: tuple[Decorator, ...] = (
    click.option("--build-dir", type=click.Path(path_type=Path), default=Path("build"), show_default=True),
    click.option("--opset", type=int, default=19, show_default=True, help="ONNX opset, 18 to 20."),
)

method_option = click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    metavar="NAME",
    help="How activation ranges are chosen: auto (each by what errs least there), minmax, percentile (99.99), "
    "percentile-99.9, percentile-99.999, percentile-99.9999, entropy or mse.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(0), default=0, help="Threads of the engines; 0: all cores."
)


def _limit(name: str, unit: str, help_: str, most: float | None = None) -> Decorator:
    """The option of a gate: a finite number, from 0 to `most` if that is given."""
    kind = click.FLOAT if most is None else click.FloatRange(0.0, most)
    return click.option(name, type=kind, callback=finite, metavar=unit, help=help_)


RUN_OPTIONS: tuple[Decorator, ...] = (
    click.option("--calibration", type=click.Path(path_type=Path), help="Folder of calibration images."),
    click.option("--evaluation", type=click.Path(path_type=Path), help="Folder of evaluation images."),
    click.option("--allow-overlap", is_flag=True, help="Accept the same image in both folders."),
    method_option,
    click.option(
        "--placement",
        type=click.Choice(["measured", "rules"]),
        default="measured",
        show_default=True,
        help="INT8 only where it pays on this machine, or wherever it can be.",
    ),
    click.option(
        "--rescue/--no-rescue",
        default=True,
        show_default=True,
        help="Mend INT8 as far as the budget needs: equalize, correct, round, leave layers in float.",
    ),
    click.option(
        "--finetune", metavar="DIR|fashion-mnist", help="If need be, train INT8 on these images, quantization-aware."
    ),
    click.option("--calib-cache", type=click.Path(path_type=Path), metavar="FILE", help="Ranges of an old TensorRT."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=21, show_default=True, help="Of the rescue."),
    _limit("--max-drop", "POINTS", "Budget: the largest loss of top-1; default: 0.5, or none with --min-ratio.", 100.0),
    _limit("--min-ratio", "RATIO", "The least top-1 as a share of the reference's, such as MLPerf's 0.99.", 1.0),
    _limit("--min-agreement", "SHARE", "Of images with the same top-1.", 1.0),
    _limit("--min-sqnr", "DB", "Of the logits, beside the reference's."),
    threads_option,
    click.option(
        "--already-quantized",
        type=click.Choice(["refuse", "pass"]),
        default="refuse",
        show_default=True,
        help="What becomes of an ONNX file with integers in it.",
    ),
)

cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Bundle: where this device keeps engines; default: $EDGEWRIGHT_CACHE or ~/.cache/edgewright.",
)

BUNDLE_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "--require-signature", type=click.Path(path_type=Path), metavar="KEYFILE",
        help="Bundle: only if a key in this file signed it.",
    ),
    click.option("--allow-older", is_flag=True, help="Bundle: even if a higher version was built here."),
    cache_option,
)  # fmt: skip

rebuild_option = click.option("--rebuild", is_flag=True, help="Bundle: build what is proven already once more.")


def bundle_options(command: Command) -> Command:
    """The options that say which bundles are trusted, and where a device keeps what it makes of them."""
    return _decorated(command, BUNDLE_OPTIONS)


def source_options(command: Command) -> Command:
    """The options that say which network, and where its graph is made."""
    return _decorated(command, (*SOURCE_OPTIONS, *GRAPH_OPTIONS, *DETAIL_OPTIONS, json_option))


def network_options(command: Command) -> Command:
    """Those of `source_options` for a command whose argument is not the network: it is `--model`."""
    return _decorated(command, (model_option, *NETWORK_OPTIONS, *GRAPH_OPTIONS, *DETAIL_OPTIONS, json_option))


def run_options(command: Command) -> Command:
    """The options of every command that runs stages."""
    return _decorated(
        command, (*SOURCE_OPTIONS, *GRAPH_OPTIONS, *RUN_OPTIONS, *ENGINE_OPTIONS, *DETAIL_OPTIONS, json_option)
    )


def _decorated(command: Command, decorators: Sequence[Decorator]) -> Command:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def as_request(
    model: str,
    weights: str,
    model_options: dict[str, Any],
    input_shape: tuple[int, int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    resize: tuple[int, ...] | None,
    crop: tuple[int, ...] | None,
    interpolation: str | None,
    labels: Path | None,
) -> ModelRequest:
    """What `SOURCE_OPTIONS` say. Raises `DataError` if the labels cannot be read."""
    from edgewright.export.completion import Completion
    from edgewright.export.resolve import ModelRequest

    completion = Completion(
        input_shape=input_shape,
        mean=mean,
        std=std,
        resize=None if resize is None else resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        crop=None if crop is None else (crop[0], crop[-1]),
        interpolation=interpolation,
        labels=None if labels is None else _label_lines(labels),
    )
    return ModelRequest(model, weights, model_options, completion)


def _label_lines(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the labels {file} cannot be read ({error})", "give a text file, a class name per line"
        ) from None
    labels = tuple(line.strip() for line in lines if line.strip())
    if not labels:
        raise DataError(f"the labels {file} are empty", "write a class name per line, in the order of the outputs")
    return labels


def graph_options(build_dir: Path, opset: int, **source: Any) -> Options:
    """What `source_options` say."""
    from edgewright.pipeline import Options

    request = as_request(**source)
    return Options(
        request.model,
        request.weights,
        build_dir,
        opset,
        model_options=request.options,
        completion=request.completion,
    )


def pipeline_options(target: str, batch: tuple[int, int, int], workspace: int | None, **arguments: Any) -> Options:
    """What `run_options` say. Raises `ParityError` if a gate makes no sense."""
    from edgewright.runtime.gates import gates_of
    from edgewright.runtime.specs import BatchProfile

    gates = gates_of(**{name: arguments.pop(name) for name in inspect.signature(gates_of).parameters})
    names = ("build_dir", "opset", *inspect.signature(as_request).parameters)
    return replace(
        graph_options(**{name: arguments.pop(name) for name in names}),
        gates=gates,
        targets=tuple(dict.fromkeys(word.strip() for word in target.split(",") if word.strip())),
        profile=BatchProfile(*batch),
        workspace=None if workspace is None else workspace << 20,
        **arguments,
    )
