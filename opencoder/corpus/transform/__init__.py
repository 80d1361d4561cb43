"""Small defects mended instead of dropping the file: the copyright header taken out, personal data replaced by placeholders,
the licence read on the way.

`transform` does all of it to one text; `licence.RepositoryLicences`, `licence.licence_of` and `licence.is_allowed` decide on
licences once a repository's files are known. What is removed and what stays: docs/transform.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opencoder.corpus_config import TransformConfig

from .header import Header, find_header
from .licence import Licence, is_licence_file, licence_of, licences_in
from .notice import spdx_ids
from .pii import PLACEHOLDERS, counts, find_pii
from .spans import PiiSpan

__all__ = ["Header", "Licence", "PiiSpan", "Transformed", "transform"]


@dataclass(frozen=True)
class Transformed:
    """A text after the step, and what was done to it. Offsets are in characters of the text as given."""

    text: str
    header: Header
    """The notices found in the leading comments; `header.removed` is empty where headers are left."""
    licence: Licence
    """By the file alone: its tags and its header; for a licence file its text."""
    pii: tuple[PiiSpan, ...]
    """Ascending, without overlaps, none inside the removed header."""

    @property
    def pii_counts(self) -> dict[str, int]:
        """Spans per kind; kinds without any are left out."""
        return counts(self.pii)

    def record(self) -> dict[str, Any]:
        """What was found and done as plain values for a table or JSON; with the text as given it leads to `text`."""
        return {
            "licence": self.licence.expression,
            "licence_source": self.licence.source,
            "spdx": list(self.header.spdx),
            "header_licences": list(self.header.licences),
            "copyrights": [list(c) for c in self.header.copyrights],
            "removed": [list(span) for span in self.header.removed],
            "pii": [list(span) for span in self.pii],
        }

    @property
    def changed(self) -> bool:
        """Whether `text` differs from the text as given."""
        return bool(self.header.removed or self.pii)


def transform(text: str, *, language: str, path: str, config: TransformConfig) -> Transformed:
    """Strip the header of a file, replace its personal data, and read its licence.

    `language` is a name of languages.json, `path` the file's path (a licence file is known by it). Time grows linearly with
    the length of the text. A licence file keeps its notice: it is the file's content."""
    licence_file = is_licence_file(path)
    header = Header() if licence_file else find_header(text, language)
    if licence_file:
        licence = licence_of(spdx_ids(text), licences_in(text))
    else:
        # A tag counts wherever it stands in the first lines: not every file has it in a comment of its own.
        tags = header.spdx or (spdx_ids(text[:4000]) if "SPDX-License-Identifier" in text[:4000] else ())
        licence = licence_of(tags, header.licences)
    removed = header.removed if config.headers else ()
    if not config.headers:
        header = Header((), header.spdx, header.licences, header.copyrights)
    spans = []
    if config.pii:
        spans = [
            s for s in find_pii(text, language, config.pii) if not any(a <= s.start and s.end <= b for a, b in removed)
        ]
    edits = sorted([(a, b, "") for a, b in removed] + [(s.start, s.end, PLACEHOLDERS[s.kind]) for s in spans])
    parts, position = [], 0
    for start, end, new in edits:
        parts += [text[position:start], new]
        position = end
    return Transformed("".join([*parts, text[position:]]), header, licence, tuple(spans))
