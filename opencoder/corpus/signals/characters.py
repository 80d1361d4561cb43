"""Classes of characters, the loaded C++ engine that knows them, and what is counted character by character."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

from opencoder.native import text_engine

TABLE_SIZE = 0x40000
"""Code points in the engine's table; those above have no class but the variation selectors, which are PIECE (a test
checks it)."""
WORD, SPACE, LETTER, DIGIT, UPPER, LOWER, PIECE = (1 << bit for bit in range(7))
"""Bits of a character's class: `\\w` and `\\s` of re, str.isalpha, str.isdigit, str.isupper, lower or title case, and `\\w` of
the package regex, which the published tokeniser uses: it counts combining marks as parts of a word."""

_DELETED = dict.fromkeys([*range(0x08), *range(0x0E, 0x1B), *range(0x1C, 0x20), 0x202C])
_SPACED = [*string.punctuation, *(chr(ord(c) + 0xFEE0) for c in string.punctuation), "\u2009", "\u200b"]
_SPACED += list("。、「」《》【】‘’“”")
TRANSLATION = {**_DELETED, **dict.fromkeys(map(ord, _SPACED), " ")}
"""For str.translate, the first step towards normalised words: what is deleted, and what becomes a space. Besides ASCII
punctuation and its full-width forms, these are the marks that the published filter maps to ASCII punctuation first."""


class CharacterCounts(NamedTuple):
    """How many characters of a text are of a kind, and its lines."""

    white_space: int
    letters: int
    digits: int
    replacements: int
    """U+FFFD."""
    curly_brackets: int
    lines: int
    """Raw lines: the text cut after each newline."""
    longest_line: int
    """Characters of the longest raw line, its newline included."""


def character_classes() -> bytes:
    """The bits of each code point below TABLE_SIZE."""
    everything = "".join(map(chr, range(TABLE_SIZE)))

    def bits(of: Callable[[str], bool], bit: int) -> NDArray[np.uint8]:
        return np.fromiter(map(of, everything), np.uint8, TABLE_SIZE) * np.uint8(bit)

    table = bits(str.isalnum, WORD) | bits(str.isspace, SPACE) | bits(str.isalpha, LETTER) | bits(str.isdigit, DIGIT)
    table |= bits(str.isupper, UPPER) | bits(str.islower, LOWER)
    table[ord("_")] |= WORD
    titles = bits(str.istitle, LOWER)
    table |= np.where(table & UPPER, np.uint8(0), titles)  # istitle() of one character is true of capitals too
    for run in regex.finditer(r"\w+", everything):
        table[run.start() : run.end()] |= PIECE
    return table.tobytes()


@cache
def engine() -> Any:
    """The C++ engine with its tables set, or None where it was not built."""
    cpp = text_engine()
    if cpp is not None:
        spaced = [code for code, to in TRANSLATION.items() if to is not None]
        deleted = [code for code, to in TRANSLATION.items() if to is None]
        cpp.set_character_tables(character_classes(), spaced, deleted)
    return cpp


def count_characters(text: str) -> CharacterCounts:
    """CharacterCounts of a text."""
    cpp = engine()
    if cpp is not None:
        return CharacterCounts(*cpp.count_characters(text))
    lengths = [len(line) + 1 for line in text.split("\n")]
    lengths[-1] -= 1  # nothing after the last newline, or a last line without one
    if not lengths[-1]:
        lengths.pop()
    return CharacterCounts(
        sum(map(str.isspace, text)),
        sum(map(str.isalpha, text)),
        sum(map(str.isdigit, text)),
        text.count("\ufffd"),
        text.count("{") + text.count("}"),
        len(lengths),
        max(lengths, default=0),
    )
