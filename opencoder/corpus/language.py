"""Language and doc type of a file by its name: exact file name first, then extension (case kept), else unknown.

The table (languages.json) derives from github-linguist; its licence stands inside."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

UNKNOWN = "unknown"
EXCLUDED = "excluded"


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


def detect(path: str) -> Language:
    """The language of a path; only its last component counts. Longer extensions win (`html.hl` before `hl`)."""
    table = tables()
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    language = table.filenames.get(name)
    parts = name.split(".")
    for i in range(1, len(parts)):
        if language is None:
            language = table.extensions.get(".".join(parts[i:]))
    if language is None:
        return Language(UNKNOWN, UNKNOWN)
    return Language(language, table.doc_types[language])
