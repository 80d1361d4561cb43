"""A source text split into its code and its comments.

Default mode: the lexers of csrc/text, by the tables of comment_syntax.yaml. Comments are line and block comments, a leading
`#!` line, and in Python the strings that start a statement. A newline behind a comment ends it there as well, so that
comments stay lines, and a line that holds nothing else leaves the code. Neither part is ever longer than the text.

Compat mode: what the published filter gets from Pygments. Its comments are the tokens of type multi-line comment,
single-line comment, doc string, hashbang and special comment of the lexer that bears the language's name; the rest is code.
Pygments strips newlines at both ends and ends the text with one. A language without such a lexer goes through the released
line scanner, Perl through its own. For the languages of `RELEASED` C++ repeats the tokens at 80–270 MB/s; for the others
Pygments itself runs (0.5–3 MB/s)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from opencoder.native import text_engine

RELEASED = {
    "c": "c", "cpp": "cpp", "csharp": "csharp", "css": "nothing", "go": "go", "html": "html", "java": "java",
    "javascript": "javascript", "json": "json", "php": "php", "python": "python", "rust": "rust", "sage": "python",
    "sql": "sql", "starlark": "python", "typescript": "typescript", "xml": "xml",
}  # fmt: skip
"""Language → the lexer of csrc/text that repeats Pygments' tokens for it. CSS: Pygments types its comments as plain comment,
which the filter takes for code."""

HEADER_CHARACTERS = 16384
"""A leading comment is looked for in the text's first characters, and in the whole only if it is longer than they are."""


class Split(NamedTuple):
    """The two parts of a text, each in order."""

    code: str
    comments: str


class CommentSpan(NamedTuple):
    """Where a comment stands."""

    begin: int
    end: int
    """In code points; `end` is the first one behind."""
    kind: int
    """0 comment, 1 doc string, 2 hashbang."""


class _Quote(NamedTuple):
    """A kind of string, as comment_syntax.yaml describes it."""

    open: str
    close: str
    escape: bool
    multiline: bool
    doc: bool
    insert: str


def split(text: str, language: str, *, compat: bool = False) -> Split:
    """Code and comments of `text` (every line end a single newline). `compat` asks for exactly what the published filter
    sees. A language of unknown comment syntax is all code."""
    if compat or text_engine() is None:  # without the engine Pygments serves both modes
        return _released(text, language)
    lexer = _table_lexer(language)
    return Split(text, "") if lexer is None else Split(*lexer.split(text, False))


def comment_spans(text: str, language: str) -> list[CommentSpan]:
    """The comments of `text` in default mode, in order; empty if the language's comment syntax is unknown.

    Raises RuntimeError without the text engine."""
    if text_engine() is None:
        raise RuntimeError("comments need the text engine: install a C++ compiler and run `pip install -e .` again")
    lexer = _table_lexer(language)
    return [] if lexer is None else [CommentSpan(*span) for span in lexer.spans(text, False)]


def leading_comment(text: str, language: str) -> tuple[int, int] | None:
    """Where the first block of comments stands, if the text begins with one: (begin, end), end exclusive.

    Before it only white space, a byte order mark, a `#!` line, a coding line of Python or Ruby, an XML declaration, a document
    type or `<?php` may stand. The block is the first comment and those that follow with no blank line and no code between
    them; the newline behind it is not part of it. Doc strings do not count."""
    found = _leading_comment(text[:HEADER_CHARACTERS], language)
    if found and found[1] >= HEADER_CHARACTERS - 1 and len(text) > HEADER_CHARACTERS:
        found = _leading_comment(text, language)
    return found


def _leading_comment(text: str, language: str) -> tuple[int, int] | None:
    spans = comment_spans(text, language)
    at = _behind_preamble(text)
    block: tuple[int, int] | None = None
    for begin, end, kind in spans:
        if end <= at or kind == 2:
            at = max(at, end)
            continue
        if kind == 1:
            break
        if block is None:
            if text[at:begin].strip("\ufeff \t\n\r\f"):
                break
            if "coding" in text[begin:end] and "\n" not in text[begin:end] and _is_coding_line(text, begin, end):
                at = end
                continue
            block = (begin, end)
        elif (gap := text[block[1] : begin]).isspace() or not gap:
            if gap.count("\n") + text[block[1] - 1 : block[1]].count("\n") > 1:
                break
            block = (block[0], end)
        else:
            break
    if block and text[block[1] - 1] == "\n":
        block = (block[0], block[1] - 1)
    return block


def _behind_preamble(text: str) -> int:
    """Behind an XML declaration, document type or `<?php` that the text begins with."""
    at = 0
    while True:
        start = len(text) - len(text[at:].lstrip("\ufeff \t\n\r\f"))
        if text.startswith("<?php", start):
            return start + len("<?php")
        if text.startswith("<?xml", start) or text[start : start + 9].lower() == "<!doctype":
            end = text.find(">", start)
            if end < 0:
                return at
            at = end + 1
        else:
            return at


def _is_coding_line(text: str, begin: int, end: int) -> bool:
    """Whether a comment on line 1 or 2 declares the encoding (PEP 263; Ruby's magic comment has the same form)."""
    comment = text[begin:end]
    return text.count("\n", 0, begin) < 2 and comment.startswith("#") and ("coding:" in comment or "coding=" in comment)


def raw_lines(text: str) -> list[str]:
    """The text cut after each newline, which stays part of its line."""
    lines = text.split("\n")
    last = lines.pop()
    return [line + "\n" for line in lines] + ([last] if last else [])


@cache
def syntax_table() -> dict[str, dict[str, Any]]:
    """Language → its entry of comment_syntax.yaml."""
    entries = yaml.safe_load((Path(__file__).parent / "comment_syntax.yaml").read_text(encoding="utf-8"))
    return {language: entry for entry in entries for language in entry["languages"]}


@cache
def _table_lexer(language: str) -> Any:
    """The default mode's lexer, or None."""
    make: Any = text_engine()
    entry = syntax_table().get(language)
    if entry is None:
        return None
    if "lexer" in entry:
        return make.Lexer(entry["lexer"])
    lines = [(mark, "anywhere") if isinstance(mark, str) else tuple(mark) for mark in entry.get("lines", [])]
    blocks = [_block(*block) for block in entry.get("blocks", [])]
    strings = [_quote(string) for string in entry.get("strings", [])]
    return make.Lexer.from_table(lines, blocks, strings, entry.get("features", []))


def _block(opening: str, closing: str, how: str = "") -> tuple[str, str, bool, bool]:
    if how not in ("", "nested", "lines"):
        raise ValueError(f"comment_syntax.yaml: a block comment is nested or lines, not {how}")
    return opening, closing, how == "nested", how == "lines"


def _quote(entry: str | dict[str, Any]) -> _Quote:
    known: dict[str, Any] = {"open": entry} if isinstance(entry, str) else entry
    return _Quote(
        known["open"],
        known.get("close", known["open"]),
        known.get("escape", True),
        known.get("multiline", False),
        known.get("doc", False),
        known.get("insert", ""),
    )


# The published filter ---------------------------------------------------------------------------------------------------


def _released(text: str, language: str) -> Split:
    if language == "perl":
        return _perl(text)
    if text_engine() is not None and language in RELEASED:
        return Split(*_released_lexer(RELEASED[language]).split(_as_pygments_reads(text), True))
    lexer = _pygments_lexer(language)
    if lexer is None:
        return _by_hand(text)
    comment_types = _comment_types()
    code: list[str] = []
    comments: list[str] = []
    for kind, token in lexer.get_tokens(text):
        (comments if kind in comment_types else code).append(token)
    return Split("".join(code), "".join(comments))


def _as_pygments_reads(text: str) -> str:
    """Without byte order mark, with single newlines, none at the start and one at the end."""
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip("\n") + "\n"


@cache
def _released_lexer(name: str) -> Any:
    engine: Any = text_engine()
    return engine.Lexer(name)


@cache
def _pygments_lexer(language: str) -> Any:
    """Pygments' lexer of that name, or None."""
    from pygments.lexers import get_lexer_by_name  # 0.1 s: only where it is needed
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language)
    except ClassNotFound:
        return None


@cache
def _comment_types() -> frozenset[Any]:
    from pygments.token import Comment, Literal

    return frozenset({Comment.Multiline, Comment.Single, Literal.String.Doc, Comment.Hashbang, Comment.Special})


def _by_hand(text: str) -> Split:
    """The released line scanner. Once a line starts with #, // or --, it takes all that follows for comment, up to a line
    that starts or ends with triple quotes or C comment marks."""
    code, comments, inside = [], [], False
    for line in raw_lines(text):
        stripped = line.strip()
        if stripped.startswith(('"""', "/*")) or stripped.endswith(('"""', "*/")):
            inside = not inside
            comments.append(line)
        elif stripped.startswith(("#", "//", "--")) or inside:
            inside = True
            comments.append(line)
        else:
            code.append(line)
    return Split("".join(code), "".join(comments))


def _perl(text: str) -> Split:
    """The released scanner for Perl: POD blocks and lines that start with # are comments."""
    code, comments, inside = [], [], False
    for line in raw_lines(text):
        stripped = line.strip()
        if stripped.startswith("=cut"):
            inside = False
            comments.append(line)
        elif stripped.startswith("="):
            inside = True
            comments.append(line)
        elif stripped.startswith("#") or inside:
            comments.append(line)
        else:
            code.append(line)
    return Split("".join(code), "".join(comments))
