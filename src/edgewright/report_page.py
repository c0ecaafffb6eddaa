"""The report as one HTML page: a function of the document and small pictures; no script, nothing from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgewright import report_answers as answers
from edgewright import report_view as view
from edgewright.report_figures import FigurePair, Point, Spread, frontier_figure, latency_figure
from edgewright.runtime.backends import BACKENDS

__all__ = ["report_html"]

Document = Mapping[str, Any]
TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = "report.html.j2"
GROUPS = (
    ("Run on this machine", ("verified", "over_budget", "undecided")),
    ("Built for other machines", ("simulated", "built_not_run")),
)
"""The parts of the table; rows of which nothing was built are named below it, with their reasons."""
FULL_BAR_DB = 60.0  # SQNR of 8 bits over a full range is about 50 dB


def report_html(document: Document, thumbnails: Mapping[int, str]) -> str:
    """The page for a document `edgewright.engine/1`.

    `thumbnails`: JPEGs in base64 of the images that changed, by their positions; where one is missing its words remain.
    Raises `KeyError` if the document lacks what all documents have.
    """
    import jinja2

    try:
        return _rendered(document, thumbnails)
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from error


def _rendered(document: Document, thumbnails: Mapping[int, str]) -> str:
    ran = [row for row in document["engines"] if row["latency_ms"] is not None]
    decisive = view.decisive(document)
    page: str = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            document=document,
            head=view.headline(document),
            key_figures=list(view.key_figures(document)),
            best=view.recommended(document),
            groups=list(_groups(document["engines"])),
            axis=_loss_axis(document),
            ran=ran,
            reasons=view.reasons(document["engines"]),
            latency=_latency(ran),
            frontier=_frontier(document, ran),
            layers=list(_layers(document)),
            breakdown=_breakdown(document),
            thumbnails=thumbnails,
            figures=answers.figures_table(document["engines"]),
            classes=answers.classes_table(document["engines"]),
            confusion=answers.confusion_rows(decisive),
            decisive=decisive,
            gates=answers.gate_rows(decisive),
            statuses=view.STATUS_WORDS,
            **view.words_of(document),
        )
    )
    return page


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # names of models, classes and files are not ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (
        view.engine_name,
        view.per_cent,
        view.points,
        view.milliseconds,
        view.megabytes,
        view.decibels,
        view.bar,
        view.short,
    ):
        environment.filters[write.__name__] = write
    return environment


def _groups(engines: Sequence[Document]) -> Iterator[tuple[str, list[Document]]]:
    for heading, statuses in GROUPS:
        rows = [row for row in engines if row["status"] in statuses]
        if rows:
            yield heading, sorted(rows, key=_speed) if rows[0]["latency_ms"] else rows


def _speed(row: Document) -> float:
    return float("inf") if row["latency_ms"] is None else float(row["latency_ms"]["p50"])


def _loss_axis(document: Document) -> dict[str, float]:
    """What all small pictures of loss intervals span, in fractions: zero, the budget, every interval within reason."""
    budget = view.largest_loss(document)
    bounds = [bound for row in document["engines"] if row["parity"] for bound in row["parity"]["loss_ci95"]]
    low = max(min([*bounds, 0.0]), -4 * budget or -0.02)
    high = min(max([*bounds, budget]), 4 * budget or 0.02)
    margin = 0.05 * (high - low)
    return {"low": low - margin, "span": high - low + 2 * margin, "budget": budget}


def _latency(ran: Sequence[Document]) -> FigurePair | None:
    spreads = [
        Spread(
            view.engine_name(row),
            row["precision"]["requested"],
            row["latency_ms"]["p50"],
            row["latency_ms"]["p99"],
            tuple(row["latency_ms"]["quantiles"]),
        )
        for row in sorted(ran, key=_speed)
        if row["latency_ms"].get("quantiles")
    ]
    return latency_figure(spreads) if spreads else None


def _frontier(document: Document, ran: Sequence[Document]) -> FigurePair | None:
    """Of top-1, or without labels of agreement."""
    judged = [row for row in ran if row["parity"] is not None]
    if not judged:
        return None
    labelled = judged[0]["parity"]["labelled"]
    reference = judged[0]["parity"]["reference_top1"] if labelled else 1.0
    points = [
        Point(
            view.engine_name(row),
            row["backend"],
            row["precision"]["requested"],
            row["latency_ms"]["p50"],
            100 * (row["parity"]["top1"] if labelled else row["parity"]["agreement"]),
            100 * (reference - row["parity"]["loss_ci95"][1]),
            100 * (reference - row["parity"]["loss_ci95"][0]),
        )
        for row in judged
    ]
    limit = 100 * (reference - view.largest_loss(document))
    share = "top-1" if labelled else "agreement"
    return frontier_figure(points, reference=100 * reference, limit=limit, share=share)


def _layers(document: Document) -> Iterator[dict[str, Any]]:
    """One map for each INT8 graph, that of the recommended engine first."""
    found = document.get("layers") or {}
    best = view.recommended(document)
    first = BACKENDS[best["backend"]].dialect if best and best["backend"] in BACKENDS else ""
    for dialect in sorted(found, key=lambda dialect: dialect != first):
        layers = found[dialect]["layers"]
        counts = {
            precision: sum(layer["precision"] == precision for layer in layers)
            for precision in dict.fromkeys(layer["precision"] for layer in layers)
        }
        macs = sum(layer["macs"] for layer in layers) or 1
        integer = sum(layer["macs"] for layer in layers if layer["precision"] == "int8")
        yield {
            "dialect": dialect,
            "images": found[dialect]["images"],
            "note": found[dialect]["note"],
            "counts": counts,
            "int8_share": integer / macs,
            "layers": layers,
            "full": FULL_BAR_DB,
        }


def _breakdown(document: Document) -> dict[str, Any] | None:
    """A row per stage of the network, with what each engine spends in it."""
    found = document.get("breakdown")
    if not found:
        return None
    engines = {row["path"]: view.engine_name(row) for row in document["engines"] if row["path"] in found["engines"]}
    timed = {path: name for path, name in engines.items() if found["engines"][path]["stages"]}
    times = {
        path: {share["name"]: share["milliseconds"] for share in found["engines"][path]["stages"]} for path in timed
    }
    weights = {path: {stage["name"]: stage["weights"] for stage in found["engines"][path]["graph"]} for path in engines}
    best = view.recommended(document)
    chosen = best["path"] if best is not None and best["path"] in engines else next(iter(engines), None)
    return {
        "stages": found["graph"],
        "runs": found["runs"],
        "timed": timed,
        "times": times,
        "most_ms": max((value for each in times.values() for value in each.values()), default=0.0),
        "weights": weights.get(chosen or "", {}),
        "most_weights": max((stage["weights"] for stage in found["graph"]), default=0),
        "chosen": None if chosen is None else engines[chosen],
        "kinds": [] if chosen is None else found["engines"][chosen]["kinds"],
        "total": None if chosen is None else found["engines"][chosen]["milliseconds"],
    }
