"""The commands that make a bundle on the workstation, sign it, and take it apart again."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgewright.cli_options import detail_wanted, json_option, pipeline_options, run_options

if TYPE_CHECKING:
    from edgewright.outcome import Outcome
    from edgewright.pack import Packed
    from edgewright.workspace import StageRun

__all__ = ["keygen", "pack", "unpack"]

WIDTH = 80
KEY_DIGITS = 16  # of a key's fingerprint, for a person; documents have all of them


@click.command()
@run_options
@click.option("--archive", is_flag=True, help="Also as one file, MODEL.edgewright.")
@click.option("--sign", type=click.Path(path_type=Path), metavar="KEY", help="Private key, from edgewright keygen.")
@click.option(
    "--bundle-version", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Default: one more, if it differs."
)
@click.option("--allow-failed", is_flag=True, help="Pack although no engine passes.")
def pack(
    as_json: bool, archive: bool, sign: Path | None, bundle_version: int | None, allow_failed: bool, **arguments: Any
) -> int:
    """Everything that engine does, and then a bundle: what a device builds its engines from.

    Exit code 0: written; 3: not written, because no engine passes; 1: an error.
    """
    from edgewright.console import ConsoleObserver
    from edgewright.pack import pack
    from edgewright.pipeline import Pipeline
    from edgewright.report import EXIT_CODES
    from edgewright.runtime.bundle.keys import private_key

    if sign is not None:
        private_key(sign)  # what is wrong with it is said before the first stage
    with ConsoleObserver(detail_wanted()) as observer:
        pipeline = Pipeline(pipeline_options(**arguments), observer)
        with pipeline.workspace.locked():
            outcome = pipeline.prove()
            if outcome.verdict == "fail" and not allow_failed:
                packed = None
            else:
                packed = pack(pipeline, outcome, version=bundle_version, signing_key=sign, archive=archive)
    if as_json:
        click.echo(json.dumps(_document(outcome, packed, pipeline.runs), indent=1))
    elif packed is not None:
        click.echo("\n".join(_lines(outcome, packed)))
    if packed is None:
        click.echo("not packed: no engine passes; --allow-failed packs it all the same", err=True)
        return EXIT_CODES[outcome.verdict]
    return 0


@click.command()
@click.argument("prefix", type=click.Path(path_type=Path), default=Path("edgewright"))
@json_option
def keygen(prefix: Path, as_json: bool) -> None:
    """Make a pair of Ed25519 keys: PREFIX.key to sign with, PREFIX.pub for the devices."""
    from edgewright.runtime.bundle import write_key_pair

    pair = write_key_pair(prefix)
    if as_json:
        document = {
            "schema": "edgewright.keygen/1",
            "private": str(pair.private),
            "public": str(pair.public),
            "fingerprint": pair.fingerprint,
        }
        click.echo(json.dumps(document, indent=1))
        return
    click.echo(f"{pair.private}: sign with it (pack --sign), keep it off the devices; it is not encrypted")
    click.echo(f"{pair.public}: for the devices (--require-signature)")
    click.echo(f"fingerprint: {pair.fingerprint}")


@click.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--require-signature", type=click.Path(path_type=Path), metavar="KEYFILE", help="Trusted public keys.")
@json_option
def unpack(archive: Path, folder: Path | None, require_signature: Path | None, as_json: bool) -> None:
    """Check the one-file bundle ARCHIVE and unpack it into FOLDER, which must not exist.

    By default FOLDER is beside ARCHIVE, with the suffix .bundle.
    """
    from edgewright.runtime.bundle import BUNDLE_SUFFIX, open_bundle
    from edgewright.runtime.bundle import unpack as unpacked

    beside = archive.parent / f"{archive.stem}{BUNDLE_SUFFIX}"
    path = unpacked(archive, folder or beside, require_signature=require_signature)
    with open_bundle(path, require_signature=require_signature) as bundle:
        document = {
            "schema": "edgewright.unpack/1",
            "path": str(path),
            "model": bundle.model,
            "version": bundle.version,
            "sha256": bundle.sha256,
            "signed_by": bundle.signed_by,
        }
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    signed = f"signed by {bundle.signed_by[:KEY_DIGITS]}" if bundle.signed_by else "no signature was required"
    click.echo(f"{path}: {bundle.model}, version {bundle.version}, {signed}")


def _document(outcome: Outcome, packed: Packed | None, stages: Sequence[StageRun]) -> dict[str, Any]:
    """The document `edgewright.pack/1`; `bundle` is null if none was written."""
    from edgewright.report import stage_document

    return {
        "schema": "edgewright.pack/1",
        "model": outcome.model,
        "verdict": outcome.verdict,
        "bundle": None if packed is None else _bundle(packed),
        "stages": [stage_document(stage) for stage in stages],
    }


def _bundle(packed: Packed) -> dict[str, Any]:
    return {
        "path": str(packed.path),
        "archive": None if packed.archive is None else str(packed.archive),
        "sha256": packed.sha256,
        "version": packed.version,
        "signed_by": packed.signed_by,
        "bytes": packed.bytes,
        "golden_images": packed.spec.golden.images,
        "graphs": [
            {
                "dialect": graph.dialect,
                "precision": graph.precision,
                "path": graph.path,
                "limits": {"sqnr_db": graph.limits.sqnr_db, "agreement": graph.limits.agreement},
            }
            for graph in packed.spec.graphs
        ],
        "left_out": [{"precision": each.precision, "reason": each.reason} for each in packed.left_out],
    }


def _lines(outcome: Outcome, packed: Packed) -> list[str]:
    signed = f"signed by {packed.signed_by[:KEY_DIGITS]}" if packed.signed_by else "not signed"
    lines = [f"{packed.path}: version {packed.version}, {packed.bytes / 1e6:.1f} MB, {signed}"]
    if packed.archive is not None:
        lines.append(f"{packed.archive}: the same in one file")
    for graph in packed.spec.graphs:
        limits = graph.limits
        lines.append(f"  {graph.path}: at least {limits.sqnr_db:.1f} dB and {100 * limits.agreement:.1f} % agreement")
    lines.append(f"  on {packed.spec.golden.images} golden inputs")
    for each in packed.left_out:
        lines += textwrap.wrap(
            f"no {each.precision} graph: {each.reason}", WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    if outcome.verdict != "pass":
        lines.append(f"the verdict is {outcome.verdict.upper()}: see edgewright engine")
    return lines
