"""The layers of a quantized network as a table, one layer in detail, and the hops of a chain: for a person."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgewright.explain import ExplainedLayer, Explanation
from edgewright.explain_layer import LayerDetail
from edgewright.report import in_short

if TYPE_CHECKING:
    from rich.box import Box
    from rich.table import Table

__all__ = ["detail_lines", "explain_lines", "explain_table"]

HEADINGS = ("own dB", "", "dB", "in", "covers", "by", "saw", "out %", "float")
NARROWEST_NAME = 14  # columns
BAR = 6  # columns
FULL_BAR_DB = 48.0  # eight bits of an even distribution: 6.02 dB each
BLOCKS = " ▏▎▍▌▋▊▉█"
DETAIL_BAR = 40  # columns
NAMED_CHANNELS = 8
GATE_NAME = re.compile(r"(?<=gate) of [^:]+(?=:)")  # the same reason for each gate


def explain_table(layers: Sequence[ExplainedLayer], logits_db: float | None, width: int = 80) -> Table:
    """A row per layer in the given order; fits `width` columns, names are shortened from the left.

    `logits_db`: of the whole quantized network, beside which the last column stands.
    """
    from rich.table import Table

    rows = [_cells(layer, logits_db) for layer in layers]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    space = max(NARROWEST_NAME, width - sum(widths) - len(widths))
    table = Table(box=_head_rule(), show_edge=False, pad_edge=False, padding=0)
    table.add_column("layer", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("", "in", "by") else "right")
    for layer, cells in zip(layers, rows, strict=True):
        table.add_row(_shortened(_short_name(layer), space), *cells)
    return table


def explain_lines(explanation: Explanation, shown: Sequence[ExplainedLayer], notes: Sequence[str] = ()) -> list[str]:
    """What the layers come to, how to read the table, why layers are not INT8, and what the stages noticed."""
    logits = explanation.logits
    left = len(explanation.layers) - len(shown)
    lines = [
        f"{explanation.dialect}: logits {_db(logits.sqnr_db)} dB, agreement {100 * logits.agreement:.1f} % with FP32 "
        f"on {explanation.images} calibration images",
        "own dB: error of the layer given right inputs, its bar; dB: with all errors before it",
        "covers, saw: range of its input and the method that chose it, what was seen; out: saturated",
        "float: dB that the logits gain if this layer alone stays in float",
    ]
    if left:
        lines.append(f"{left} layers that lose less are not shown: --all")
    reasons: dict[str, list[str]] = {}
    for layer in explanation.layers:
        if layer.precision != "int8":
            reasons.setdefault(GATE_NAME.sub("", layer.reason), []).append(_short_name(layer))
    lines += [f"not INT8: {_listed(names)}: {reason}" for reason, names in reasons.items()]
    return [*lines, *(f"note: {note}" for note in notes)]


def detail_lines(layer: ExplainedLayer, detail: LayerDetail) -> list[str]:
    """One layer, from its input to its output."""
    lines = [
        f"{layer.name} ({layer.operator}): {layer.precision}, {layer.reason}",
        f"own {layer.own_sqnr_db:.1f} dB, {layer.sqnr_db:.1f} dB with all errors before it; "
        f"{in_short(layer.macs, ' ')}MACs",
    ]
    if layer.in_float is not None:
        lines.append(
            f"left in float: logits {_db(layer.in_float.sqnr_db)} dB, agreement {100 * layer.in_float.agreement:.1f} %"
        )
    if detail.shares:
        lines += ["", *_histogram(layer, detail)]
    if detail.candidates:
        lines += ["", "ranges in question:"]
        lines += [
            f"  {each.method:<19}{_interval(each.low, each.high):>22}{each.sqnr_db:>9.1f} dB"
            for each in detail.candidates
        ]
    return [*lines, "", *_channels(layer, detail)]


def _cells(layer: ExplainedLayer, logits_db: float | None) -> tuple[str, ...]:
    bounds = layer.input
    gain = ""
    if layer.in_float is not None and layer.in_float.sqnr_db is not None and logits_db is not None:
        gain = f"{layer.in_float.sqnr_db - logits_db:+.1f}"
    return (
        _db(layer.own_sqnr_db),
        _bar(layer.own_sqnr_db / FULL_BAR_DB, BAR),
        _db(layer.sqnr_db),
        layer.precision,
        "" if bounds is None else _interval(bounds.low, bounds.high),
        "" if bounds is None else bounds.method.replace("percentile-", "p").replace("percentile", "p99.99"),
        "" if bounds is None else _interval(bounds.minimum, bounds.maximum),
        "" if bounds is None else f"{100 * bounds.saturation:.2f}",
        gain,
    )


def _histogram(layer: ExplainedLayer, detail: LayerDetail) -> Iterator[str]:
    """A bar per part of what was seen; parts that the range covers are marked."""
    bounds = layer.input
    if bounds is not None:
        yield (
            f"input {bounds.tensor}: covers {_interval(bounds.low, bounds.high)} by {bounds.method or 'unknown'}, "
            f"saw {_interval(bounds.minimum, bounds.maximum)}, {100 * bounds.saturation:.3f} % saturates"
        )
    most = max(detail.shares)
    for low, high, share in zip(detail.edges, detail.edges[1:], detail.shares, strict=False):
        covered = bounds is not None and low < bounds.high and high > bounds.low
        bar = _bar(share / most, DETAIL_BAR) or ("▏" if share else "")
        yield f"  {low:>10.3g} {'│' if covered else ' '} {bar:<{DETAIL_BAR}} {100 * share:>6.2f} %".rstrip()
    yield "  │: covered by the range; the rest saturates"


def _channels(layer: ExplainedLayer, detail: LayerDetail) -> Iterator[str]:
    if detail.widest is None or detail.narrowest is None:
        yield "weights: computed at run time" if detail.channels is None else "weights: all 0"
    else:
        yield (
            f"weights of {detail.channels} output channels: widest ±{detail.widest:.3g}, narrowest "
            f"±{detail.narrowest:.3g}, {detail.widest / detail.narrowest:.3g} times narrower"
        )
    if detail.zero_channels:
        yield f"{len(detail.zero_channels)} channels without weights: {_numbers(detail.zero_channels)}"
    if detail.constant_channels:
        dead = [channel for channel, value in detail.constant_channels.items() if value == 0]
        yield (
            f"{len(detail.constant_channels)} output channels give one value on all images, {len(dead)} of them 0: "
            f"{_numbers(tuple(detail.constant_channels))}"
        )


def _bar(share: float, columns: int) -> str:
    eighths = round(8 * columns * min(1.0, max(0.0, share)))
    return "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()


def _db(value: float | None) -> str:
    """Without what JSON needs in place of infinity."""
    if value is None or value <= -300:
        return "none"
    return "exact" if value >= 300 else f"{value:.1f}"


def _interval(low: float, high: float) -> str:
    return f"{_two_digits(low)}…{_two_digits(high)}"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if 9.95 <= abs(value) < 9999.5 else f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-")


def _short_name(layer: ExplainedLayer) -> str:
    """The module where the name says no more: features.0.0 for features.0.0/Conv."""
    return layer.name.removesuffix(f"/{layer.operator}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _numbers(channels: Sequence[int]) -> str:
    more = ", …" if len(channels) > NAMED_CHANNELS else ""
    return ", ".join(map(str, channels[:NAMED_CHANNELS])) + more


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _head_rule() -> Box:
    from rich.box import Box

    return Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one space between columns
