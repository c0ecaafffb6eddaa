"""The page and the Markdown of a report: what they say and leave out, and names that try to be more than names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from edgewright import report_page
from edgewright.report_figures import FigurePair
from edgewright.report_markdown import report_markdown
from edgewright.report_page import report_html
from edgewright.report_view import largest_loss
from report_documents import report_document, thumbnails

SCRIPT = "<script>alert(1)</script>"
QUOTES = """a "quoted" 'class' & <b>more</b>"""
MOST_BYTES = 2_000_000
DRAWN: dict[str, FigurePair] = {}


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(report_document(), thumbnails())


@pytest.fixture(autouse=True)
def _figures_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figure is not drawn again; only one test is about what matplotlib makes of the same facts."""
    for name in ("latency_figure", "frontier_figure"):
        monkeypatch.setattr(report_page, name, functools.partial(_remembered, DRAWN, getattr(report_page, name)))


def _remembered(drawn: dict[str, FigurePair], draw: Callable[..., FigurePair], *given: Any, **more: Any) -> FigurePair:
    key = f"{draw.__name__} {given} {more}"
    if key not in drawn:
        drawn[key] = draw(*given, **more)
    return drawn[key]


def test_the_same_facts_give_the_same_page(page: str) -> None:
    DRAWN.clear()
    assert report_html(report_document(), thumbnails()) == page


def test_the_verdict_stands_on_top_in_words_and_numbers(page: str) -> None:
    words = " ".join(Elements(page).text.split())
    assert "Pass. Loses at most 0.82 points (95 %), budget 2. Take openvino int8." in words
    assert "Top-1 accuracy94.65 %95.00 % in PyTorch" in words
    assert "Size6.3 MB" in words
    assert words.index("Pass.") < words.index("Engines side by side")


def test_nothing_comes_from_elsewhere_and_nothing_runs(page: str) -> None:
    assert "default-src 'none'" in page
    for tag, attributes in Elements(page).tags:
        assert tag not in ("script", "iframe", "object", "embed")
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "xlink:href"):
            address = attributes.get(name) or ""
            assert address.startswith(("#", "data:")) or not address, address
    assert not re.search(r"url\((?!#)|@import", page)


def test_a_page_is_small(page: str) -> None:
    assert len(page.encode()) < MOST_BYTES


def test_ids_are_unique(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', page)
    assert set(referred) <= set(ids)


@pytest.mark.parametrize("name", [SCRIPT, QUOTES])
def test_names_are_text(name: str) -> None:
    plain, document = Elements(report_html(report_document(), {})), report_document(model=name, label=name)
    document["engines"][0]["reason"] = document["notes"][0] = document["provenance"]["command"] = name
    document["layers"]["cpu"]["layers"][0]["name"] = document["breakdown"]["graph"][0]["name"] = name
    document["layers"][name] = document["layers"].pop("cpu")
    for figures in (row["figures"] for row in document["engines"] if row["figures"]):
        figures["worst_class"]["label"] = name
        figures["confusion_changes"] = [change | {"true_label": name} for change in figures["confusion_changes"]]
    found = Elements(report_html(document, {}))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert found.text.count(name) >= 10
    assert all(name in (attributes["alt"] or "") for tag, attributes in found.tags if tag == "img")


def test_a_backend_s_name_that_looks_like_mathematics_is_text() -> None:
    document = report_document()
    document["engines"][0]["backend"] = "$\\frac{<b>$"
    assert "$\\frac{&lt;b&gt;$" in report_html(document, {})


@pytest.mark.parametrize("missing", ["calibration", "layers", "breakdown", "changed", "provenance", "notes", "targets"])
def test_what_an_older_document_lacks_is_left_out(missing: str) -> None:
    document = report_document()
    del document[missing]
    whole, without = report_html(report_document(), {}), report_html(document, {})
    assert len(without) < len(whole)
    assert report_markdown(document)


def test_a_document_of_an_older_version() -> None:
    document = report_document()
    for row in document["engines"]:
        row.pop("sha256")
        for name in ("p50_ci95", "quantiles", "cv"):
            (row["latency_ms"] or {}).pop(name, None)
    assert "median" in report_html(document, {})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"verdict": "fail", "recommended": None, "engines": []}, "Fail. No engine passes."),
        ({"verdict": "inconclusive", "recommended": None, "engines": []}, "Inconclusive. No engine could be run here."),
    ],
)
def test_a_verdict_without_recommendation(change: dict[str, Any], sentence: str) -> None:
    document = report_document(**change)
    assert sentence in " ".join(Elements(report_html(document, {})).text.split())


@pytest.mark.parametrize(
    ("gates", "labelled", "limit"),
    [
        ({"max_drop": 0.02}, True, 0.02),
        ({"min_ratio": 0.99}, True, 0.0095),  # of 95 % in the reference
        ({"max_drop": 0.005, "min_ratio": 0.99}, True, 0.005),
        ({"max_drop": 0.02, "min_agreement": 0.995}, True, 0.02),  # agreement is no accuracy
        ({"max_drop": 0.02, "min_agreement": 0.985}, False, 0.015),
        ({"max_drop": 0.01, "min_sqnr": 30.0}, False, 0.01),
    ],
)
def test_the_limit_is_that_of_the_gates(gates: dict[str, float], labelled: bool, limit: float) -> None:
    document = report_document()
    document["reference"]["labelled"] = labelled
    document["provenance"]["options"] = {"gates": gates, "budget": 0.25}  # what quantization aims at is another matter
    assert largest_loss(document) == pytest.approx(limit)


def test_the_limit_of_older_documents() -> None:
    document = report_document()
    document["provenance"]["options"] = {"budget": 0.03}
    assert largest_loss(document) == 0.03
    del document["provenance"]
    assert largest_loss(document) == 0.005


@pytest.mark.parametrize(("verdict", "status"), [("fail", "over_budget"), ("inconclusive", "undecided")])
def test_without_an_engine_to_take_the_closest_is_named(verdict: str, status: str) -> None:
    document = report_document(verdict=verdict, recommended=None)
    for row in document["engines"][:4]:
        row |= {"status": status, "reason": f"{verdict.upper()}: of {row['backend']} {row['precision']['requested']}"}
    document["engines"][0]["status"] = "failed"  # it loses least, and is not what the verdict is about
    sentence = {
        "fail": "Fail. No engine passes; the closest is openvino bf16: of openvino bf16.",
        "inconclusive": "Inconclusive. Of openvino bf16; the closest is openvino bf16.",
    }[verdict]
    words = " ".join(Elements(report_html(document, {})).text.split())
    assert sentence in words
    assert "Take " not in words
    assert sentence.partition(". ")[2] in report_markdown(document)


def test_each_of_several_gates_is_told() -> None:
    document = report_document()
    assert 'aria-label="Gates"' not in report_html(document, {})
    first = document["engines"][3]["gates"][0]
    second = first | {"gate": "min_sqnr", "verdict": "fail", "claim": "SQNR of the logits 12.0 dB, minimum 20"}
    document["engines"][3]["gates"] = [first, second]
    text = " ".join(Elements(report_html(document, {})).text.split())
    assert "pass loses at most 0.82 points (95 %), budget 2fail SQNR of the logits 12.0 dB, minimum 20" in text


def test_classes_confidences_and_confusions_are_shown() -> None:
    text = " ".join(Elements(report_html(report_document(), {})).text.split())
    # of 2,000 coats 1,900 are right in the reference; openvino int8 loses 12 and gains 5 of them
    assert "coat95.00 → 94.650.35 [−0.09, 0.81]" in text
    assert "What openvino int8 confuses more or less often than the reference" in text
    assert "coatshirt100107" in text


@pytest.mark.parametrize("missing", ["figures", "gates"])
def test_rows_of_an_older_document_lack_figures(missing: str) -> None:
    document = report_document()
    for row in document["engines"]:
        del row[missing]
    assert "Classes and confidences" not in report_html(document, {}) or missing == "gates"


def test_figures_that_a_later_version_adds_are_shown() -> None:
    document = report_document()
    document["engines"][0]["parity"] |= {"worst_class": {"label": "bag", "drop": 0.125}, "ece": 0.0213}
    text = Elements(report_html(document, {})).text
    for words in ("worst class.label", "bag", "0.125", "ece", "0.0213"):
        assert words in text


def test_without_labels_agreement_is_shown() -> None:
    document = report_document()
    document["reference"] |= {"top1": None, "top5": None, "labelled": False}
    for row in document["engines"]:
        if row["parity"]:
            row["parity"] |= dict.fromkeys(("reference_top1", "reference_top5", "top1", "top5", "delta", "pairs"))
            row["parity"]["labelled"] = False
    document["changed"]["images"] = [{**image, "right": None} for image in document["changed"]["images"]]
    text = Elements(report_html(document, {})).text
    assert "Agrees, %" in text
    assert "Top-1, %" not in text
    assert "| engine | agrees, % | differs, % [95 %] |" in report_markdown(document)


# Markdown


def test_the_markdown_says_the_verdict_first() -> None:
    lines = report_markdown(report_document()).splitlines()
    assert lines[0] == "### ✅ a\\_network: pass"
    assert lines[2] == "Loses at most 0.82 points \\(95 %\\), budget 2. Take **openvino int8**."
    assert "| **openvino int8** | 94.65 | 0.35 [−0.09, 0.81] | " in "\n".join(lines)


def test_the_markdown_s_folds_are_closed() -> None:
    text = report_markdown(report_document())
    assert text.count("<details>") == text.count("</details>") == 4


@pytest.mark.parametrize("name", [SCRIPT, "a | b", "`code` *bold* [x](y)", "two\nlines"])
def test_names_in_markdown_are_text(name: str) -> None:
    plain = report_markdown(report_document())
    text = report_markdown(report_document(model=name, label=name))
    assert len(text.splitlines()) == len(plain.splitlines())
    unescaped: Callable[[str], int] = lambda mark: len(re.findall(rf"(?<!\\){re.escape(mark)}", text))  # noqa: E731
    for mark in ("|", "<", "*", "["):
        assert unescaped(mark) == len(re.findall(rf"(?<!\\){re.escape(mark)}", plain)), mark
