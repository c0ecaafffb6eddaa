"""The figures of the report as inline SVG, each wide and narrow, in colours that the page sets by CSS variables.

matplotlib draws with colours that stand for names (`COLOURS`); in the SVG they become `var(--NAME)`, so that one figure
serves the light and the dark page. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "FigurePair", "Point", "Spread", "frontier_figure", "latency_figure"]

COLOURS = {
    name: f"#0102{index:02x}"
    for index, name in enumerate(("ink", "muted", "line", "page", "bad", "fp32", "fp16", "bf16", "int8"), 16)
}
"""What matplotlib draws with, by the CSS variable that takes its place."""
WIDE, NARROW = 9.6, 3.7  # inches, of 96 CSS pixels: the column of the page, and that of a phone of 390
ROW_INCHES = 0.46
FONT_SIZE = 9.0  # points: 12 CSS pixels
MARKERS = ("o", "s", "D", "^", "v", "P")
STYLE: Any = {
    "svg.fonttype": "none",  # text, not outlines
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same measures on all machines; the page sets its own
    "font.size": FONT_SIZE,
    "text.parse_math": False,  # names are not ours
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
}
XML_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
STYLE_SHEET = re.compile(r"<style[^>]*>.*?</style>", re.DOTALL)  # it would hold for all of the page
GROUP_ID = re.compile(r'<g id="[^"]*"')
FONT_FAMILY = "font-family: 'DejaVu Sans'; "


@dataclass(frozen=True)
class Spread:
    """How one engine's runs spread: `quantiles` in milliseconds from 0 to 100 % in equal steps, `p50` and `p99`."""

    name: str
    precision: str
    p50: float
    p99: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One engine on the plane of latency (milliseconds) and a share in per cent, with the interval of the share."""

    name: str
    backend: str
    precision: str
    milliseconds: float
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class FigurePair:
    """The same figure as two SVG elements: for a page of some width, and for a phone."""

    wide: str
    narrow: str


def latency_figure(spreads: Sequence[Spread]) -> FigurePair:
    """A band per engine: 5 to 95 % of its runs pale, 25 to 75 % strong, a line for the median, a dot for the p99."""

    def draw(width: float) -> Figure:
        figure, axes = _figure(width, 0.75 + ROW_INCHES * len(spreads))
        limit = 1.06 * max(max(_at(spread, 95), min(spread.p99, 2 * spread.p50)) for spread in spreads)
        for row, spread in enumerate(spreads):
            _draw_spread(axes, -row, spread, limit)
        axes.set_xlim(0, limit)
        axes.set_ylim(-len(spreads) + 0.6, 0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("milliseconds per image")
        return figure

    return _pair("latency", draw)


def frontier_figure(points: Sequence[Point], *, reference: float, limit: float, share: str) -> FigurePair:
    """Latency against a share in per cent, with its intervals; the engines that no other beats at both are joined.

    * reference: the share of the reference, a dashed line; limit: the least that passes, the edge of a shaded part
    * share: what the share is, such as "top-1"
    """

    def draw(width: float) -> Figure:
        figure, axes = _figure(width, 3.4)
        low = min(limit, *(point.low for point in points))
        high = max(reference, *(point.high for point in points))
        margin = max(0.12 * (high - low), 0.02)
        right = 1.18 * max(point.milliseconds for point in points)
        axes.set_xlim(0, right)
        axes.set_ylim(low - margin, high + margin)
        axes.axhspan(low - margin, limit, color=COLOURS["bad"], alpha=0.08, linewidth=0)
        axes.axhline(limit, color=COLOURS["bad"], linewidth=0.8)
        axes.axhline(reference, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        _name_lines(axes, reference, limit)
        front = _undominated(points)
        axes.step(
            [point.milliseconds for point in front],
            [point.share for point in front],
            where="post",
            color=COLOURS["muted"],
            linewidth=1.0,
            zorder=1,
        )
        backends = list(dict.fromkeys(point.backend for point in points))
        for point in points:
            _draw_point(axes, point, MARKERS[backends.index(point.backend) % len(MARKERS)])
        _name_points(figure, axes, points)
        axes.grid(axis="x", color=COLOURS["line"], linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("median milliseconds per image")
        axes.set_ylabel(f"{share}, %")
        return figure

    return _pair("frontier", draw)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, width=0.6)
    return figure, axes


def _draw_spread(axes: Axes, row: float, spread: Spread, limit: float) -> None:
    colour = COLOURS.get(spread.precision, COLOURS["ink"])
    for low, high, alpha in ((5, 95, 0.28), (25, 75, 0.85)):
        left, right = _at(spread, low), _at(spread, high)
        axes.barh(row, max(right - left, limit / 500), left=left, height=0.3, color=colour, alpha=alpha, linewidth=0)
    axes.plot([spread.p50] * 2, [row - 0.24, row + 0.24], color=COLOURS["ink"], linewidth=1.6)
    if spread.p99 <= limit:
        axes.plot([spread.p99], [row], marker="o", markersize=3, color=COLOURS["muted"])
    axes.text(0, row + 0.28, spread.name, va="bottom", ha="left")
    axes.text(limit, row + 0.28, f"{spread.p50:.3g} ms", va="bottom", ha="right")


def _at(spread: Spread, per_cent: int) -> float:
    return spread.quantiles[round(per_cent / 100 * (len(spread.quantiles) - 1))]


def _draw_point(axes: Axes, point: Point, marker: str) -> None:
    colour = COLOURS.get(point.precision, COLOURS["ink"])
    axes.plot([point.milliseconds] * 2, [point.low, point.high], color=colour, linewidth=1.4, zorder=2)
    axes.plot(
        [point.milliseconds],
        [point.share],
        marker,
        color=colour,
        markersize=7,
        markeredgecolor=COLOURS["page"],
        zorder=3,
    )


def _name_lines(axes: Axes, reference: float, limit: float) -> None:
    """The reference above its line, the limit below its own: they may be close."""
    style: Any = {"textcoords": "offset points", "color": COLOURS["muted"], "fontsize": 8}
    axes.annotate("reference", (0, reference), xytext=(3, 3), **style)
    axes.annotate("limit", (0, limit), xytext=(3, -3), va="top", **style)


def _undominated(points: Sequence[Point]) -> list[Point]:
    """Those to which no other is at least as quick and as accurate, the quickest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.milliseconds, -point.share)):
        if not front or point.share > front[-1].share:
            front.append(point)
    return front


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Beside, above or below its point, wherever that is free; letters are taken for as wide as DejaVu's."""
    figure.draw_without_rendering()  # lays out, so that data have places
    scale = figure.dpi / 72
    taken = []
    for point in points:
        x, y = axes.transData.transform((point.milliseconds, point.share))
        taken.append((x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale))
    left, bottom, right, top = axes.bbox.extents
    taken += [(*text.get_window_extent().extents,) for text in axes.texts]  # the names of the lines
    for point in points:
        x, y = axes.transData.transform((point.milliseconds, point.share))
        width, height = 0.62 * 8 * len(point.name) * scale, 10 * scale
        places = [
            (x + dx * 9 * scale - (width if dx < 0 else 0), y + dy * 11 * scale - height / 2)
            for dy in (0, 1, -1, 2, -2, 3, -3)
            for dx in (1, -1)
        ]
        free = [
            (box_x, box_y)
            for box_x, box_y in places
            if left <= box_x and box_x + width <= right and bottom <= box_y and box_y + height <= top
            if not any(
                box_x < x1 and x0 < box_x + width and box_y < y1 and y0 < box_y + height for x0, y0, x1, y1 in taken
            )
        ]
        box_x, box_y = (free or places)[0]
        taken.append((box_x, box_y, box_x + width, box_y + height))
        axes.annotate(
            point.name,
            tuple(axes.transData.inverted().transform((box_x, box_y + height / 2))),
            va="center",
            ha="left",
            fontsize=8,
            annotation_clip=False,
        )


def _pair(name: str, draw: Callable[[float], Figure]) -> FigurePair:
    return FigurePair(_svg(f"{name} wide", draw, WIDE), _svg(f"{name} narrow", draw, NARROW))


def _svg(salt: str, draw: Callable[[float], Figure], width: float) -> str:
    """The SVG element; `salt` keeps the ids of different figures of one page apart."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"edgewright {salt}"}):
        draw(width).savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(content.getvalue())


def _inline(svg: str) -> str:
    """Without prologue, size, own font and unused ids; with the page's colours."""
    svg = STYLE_SHEET.sub("", METADATA.sub("", XML_PROLOGUE.sub("", svg)))
    svg = GROUP_ID.sub("<g", svg).replace(FONT_FAMILY, "")
    svg = re.sub(r"(<svg [^>]*?)>", _without_size, svg, count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _without_size(tag: re.Match[str]) -> str:
    return re.sub(r' (?:width|height|version|xmlns:xlink)="[^"]*"', "", tag.group(1)) + ' aria-hidden="true">'
