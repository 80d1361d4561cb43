"""String literals, encoded data and hexadecimal words, found without a lexer as the published filter does.

The patterns below are the definition; csrc/text/strings.cpp finds the same in one pass each. The patterns of encoded
data and of hexadecimal words need no backtracking beyond one piece; those of string literals look for the end of a
literal from each quote that has none, so that an engine must remember where it found none (csrc does; Python's `re`
takes quadratic time on a text full of unpaired quotes, which is why literals() searches by hand)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .characters import engine
from .words import PIECES

LONG_LINE_TOKENS = 20
"""A line of a string literal with more tokens is long."""
LONG_WORD = 20
"""A word in a string literal with more characters is long, unless it holds an http(s) URL."""

_URL = re.compile(r"https?://\S")
_BASE64 = re.compile(r"[a-zA-Z0-9+/\n=]{64,}")
_HEX_BYTES = re.compile(r"(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}")
_UNICODE_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4}){8,}")
_HEX_WORD = re.compile(r"\b0[xX][0-9a-fA-F]+\b")


class StringCounts(NamedTuple):
    """What is counted over the string literals of a code text."""

    long_lines: int
    """Lines of more than 20 tokens inside literals that may span lines."""
    characters: int
    """Characters inside literals of which only triple-quoted ones may span lines."""
    long_word_characters: int
    """Of those, in white-space separated words of more than 20 characters without a URL."""


class EncodedCounts(NamedTuple):
    """Runs of encoded data: base64 (64 characters and more), hex bytes and \\u escapes (8 and more)."""

    longest: int
    characters: int


def literals(code: str, *, across_lines: bool) -> Iterator[str]:
    """The insides of string literals, empty ones left out: from a quote to the next of its kind, triple quotes first,
    escapes unknown. Literals in single or double quotes end on their own line unless `across_lines`."""
    position, exhausted = 0, set[str]()
    newline = -1  # the next one; looked for again only once passed: a line may hold many quotes
    opening = re.compile("['\"]")
    while (found := opening.search(code, position)) is not None:
        position = found.start()
        quote = found.group()
        for mark in (quote * 3, quote):
            if mark in exhausted or not code.startswith(mark, position):
                continue
            begin = position + len(mark)
            bound = len(code)
            if len(mark) == 1 and not across_lines:
                if newline < begin:
                    newline = code.find("\n", begin)
                    newline = len(code) if newline < 0 else newline
                bound = newline
            end = code.find(mark, begin, bound)
            if end >= 0:
                if end > begin:
                    yield code[begin:end]
                position = end + len(mark)
                break
            if bound == len(code):
                exhausted.add(mark)
        else:
            position += 1


def count_strings(code: str) -> StringCounts:
    """StringCounts of a code text."""
    cpp = engine()
    if cpp is not None:
        return StringCounts(*cpp.count_strings(code))
    long_lines = 0
    for inside in literals(code, across_lines=True):
        long_lines += sum(len(PIECES.findall(line)) > LONG_LINE_TOKENS for line in inside.split("\n"))
    characters = long_word_characters = 0
    for inside in literals(code, across_lines=False):
        characters += len(inside)
        long_word_characters += sum(len(w) for w in inside.split() if len(w) > LONG_WORD and not _URL.search(w))
    return StringCounts(long_lines, characters, long_word_characters)


def count_encoded(text: str) -> EncodedCounts:
    """EncodedCounts of a text."""
    cpp = engine()
    if cpp is not None:
        return EncodedCounts(*cpp.count_encoded(text))
    sizes = [m.end() - m.start() for p in (_BASE64, _HEX_BYTES, _UNICODE_ESCAPES) for m in p.finditer(text)]
    return EncodedCounts(max(sizes, default=0), sum(sizes))


def hex_word_characters(text: str) -> int:
    """Characters of the whole words 0x… of a text."""
    cpp = engine()
    if cpp is not None:
        return int(cpp.hex_word_characters(text))
    return sum(m.end() - m.start() for m in _HEX_WORD.finditer(text))
