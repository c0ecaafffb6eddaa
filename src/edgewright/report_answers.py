"""What is known of the engines' answers beside their loss, as tables of cells: for the page of the report.

Pure functions of the rows of the document `edgewright.engine/1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgewright.report_view import decibels, engine_name, per_cent, points

__all__ = ["classes_table", "confusion_rows", "figures_table", "gate_rows"]

Row = Mapping[str, Any]
HEADINGS: Mapping[str, tuple[str, str]] = {
    "top5": ("Top-5", "share"),
    "agreement": ("Agreement", "share"),
    "agreement_ci95": ("95 %", "shares"),
    "mcnemar_p": ("McNemar p", "p"),
    "sqnr_db": ("Logit SQNR", "dB"),
    "cosine": ("Cosine", "cosine"),
    "max_abs": ("Max. difference", "number"),
    "nonfinite": ("Not finite", "count"),
}
"""Fields of "parity" with their headings and units, in the order of the table; others follow by their own names."""
SHOWN_ELSEWHERE = {
    *(
        "source",
        "images",
        "labelled",
        "reference_top1",
        "reference_top5",
        "top1",
        "delta",
        "loss_ci95",
        "pairs",
        "chance",
    ),
}


def figures_table(engines: Sequence[Row]) -> dict[str, Any]:
    """How close the answers are: `headings`, and `rows` of an engine's name and cells.

    Fields that are not known here are shown under their own names, those of objects with a point between.
    """
    judged = [(engine_name(row), dict(_flat(row["parity"]))) for row in engines if row["parity"] is not None]
    found = dict.fromkeys(name for _, values in judged for name, value in values.items() if value is not None)
    names = [name for name in HEADINGS if name in found] + [name for name in found if name not in HEADINGS]
    return {
        "headings": [HEADINGS[name][0] if name in HEADINGS else name.replace("_", " ") for name in names],
        "rows": [(name, [_cell(field, values.get(field)) for field in names]) for name, values in judged],
    }


def classes_table(engines: Sequence[Row]) -> dict[str, Any]:
    """What changes for a class and for the confidences: `headings`, and `rows` of an engine's name and cells."""
    judged = [(engine_name(row), row["figures"]) for row in engines if row.get("figures")]
    thresholds = dict.fromkeys(each["threshold"] for _, figures in judged for each in figures["crossings"])
    labelled = any(figures["worst_class"] for _, figures in judged)
    classes = ("Class that loses most", "Its accuracy, %", "Its loss, points [95 %]", "Calibration error, %")
    return {
        "headings": [*(classes if labelled else ()), *(f"Crosses {each:g}, %" for each in thresholds)],
        "rows": [
            (name, [*(_of_classes(figures) if labelled else ()), *_crossings(figures, list(thresholds))])
            for name, figures in judged
        ],
    }


def confusion_rows(row: Row | None) -> list[tuple[str, str, str, str]]:
    """The right class, the class that was answered, how often the reference did so, and how often the engine."""
    changes = ((row or {}).get("figures") or {}).get("confusion_changes", ())
    return [
        (
            _class_name(change["true_label"], change["true"]),
            _class_name(change["predicted_label"], change["predicted"]),
            f"{change['reference']:,}",
            f"{change['engine']:,}",
        )
        for change in changes
    ]


def gate_rows(row: Row | None) -> list[tuple[str, str]]:
    """The verdict of each gate and what it found, where there is more than one: of one the verdict says it all."""
    gates = (row or {}).get("gates") or ()
    return [(gate["verdict"], gate["claim"]) for gate in gates] if len(gates) > 1 else []


def _of_classes(figures: Row) -> Iterator[str]:
    worst, error = figures["worst_class"], figures["calibration_error"]
    if worst is None or worst["right"] >= worst["reference_right"]:
        yield from ("" if worst is None else "none", "", "")
    else:
        before, after = worst["reference_right"] / worst["images"], worst["right"] / worst["images"]
        low, high = worst["loss_ci95"]
        yield _class_name(worst["label"], worst["index"])
        yield f"{per_cent(before)} → {per_cent(after)}"
        yield f"{points(before - after)} [{points(low)}, {points(high)}]"
    yield "" if error is None else f"{per_cent(error['reference'])} → {per_cent(error['engine']) or 'none'}"


def _crossings(figures: Row, thresholds: Sequence[float]) -> Iterator[str]:
    shares = {each["threshold"]: each["rose"] + each["fell"] for each in figures["crossings"]}
    return (per_cent(shares.get(threshold)) for threshold in thresholds)


def _class_name(label: str, index: int) -> str:
    return label.partition(",")[0] or f"class {index}"


def _flat(parity: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, words and intervals by name."""
    for name, value in parity.items():
        if not prefix and name in SHOWN_ELSEWHERE:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list) or (len(value) == 2 and all(_is_number(each) for each in value)):
            yield f"{prefix}{name}", value


def _cell(field: str, value: Any) -> str:
    if value is None:
        return ""
    unit = HEADINGS[field][1] if field in HEADINGS else ""
    if isinstance(value, list):
        write = per_cent if unit == "shares" else lambda each: f"{each:.3g}"
        return " … ".join(write(each) for each in value)
    if unit == "share":
        return f"{per_cent(value)} %"
    if unit == "dB":
        return decibels(value)
    if unit == "cosine":
        return f"{value:.5f}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
