"""A measurement for a person: blocks in the words of trtexec, at 80 columns, and a line for each comparison."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgewright.runtime.bench import Bench, Comparison, Result
    from edgewright.runtime.device.clocks import Clocks

__all__ = ["bench_lines", "progress_lines"]

WIDTH, INDENT = 80, "  "
NO_BREAK = "\N{NO-BREAK SPACE}"
UNSTABLE = "latency is unstable where the coefficient of variation is above 2.5 %"
QUIETER = "stop other programs, fix the clocks (docs/bench.md), or measure longer with --seconds"


def bench_lines(found: Bench) -> Iterator[str]:
    """Everything that was measured."""
    yield "=== Device information ==="
    yield from _device_lines(found)
    for result in found.results:
        yield ""
        yield from _result_lines(result)
    if found.comparisons:
        yield ""
        yield "=== Comparison ==="
        for comparison in found.comparisons:
            yield from _wrapped(comparison_line(comparison))
    if not all(result.latency.stable for result in found.results):
        yield ""
        yield from _wrapped(f"warning: {UNSTABLE}: {QUIETER}")
    for note in found.notes:
        yield ""
        yield from _wrapped(f"note: {note}")


def progress_lines(line: str) -> list[str]:
    """What is said while it is measured."""
    return _wrapped(line)


def _device_lines(found: Bench) -> Iterator[str]:
    machine, before, after = found.machine, found.before, found.after
    cores = f"{machine.cores} core{'' if machine.cores == 1 else 's'}"
    yield from _wrapped(f"Processor: {machine.processor}, {cores}")
    if machine.board:
        yield from _wrapped(f"Board: {machine.board}, power mode {_known(before, 'power_mode')}")
    if machine.gpu:
        yield from _wrapped(f"GPU: {machine.gpu}, {_moved(before.gpu_mhz, after.gpu_mhz)}")
    yield f"System: {machine.system}"
    yield from _wrapped(f"Clocks: {_moved(before.cpu_mhz, after.cpu_mhz)}; governor {_known(before, 'governor')}")
    yield from _wrapped(f"Load average before: {_known(before, 'load')}")


def _result_lines(result: Result) -> Iterator[str]:
    latency, setup = result.latency, result.setup
    yield "=== Performance summary ==="
    yield from _wrapped(f"Engine: {result.words}, {result.bytes / 1e6:.1f} MB, {result.backend} {result.version}")
    yield from _wrapped(f"  {result.path} ({result.why})")
    yield from _wrapped(f"Set-up: {setup}, input {'x'.join(map(str, (setup.batch, *result.shape)))}")
    queries = "" if setup.batch == 1 else f" of {setup.batch} images"
    yield f"Throughput: {_number(result.images_per_second)} images/s, {_number(result.qps)} qps{queries}"
    figures = {
        "min": latency.min,
        "max": latency.max,
        "mean": latency.mean,
        "median": latency.p50,
        "percentile(90%)": latency.p90,
        "percentile(95%)": latency.p95,
        "percentile(99%)": latency.p99,
    }
    words = (f"{name}{NO_BREAK}={NO_BREAK}{_number(value)}{NO_BREAK}ms" for name, value in figures.items())
    yield from _wrapped(f"Latency: {', '.join(words)}")
    if result.preprocess_ms is not None:
        yield f"Preprocessing, a part of it: median = {_number(result.preprocess_ms)} ms"
    unstable = "" if latency.stable else ", unstable"
    yield f"Timed runs: {latency.runs}, coefficient of variation = {100 * latency.cv:.1f} %{unstable}"


def comparison_line(comparison: Comparison) -> str:
    """Such as "batch 1, 2 threads: a takes 0.8 x the time of b (95 % interval 0.79 to 0.81, 90 pairs): faster"."""
    interval = f"{comparison.low:.3f} to {comparison.high:.3f}"
    sure = f"{100 * min(comparison.confidence, 0.95):.0f} % interval" if comparison.confidence else "range"
    engine, baseline = _names(comparison)
    parts = [
        f"{comparison.engine.setup}: {engine} takes {comparison.ratio:.3f} x the time of {baseline} ({sure} {interval}",
        f", {comparison.rounds} pairs): " if comparison.paired else ", of separate medians): ",
        _verdict(comparison),
        "" if comparison.paired else "; not measured in turns, so whatever else changed in between counts as well",
        f"; not alike: {'; '.join(comparison.unlike)}" if comparison.unlike else "",
    ]
    return "".join(parts)


def _verdict(comparison: Comparison) -> str:
    if comparison.equal:
        return "equally fast, within 1 %"
    if not comparison.decided:
        return "no difference can be told"
    return f"{'faster' if comparison.ratio < 1 else 'slower'}, {1 / comparison.ratio:.2f} x the speed"


def _names(comparison: Comparison) -> tuple[str, str]:
    """Of the engine and the baseline, with their paths if they have the same name."""
    engine, baseline = comparison.engine, comparison.baseline
    if engine.words != baseline.words:
        return engine.words, baseline.words
    if engine.path != baseline.path:
        return f"{engine.words} of {engine.path}", f"{baseline.words} of {baseline.path}"
    return engine.words, "itself" if comparison.paired else "the one saved"


def _known(clocks: Clocks, name: str) -> str:
    value = getattr(clocks, name)
    return f"not known ({clocks.unread.get(name, 'no reason')})" if value is None else str(value)


def _moved(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "MHz not known"
    return f"{before:.0f} MHz before, {after:.0f} MHz after"


def _number(value: float) -> str:
    """Four significant digits, and no exponent."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}" if value >= 0.001 else f"{value:.6f}"


def _wrapped(line: str) -> list[str]:
    lines = textwrap.wrap(line, WIDTH, subsequent_indent=INDENT, break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines]
