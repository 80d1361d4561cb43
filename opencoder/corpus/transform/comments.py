"""Comment syntax of a language at the head of a file (comments.yaml, comment_syntax.yaml), and the comments with which a text
begins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..lexing import syntax_table

UNKNOWN = "unknown"
MAX_LEADING = 100_000
"""Characters in which leading comments are looked for: the longest licence in use, GPL-3, has 35,000."""
NESTING = ("{-", "(*", "#|", "/+", "(;", "#=", "/-", "(:", "#[")
"""Opening markers of comments that may hold comments of their own."""
_BLANKS = re.compile(r"[ \t\r\n\f\v]*")
_LINE_END = re.compile(r"[^\n]*\n?")


class Syntax(NamedTuple):
    """How a language writes comments."""

    line: tuple[str, ...]
    """Markers of comments that end with the line, longest first."""
    block: tuple[tuple[str, str], ...]
    """(opening, closing) markers, longest opening first."""
    string: tuple[str, ...]
    """Quotes of string literals that serve as a comment where they are the first statement."""
    preamble: re.Pattern[str]
    """What may stand before the header and stays."""


_Markers = tuple[frozenset[str], frozenset[tuple[str, str]]]
"""Of line and block comments."""


class Comment(NamedTuple):
    """One block comment, or a run of line comments without a blank line between."""

    start: int
    """Offset of its first character; its indentation is not part of it."""
    end: int
    """Offset behind its last one: the closing marker, or the line end of the last line."""
    marker: str
    """Opening marker."""
    close: str
    """Closing marker; '' for line comments."""


def _syntax(line: Iterable[str], block: Iterable[Sequence[str]], facts: dict[str, Any], common: list[str]) -> Syntax:
    """`facts`: string and preamble of a family, if it has them."""
    return Syntax(
        tuple(sorted(line, key=len, reverse=True)),
        tuple(sorted(((opening, closing) for opening, closing, *_ in block), key=lambda pair: -len(pair[0]))),
        tuple(facts.get("string", [])),
        re.compile("|".join(f"(?:{pattern})" for pattern in [*facts.get("preamble", []), *common])),
    )


@cache
def _named() -> tuple[dict[str, Syntax], dict[_Markers, Syntax], list[str]]:
    """What comments.yaml says: language → syntax, markers → syntax of the first family that has them, common preamble."""
    data = yaml.safe_load((Path(__file__).parent / "comments.yaml").read_text(encoding="utf-8"))
    common: list[str] = data["common_preamble"]
    named: dict[str, Syntax] = {}
    families: dict[_Markers, Syntax] = {}
    for family, facts in data["families"].items():
        syntax = _syntax(facts["line"], facts.get("block", []), facts, common)
        families.setdefault(_markers(syntax), syntax)
        for language in facts["languages"]:
            assert language not in named, f"comments.yaml names {language} twice"
            named[language] = syntax
        if family == UNKNOWN:
            named[UNKNOWN] = syntax
    return named, families, common


def _markers(syntax: Syntax) -> _Markers:
    return frozenset(syntax.line), frozenset(syntax.block)


def lexed_syntax(language: str) -> Syntax | None:
    """The syntax with the markers that comment_syntax.yaml has for the language; None where it has none or a lexer of its own."""
    entry = syntax_table().get(language)
    if entry is None or "lexer" in entry:
        return None
    _, families, common = _named()
    line = (mark if isinstance(mark, str) else mark[0] for mark in entry.get("lines", []))
    syntax = _syntax(line, entry.get("blocks", []), {}, common)
    return families.get(_markers(syntax), syntax)


@cache
def syntax_of(language: str) -> Syntax:
    """The comment syntax of a language of languages.json; one that no table names gets the common markers."""
    named, _, _ = _named()
    return named.get(language) or lexed_syntax(language) or named[UNKNOWN]


def named_languages() -> set[str]:
    """Every language that comments.yaml names."""
    return set(_named()[0]) - {UNKNOWN}


def leading_comments(text: str, syntax: Syntax) -> list[Comment]:
    """The comments before the first statement of `text`, in order; a preamble (hashbang, XML declaration…) is stepped over.

    A block comment that is not closed within MAX_LEADING characters ends the search: it is not known to be a comment."""
    found: list[Comment] = []
    limit = min(len(text), MAX_LEADING)
    position = 1 if text.startswith("\ufeff") else 0
    while position < limit:
        position = _skip_blanks(text, position)
        end = _preamble_end(text, position, syntax)
        if end > position:
            position = end
            continue
        comment = _comment_at(text, position, limit, syntax, first=not found)
        if comment is None:
            break
        found.append(comment)
        position = comment.end
    return found


def _skip_blanks(text: str, position: int) -> int:
    found = _BLANKS.match(text, position)
    assert found is not None
    return found.end()


def _line_end(text: str, position: int) -> int:
    found = _LINE_END.match(text, position)
    assert found is not None
    return found.end()


def _preamble_end(text: str, position: int, syntax: Syntax) -> int:
    """End of a preamble at `position`, or `position`. A block comment that goes on in the next line is none, whatever its
    first line says (an editor's mode line often opens the header)."""
    for opening, closing in syntax.block:
        if text.startswith(opening, position):
            line = text[position + len(opening) : _line_end(text, position)]
            if closing not in line:
                return position
    found = syntax.preamble.match(text, position)
    return found.end() if found else position


def _comment_at(text: str, position: int, limit: int, syntax: Syntax, first: bool) -> Comment | None:
    for opening, closing in syntax.block:
        if text.startswith(opening, position) and _word_ends(text, position, opening):
            end = _block_end(text, position, limit, opening, closing)
            return None if end < 0 else _box(text, Comment(position, end, opening, closing), limit)
    if first:
        for quote in syntax.string:
            start = position + (text[position : position + 1] in ("r", "R", "u", "U"))
            if text.startswith(quote, start):
                end = text.find(quote, start + len(quote), limit)
                # Only a whole statement is a doc string: """…""".format(…) is not.
                if end >= 0 and text[end + len(quote) : _line_end(text, end + len(quote))].strip() == "":
                    return Comment(position, end + len(quote), text[position : start + len(quote)], quote)
    for marker in syntax.line:
        if _marks_line(text, position, marker):
            return _run_of_lines(text, position, limit, marker, syntax)
    return None


def _block_end(text: str, position: int, limit: int, opening: str, closing: str) -> int:
    """Offset behind the closing marker, or -1."""
    if opening not in NESTING:
        end = text.find(closing, position + len(opening), limit)
        return -1 if end < 0 else end + len(closing)
    depth, position = 1, position + len(opening)
    inner = end = 0  # the next of either marker; only looked for again once passed, so that the time stays linear
    while depth:
        if end < position:
            end = text.find(closing, position, limit)
        if 0 <= inner < position:
            inner = text.find(opening, position, limit)
        if end < 0:
            return -1
        if 0 <= inner < end:
            depth, position = depth + 1, inner + len(opening)
        else:
            depth, position = depth - 1, end + len(closing)
    return position


def _box(text: str, comment: Comment, limit: int) -> Comment:
    """`comment`, or the run of block comments that it begins where each fills one line: a header drawn as a box."""
    start, end, opening, closing = comment
    lines = 0
    position = start
    while position < limit and text.startswith(opening, position):
        line_end = _line_end(text, position)
        line = text[position:line_end].rstrip()
        if not line.endswith(closing) or len(line) < len(opening) + len(closing) or line.count(closing) > 1:
            break
        lines, end = lines + 1, line_end
        position = line_end
        while text[position : position + 1] in (" ", "\t"):
            position += 1
    return Comment(start, end, opening, "") if lines > 1 else comment


def _word_ends(text: str, position: int, marker: str) -> bool:
    """A marker made of letters must be a word of its own."""
    after = text[position + len(marker) : position + len(marker) + 1]
    return not marker[-1].isalpha() or after == "" or not (after.isalnum() or after == "_")


def _marks_line(text: str, position: int, marker: str) -> bool:
    if marker[-1].isalpha():
        given = text[position : position + len(marker)]
        # One letter is a Fortran comment and must keep its case and its column; words are read in any case.
        same = given == marker and _column(text, position) == 0 if len(marker) == 1 else given.lower() == marker.lower()
        return same and text[position + len(marker) : position + len(marker) + 1] in ("", " ", "\t", "\r", "\n")
    return text.startswith(marker, position)


def _column(text: str, position: int) -> int:
    return position - (text.rfind("\n", 0, position) + 1)


def _run_of_lines(text: str, start: int, limit: int, marker: str, syntax: Syntax) -> Comment:
    end = _line_end(text, start)
    while end < limit:
        position = end
        while text[position : position + 1] in (" ", "\t"):
            position += 1
        if not _marks_line(text, position, marker) or _preamble_end(text, position, syntax) > position:
            break
        end = _line_end(text, position)
    return Comment(start, end, marker, "")
