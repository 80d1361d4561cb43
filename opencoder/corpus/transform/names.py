"""Names of people where a header or a manifest states who wrote or owns something.

A name is only looked for behind such a marker: names elsewhere (in data, in prose) are left."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .data import words
from .notice import LEAD, YEARS
from .spans import PiiSpan

_PARTICLES = words("particles")
_NOT_A_NAME = words("no_names")
_ORGANISATIONS = words("organisations")
_SEPARATOR = re.compile(r"[ \t]*(?:,|;|&| and | und | et )[ \t]*")
_FIELD = re.compile(r"[^\n<>(){}\[\]|\"`@*/\\;:=]{2,160}")
_DATE_TAIL = re.compile(
    r"[ \t,]*(?:\bon\b|\bat\b|\bin\b|\b(?:19|20)\d\d\b|\d{1,2}[/.-]|\ball rights\b|\. ?$|(?<=[^\W\d_]{2})\.[ \t]+[A-Z]|\s-\s).*$",
    re.IGNORECASE | re.DOTALL,
)
_COMMENT_START = re.compile(r"(?:[\s*#/;%!'\"|{(<>.-]|dnl\b|REM\b)*$")
_AFTER_AUTHOR = re.compile(
    r"(?:s|\(s\))?[\"']{0,1}\]?[ \t]*(?:(::?|=>|=)[ \t]*|[ \t]+|(?=[{\[(]))(?:\[[ \t]*)?(?:u?[\"'])?", re.IGNORECASE
)
_CLOSING_NAME = re.compile(r"[^\n]{0,10}?\bname[\"']?[ \t]*[:=>]{1,2}[ \t]*[\"']")
_CHINESE = re.compile(r"[\u4e00-\u9fff·]{2,6}")
_TAG_HANDLE = re.compile(r"[A-Za-z][\w.-]{2,30}(?=[ \t]*(?:$|\n|<|\*|,|\())")
_LINK = re.compile(r"<a\b[^>\n]{0,200}>")


def _is_organisation(text: str) -> bool:
    return any(word.lower().rstrip(".,") in _ORGANISATIONS for word in re.split(r"[\s/&-]+", text))


def _is_word_of_name(word: str, capitals: bool) -> bool:
    if word.lower() in _PARTICLES:
        return True
    if len(word.rstrip(".")) == 1:
        return word[0].isupper()
    letters = re.sub(r"[.'’-]", "", word)
    return word[0].isupper() and letters.isalpha() and (capitals or not letters.isupper())


def is_person(text: str, *, capitals: bool = False) -> bool:
    """Whether `text` reads as the full name of one person: two to five words, each a capitalised word, an initial or a
    particle, no word of an organisation. Or two to six Chinese characters. `capitals`: names in capital letters count, too."""
    if _CHINESE.fullmatch(text):
        return True
    words = text.split()
    if not 2 <= len(words) <= 5 or _is_organisation(text):
        return False
    if any(w.strip(".,").lower() in _NOT_A_NAME for w in words) or words[-1].lower() in _PARTICLES:
        return False
    full = [w for w in words if w.lower() not in _PARTICLES and len(w.rstrip(".")) > 1]
    return (
        len(full) >= 1
        and sum(w.lower() not in _PARTICLES for w in words) >= 2
        and all(_is_word_of_name(w, capitals) for w in words)
    )


def _people(text: str, start: int, *, handles: bool = False, capitals: bool = True) -> Iterator[PiiSpan]:
    """The names in the list that begins at `start`, up to the first part that is none."""
    while text[start : start + 1] in (" ", "\t"):
        start += 1
    field = _FIELD.match(text, start)
    if field is None:
        return
    position = start
    for part in _SEPARATOR.split(field[0]):
        place = text.find(part, position)
        name = _DATE_TAIL.sub("", part).rstrip(" \t.,'-")
        offset = len(name) - len(name.lstrip(" \t'-"))
        name = name.strip(" \t'-")
        if not is_person(name, capitals=capitals) and not (
            handles and position == start and _is_handle(text, place + offset, name)
        ):
            return
        yield PiiSpan(place + offset, place + offset + len(name), "name")
        position = place + len(part)


def _is_handle(text: str, start: int, name: str) -> bool:
    return name.lower() not in _NOT_A_NAME and _TAG_HANDLE.fullmatch(name) is not None and not _is_organisation(name)


_NAME_BEFORE = re.compile(r"([^\W\d_][^\n<>(){}\[\]|\"`@*/\\;:=,]{2,60}?)[\"']?[ \t]{1,3}[<(]$")


def before_address(text: str, start: int) -> Iterator[PiiSpan]:
    """The name in `N <address>`; the address begins at `start`."""
    if text[start - 1 : start] not in ("<", "("):
        return
    found = _NAME_BEFORE.search(text[max(0, start - 70) : start])
    if found is None:
        return
    name = found[1]
    offset = 0
    while not is_person(name[offset:]):  # the last words may be a name where the first are not
        blank = name.find(" ", offset)
        if blank < 0:
            return
        offset = blank + 1
    begin = start - len(found[0]) + offset
    yield PiiSpan(begin, begin + len(name) - offset, "name")


def author_at(text: str, at: int, end: int) -> Iterator[PiiSpan]:
    """`@author N`, `Author: N`, `__author__ = "N"`, `"author": "N"`, `authors = ["N"]`, `\\author{N}`, `MODULE_AUTHOR("N")`."""
    before = text[max(0, at - 40) : at].rpartition("\n")[2]
    if text.startswith("ity", end) or text.startswith("iz", end) or text.startswith("is", end):
        return
    tag = before.endswith("@")
    if before.endswith(("\\", "MODULE_")):
        opening = text[end : end + 2]
        yield from _people(text, end + (2 if opening[1:] == '"' else 1)) if opening[:1] in ("{", "(") else ()
        return
    dunder = before.endswith("__") and text.startswith("__", end)
    found = _AFTER_AUTHOR.match(text, end + 2 if dunder else end)
    if found is None or (before[-1:].isalnum() and not tag):
        return
    position = found.end()
    operator, quoted = found[1], found[0].endswith(('"', "'"))
    if tag:
        if operator is None or operator == ":":
            link = _LINK.match(text, position)
            yield from _people(text, link.end() if link else position, handles=not text.startswith("s", end))
        return
    if text[position : position + 1] == "{":  # "author": {"name": "N"}
        inner = _CLOSING_NAME.match(text, position)
        if inner:
            yield from _people(text, inner.end())
        return
    if (quoted and operator) or (
        operator in (":", "::") and (_COMMENT_START.match(before) or before.rstrip().endswith("-*-")) and not quoted
    ):
        yield from _people(text, position)


def maker_at(text: str, at: int, end: int) -> Iterator[PiiSpan]:
    """`Written by N`, `Created by N on DATE`, `Maintainer: N`, `Contributor: N`, `Signed-off-by: N`, `__maintainer__ = "N"`."""
    before = text[max(0, at - 40) : at].rpartition("\n")[2]
    word = text[at:end].lower()
    if word.endswith(" by"):
        dated = re.match(r"[ \t]+[\w.-]{2,40}[ \t]+on[ \t]+[\d/.-]{6,10}", text[end : end + 80]) is not None
        if _COMMENT_START.match(before) or dated:
            yield from _people(text, end, handles=dated)
        return
    found = re.compile(r"(?:s|__)?[\"']?[ \t]*[:=][ \t]*(u?[\"'])?").match(text, end)
    if found and (found[1] or _COMMENT_START.match(before) or before.endswith("__")):
        yield from _people(text, found.end())


def holder_at(text: str, at: int) -> Iterator[PiiSpan]:
    """The people in a copyright line; `at` is the first of `copyright`, `(c)`, `©` on it."""
    line_end = text.find("\n", at, at + 300)
    line = text[at : line_end if line_end >= 0 else at + 300]
    position, years = 0, False
    marked = re.match(r"\(c\)|©|copyright[ \t:]{0,3}(?:\(c\)|©|&copy;)", line, re.IGNORECASE) is not None
    while True:
        lead = LEAD.match(line, position)
        year = YEARS.match(line, lead.end() if lead else position)
        position = year.end() if year else lead.end() if lead else position
        years = years or year is not None
        if year is None:
            break
    if marked or years:
        yield from _people(text, at + position, capitals=False)
