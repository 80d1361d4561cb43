"""The report: its numbers against the files of the build, its text against hostile content, its pages without a browser."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoder.corpus import report, report_page, rules
from opencoder.corpus.report_text import marked_pair, visible

from . import report_cases as cases


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.build_everything(tmp_path_factory.mktemp("report"))


def result_of(corpus: Path) -> dict[str, Any]:
    return dict(json.loads((corpus / "report.json").read_text()))


def rows(corpus: Path, stage: str) -> list[dict[str, Any]]:
    return [row for part in sorted((corpus / stage).glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


# ---- numbers ----


def test_files_and_bytes_by_reason_and_language_are_those_of_the_dropped_files(corpus: Path) -> None:
    result, dropped = result_of(corpus), rows(corpus, "dropped")
    files, volume, cells = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    for row in dropped:
        reason = f"{row['stage']}: {row['reason']}"
        files[reason] += 1
        volume[reason] += row["size_bytes"]
        cells[row["language"], reason] += row["size_bytes"]
    assert len(files) >= 8, files
    assert result["by_reason"] == files
    assert result["bytes_by_reason"] == volume
    found = {
        (row["language"], reason): cell["bytes"]
        for row in result["by_language"]
        for reason, cell in row["dropped"].items()
    }
    assert found == cells
    kept = Counter(row["language"] for row in rows(corpus, "clean"))
    assert {row["language"]: row["kept"] for row in result["by_language"] if row["kept"]} == kept
    assert sum(row["failed"] for row in result["by_language"]) == len(rows(corpus, "failed")) == 2


def test_rules_have_the_files_and_bytes_of_which_they_are_the_reason(corpus: Path) -> None:
    result = result_of(corpus)
    dropped = [row for row in rows(corpus, "dropped") if row["stage"] == "rules"]
    hits = Counter(name for row in dropped for name in {hit["rule"] for hit in json.loads(row["hits"])})
    assert {row["rule"]: row["hits"] for row in result["by_rule"]} == hits
    assert {row["rule"]: row["first_bytes"] for row in result["by_rule"] if row["first"]} == {
        name: sum(row["size_bytes"] for row in dropped if row["reason"] == name)
        for name in {row["reason"] for row in dropped}
    }


def test_rules_have_the_files_and_bytes_that_they_judge_and_hit(corpus: Path) -> None:
    """Judged: what reached the rules. All files of the corpus but two are Python, HTML and JavaScript of one type."""
    result = result_of(corpus)
    before = {"read", "language", "exact_dedup", "fuzzy_dedup", "transform"}
    dropped = [row for row in rows(corpus, "dropped") if row["stage"] not in before]
    kept = rows(corpus, "clean")
    sizes = {row["path"]: row["size_bytes"] for row in dropped}
    for row in result["by_rule"]:
        hit = [one for one in dropped if row["rule"] in {h["rule"] for h in json.loads(one["hits"] or "[]")}]
        judged = [one for one in (*dropped, *kept) if table_of(one["language"]) in row["tables"]]
        assert (row["hits"], row["hit_bytes"]) == (len(hit), sum(sizes[one["path"]] for one in hit))
        assert row["judged"] == len(judged) > 0
        assert row["share"] == round(len(hit) / len(judged), 6)
    one = next(row for row in result["by_rule"] if row["rule"] == "qsc_code_num_words")
    assert one["judged"] == len(dropped) + len(kept)
    assert one["judged_bytes"] == result["bytes"]["in"] - sum(
        row["size_bytes"]
        for row in (*rows(corpus, "dropped"), *rows(corpus, "failed"))
        if row["stage"] in before or row["stage"] is None
    )


def table_of(language: str) -> str:
    return language if language in rules.OWN_TABLE else "others"


def test_kept_files_are_shown_by_table(corpus: Path) -> None:
    kept: dict[str, set[str]] = {}
    for row in rows(corpus, "clean"):
        kept.setdefault(table_of(row["language"]), set()).add(row["path"])
    shown = {
        group["table"]: [file["path"] for file in group["samples"]] for group in result_of(corpus)["kept_by_table"]
    }
    assert shown.keys() == kept.keys()
    for table, paths in shown.items():
        assert len(paths) == len(set(paths)) == min(3, len(kept[table]))
        assert set(paths) <= kept[table]
    page = (corpus / "report.html").read_text()
    assert all(f'id="kept-{table}"' in page for table in kept)
    assert set(re.findall(r'href="#(kept-\w+)"', page)) == {f"kept-{table}" for table in kept}


def test_every_reason_has_samples_of_its_files(corpus: Path) -> None:
    paths = {f"{row['stage']}: {row['reason']}": set[str]() for row in rows(corpus, "dropped")}
    for row in rows(corpus, "dropped"):
        paths[f"{row['stage']}: {row['reason']}"].add(row["path"])
    groups = {group["reason"]: [file["path"] for file in group["samples"]] for group in result_of(corpus)["samples"]}
    assert groups.keys() == paths.keys()
    for reason, shown in groups.items():
        assert len(shown) == min(3, len(paths[reason]))
        assert set(shown) <= paths[reason]


def test_lists_are_cut_and_what_is_left_out_is_counted() -> None:
    result = cases.many()
    assert len(result["failures"]) == report.LISTED
    assert result["left_out"]["failures"] == 1000 + 2 * 7
    assert "1,014 more are not listed" in report_page.report(result)


def test_size_classes_keep_all_clusters_and_files() -> None:
    sizes = {"2": 7, "3": 1, "4": 2, "5": 1, "8": 2, "9": 4, "16": 1, "17": 1, "1025": 1}
    classes = report_page.size_classes(sizes)
    assert [one.label for one in classes] == ["2", "3", "4", "5–8", "9–16", "17–32", "1,025–2,048"]
    assert [one.clusters for one in classes] == [7, 1, 2, 3, 5, 1, 1]
    assert sum(one.files for one in classes) == sum(int(size) * n for size, n in sizes.items())


@pytest.mark.parametrize(
    ("bands", "rows_", "left_edge"), [(16, 128, 0.9), (25, 10, 0.5), (14, 8, 0.0), (1, 1, 0.0), (1000, 2, 0.0)]
)
def test_the_curve_is_the_formula(bands: int, rows_: int, left_edge: float) -> None:
    curve = report_page.curve(bands, rows_)
    assert curve.start == left_edge
    width, height = report_page.CURVE_BOX
    for point in curve.points.split():
        x, y = map(float, point.split(","))
        j = curve.start + (1 - curve.start) * x / width
        step = 0.06 * (1 - curve.start) / width  # the points have one decimal
        low, high = (1 - (1 - min(1.0, max(0.0, v)) ** rows_) ** bands for v in (j - step, j + step))
        assert low - 0.06 / height <= 1 - y / height <= high + 0.06 / height
    for chance, jaccard in curve.found:
        assert 1 - (1 - jaccard**rows_) ** bands == pytest.approx(float(chance.rstrip("%")) / 100)


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (report_page.human_size, 0, "0 B"),
        (report_page.human_size, 999, "999 B"),
        (report_page.human_size, 1000, "1.0 kB"),
        (report_page.human_size, 999_949, "999.9 kB"),
        (report_page.human_size, 999_950, "1.0 MB"),
        (report_page.human_size, 12_345_678, "12.3 MB"),
        (report_page.human_size, 1.2e19, "12,000.0 PB"),
        (report_page.human_share, 0.0, "0.0%"),
        (report_page.human_share, 1e-6, "< 0.1%"),
        (report_page.human_share, 0.25926, "25.9%"),
        (report_page.human_share, 1 - 1e-6, "> 99.9%"),
        (report_page.human_share, 1.0, "100.0%"),
        (report_page.human_duration, 0.715, "0.7 s"),
        (report_page.human_duration, 59.96, "1 min 0 s"),
        (report_page.human_duration, 203.564, "3 min 24 s"),
        (report_page.human_duration, 9000, "2 h 30 min"),
        (report_page.human_number, 60_000.0, "60,000"),
        (report_page.human_number, 0.123456, "0.1235"),
    ],
)
def test_numbers_are_readable(show: Any, value: float, text: str) -> None:
    assert show(value).replace("\u00a0", " ") == text


# ---- text ----


def plain(markup: str) -> str:
    """Text of HTML as a browser has it, without marks, with named characters as they were."""
    named = re.sub(r'<span class="unseen" title="U\+([0-9A-F]+)">.*?</span>', lambda m: f"&#x110000;{m[1]};", markup)
    text = html.unescape(re.sub(r"<(?!span)[^>]*>", "", named).replace("&#x110000;", "\ue000"))
    return re.sub(r"\ue000([0-9A-F]+);", lambda m: chr(int(m[1], 16)), text)


ANY_TEXT = st.text(st.characters(exclude_characters="\ue000"), max_size=60)


@given(ANY_TEXT, st.booleans())
def test_every_character_is_seen_and_none_is_lost(text: str, lines: bool) -> None:
    shown = str(visible(text, lines=lines))
    allowed = "\n\t" if lines else ""
    assert not [c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp", "Cs"} and c not in allowed]
    assert plain(shown) == text


def test_characters_that_cannot_be_seen_are_named() -> None:
    shown = visible("a\0b\u202ec</pre>\n")
    assert shown == (
        'a<span class="unseen" title="U+0000">NUL</span>b<span class="unseen" title="U+202E">U+202E</span>'
        'c&lt;/<wbr>pre&gt;<span class="unseen" title="U+000A">LF</span>'
    )


def marks(markup: str) -> list[str]:
    return [plain(found) for found in re.findall(r"<mark>(.*?)</mark>", markup, re.DOTALL)]


@given(ANY_TEXT, ANY_TEXT, st.sampled_from([None, 1, 30]))
def test_marking_changes_neither_text(left: str, right: str, cut: int | None) -> None:
    pair = marked_pair(left, right, cut=cut)
    assert (plain(str(pair.left)), plain(str(pair.right))) == (left, right)
    if left == right:
        assert pair.differences == 0
    elif cut is None:
        assert marks(str(pair.left)) + marks(str(pair.right))


def test_what_differs_is_marked_by_words_and_nothing_else() -> None:
    left, right = "import a\nx = call(1, two)\nend\n", "import a\nx = call(1, three)\nmore\nend\n"
    pair = marked_pair(left, right)
    assert marks(str(pair.left)) == ["two"]
    assert marks(str(pair.right)) == ["three", "more\n"]
    unlike = marked_pair("same\nalpha(beta)\n", "same\n{gamma: [delta], (eps)}\n")
    assert marks(str(unlike.left)) == ["alpha(beta)\n"]


def test_the_end_of_a_cut_text_is_no_difference() -> None:
    whole = "".join(f"line {i}\n" for i in range(100))
    left, right = whole[:200], ("# a header\n" + whole)[:200]
    assert marks(str(marked_pair(left, right, cut=200).right)) == ["# a header\n"]
    assert marks(str(marked_pair(left, right, cut=200).left)) == []
    assert marks(str(marked_pair(left, right).left)) != []


# ---- pages ----


class Page(HTMLParser):
    """Tags and their attributes; raises AssertionError where one is closed that is not open."""

    VOID = frozenset({"meta", "link", "wbr", "br", "line", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module", params=["everything", "nothing", "many", "off"])
def page(request: pytest.FixtureRequest, corpus: Path) -> str:
    if request.param == "everything":
        return (corpus / "report.html").read_text()
    off = ("dedup.fuzzy=false", "dedup.exact=false", "rules.enabled=false", "samples_per_rule=0")
    made = {"nothing": cases.nothing, "many": cases.many, "off": lambda: cases.assembled([cases.counts([])], *off)}
    return report_page.report(made[request.param]())


def test_a_page_is_whole_and_its_references_stay_inside(page: str) -> None:
    found = Page(page)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    assert {"funnel", "languages", "reasons", "rules", "duplicates", "pii", "licences", "benchmarks", "dropped", "kept",
            "failures"} <= set(ids)  # fmt: skip
    links = found.values("href")
    assert {"#" + name for name in ("funnel", "failures")} <= set(links)
    assert all(link in ("timings.html", "data:,") or link.removeprefix("#") in ids for link in links)
    assert set(found.values("aria-labelledby")) <= set(ids)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form", "audio", "video"}
    assert [tag for tag, _ in found.tags].count("link") == 1
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name == "src"]
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert style
    assert not re.search(r"url\(|@import|@font-face|http", style)
    assert "default-src 'none'" in page
    assert "\0" not in page
    assert "\u202e" not in page


def test_timings_stand_on_their_own_page() -> None:
    result = cases.nothing()
    slower = {**result, "timings": {name: 7 * value for name, value in cases.TIMINGS.items()}}
    assert report_page.report(slower) == report_page.report(result)
    page = report_page.timings(cases.TIMINGS)
    assert {"report.html", "#content", "data:,"} == set(Page(page).values("href"))
    for text in ("2 h 30 min", "1 min 40 s", "540.0\u00a0MB", "4 min 55 s", "87.0%"):
        assert text in page
    assert page.index('data-stage="read"') < page.index('data-stage="judge"')


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb. Source: WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_bars_stand_out_from_what_is_behind_them(scheme: int) -> None:
    style = report_page.timings(cases.TIMINGS)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]))

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "soft", "link", "kept", "gone"):
        for behind in ("back", "card"):
            assert contrast(text, behind) >= 4.5, (text, behind)
    assert contrast("ink", "mark") >= 4.5
    for part in ("kept", "gone"):
        assert contrast(part, "bar") >= 3.0, part
