"""Copyright and licence comments at the head of a file: found, taken out, and their facts kept.

Only comments before the first statement count, and of these only the ones that hold a notice. A comment that is notice and
little else goes whole; one that documents the file as well loses just the paragraphs of its notice. What stays is byte for
byte what it was. Source of the step: arXiv:2411.04905, which deletes the leading copyright comment; its matcher is not
released."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from .comments import Comment, leading_comments, syntax_of
from .licence import licences_in
from .notice import GENERATED, LEGAL, META, Copyright, copyrights, is_notice, spdx_ids

DOCUMENTATION_WORDS = 12
"""A notice that stands with fewer words of other text (a title, a file name) goes with them."""
DOC_STRING_WORDS = 4
"""The same in a doc string, whose other text is documentation by its nature."""
_DECORATION = re.compile(r"^[\s*#/;%!'\"|=~_.+<>(){}@\\-]*|[\s*#/|=~_+(){}<>-]*$")
_WORD = re.compile(r"[^\W\d_]{2,}")
_TAG = re.compile(r"[\s*#/;%!'-]{0,12}[@\\]\w")
_OWN_LINE = re.compile(
    r"[\s*#/;%!'\"-]{0,12}(?:copyright\b|\(c\)|©|SPDX-|all rights reserved|licen[sc]e[ \t]{0,4}:)", re.IGNORECASE
)


class Span(NamedTuple):
    """A range of characters of the original text."""

    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What was found at the head of a file."""

    removed: tuple[Span, ...] = ()
    """What `strip` takes out, in order, without overlaps."""
    spdx: tuple[str, ...] = ()
    """SPDX expressions tagged in the notices."""
    licences: tuple[str, ...] = ()
    """SPDX ids recognised from the notices' words."""
    copyrights: tuple[Copyright, ...] = ()
    """Years and holders."""

    def strip(self, text: str) -> str:
        """`text`, from which this header was found, without the removed spans."""
        parts, position = [], 0
        for start, end in self.removed:
            parts.append(text[position:start])
            position = end
        return "".join([*parts, text[position:]])


def find_header(text: str, language: str) -> Header:
    """The notices in the leading comments of a file of `language` (a name of languages.json)."""
    removed: list[Span] = []
    notices: list[str] = []
    whole = -1  # end of the last comment that went whole
    for comment in leading_comments(text, syntax_of(language)):
        body = text[comment.start : comment.end]
        if is_notice(body):
            spans = _notice_spans(text, comment)
        elif whole >= 0 and text[whole : comment.start].strip() == "" and _is_legal(text, comment):
            spans = [_whole(text, comment)]  # the terms go on behind a blank line
        else:
            continue
        whole = comment.end if spans == [_whole(text, comment)] else -1
        removed += spans
        notices += [text[start:end] for start, end in spans]
    if not removed:
        return Header()
    notice = "\n".join(notices)
    return Header(tuple(removed), tuple(spdx_ids(notice)), tuple(licences_in(notice)), tuple(copyrights(notice)))


def _is_legal(text: str, comment: Comment) -> bool:
    """Whether every paragraph of a comment is legal text."""
    paragraphs = _paragraphs(text, comment)
    return bool(paragraphs) and all(p.kind == "notice" for p in paragraphs)


class _Paragraph(NamedTuple):
    start: int
    end: int
    text: str
    kind: str
    """notice, generated, meta (author, version…), or documentation."""


def _notice_spans(text: str, comment: Comment) -> list[Span]:
    paragraphs = _paragraphs(text, comment)
    generated = any(p.kind == "generated" for p in paragraphs)
    documented = sum(len(_WORD.findall(p.text)) for p in paragraphs if p.kind == "documentation")
    title = DOC_STRING_WORDS if comment.close and comment.close == comment.marker[-3:] else DOCUMENTATION_WORDS
    if documented < title and not generated:
        return [_whole(text, comment)]
    return _merge([Span(p.start, p.end) for p in paragraphs if p.kind == "notice" and p.end > p.start])


def _paragraphs(text: str, comment: Comment) -> list[_Paragraph]:
    """The paragraphs of a comment: lines between lines without words; lines that open with a tag (`@license`) or are a
    notice of their own (`Copyright …`, `SPDX-…`) begin one. Opening and closing marker belong to none; the empty lines
    behind a paragraph belong to it."""
    inner_start, inner_end = comment.start, comment.end
    if comment.close:
        inner_start += len(comment.marker)
        inner_end -= len(comment.close)
    groups: list[list[tuple[int, int, str]]] = []
    open_group = alone = False
    position = inner_start
    while position < inner_end:
        newline = text.find("\n", position, inner_end)
        end = inner_end if newline < 0 else newline + 1
        line = text[position:end]
        content = _DECORATION.sub("", line)
        if content:
            own = _OWN_LINE.match(line) is not None
            # A line of its own ends a paragraph of documentation, and prose behind it begins the next one; a line of legal
            # words goes on with it.
            breaks = _TAG.match(line) is not None or own or (alone and LEGAL.search(line) is None)
            if not open_group or breaks:
                groups.append([])
            groups[-1].append((position, end, content))
            open_group, alone = True, own
        else:
            open_group = False
            if groups:
                groups[-1].append((position, end, ""))
        position = end
    return [_judge(text, group, comment, inner_start, inner_end) for group in groups]


def _judge(text: str, group: list[tuple[int, int, str]], comment: Comment, first: int, last: int) -> _Paragraph:
    content = "\n".join(line for _, _, line in group if line)
    start, end = group[0][0], group[-1][1]
    if comment.close:
        if start == first:  # beside the opening marker: what follows it on that line, up to the line end
            start = first
            if text[end - 1 : end] == "\n" and end < last:
                end -= 1
        if end >= last:  # beside the closing marker: its own line stays with its indentation
            end = text.rfind("\n", start, last) + 1 if text[group[-1][0] : last].strip(" \t*") == "" else last
    if GENERATED.search(content):
        kind = "generated"
    elif LEGAL.search(content):
        kind = "notice"
    elif all(META.search(line) for line in content.split("\n")):
        kind = "meta"
    else:
        kind = "documentation"
    return _Paragraph(start, max(start, end), content, kind)


def _whole(text: str, comment: Comment) -> Span:
    """The comment with its indentation, the rest of its last line if blank, and the blank lines behind it unless they part
    it from something that stays above."""
    start, end = comment.start, comment.end
    while start > 0 and text[start - 1] in " \t":
        start -= 1
    if comment.close:
        rest = end
        while rest < len(text) and text[rest] in " \t\r":
            rest += 1
        if rest < len(text) and text[rest] == "\n":
            end = rest + 1
        elif start > 0 and text[start - 1] != "\n":
            return Span(comment.start, end)  # code before and behind on the same line: nothing else is touched
        else:
            end = rest
    above = text[:start]
    if not above.strip("\ufeff") or above.endswith(("\n\n", "\n\r\n")):
        while (newline := text.find("\n", end)) >= 0 and text[end:newline].strip() == "":
            end = newline + 1
    return Span(start, end)


def _merge(spans: list[Span]) -> list[Span]:
    """Neighbouring spans as one."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].end >= span.start:
            merged[-1] = Span(merged[-1].start, max(span.end, merged[-1].end))
        else:
            merged.append(span)
    return merged
