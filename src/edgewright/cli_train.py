"""`edgewright train`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click

from edgewright.cli_options import DEFAULT_MODEL

__all__ = ["train"]


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--output", type=click.Path(path_type=Path), help="Default: build/MODEL/trained.safetensors.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the 60,000 images.")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), help="sgd has Nesterov momentum of 0.9.")
@click.option("--learning-rate", "peak_learning_rate", type=float, help="Peak of the one-cycle schedule.")
@click.option("--weight-decay", type=float, help="Of matrices and filters.")
@click.option("--batch-size", type=click.IntRange(1))
@click.option("--label-smoothing", type=float)
@click.option("--augment/--no-augment", default=None, help="Flip and shift the training images.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1))
@click.option("--size", type=click.IntRange(1, 4096), metavar="PIXELS", help="Height and width of the images.")
@click.option("--from", "start", metavar="FILE|lite0|none", help="First weights; a head for other classes is replaced.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0: PyTorch's own choice.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder with Fashion-MNIST's idx files.")
@click.option("--build-dir", type=click.Path(path_type=Path), default=Path("build"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def train(
    model: str,
    output: Path | None,
    start: str | None,
    size: int | None,
    device: str,
    threads: int,
    data: Path | None,
    build_dir: Path,
    as_json: bool,
    **changes: Any,
) -> None:
    """Train MODEL on Fashion-MNIST; goes on where it was stopped.

    Without options by the recipe of docs/training.md, for mobilenet_effnet_b0 that of the checkpoint that ships.
    """
    from edgewright.console import ConsoleObserver
    from edgewright.recipes import recipe_of
    from edgewright.train import train_checkpoint
    from edgewright.workspace import Workspace

    recipe = recipe_of(model, **changes)
    workspace = Workspace(build_dir / model)
    with ConsoleObserver(label_width=len("train")) as observer, workspace.locked():
        training = train_checkpoint(
            model,
            output or workspace.path("trained.safetensors"),
            recipe=recipe,
            start=start,
            size=size,
            data=data,
            device=device,
            threads=threads,
            state_file=workspace.path("training.pt"),
            progress=functools.partial(observer.progressed, "train"),
        )
    if as_json:
        document = {
            "schema": "edgewright.train/1",
            "model": model,
            "path": str(training.checkpoint),
            "top1": training.top1,
            "start": training.start,
            "epochs": len(training.curve),
            "seconds": training.seconds,
            "curve": {"csv": str(training.curve_csv), "svg": str(training.curve_svg)},
        }
        click.echo(json.dumps(document, indent=1))
        return
    click.echo(f"started from {training.start}")
    click.echo(f"{training.checkpoint}: top-1 {100 * training.top1:.2f} % on the 10,000 test images")
    click.echo(f"learning curve: {training.curve_csv}, {training.curve_svg}")
