"""The document `edgewright.engine/1` in the words and numbers of a page: what the templates of the report show.

Pure functions of the document. Fields that an older document lacks leave their part of the page out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgewright.report import in_points, in_short
from edgewright.runtime.gates import DEFAULT_BUDGET
from edgewright.runtime.parity import SQNR_LIMIT_DB

__all__ = [
    "STATUS_WORDS",
    "bar",
    "decibels",
    "decisive",
    "engine_name",
    "headline",
    "key_figures",
    "largest_loss",
    "loss_of",
    "megabytes",
    "milliseconds",
    "per_cent",
    "points",
    "reasons",
    "recommended",
    "short",
    "words_of",
]

Document = Mapping[str, Any]
WORDS = {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive"}
STATUS_WORDS = {
    "verified": "verified",
    "over_budget": "over budget",
    "undecided": "undecided",
    "built_not_run": "built, not run",
    "simulated": "simulated",
    "skipped": "skipped",
    "failed": "failed",
}
QUIET_CV = 0.025  # coefficient of variation above which a machine was not quiet: docs/contract.md


def engine_name(engine: Document) -> str:
    """Such as "tensorrt-rtx int8 sm86"."""
    return " ".join(word for word in (engine["backend"], engine["precision"]["requested"], engine["target"]) if word)


def recommended(document: Document) -> Document | None:
    """The row of the engine to take."""
    best = document["recommended"]
    return None if best is None else next((row for row in document["engines"] if row["path"] == best["path"]), None)


def decisive(document: Document) -> Document | None:
    """The row that the verdict is about: the engine to take, else of those with its verdict what lost least."""
    best = recommended(document)
    if best is not None:
        return best
    status = "over_budget" if document["verdict"] == "fail" else "undecided"
    rows = [row for row in document["engines"] if row["status"] == status and row["parity"] is not None]
    return min(rows, key=lambda row: loss_of(row["parity"]), default=None)


def headline(document: Document) -> dict[str, str]:
    """The verdict as a word, a sentence, and what to take."""
    row, verdict = decisive(document), document["verdict"]
    take = "" if recommended(document) is None or row is None else engine_name(row)
    if row is None:
        sentence = "no engine could be run here" if verdict == "inconclusive" else "no engine passes"
    else:
        word, _, claim = row["reason"].partition(": ")
        sentence = claim if word.lower() == verdict else row["reason"]
        if verdict == "fail":
            sentence = f"no engine passes; the closest is {engine_name(row)}: {sentence}"
        if verdict == "inconclusive":
            sentence = f"{sentence}; the closest is {engine_name(row)}"
    return {"word": WORDS.get(verdict, verdict), "verdict": verdict, "sentence": sentence, "take": take}


def key_figures(document: Document) -> Iterator[dict[str, str]]:
    """What a reader wants to know of the recommended engine at once: `label`, `value`, `unit`, `note`."""
    best = recommended(document)
    if best is None or best["parity"] is None:
        return
    parity, plain = best["parity"], _plain(document, best)
    low, high = parity["loss_ci95"]
    if parity["labelled"]:
        note = f"{per_cent(parity['reference_top1'])} % in {document['reference'].get('source', 'PyTorch')}"
        yield _figure("Top-1 accuracy", per_cent(parity["top1"]), "%", note)
        loss = parity["reference_top1"] - parity["top1"]
        interval = f"95 %: {points(low)} to {points(high)}"
        yield _figure("Accuracy loss", points(loss), "points", interval)
    else:
        yield _figure("Agreement", per_cent(parity["agreement"]), "%", "of the images answered as by the reference")
        yield _figure("Disagreement", per_cent(1 - parity["agreement"]), "%", f"95 %: {points(low)} to {points(high)}")
    latency = best["latency_ms"]
    if latency is not None:
        times = _times(plain, latency)
        yield _figure("Median latency", milliseconds(latency["p50"]), "ms", times or f"{latency['threads']} threads")
    if best["bytes"]:
        yield _figure("Size", megabytes(best["bytes"]), "MB", _smaller(plain, best))


def _figure(label: str, value: str, unit: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "unit": unit, "note": note}


def _plain(document: Document, best: Document) -> Document | None:
    """The FP32 engine of the same backend and target, if it is another one."""
    for row in document["engines"]:
        same = (row["backend"], row["target"]) == (best["backend"], best["target"])
        if same and row["precision"]["requested"] == "fp32" and row is not best and row["bytes"]:
            return dict(row)
    return None


def _times(plain: Document | None, latency: Document) -> str:
    if plain is None or plain["latency_ms"] is None:
        return ""
    ratio = plain["latency_ms"]["p50"] / latency["p50"]
    times = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
    return f"{times} × as fast as {engine_name(plain)}"


def _smaller(plain: Document | None, best: Document) -> str:
    return "" if plain is None else f"{100 * best['bytes'] / plain['bytes']:.0f} % of {engine_name(plain)}"


def per_cent(share: float | None, digits: int = 2) -> str:
    """0.9405 as "94.05"."""
    return "" if share is None else f"{100 * share:.{digits}f}"


def points(share: float) -> str:
    """A difference of shares in points, with a sign that is a minus: 0.0027 as "0.27"."""
    return in_points(share).replace("-", "−")


def milliseconds(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def decibels(value: float | None) -> str:
    """An SQNR; at its limits nothing differs, or nothing is left of the signal."""
    if value is None:
        return "not known"
    if abs(value) >= SQNR_LIMIT_DB:
        return "exact" if value > 0 else "none"
    return f"{value:.1f} dB"


def megabytes(count: float | None) -> str:
    """Of 10⁶ bytes."""
    return "" if count is None else f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"


def bar(value: float | None, most: float) -> str:
    """How much of a bar is full, as a CSS percentage."""
    return f"{100 * min(1.0, max(0.0, (value or 0.0) / most)):.1f}%" if most > 0 else "0%"


def largest_loss(document: Document) -> float:
    """The largest loss that the gates let pass, a fraction; without labels the largest disagreement.

    What the contract has by default where a document does not say.
    """
    options, reference = document.get("provenance", {}).get("options", {}), document["reference"]
    gates = options.get("gates", {})
    limits = [gates["max_drop"]] if "max_drop" in gates else []
    if "min_ratio" in gates and reference["labelled"]:
        limits.append((1 - gates["min_ratio"]) * reference["top1"])
    if "min_agreement" in gates and not reference["labelled"]:
        limits.append(1 - gates["min_agreement"])
    return float(min(limits, default=options.get("budget", DEFAULT_BUDGET)))


def short(count: float) -> str:
    """Three digits and the SI prefix: 25.6M."""
    return in_short(count) or "0"


def reasons(engines: Sequence[Document]) -> list[tuple[str, str]]:
    """Why rows are not verified: the engines of one backend with the same reason together, and the reason."""
    grouped: dict[tuple[str, str], list[Document]] = {}
    for row in engines:
        if row["status"] != "verified" and row["reason"]:
            grouped.setdefault((row["backend"], row["reason"]), []).append(row)
    return [(_together(backend, rows), reason) for (backend, reason), rows in grouped.items()]


def _together(backend: str, rows: Sequence[Document]) -> str:
    precisions = ", ".join(dict.fromkeys(row["precision"]["requested"] for row in rows))
    targets = ", ".join(dict.fromkeys(str(row["target"]) for row in rows if row["target"]))
    status = ", ".join(dict.fromkeys(STATUS_WORDS.get(row["status"], str(row["status"])) for row in rows))
    return f"{backend} {precisions}" + (f" for {targets}" if targets else "") + f", {status}"


def words_of(document: Document) -> dict[str, Any]:
    """What the page says in sentences, and the parts of the document that older ones lack."""
    ran = [row for row in document["engines"] if row["latency_ms"] is not None]
    changed, calibration = document.get("changed"), document.get("calibration") or {}
    named = {row["path"]: engine_name(row) for row in document["engines"]}
    return {
        "latency_words": "; ".join(_latency_words(row) for row in ran) + ".",
        "frontier_words": "; ".join(_frontier_words(row) for row in ran if row["parity"] is not None) + ".",
        "timing": _timing(ran),
        "noisy": ", ".join(_noise(row) for row in ran if row["latency_ms"].get("cv", 0) > QUIET_CV),
        "changed": changed,
        "changed_name": "" if changed is None else named.get(changed["engine"], changed["engine"]),
        "calibration": calibration,
        "provenance": document.get("provenance") or {},
        "targets": document.get("targets") or {},
        "notes": [note for note in document.get("notes") or [] if note not in calibration.get("notes", ())],
        "stages": document.get("stages") or [],
        "hashes": [(row["path"], row["sha256"]) for row in document["engines"] if row.get("sha256")],
    }


def _latency_words(row: Document) -> str:
    latency = row["latency_ms"]
    quantiles = f"90 % within {milliseconds(latency['p90'])}, 99 % within {milliseconds(latency['p99'])}"
    return f"{engine_name(row)}: median {milliseconds(latency['p50'])} ms, {quantiles}"


def _frontier_words(row: Document) -> str:
    parity = row["parity"]
    share, word = (parity["top1"], "top-1") if parity["labelled"] else (parity["agreement"], "agreement")
    return f"{engine_name(row)}: {milliseconds(row['latency_ms']['p50'])} ms, {word} {per_cent(share)} %"


def _timing(ran: Sequence[Document]) -> str:
    if not ran:
        return ""
    latency = ran[0]["latency_ms"]
    threads = "1 thread" if latency["threads"] == 1 else f"{latency['threads']} threads"
    return f"{latency['runs']} runs of each engine at batch {latency['batch']} with {threads}, measured in turns."


def _noise(row: Document) -> str:
    return f"the runs of {engine_name(row)} vary by {100 * row['latency_ms']['cv']:.0f} %"


def loss_of(parity: Document) -> float:
    """What the reference gets right and the engine does not, less the reverse; without labels the disagreement."""
    return float(parity["reference_top1"] - parity["top1"] if parity["labelled"] else 1 - parity["agreement"])
