"""What is counted over prose: sentences, lines that repeat, links and tags, words as they are written.

This module is the definition; csrc/text/prose.cpp counts the same in one pass."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

from .characters import engine
from .stop_words import ENGLISH
from .words import PIECES

BULLETS = tuple(
    map(
        chr,
        [0x2022, 0x2023, 0x2043, 0x204C, 0x204D, 0x2219, *range(0x25A0, 0x25B0), *range(0x25C6, 0x25CC), 0x25CF,
         *range(0x25D0, 0x25D7), 0x25D8, 0x25D9, *range(0x25E2, 0x25E7), 0x25EF, 0x2611, 0x2612, 0x29BE, 0x2B1B,
         0x2B1C, 0x2B1E, 0x2B1F, 0x2B24],
    )
)  # fmt: skip
READ_MORE = (
    "...", "…", "全文", "详情", "详细", "更多", "المزيد", "تفاصيل", "اقرأ المزيد", "もっと", "詳細", "もっと読む",
)  # fmt: skip
"""Ends of lines that announce more text elsewhere."""
CLOSING = "]】)>》"
"""Brackets cut off a line's end before it is compared with READ_MORE."""

_SENTENCE = re.compile(r"\b[^.!?。！？؟]+[.!?。！？؟]*")
_SEPARATOR = re.compile(r"[.?!\n]")
_LINK = re.compile(r"\(https?://")


class ProseCounts(NamedTuple):
    """Counts over a text."""

    sentences: int
    """Runs without . ! ? and their CJK and Arabic forms that begin at a word boundary."""
    separators: int
    """Characters . ? ! and newlines."""
    link_characters: int
    """Of http(s) links in parentheses, which count."""
    tag_characters: int
    """From < to the next > on the same line."""
    bullet_lines: int
    read_more_lines: int
    raw_words: int
    """Runs of word characters or of other symbols, as they are written."""
    capital_words: int
    lenticular_brackets: int
    """Raw words that are a single 【 or 】."""
    stop_words: int
    filled_lines: int
    """Lines that are not blank, compared without the white space around them."""
    filled_characters: int
    repeated_lines: int
    """Of the filled lines, those that occur more than once."""
    repeated_characters: int


@cache
def _counter() -> Any:
    """The engine's counter with the tables above, or None without the engine."""
    cpp = engine()
    if cpp is None:
        return None
    endings = [list(map(ord, ending)) for ending in READ_MORE]
    return cpp.ProseCounter(sorted(ENGLISH), list(map(ord, BULLETS)), endings, list(map(ord, CLOSING)))


def count_prose(text: str) -> ProseCounts:
    """ProseCounts of a text."""
    counter = _counter()
    if counter is not None:
        return ProseCounts(*counter.count(text))
    lines = text.split("\n")
    filled = Counter(s for line in lines if (s := line.strip()))
    repeated = {line: n for line, n in filled.items() if n > 1}
    words = PIECES.findall(text)
    return ProseCounts(
        sum(1 for _ in _SENTENCE.finditer(text)),
        len(_SEPARATOR.findall(text)),
        sum(map(_link, text.split())),
        sum(map(_tags, lines)),
        sum(line.lstrip().startswith(BULLETS) for line in lines),
        sum(line.rstrip().rstrip(CLOSING).endswith(READ_MORE) for line in lines),
        len(words),
        sum(map(str.isupper, words)),
        sum(word in ("【", "】") for word in words),
        sum(word in ENGLISH for word in words),
        sum(filled.values()),
        sum(len(line) * n for line, n in filled.items()),
        sum(repeated.values()),
        sum(len(line) * n for line, n in repeated.items()),
    )


def _link(run: str) -> int:
    """Characters that `\\(https?://\\S+\\)` finds in a run without white space: up to its last closing parenthesis, so one
    link at most."""
    end = run.rfind(")")
    starts = (m.start() for m in _LINK.finditer(run) if m.end() < end)
    return next((end + 1 - start for start in starts), 0)


def _tags(line: str) -> int:
    """Characters that `<.*?>` finds in a line."""
    total = position = 0
    while (begin := line.find("<", position)) >= 0 and (end := line.find(">", begin)) >= 0:
        position = end + 1
        total += position - begin
    return total
