"""What is counted over the lines of the code text. This module is the definition; csrc/text/code_lines.cpp counts the same."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from .characters import engine

_SPACES = re.compile(r"\s+")
_ASSIGNED_QUOTE = re.compile(r"=\s*[\"']")
_JOIN = re.compile(r"[\"']\s*\+\s*[\"']")
_ASSERTION = re.compile(r"(?<![a-z0-9])assert")


class CodeLineCounts(NamedTuple):
    """Counts over the lines of a code text that are not blank."""

    lines: int
    repeated: int
    """Lines that occur more than once, compared without any white space; single characters and `},` never count."""
    assertions: int
    """Lines with `assert` in any case anywhere."""
    assertion_words: int
    """Lines in which a word begins with `assert` in any case; a word may follow an underscore (static_assert)."""
    concatenations: int
    """Lines in which a quoted string is assigned and joined by + to another."""


def count_code_lines(code: str) -> CodeLineCounts:
    """CodeLineCounts of a code text."""
    cpp = engine()
    if cpp is not None:
        return CodeLineCounts(*cpp.count_code_lines(code))
    lines = [line for line in code.split("\n") if line and not line.isspace()]
    bare = Counter(_SPACES.sub("", line) for line in lines)
    return CodeLineCounts(
        len(lines),
        sum(n for line, n in bare.items() if n > 1 and len(line) > 1 and line != "},"),
        sum("assert" in line.lower() for line in lines),
        sum(_ASSERTION.search(line.lower()) is not None for line in lines),
        sum(map(concatenates, lines)),
    )


def concatenates(line: str) -> bool:
    """Whether `=\\s*["'].+?["']\\s*\\+\\s*["'].+?["']` is found in the line, in linear time: if it is, then from the first
    quote after an `=`, by the first join behind it, to the last quote."""
    opening = _ASSIGNED_QUOTE.search(line)
    join = _JOIN.search(line, opening.end() + 1) if opening else None
    return join is not None and max(line.rfind("'"), line.rfind('"')) > join.end()
