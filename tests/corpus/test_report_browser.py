"""The report as a browser has it: on a phone and on a desk, with the network watched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opencoder.corpus import report

from . import report_cases as cases
from .browser import NAMES, Browser, find_browser

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)} starts")
WIDTHS = (390, 1280)
OVERFLOW = """(() => {
  const root = document.documentElement, found = [];
  for (const e of document.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect();
    if (box.right > root.clientWidth + 1 && !e.closest(".scroll, pre, .skip")) found.push(e.outerHTML.slice(0, 200));
  }
  return {width: Math.max(root.scrollWidth, document.body.scrollWidth), found};
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(str(find_browser()), tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.build_everything(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module", params=["everything", "nothing", "many"])
def folder(request: pytest.FixtureRequest, everything: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "everything":
        return everything
    made: dict[str, Callable[[], dict[str, Any]]] = {"nothing": cases.nothing, "many": cases.many}
    path = tmp_path_factory.mktemp(request.param)
    report.write(path, made[request.param]())
    return path


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report.html", "timings.html"])
def test_a_page_fits_its_window_and_asks_for_nothing(browser: Browser, folder: Path, name: str, width: int) -> None:
    browser.open(folder / name, width=width)
    for unfold in ("", 'document.querySelectorAll("details").forEach(d => d.open = true)'):
        browser.evaluate(unfold)
        found = browser.evaluate(OVERFLOW)
        assert found["found"] == []
        assert found["width"] <= width
    assert browser.requests == [(folder / name).as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("window.hostile") is None
    assert browser.evaluate("document.scripts.length + document.images.length") == 0


def text(browser: Browser, selector: str) -> str:
    """What is seen of an element, spaces made plain."""
    seen = browser.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
    return " ".join(str(seen).replace("\u200b", "").split())


def numbers(*values: int) -> list[str]:
    return [f"{value:,}" for value in values]


def test_sections_have_the_numbers_of_report_json(browser: Browser, folder: Path) -> None:
    result = result_of(folder)
    browser.open(folder / "report.html", width=390)
    browser.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
    head, counts = text(browser, "header"), result["counts"]
    for value in numbers(counts["in"], counts["kept"]):
        assert f"{value} file" in head
    cards = text(browser, ".cards")
    for value, label in ((counts["kept"], "kept"), (counts["dropped"], "dropped"), (counts["failed"], "failed")):
        assert f"{value:,} {label}" in cards
    for row in result["funnel"]:
        seen = text(browser, f"[data-stage={row['stage']}]")
        assert f"{row['files_in'] - row['dropped']:,} left" in seen
        assert (f"{row['dropped']:,} dropped" in seen or f"{row['dropped']:,} failed" in seen) == (row["dropped"] > 0)
    languages = browser.evaluate('[...document.querySelectorAll("#languages ~ * tbody tr")].map(r => r.innerText)')
    for row in result["by_language"]:
        assert any(numbers(row["files"], row["kept"]) == r.split("\t")[3:5] for r in languages), row["language"]
    for reason, n in result["by_reason"].items():
        seen = text(browser, f'tr[data-reason="{reason}"]')
        assert f"{n:,}" in seen.split(), (reason, seen)
    for row in result["by_rule"]:
        seen = text(browser, f'tr[data-rule="{row["rule"]}"]').split()
        assert set(numbers(row["hits"], row["alone"])) <= set(seen)
    for kind, n in result["transform"]["pii"].items():
        assert text(browser, f'[data-pii="{kind}"]') == f"{kind} {n:,}"


def test_the_report_of_no_files_says_so_in_each_section(browser: Browser, tmp_path: Path) -> None:
    report.write(tmp_path, cases.nothing())
    browser.open(tmp_path / "report.html", width=390)
    seen = text(browser, "main")
    for words in (
        "no files",
        "nothing was dropped",
        "no rule was hit",
        "not looked for",
        "nothing was kept",
        "Failures none",
    ):
        assert words in seen
    assert "nan" not in seen.lower()


def test_the_corpus_of_the_test_has_something_of_everything(everything: Path) -> None:
    result = result_of(everything)
    assert result["clusters"]["exact"]["dropped"] == 1
    assert len(result["clusters"]["examples"]) == 2
    assert result["transform"]["pii"] == {"email": 1}
    assert result["transform"]["with_header"] == 1
    assert len(result["failures"]) == 2
    assert {match["path"] for match in result["matches"]} == {"leak.py"}
    shown = {file["path"] for group in result["samples"] for file in group["samples"]}
    assert {cases.EVIL_NAME, "short.py", "nul.py"} <= shown


@pytest.mark.parametrize("width", WIDTHS)
def test_near_duplicates_stand_side_by_side_or_one_below_the_other(
    browser: Browser, everything: Path, width: int
) -> None:
    browser.open(everything / "report.html", width=width)
    browser.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
    pairs = browser.evaluate(
        """[...document.querySelectorAll(".pair")].map(p => ({
             boxes: [...p.children].map(c => c.getBoundingClientRect().toJSON()),
             texts: [...p.querySelectorAll("pre")].map(t => t.textContent),
             marks: [...p.querySelectorAll("mark")].map(m => m.textContent)}))"""
    )
    examples = result_of(everything)["clusters"]["examples"]
    assert [pair["texts"] for pair in pairs] == [[row["excerpt"], row["kept_excerpt"]] for row in examples]
    for row, pair in zip(examples, pairs, strict=True):
        left, right = pair["boxes"]
        if width < 600:
            assert right["y"] >= left["y"] + left["height"]
        else:
            assert (left["y"], left["width"]) == (right["y"], right["width"])
            assert right["x"] >= left["x"] + left["width"]
        assert ("combine" in pair["marks"]) == (row["path"] == "near.py" or row["kept_path"] == "near.py")


def test_hostile_text_is_shown_as_it_is(browser: Browser, everything: Path) -> None:
    browser.open(everything / "report.html", width=390)
    samples = browser.evaluate('[...document.querySelectorAll("#dropped ~ details pre")].map(p => p.textContent)')
    unseen = (
        "# U+202E reversed U+2066 isolated U+2069 zeroU+200Bwidth BEL bell ESC[31m escape U+2028 line U+FEFF mark\n"
    )
    assert cases.HOSTILE + unseen in samples
    names = browser.evaluate('[...document.querySelectorAll("#dropped ~ details code")].map(c => c.textContent)')
    assert cases.EVIL_NAME.replace("\u202e", "U+202E") in names


def test_the_page_follows_the_colour_scheme(browser: Browser, everything: Path) -> None:
    seen = []
    for dark in (False, True):
        browser.open(everything / "report.html", width=390, dark=dark)
        style = "getComputedStyle(document.body)"
        seen.append(browser.evaluate(f"[{style}.backgroundColor, {style}.color]"))
    (light_back, light_ink), (dark_back, dark_ink) = seen
    assert light_back == "rgb(247, 249, 251)"
    assert len({light_back, light_ink, dark_back, dark_ink}) == 4


def test_the_keyboard_reaches_everything(browser: Browser, everything: Path) -> None:
    browser.open(everything / "report.html", width=390)
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.className") == "skip"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().x") >= 0
    browser.press("Enter")
    assert browser.evaluate("location.hash") == "#content"
    browser.evaluate('document.querySelector("#dropped ~ details:not([open]) summary").focus()')
    before = browser.evaluate('document.querySelectorAll("details[open]").length')
    browser.press("Enter")
    assert browser.evaluate('document.querySelectorAll("details[open]").length') == before + 1
    browser.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
    unreached = browser.evaluate(
        """[...document.querySelectorAll("body *")].filter(e => {
             const style = getComputedStyle(e);
             const over = (inner, outer, way) => inner > outer + 1 && ["auto", "scroll"].includes(way);
             return e.tabIndex < 0 && (over(e.scrollWidth, e.clientWidth, style.overflowX) ||
                                       over(e.scrollHeight, e.clientHeight, style.overflowY)); }).map(e => e.outerHTML.slice(0, 100))"""
    )
    assert unreached == []
