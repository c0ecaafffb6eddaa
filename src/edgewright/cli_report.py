"""The commands that read finished builds: the report made again, and two builds held against each other."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgewright.cli_options import json_option

__all__ = ["compare", "report"]

REGRESSION = 3


@click.command()
@click.argument("build", type=click.Path(path_type=Path))
@json_option
def report(build: Path, as_json: bool) -> None:
    """Make report.html and report.md again from the finished build folder BUILD.

    Nothing is measured again: they show what report.json has.
    """
    from edgewright.report_files import rewritten

    page, text = rewritten(build)
    if as_json:
        click.echo(json.dumps({"schema": "edgewright.report/1", "html": str(page), "markdown": str(text)}, indent=1))
    else:
        click.echo(f"{page}\n{text}")


@click.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@json_option
def compare(first: Path, second: Path, as_json: bool) -> int:
    """Hold build B against build A: weights, data, versions, and what each engine is worth.

    A and B are build folders, or report.json files. Accuracy is compared image by image where both folders judged the
    same images, latency where both ran on the same machine. Exit code 0: B is not worse; 3: it is, by more than its
    interval; 1: an error.
    """
    from edgewright.compare_report import compare_document, compare_lines, compare_table
    from edgewright.console import print_listing
    from edgewright.report_files import compared

    found = compared(first, second)
    if as_json:
        click.echo(json.dumps(compare_document(found), indent=1))
    else:
        print_listing(lambda width: compare_table(found), compare_lines(found))
    return REGRESSION if found.regressions else 0
