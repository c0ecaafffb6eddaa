"""The report in GitHub's Markdown, for a pull request: the verdict first, a table, the rest folded up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgewright import report_view as view

__all__ = ["report_markdown"]

Document = Mapping[str, Any]
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~!&@])")
SHOWN_IMAGES = 10
MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "❔"}


def report_markdown(document: Document) -> str:
    """A few lines and some folds for a document `edgewright.engine/1`; names are shown as text, whatever they are."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    head = view.headline(document)
    take = f" Take **{_text(head['take'])}**." if head["take"] else ""
    mark = MARKS.get(head["verdict"], "")
    yield f"### {mark} {_text(document['model'])}: {head['word'].lower()}"
    yield ""
    yield f"{_text(head['sentence'][:1].upper() + head['sentence'][1:])}.{take}"
    yield ""
    yield from _engines(document)
    others = view.reasons(document["engines"])
    if others:
        yield from _fold("Engines that are not verified", [f"- **{_text(who)}**: {_text(why)}" for who, why in others])
    yield from _changed(document)
    if document.get("notes"):
        yield from _fold("Notes", [f"- {_text(note)}" for note in document["notes"]])
    yield from _provenance(document.get("provenance") or {})


def _engines(document: Document) -> Iterator[str]:
    """A row for the reference and one for each engine that was judged."""
    labelled = document["reference"]["labelled"]
    best = view.recommended(document)
    headings = "top-1, % | loss, points [95 %]" if labelled else "agrees, % | differs, % [95 %]"
    yield f"| engine | {headings} | ms | MB | status |"
    yield "|:--|--:|--:|--:|--:|:--|"
    if labelled:
        source = document["reference"].get("source", "PyTorch")
        yield f"| {_text(source)} | {view.per_cent(document['reference']['top1'])} | | | | reference |"
    for row in document["engines"]:
        if row["parity"] is None:
            continue
        parity, latency = row["parity"], row["latency_ms"]
        name = _text(view.engine_name(row))
        share = parity["top1"] if labelled else parity["agreement"]
        low, high = parity["loss_ci95"]
        loss = f"{view.points(view.loss_of(parity))} [{view.points(low)}, {view.points(high)}]"
        time = "" if latency is None else view.milliseconds(latency["p50"])
        size, status = view.megabytes(row["bytes"]), view.STATUS_WORDS.get(row["status"], _text(row["status"]))
        shown = f"**{name}**" if best is not None and row["path"] == best["path"] else name
        yield f"| {shown} | {view.per_cent(share)} | {loss} | {time} | {size} | {status} |"


def _changed(document: Document) -> Iterator[str]:
    changed = document.get("changed")
    if not changed or not changed["total"]:
        return
    images = changed["images"][:SHOWN_IMAGES]
    rows = [
        f"| {_text(image['name'])} | {_answer(image['reference'])} | {_answer(image['engine'])} "
        f"| {_text(image['right']['label']) if image['right'] else ''} |"
        for image in images
    ]
    title = f"{changed['total']:,} of {document['reference']['images']:,} images are answered otherwise"
    yield from _fold(title, ["| image | reference | engine | right |", "|:--|:--|:--|:--|", *rows])


def _answer(answer: Document) -> str:
    sure = "not finite" if answer["probability"] is None else f"{view.per_cent(answer['probability'], 0)} %"
    return f"{_text(answer['label'])} {sure}"


def _provenance(provenance: Document) -> Iterator[str]:
    if not provenance:
        return
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    facts = {
        "command": provenance["command"],
        "machine": provenance["machine"],
        "weights": provenance["weights"],
        "evaluation": provenance["evaluation"]["identity"],
        "versions": versions,
    }
    yield from _fold("Provenance", [f"- {name}: {_code(str(value))}" for name, value in facts.items()])


def _fold(title: str, lines: Sequence[str]) -> Iterator[str]:
    """A blank line behind the summary: without it GitHub shows Markdown as text."""
    yield from ("", f"<details><summary>{title}</summary>", "", *lines, "", "</details>")


def _text(words: str) -> str:
    """`words` as text on one line, whatever Markdown or HTML they hold."""
    return SPECIAL.sub(r"\\\1", " ".join(str(words).split()))


def _code(words: str) -> str:
    """A code span; the fence is longer than any run of backticks in it."""
    words = " ".join(words.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", words)), default=0))
    return f"{fence} {words} {fence}" if len(fence) > 1 else f"`{words}`"
