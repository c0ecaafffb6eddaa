"""The page in a real browser, light and dark, on a desk and on a phone, with the keyboard and to a screen reader."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, Browser, opened_browser
from edgewright.report_page import TEMPLATES, report_html
from report_documents import report_document, thumbnails

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
READABLE = 4.5  # contrast of text, WCAG 2.2, 1.4.3; of what is no text 3, 1.4.11
VISIBLE = 3.0
LONG_NAME = "a_network_with_a_name_that_is_far_too_long_for_any_phone_" * 2


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    document = report_document(model=LONG_NAME, label=LONG_NAME, weights=f"/home/anna/{LONG_NAME}.pth")
    file.write_text(report_html(document, thumbnails()))
    return file


@pytest.mark.parametrize(("width", "scheme"), list(itertools.product(WIDTHS, SCHEMES)))
def test_the_page_fits_and_nobody_complains(browser: Browser, report: Path, width: int, scheme: str) -> None:
    with browser.page(report, width=width, scheme=scheme) as page:
        assert page.complaints == []
        assert [address for address in page.requests if not address.startswith(("file:", "data:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("window.innerWidth") == width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 60) == (scheme == "dark"), background
        shown = page.evaluate(
            "[...document.querySelectorAll('figure svg')].filter(e => e.getClientRects().length).length"
        )
        assert shown == 2, "of the wide and the narrow figures one each"
        letters = page.evaluate(
            "Math.min(...[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"
            ".filter(height => height > 0))"
        )
        assert letters >= 9, "CSS pixels, ascent and descent included"


def test_the_check_of_the_width_can_fail(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "wide.html"
    file.write_text("<!doctype html><body><div style='width: 500px'>wide</div><script>console.error('no')</script>")
    with browser.page(file, width=390, scheme="light") as page:
        assert page.evaluate("document.documentElement.scrollWidth > window.screen.width")
        assert page.complaints != []


def test_what_a_screen_reader_finds(browser: Browser, report: Path) -> None:
    with browser.page(report, width=1280, scheme="light") as page:

        def none(selector: str) -> bool:
            return bool(page.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length") == 0)

        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.evaluate("document.title").startswith(LONG_NAME)
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => +e.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
        assert none("th:not([scope]):not([aria-hidden])")
        assert none("img:not([alt]), img[alt='']")
        assert none("[role=img]:not([aria-label]), [role=region]:not([aria-label])")
        assert none("svg:not([aria-hidden])"), "what stands around it says what it shows"
        assert none("section:not([aria-labelledby])")
        assert none("input:not([aria-label])")
        words = page.evaluate("document.querySelector('.wide[role=img]').ariaLabel")
        assert "openvino int8: median 1." in words


def test_on_a_phone_an_engine_is_a_card_that_names_its_columns(browser: Browser, report: Path) -> None:
    script = """(() => {
        const table = document.querySelector('.engines'), box = table.closest('.scroll');
        const cells = [...table.querySelectorAll('td[data-column]')].filter(cell => cell.innerText);
        const name = cell => table.rows[0].cells[cell.cellIndex].textContent.trim();
        const shown = cell => getComputedStyle(cell, '::before').content;
        return {
            fits: box.scrollWidth <= box.clientWidth,
            cells: cells.length,
            unlike: cells.filter(cell => cell.dataset.column !== name(cell)).length,
            named: cells.filter(cell => shown(cell) === JSON.stringify(name(cell))).length,
            table: [...table.querySelectorAll('tr, th, td')].every(each => each.role || each.ariaHidden),
        };
    })()"""
    for width, named in ((390, True), (1280, False)):
        with browser.page(report, width=width, scheme="light") as page:
            found = page.evaluate(script)
            cells = found["cells"]
            assert cells > 10
            assert found == {"fits": True, "cells": cells, "unlike": 0, "named": named * cells, "table": True}


def test_a_layer_is_reached_without_a_mouse(browser: Browser, report: Path) -> None:
    with browser.page(report, width=390, scheme="light") as page:
        page.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
        for _ in range(40):
            page.press("Tab")
            if page.evaluate("document.activeElement.type") == "radio":
                break
        for _ in range(2):
            page.press("ArrowRight")
        assert page.evaluate("document.activeElement.ariaLabel").startswith(
            "features.2.conv/Conv: int8, own SQNR 27.0 dB"
        )
        tip = page.evaluate(
            "(() => { const tips = [...document.querySelectorAll('.tip')].filter(e => e.getClientRects().length);"
            "return tips.map(e => e.textContent); })()"
        )
        assert len(tip) == 1, tip
        assert "input -1.5 … 2.5 by mse, saw -2 … 3, 0.10 % saturates" in " ".join(tip[0].split())
        page.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "all columns are one stop"


def test_a_layer_is_reached_with_a_mouse(browser: Browser, report: Path) -> None:
    with browser.page(report, width=1280, scheme="dark", height=6000) as page:
        box = page.evaluate("(r => [r.x + r.width / 2, r.y + r.height / 2])"
                            "(document.querySelectorAll('.columns label')[5].getBoundingClientRect())")  # fmt: skip
        page.hover(*box)
        shown = page.evaluate("[...document.querySelectorAll('.tip')].filter(e => e.getClientRects().length).length")
        words = page.evaluate("document.querySelectorAll('.columns label')[5].querySelector('.tip').innerText")
        assert (shown, words.split()[0]) == (1, "features.5.conv/Conv")


def test_all_of_it_is_printed(browser: Browser, report: Path, tmp_path: Path) -> None:
    with browser.page(report, width=1280, scheme="dark", media="print") as page:
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("document.querySelector('nav').getClientRects().length") == 0
        page.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


# Colours, from the style sheet itself


def palettes() -> dict[str, dict[str, str]]:
    sheet = (TEMPLATES / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)
    light, dark, _ = (dict(re.findall(r"--([\w-]+): (#\w{3,6});", block)) for block in blocks)
    return {"light": light, "dark": light | dark}


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, WCAG 2.2."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(colour: str, other: str) -> float:
    high, low = sorted((luminance(colour), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_is_that_of_the_definition() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01), "WebAIM's example that just fails"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_and_marks_can_be_read(scheme: str) -> None:
    palette: Any = palettes()[scheme]
    for name in ("ink", "muted", "accent", "good", "warn", "bad"):
        for ground in ("page", "panel"):
            assert contrast(palette[name], palette[ground]) >= READABLE, (name, ground)
    for name in ("fp32", "fp16", "bf16", "int8"):
        assert contrast(palette[name], palette["page"]) >= VISIBLE, name
