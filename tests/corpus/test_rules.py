"""The tables of thresholds, verdicts and the page made of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from opencoder.corpus import rules, signals
from opencoder.corpus.language import detect
from opencoder.corpus.rules_page import page
from opencoder.corpus.signal_table import signal_names
from opencoder.corpus.signals import LANGUAGE_SIGNALS, general
from opencoder.corpus.verdict import evaluate, first_hit

pytestmark = pytest.mark.fast
PAGE = Path(__file__).parents[2] / "docs" / "rules.md"

# (signals with a threshold, signals) of each published table; the text tables there leave one recorded signal out.
ACTIVE = {
    "text_zh": (26, 32), "text_en": (26, 32), "others": (31, 33), "data": (28, 33), "shell": (28, 33), "sql": (31, 33),
    "python": (39, 41), "cpp": (36, 41), "c": (36, 41), "csharp": (35, 37), "go": (35, 38), "html": (28, 36),
    "java": (35, 41), "javascript": (36, 42),
}  # fmt: skip


@pytest.mark.parametrize("table", rules.TABLES)
def test_tables_have_the_published_numbers_of_rules(table: str) -> None:
    known = [rule for group in rules.groups_of(table) for rule in rules.load_rules() if group in rule.groups]
    assert (sum(bool(rule.conditions(table)) for rule in known), len(known)) == ACTIVE[table]


def test_there_are_118_signals() -> None:
    names = signal_names()
    assert len(set(names)) == len(names) == 118
    assert {f"qsc_doc_{n}" for n in general.TEXT} == {n for n in names if n.startswith("qsc_doc_")}
    assert {f"qsc_code_{n}" for n in general.CODE} == {n for n in names if n.startswith("qsc_code_")}
    assert {n for group in LANGUAGE_SIGNALS.values() for n in group} <= set(names)


def test_every_entry_is_well_formed() -> None:
    for rule in rules.load_rules():
        assert set(rule.groups) <= {"doc", "code", *rules.OWN_TABLE}
        assert set(rule.drop) <= {"text", "code", *rules.TABLES}
        assert 0 < rule.probability <= 1
        assert rule.quantity
        assert rule.unit
        assert rule.doc
        for conditions in rule.drop.values():
            for condition in conditions:
                rules.parse(condition)


def test_a_condition_of_another_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"'>= 3': allowed are is true"):
        rules.parse(">= 3")


@pytest.mark.parametrize(
    ("doc_type", "language", "natural", "table"),
    [
        ("code", "rust", "en", "others"),
        ("code", "typescript", "en", "others"),
        ("code", "python", "en", "python"),
        ("data", "json", "en", "data"),
        ("data", "html", "en", "html"),
        ("text", "markdown", "en", "text_en"),
        ("text", "markdown", "fr", "text_en"),
        ("text", "markdown", "zh", "text_zh"),
    ],
)
def test_choice_of_table(doc_type: str, language: str, natural: str, table: str) -> None:
    assert rules.table_for(doc_type, language, natural) == table


def test_hits_name_value_and_threshold() -> None:
    values, _ = signals.compute_document(signals.make_document("x = 1\n", size_bytes=6, doc_type="code"))
    hits = {hit.rule: hit for hit in rules.judge(values, doc_type="code", language="python")}
    assert hits["qsc_code_num_lines"] == ("qsc_code_num_lines", 1.0, "< 10")
    long_data = {"qsc_code_num_chars": 6000}
    assert [h.threshold for h in rules.judge(long_data, doc_type="data", language="json")] == ["> 5000"]
    assert rules.judge(long_data, doc_type="code", language="rust") == []


@pytest.mark.parametrize(
    ("signal", "value", "language", "hit"),
    [
        ("qsc_codepython_cate_ast", False, "python", True),
        ("qsc_codepython_cate_ast", True, "python", False),
        ("qsc_codepython_cate_ast", False, "javascript", False),
        ("qsc_codego_cate_var_zero", 1.0, "go", True),
        ("qsc_codec_nums_lines_main", 2, "c", True),
        ("qsc_codec_nums_lines_main", 1, "c", False),
        ("qsc_code_frac_chars_comments", 0.9, "html", False),
        ("qsc_code_frac_chars_comments", 0.9, "rust", True),
        ("qsc_code_frac_chars_comments", None, "rust", False),
        ("qsc_code_frac_chars_digital", 0.25, "sql", False),
    ],
)
def test_single_rules(signal: str, value: float | None, language: str, hit: bool) -> None:
    found = rules.judge({signal: value}, doc_type="code", language=language)
    assert [h.rule for h in found] == [signal] * hit


def test_text_tables_differ() -> None:
    def hits(natural: str, **values: float) -> int:
        named = {f"qsc_doc_{name}": value for name, value in values.items()}
        return len(rules.judge(named, doc_type="text", language="text", natural_language=natural))

    assert hits("en", mean_word_length=2.0) == 1
    assert hits("zh", mean_word_length=2.0) == 0
    assert hits("en", num_sentences=1) == hits("zh", num_sentences=1) == 1
    assert hits("en", num_sentences=2) == 0
    assert hits("zh", frac_words_all_caps=0.9) == 0


def test_draws_follow_the_file_and_hit_in_four_of_five() -> None:
    signal = "qsc_codepython_score_lines_no_logic"

    def hit(identity: str | None) -> bool:
        return bool(rules.judge({signal: 0.6}, doc_type="code", language="python", identity=identity))

    drawn = [hit(f"{i:064x}") for i in range(2000)]
    assert 0.77 < sum(drawn) / len(drawn) < 0.83
    assert drawn == [hit(f"{i:064x}") for i in range(2000)]
    assert hit(None)
    assert not rules.judge({signal: 0.4}, doc_type="code", language="python", identity="00")


def test_a_verdict_has_all_of_it() -> None:
    found = evaluate("x = 1\n", path="a.rs", size_bytes=6, language="rust", doc_type="code", identity="ab")
    assert not found.keep
    assert found.errors == {}
    assert found.natural_language == "en"
    assert {h.rule for h in found.hits} >= {"qsc_code_num_lines", "qsc_code_num_words"}


def test_the_page_is_current() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "opencoder.corpus.rules"], capture_output=True, check=True, cwd=PAGE.parents[1]
    ).stdout.decode()
    assert made == page()
    assert PAGE.read_text(encoding="utf-8") == made, "python -m opencoder.corpus.rules > docs/rules.md"


def test_the_page_names_every_signal() -> None:
    text = page()
    assert all(f"`{name}`" in text for name in signal_names())


@pytest.mark.parametrize("compat", [False, True])
def test_the_first_hit_decides_as_all_of_them_do(compat: bool) -> None:
    root = Path(__file__).parents[2]
    files = [*root.glob("opencoder/corpus/**/*.py"), *root.glob("csrc/text/*"), *root.glob("*.*"), *root.glob("docs/*")]
    kept = 0
    for file in files:
        language, doc_type = detect(file.name)
        if doc_type not in ("code", "data", "text"):
            continue
        text = file.read_text(encoding="utf-8")
        about = {"path": file.name, "size_bytes": file.stat().st_size, "language": language, "doc_type": doc_type}
        full = evaluate(text, identity=file.name, compat=compat, **about)
        hit = first_hit(signals.make_document(text, compat=compat, **about), file.name)
        assert (hit is None) == full.keep, file
        assert hit is None or hit in full.hits
        kept += full.keep
    assert 0 < kept < len(files)


@pytest.mark.parametrize(
    ("value", "hits"), [(29, ["< 30"]), (30, []), (31, [])], ids=["below", "at the threshold", "above"]
)
def test_a_value_at_its_threshold_is_no_hit(value: int, hits: list[str]) -> None:
    found = rules.judge(
        {"qsc_code_num_words": value}, doc_type="code", language="rust", natural_language="en", identity=None
    )
    assert [hit.threshold for hit in found] == hits


def test_a_share_at_its_threshold_is_no_hit() -> None:
    def hits(share: float) -> int:
        values = {"qsc_code_frac_chars_whitespace": share}
        return len(rules.judge(values, doc_type="code", language="rust", natural_language="en", identity=None))

    assert [hits(share) for share in (0.49, 0.5, 0.51)] == [0, 0, 1]
