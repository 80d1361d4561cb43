"""Language and doc type of a file by its name: exact file name first, then extension (case kept), else unknown.

The table (languages.json) derives from github-linguist; its licence stands inside."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

UNKNOWN = "unknown"
EXCLUDED = "excluded"
EXCLUDED_BY_DEFAULT = frozenset({"gerber image"})
"""Excluded though their doc type is another: the published list has it in capitals, which never match."""


class Language(NamedTuple):
    """What a file name says."""

    name: str
    doc_type: str
    """code, data, text, excluded or unknown."""


class _Tables(NamedTuple):
    extensions: dict[str, str]
    filenames: dict[str, str]
    doc_types: dict[str, str]


@cache
def tables() -> _Tables:
    """Extension (no dot) → language, file name → language, language → doc type."""
    data = json.loads((Path(__file__).parent / "languages.json").read_text(encoding="utf-8"))
    found = _Tables({}, {}, {})
    for language, (doc_type, extensions, filenames) in data["languages"].items():
        found.doc_types[language] = doc_type
        found.extensions.update(dict.fromkeys(extensions, language))
        found.filenames.update(dict.fromkeys(filenames, language))
    return found


def detect(path: str, *, compat: bool = False) -> Language:
    """The language of a path; only its last component counts. Longer extensions win (`html.hl` before `hl`).

    `compat` looks up what the published notebook passes: as name the one without its extension, so that `go.mod` loses
    its entry and `login.css` finds that of the shell file `login`, and as extension the last part alone."""
    table = tables()
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    if compat:
        stem, extension = os.path.splitext(name)
        language = table.filenames.get(stem) or table.extensions.get(extension[1:])
    else:
        parts = name.split(".")
        endings = (".".join(parts[i:]) for i in range(1, len(parts)))
        language = table.filenames.get(name) or next(filter(None, map(table.extensions.get, endings)), None)
    if language is None:
        return Language(UNKNOWN, UNKNOWN)
    excluded = language in EXCLUDED_BY_DEFAULT and not compat
    return Language(language, EXCLUDED if excluded else table.doc_types[language])
