"""The counts over characters, words, strings, code lines and prose: the C++ engine against the Python definition, and the
definition against the regular expressions it stands for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opencoder.corpus.signals import characters, code_text, prose, strings, words
from opencoder.native import text_engine
from opencoder.tools.bench_hostile import COUNTED, Hostile, counters

from .hostile import each

pytestmark = pytest.mark.fast
needs_engine = pytest.mark.skipif(text_engine() is None, reason="the C++ text engine was not built")

COUNTS = list(counters().values())
SNIPPETS = [
    "0x1f", "0X_", "\\x41", "41 42,", "de ad be ef ", "\\u00e9", "QUJD" * 20, "''", "'''", '"""', '"', "'", "http://a.b/c",
    "https://", "(http://x)", "<b>", "<", ">", "assert", "self.assertEqual(", "aSSert_eq", " = 'a' + 'b'", "=\t\"x\"+\"y\"",
    "+", "全文]", "...", "…)", "• x", "▪", "【", "】", "THE", "the", "Hello. World!", "。", "؟", "},", "}", "{", "\n", "\n\n", " ",
    "\t", "\x1c", "\x1b", "\x00", "\u2028", "\x85", "\u200b", "\u200d", "İ", "ΑΣ", "ς", "ǅ", "ﬁ", "½", "²", "٣", "ｆｕｌｌ", "！",
    "a\u0301", "⚠\ufe0f", "हिन्दी", "中文", "😀", "\U000e0100", "\ud800", "x" * 25, "_", "1", "\\",
]  # fmt: skip
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=6), max_size=40).map("".join)


def by_definition(count: Callable[[str], Any], text: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        for module in (characters, words, strings, code_text):
            patch.setattr(module, "engine", lambda: None)
        patch.setattr(prose, "_counter", lambda: None)
        return count(text)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, words.WordCounts):
        return bool(
            a._replace(entropy=0.0) == b._replace(entropy=0.0) and math.isclose(a.entropy, b.entropy, abs_tol=1e-9)
        )
    return bool(a == b)


@needs_engine
@pytest.mark.parametrize("count", COUNTS, ids=lambda f: f.__name__)
def test_engine_counts_as_the_definition_does(count: Callable[[str], Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:

        @given(texts)
        @settings(max_examples=400, deadline=None)
        @example("")
        @example("".join(SNIPPETS) * 3)
        @example("\n".join(SNIPPETS))
        @example("a b c d e f g h i j k l\n" * 3 + "a b a b a b")
        def check(text: str) -> None:
            found, truth = count(text), by_definition(count, text, monkeypatch)
            assert same(found, truth), (found, truth)

        check()


def literals_by_regex(code: str, across_lines: bool) -> list[str]:
    inside = ".*?" if across_lines else r"[^\n]*?"
    pattern = re.compile(f"'''(.*?)'''|\"\"\"(.*?)\"\"\"|'({inside})'|\"({inside})\"", re.DOTALL)
    return [group for groups in pattern.findall(code) for group in groups if group]


@given(st.text("'\"ab\n ", max_size=60), st.booleans())
@settings(max_examples=400, deadline=None)
def test_literals_are_those_of_the_published_pattern(code: str, across_lines: bool) -> None:
    assert list(strings.literals(code, across_lines=across_lines)) == literals_by_regex(code, across_lines)


@given(st.text("=+'\" \tab", max_size=40))
@settings(max_examples=400, deadline=None)
def test_concatenations_are_those_of_the_published_pattern(line: str) -> None:
    pattern = r"\s*=\s*[\"'].+?[\"']\s*\+\s*[\"'].+?[\"'].*"
    assert code_text.concatenates(line) == (re.search(pattern, line) is not None)


@given(
    st.lists(st.sampled_from(["(http://", "(https://", ")", "a", " ", "<", ">", "<b", "\n"]), max_size=30).map("".join)
)
@settings(max_examples=400, deadline=None)
def test_links_and_tags_are_those_of_the_published_patterns(text: str) -> None:
    found = prose.count_prose(text)
    assert found.link_characters == sum(map(len, re.findall(r"\(https?://\S+\)", text)))
    assert found.tag_characters == sum(map(len, re.findall(r"<.*?>", text)))


@given(texts)
@settings(max_examples=200, deadline=None)
def test_words_of_the_whole_are_those_of_its_lines(text: str) -> None:
    by_line = [w for line in text.split("\n") for w in words.normalised_words(line)]
    assert words.normalised_words(text) == by_line
    squeezed = [w for line in text.split("\n") for w in words.normalised_words(" ".join(line.split()))]
    assert (
        words.normalised_words(text.translate(characters.TRANSLATION))
        == [
            w
            for line in text.translate(characters.TRANSLATION).split("\n")
            for w in words.normalised_words(" ".join(line.split()))
        ]
        or squeezed
    )


def test_word_counts_worked_out_by_hand() -> None:
    found = words.count_words("aa bb aa bb aa bb\nx = 12\n")
    assert found[:3] == (8, 15, 4)
    assert found.top == (12, 12, 16)  # (aa bb) × 3, (aa bb aa) × 2, (aa bb aa bb) × 2
    assert found.repeated == (0,) * 6
    assert found.entropy == pytest.approx(2 * -(3 / 8) * math.log(3 / 8) + 2 * -(1 / 8) * math.log(1 / 8))


def test_chinese_words_are_segmented() -> None:
    assert words.chinese_words("我们在北京学习自然语言处理。") == ["我们", "在", "北京", "学习", "自然语言", "处理"]


@needs_engine
@given(
    st.lists(
        st.sampled_from(["我们在北京", "学习自然语言处理", "。", "\n", " ", "C语言", "abc", "，", "ＡＢ", "１２"]),
        max_size=60,
    )
)
@settings(max_examples=100, deadline=None)
def test_chinese_words_are_counted_alike(parts: list[str]) -> None:
    text = "".join(parts)
    found = words.count_words(text, "zh")
    assert same(found, words.count_word_list(words.chinese_words(text)))


def test_pieces_equal_the_published_tokeniser() -> None:
    assert words.PIECES.findall("⚠\ufe0f a\u0301b c++ d") == regex.findall(r"\w+|[^\w\s]+", "⚠\ufe0f a\u0301b c++ d")


@needs_engine
@each(COUNTED)
def test_texts_made_to_be_slow_are_counted_alike(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    text = hostile.of(20_000)
    for count in COUNTS:
        assert same(count(text), by_definition(count, text, monkeypatch)), count.__name__
