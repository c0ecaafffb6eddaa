"""The commands of a device: `build` and `verify` of a bundle, and `doctor`. They need no more than the base install."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgewright.cli_options import BUNDLE_ONLY

if TYPE_CHECKING:
    from edgewright.runtime.device.doctor import Examination
    from edgewright.runtime.device.rows import DeviceReport, DeviceRow

__all__ = ["build_engines", "doctor_lines", "or_bundle", "say", "verify_engines"]

WIDTH = 80
NOT_PROVEN = 3
FOR_BUNDLES = {*BUNDLE_ONLY, "junit", "model", "backends", "precisions", "workspace", "dla", "as_json"}
"""Parameters of `build` and `verify` that mean something for a bundle."""
OF_A_BUILD = {"workspace", "dla"}
HEADINGS = ("backend", "precision", "status", "SQNR", "agreement", "ms", "MB")
ROW = "{:<13}{:<10}{:<12}{:>9}{:>10}{:>9}{:>8}"
FACT = 16  # columns


def or_bundle(on_bundle: Callable[..., int]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Lets a command that takes a MODEL take a bundle too; options that then play no role are refused."""

    def decorated(on_model: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(on_model)
        def command(model: str, **arguments: Any) -> int:
            from edgewright.runtime.choice import stands_for_bundle

            if stands_for_bundle(Path(model)):
                _refuse_given(lambda name: name not in FOR_BUNDLES, "plays no role for a bundle")
                return on_bundle(Path(model), **{name: arguments[name] for name in FOR_BUNDLES & arguments.keys()})
            _refuse_given(lambda name: name in BUNDLE_ONLY, f"is for a bundle, and {model} is none")
            return on_model(
                model=model, **{name: value for name, value in arguments.items() if name not in BUNDLE_ONLY}
            )

        return command

    return decorated


def build_engines(
    bundle: Path, *, backends: tuple[str, ...], precisions: tuple[str, ...], workspace: int | None, dla: int | None,
    rebuild: bool, as_json: bool, **trust: Any,
) -> int:  # fmt: skip
    """`edgewright build BUNDLE`; returns its exit code. `workspace` is in MiB."""
    from edgewright.runtime.device.build import BuildOptions, build_bundle

    options = BuildOptions(backends, precisions, None if workspace is None else workspace << 20, dla, rebuild)
    report = build_bundle(bundle, options, say=say, **trust)
    _print_report(report, "device-build", as_json)
    return _exit_code(report, asked_for=bool(backends or precisions))


def verify_engines(
    bundle: Path, *, backends: tuple[str, ...], precisions: tuple[str, ...], junit: Path | None, as_json: bool,
    **trust: Any,
) -> int:  # fmt: skip
    """`edgewright verify BUNDLE`; returns its exit code."""
    from edgewright.junit_report import cases_of_device, reported_to
    from edgewright.runtime.device.verify import verify_bundle

    _refuse_given(lambda name: name in OF_A_BUILD, "plays no role when a bundle is verified")
    trust = {name: value for name, value in trust.items() if name not in OF_A_BUILD}
    with reported_to(junit, bundle.name) as keep:
        report = verify_bundle(bundle, backends=backends, precisions=precisions, say=say, **trust)
        keep(cases_of_device(report))
    _print_report(report, "device-verify", as_json)
    if not report.rows:
        asked = " ".join((*backends, *precisions, "engine"))
        say(f"no {asked} of this bundle is kept for this device; edgewright build {bundle}")
    return _exit_code(report, asked_for=False)


def say(line: str) -> None:
    """A line of progress, on stderr."""
    click.echo(line, err=True)


def doctor_lines(found: Examination) -> Iterator[str]:
    """What `doctor` says to a person, at 80 columns."""
    memory = found.memory
    facts = {
        "Python": found.python,
        "system": found.system,
        "processor": found.processor,
        "memory": memory and f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available",
        "GPU": _gpu(found.gpu) if found.gpu else f"none: {found.gpu_reason}",
    }
    if found.jetson is not None:
        facts |= {
            "board": found.jetson.board,
            "L4T": found.jetson.l4t,
            "JetPack": found.jetson.jetpack or "the package nvidia-jetpack is not installed",
            "power mode": found.jetson.power_mode,
        }
    facts |= found.libraries
    if found.providers:
        facts["providers"] = ", ".join(name.removesuffix("ExecutionProvider") for name in found.providers)
    for name, fact in facts.items():
        yield from _wrapped(name, fact or "unknown")
    yield ""
    for state in found.backends:
        words = (
            f"ready, {state.version}"
            if state.ready
            else "; ".join(word for word in (state.reason, state.remedy) if word)
        )
        yield from _wrapped(state.backend, words)
    for warning in found.warnings:
        yield ""
        yield from _wrapped("warning", "; ".join(word for word in (warning.fact, warning.remedy) if word))


def _refuse_given(refused: Callable[[str], bool], reason: str) -> None:
    """Raises `UsageError` if an option that was given on the command line is one of those."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and refused(name):
            raise click.UsageError(f"{parameter.opts[0]} {reason}")


def _exit_code(report: DeviceReport, *, asked_for: bool) -> int:
    """1: a build failed; 3: a self-test failed, nothing was proven, or not all that was asked for; 0: all is proven."""
    statuses = {row.status for row in report.rows}
    if "failed" in statuses:
        return 1
    complete = "verified" in statuses and "over_budget" not in statuses
    return 0 if complete and not (asked_for and "skipped" in statuses) else NOT_PROVEN


def _print_report(report: DeviceReport, schema: str, as_json: bool) -> None:
    click.echo(json.dumps(_document(report, schema), indent=1) if as_json else "\n".join(_lines(report)))


def _document(report: DeviceReport, schema: str) -> dict[str, Any]:
    return {
        "schema": f"edgewright.{schema}/1",
        "model": report.model,
        "version": report.version,
        "bundle": report.bundle,
        "signed_by": report.signed_by,
        "cache": str(report.cache),
        "engines": [_engine(row) for row in report.rows],
        "warnings": list(report.warnings),
    }


def _engine(row: DeviceRow) -> dict[str, Any]:
    return {
        "backend": row.backend,
        "precision": {"requested": row.precision, "actual": row.info.actual_precision if row.info else {}},
        "target": row.info and row.info.target,
        "path": row.path and str(row.path),
        "bytes": row.info and row.info.bytes,
        "status": row.status,
        "reason_code": row.reason_code,
        "reason": row.reason,
        "reused": row.reused,
        "self_test": row.self_test and asdict(row.self_test),
    }


def _lines(report: DeviceReport) -> Iterator[str]:
    """A table, and below it what is to be said of engines that were not proven."""
    signed = f", signed by {report.signed_by[:16]}" if report.signed_by else ""
    yield f"{report.model}, bundle {report.bundle[:16]}, version {report.version}{signed}"
    yield ""
    yield ROW.format(*HEADINGS)
    reasons: dict[str, list[str]] = {}
    for row in report.rows:
        yield ROW.format(row.backend, row.precision, row.status, *_figures(row)).rstrip()
        if row.status != "verified":
            reasons.setdefault(row.reason, []).append(f"{row.backend} {row.precision}")
    for reason, names in reasons.items():
        yield ""
        yield from textwrap.wrap(f"{', '.join(names)}: {reason}", WIDTH)
    for warning in report.warnings:
        yield ""
        yield from _wrapped("warning", warning)


def _figures(row: DeviceRow) -> tuple[str, ...]:
    test = row.self_test
    if test is None or row.info is None:
        return ("",) * 4
    sqnr = "-" if test.sqnr_db is None else f"{test.sqnr_db:.1f} dB"
    return sqnr, f"{100 * test.agreement:.1f} %", f"{test.latency_ms:.3g}", f"{row.info.bytes / 1e6:.1f}"


def _gpu(gpu: Mapping[str, Any]) -> str:
    memory = f"{gpu['memory'] / 1e9:.1f} GB{' shared with the processor' if gpu['integrated'] else ''}"
    return f"{gpu['name']}, {gpu['architecture']}, {memory}, driver for CUDA {gpu['driver']}"


def _wrapped(name: str, fact: str) -> list[str]:
    return textwrap.wrap(f"{name:<{FACT}}{fact}", WIDTH, subsequent_indent=" " * FACT) or [name]
