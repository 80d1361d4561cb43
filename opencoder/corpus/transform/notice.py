"""What makes a comment a copyright or licence notice, and what a notice says: SPDX ids, years and holders.

All expressions are bounded: their time grows linearly with the text."""

from __future__ import annotations

import re
from typing import NamedTuple

_YEAR = r"(?:19[6-9]\d|20[0-4]\d)"
_SYMBOL = r"(?:\(c\)|©|&copy;|\\copyright\b|\(co?py?r?\))"

_ON_ONE_LINE = [
    rf"copyright[ \t:,]{{0,4}}{_SYMBOL}",
    rf"(?:copyright|{_SYMBOL})[^\n]{{0,60}}?\b{_YEAR}\b",
    rf"\b{_YEAR}\b[ ,]{{0,3}}(?:copyright|{_SYMBOL})",
    r"^[\s*#/;%!'-]{0,12}copyright:? [A-Z][\w.]+(?: [A-Z(][^\n]{0,40})?$",
    r"^[\s*#/;%!'-]{0,12}(?:\(c\)|©) ?[A-Z]",
    r"^[\s*#/;%!'-]{0,12}licen[sc]e[ \t]{0,4}[:=][ \t]{0,30}(?:\w|<|http)",
]
_PHRASES = [
    r"copyright (?:by|the|held by) [A-Z]",
    r"SPDX-(?:License-Identifier|FileCopyrightText)",
    r"@(?:licen[sc]e|copyright|preserve)\b",
    r"all rights reserved",
    r"(?:is|are) subject to the (?:terms|licen[sc]e|following)",
    r"https?://[^\s|]{1,120}/(?-i:LICEN[SC]E|COPYING)\b",
    r"copyright and licen[sc]e (?:information|notice|terms)",
    r"\blicensed (?:under|to|for)\b",
    r"(?:released|distributed|available|provided|covered|published|redistributed|governed) "
    r"(?:under|by) (?:the )?(?:terms|conditions|same|"
    r"[\w .,'-]{0,50}licen[sc]e)",
    r"permission (?:is|to) (?:hereby |use|copy)",
    r"redistribution and use in source",
    r"gnu (?:lesser |library |affero |free documentation )?(?:general public )?licen[sc]e",
    r"use of this (?:source code|file|software) is governed",
    r"(?:in|into|to) the public domain",
    r"\b(?:see|read|in) (?:the )?(?:accompanying )?(?:files? )?[`'\"<(]{0,2}"
    r"(?:[\w./-]{0,40}/)?(?-i:LICEN[SC]E|COPYING|COPYRIGHT|Copyright\.txt|copyright\.h)",
    r"(?:mit|bsd|apache|isc|zlib|boost software|mozilla public|eclipse public|common development|"
    r"academic free|artistic|wtfpl|openssl|php|ruby)"
    r"(?:-style)?,? (?:2\.0 |v?[123](?:\.\d)? )?(?:software )?licen[sc]e",
    r"free software[;:,]? you can",
    r"this (?:program|library|software|file) is free software",
]
_NOTICE_LINE = re.compile("|".join(f"(?:{n})" for n in _ON_ONE_LINE), re.IGNORECASE | re.MULTILINE)
_NOTICE_PHRASE = re.compile("|".join(f"(?:{n})" for n in _PHRASES), re.IGNORECASE)
_LINE_BREAK = re.compile(r"[ \t]*\r?\n[\s*#/;%!'\"-]{0,40}")

LEGAL = re.compile(
    r"licen[sc]|copyright|\(c\)|©|redistribut|warrant|liab(?:le|ility)|permission|free software|\bGNU\b|rights reserved|"
    r"public domain|trademark|merchantab|fitness for|as is\b|in no event|endorse or promote|derived from this software|"
    r"www\.gnu\.org|opensource\.org|apache\.org/|59 temple|51 franklin|675 mass|sub-?licen|royalt|"
    r"hereby|disclaim|in binary form|source distribution|damages|please contact|additional information|"
    r"this file is (?:a )?part of|original code|initial developer|covered (?:code|software)|provisions above|"
    r"alternatively,? the contents|\bCDDL\b|\b[AL]?GPL\b|\bSPDX\b",
    re.IGNORECASE,
)
"""Words of legal text: a paragraph of a notice that has one belongs to the notice."""

GENERATED = re.compile(
    r"generated (?:by|from|with|code|file|automatically)|auto-?generated|do not (?:edit|modify)|machine generated",
    re.IGNORECASE,
)
"""Says that a file was made by a program: the rules on generated files read it, so it stays."""

META = re.compile(
    r"^\W{0,6}(?:@|\\)?(?:authors?|written by|created|modified|maintainers?|contributors?|version|date|file(?:name)?|package|"
    r"sub-?package|project|module|"
    r"link|since|category|e-?mail|url|home ?page|web ?site|history|revision|id|rcs|see|translat\w+|by|website|team|"
    r"vim|library|program|title|name)\b[\s:=$-]|"
    r"^\W{0,6}\$(?:Id|Revision|Date|Header|Author)\b|^\W{0,6}https?://\S+\W*$|<[\w.+-]+@[\w.-]+>| at [\w.-]+ dot ",
    re.IGNORECASE,
)
"""Lines of a header that describe the file without documenting it."""

_SPDX = re.compile(r"SPDX-License-Identifier:\s{0,4}([\w.+() -]{1,200})")
_SPDX_ID = re.compile(r"^[\w.+()-]+(?: [\w.+()-]+)*")
_COPYRIGHT = re.compile(rf"(?:copyright|{_SYMBOL}|SPDX-FileCopyrightText:)[^\n]{{0,300}}", re.IGNORECASE)
LEAD = re.compile(rf"(?:copyright(?:ed)?|SPDX-FileCopyrightText:|{_SYMBOL}|[\s:,;.-]|\bby\b)*", re.IGNORECASE)
YEARS = re.compile(rf"{_YEAR}(?:\s{{0,2}}[,–-]\s{{0,2}}(?:{_YEAR}|\d\d\b|present|now))*", re.IGNORECASE)
"""What stands before years and holder, and years as a list of ranges."""
_LATE_YEARS = re.compile(rf"[ \t,]({YEARS.pattern})(?=[\s.,]|$)", re.IGNORECASE)
_HOLDER_END = re.compile(
    r"\s*(?:[.,;]?\s*all rights reserved|\*/|-->|(?<![A-Z])\.\s|\.$|\s[|—]\s|\s-\s|[;{]|"
    r"\blicensed\b|\breleased\b|\bunder the\b|\(?https?:|<[^>]{0,80}>|\(see\b|$)",
    re.IGNORECASE,
)


NOTICE_WITHIN = 16_000


class Copyright(NamedTuple):
    """One copyright line."""

    years: str
    """As written, blanks removed: `1999-2003,2005`; '' where none is given."""
    holder: str
    """'' where none is given."""


def is_notice(comment: str) -> bool:
    """Whether a comment, markers included, holds a copyright or licence notice. Of one longer than NOTICE_WITHIN characters only
    both ends are read."""
    if len(comment) > NOTICE_WITHIN:
        comment = f"{comment[: NOTICE_WITHIN // 2]}\n{comment[-NOTICE_WITHIN // 2 :]}"
    if LEGAL.search(comment) is None:
        return False  # most comments end here
    # A phrase may go on behind a line break and the comment's marks.
    return _NOTICE_LINE.search(comment) is not None or _NOTICE_PHRASE.search(_LINE_BREAK.sub(" ", comment)) is not None


def spdx_ids(text: str) -> list[str]:
    """The SPDX expressions tagged in `text`, each once, in order. Source: SPDX specification 2.3, annex E."""
    found = []
    for tag in _SPDX.findall(text):
        expression = _SPDX_ID.match(tag.strip())
        if expression:
            found.append(expression[0].strip(" -"))
    return list(dict.fromkeys(found))


def copyrights(text: str) -> list[Copyright]:
    """The years and holders of the copyright lines in `text`, each once, in order."""
    found = []
    for line in _COPYRIGHT.findall(text):
        rest = line
        lead = LEAD.match(rest)
        rest = rest[lead.end() :] if lead else rest
        years = []
        while year := YEARS.match(rest):
            years.append(re.sub(r"\s", "", year[0]))
            rest = rest[year.end() :].lstrip(" \t,;:.-–")
            lead = LEAD.match(rest)
            rest = rest[lead.end() :] if lead else rest
        if not years and (late := _LATE_YEARS.search(rest)):  # `Copyright Jane Doe 2001-2004.`
            years, rest = [re.sub(r"\s", "", late[1])], rest[: late.start()]
        end = _HOLDER_END.search(rest)
        holder = (rest[: end.start()] if end else rest).strip(" \t*#/-,.'\"")
        if years or holder[:1].isupper():
            found.append(Copyright(",".join(years), holder[:120] if _looks_like_holder(holder) else ""))
    return list(dict.fromkeys(f for f in found if f.years or f.holder))


def _looks_like_holder(holder: str) -> bool:
    lower = holder.lower()
    return bool(holder) and not lower.startswith(
        ("notice", "holder", "owner", "and ", "law", "in ", "(c)", "licen", "statement")
    )
