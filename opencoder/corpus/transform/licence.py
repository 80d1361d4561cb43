"""The licence of a file: by SPDX tag, by the words of a notice or a licence text, by the nearest licence file of its
repository; and whether an allow-list admits it.

Ids are SPDX's (https://spdx.org/licenses). Where a text is that of a GNU licence and does not say "only" or "or later", the
id is the bare `GPL-2.0` (deprecated by SPDX for being ambiguous, which here is the case)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from opencoder.errors import ConfigError, nearest

PERMISSIVE = "permissive"
"""Entry of an allow-list that stands for every licence marked permissive in licences.yaml."""
MAX_LICENCE_CHARS = 200_000
"""Longer texts are cut before they are searched."""
MAX_EXPRESSION_TOKENS = 100
_NOT_WORD = re.compile(r"[^a-z0-9]+")

_FAMILY = re.compile(
    r"\b(?:gnu (affero |lesser |library (?:or lesser )?)?(?:general )?public licen[sc]e|"
    r"gnu ([al]?)gpl|([al]?)gpl(?= ?(?:v|version)? ?[123])|(?:licen[sc]e|under|under the) ([al]?)gpl\b)"
)
_VERSION_AFTER = re.compile(r"^[a-z ]{0,110}?(?:\bversion|\bv|\bgpl|\bgplv|^) ?([123])(?: ([01]))?\b(?! \d)")
_VERSION_BEFORE = re.compile(r"version ([123])(?: ([01]))? (?:or later |or any later version )?(?:of )?(?:the )?$")
_LATER = re.compile(
    r"any later version|or later\b|or newer\b|or greater\b|or above\b|later version s? ?of|"
    r"any version|or any later|\bv?[123] ?plus\b|or higher"
)
_TEXTS = [
    # Title and date of each licence text, which no notice repeats. A text names others of the family, so it is looked for first.
    ("gnu affero general public license version 3 19 november 2007", "AGPL-3.0"),
    ("gnu lesser general public license version 3 29 june 2007", "LGPL-3.0"),
    ("gnu lesser general public license version 2 1 february 1999", "LGPL-2.1"),
    ("gnu library general public license version 2 june 1991", "LGPL-2.0"),
    ("gnu general public license version 3 29 june 2007", "GPL-3.0"),
    ("gnu general public license version 2 june 1991", "GPL-2.0"),
    ("gnu general public license version 1 february 1989", "GPL-1.0"),
    ("gnu free documentation license version 1 3 3 november 2008", "GFDL-1.3"),
    ("gnu free documentation license version 1 2 november 2002", "GFDL-1.2"),
    ("gnu free documentation license version 1 1 march 2000", "GFDL-1.1"),
]
_NAMES_GNU = ("mozilla public license version 2 0 1 definitions", "european union public licence v 1 2")
"""Texts that name GNU licences without granting them."""
LICENCE_FILE = re.compile(
    r"^(?:(?:un)?licen[sc]es?|copying|copyright|copyleft|notice-of-licen[sc]e|mit-licen[sc]e|licen[sc]e-mit)(?:[-._][\w.+-]{0,40})?$",
    re.IGNORECASE,
)
_CODE_SUFFIX = re.compile(
    r"\.(?:py|js|ts|c|h|cpp|java|go|rb|php|rs|cs|pl|pm|sh|json|ya?ml|toml|html?|css|xml)$", re.IGNORECASE
)


class _Rule(NamedTuple):
    id: str
    permissive: bool
    all: tuple[str, ...]
    any: tuple[str, ...]
    none: tuple[str, ...]


@cache
def _rules() -> list[_Rule]:
    data = yaml.safe_load((Path(__file__).parent / "licences.yaml").read_text(encoding="utf-8"))
    return [
        _Rule(str(d["id"]), d["permissive"], *(tuple(f" {p} " for p in d.get(k, [])) for k in ("all", "any", "none")))
        for d in data
    ]


def licences_in(text: str) -> list[str]:
    """SPDX ids of the licences that `text` (a notice or a licence) grants, each once, sorted. Its SPDX tags are not read
    here (`notice.spdx_ids`)."""
    words = f" {_NOT_WORD.sub(' ', text[:MAX_LICENCE_CHARS].lower())} "
    found = {
        rule.id
        for rule in _rules()
        if ((rule.all and all(p in words for p in rule.all)) or any(p in words for p in rule.any))
        and not any(p in words for p in rule.none)
    }
    found.update(_gnu(words))
    if "Artistic-1.0-Perl" in found and ("same terms as" in words or "same license as" in words):
        found.add("GPL-1.0-or-later")  # Perl's own terms are both, at choice
    return sorted(found)


def _gnu(words: str) -> set[str]:
    texts = {identity for title, identity in _TEXTS if f" {title} " in words}
    if texts:
        return texts
    if any(f" {name} " in words for name in _NAMES_GNU):
        return set()
    found = set()
    for match in _FAMILY.finditer(words):
        kind = (match[1] or match[2] or match[3] or match[4] or "").strip()[:1]
        family = {"a": "AGPL", "l": "LGPL", "": "GPL"}[kind]
        tail = words[match.end() : match.end() + 220].lstrip()
        after, before = (
            _VERSION_AFTER.match(tail),
            _VERSION_BEFORE.search(words[max(0, match.start() - 60) : match.start()]),
        )
        version = before or after
        if version is None:
            continue
        number = f"{version[1]}.{version[2] or '0'}"
        around = tail if before is None else words[match.start() - 40 : match.start()] + tail
        found.add(f"{family}-{number}-{'or-later' if _LATER.search(around) else 'only'}")
    # "Or later" once is meant for the other mentions of the same version (`a copy of version 2 of the licence is in …`).
    found -= {
        identity for identity in found if identity.replace("-only", "-or-later") in found and identity.endswith("-only")
    }
    if not found and (bare := _FAMILY.search(words)):
        # No version is named: section 9 of the licence then leaves the choice of any version.
        kind = (bare[1] or bare[2] or bare[3] or bare[4] or "").strip()[:1]
        found.add({"a": "AGPL-3.0-or-later", "l": "LGPL-2.0-or-later", "": "GPL-1.0-or-later"}[kind])
    return found


# ---- which licence applies ----


class Licence(NamedTuple):
    """The licence of a file."""

    expression: str | None
    """SPDX expression; None: unknown."""
    source: Literal["spdx", "notice", "given", "file", "none"]
    """SPDX tag of the file, words of its header, the input's own column, the nearest licence file, or nothing."""


def is_licence_file(path: str) -> bool:
    """LICENSE, LICENCE.txt, COPYING.LIB, LICENSE-MIT… — by the last component of `path`."""
    name = path.rsplit("/", 1)[-1]
    return LICENCE_FILE.match(name) is not None and _CODE_SUFFIX.search(name) is None


class RepositoryLicences:
    """The licence files of one repository, by folder."""

    def __init__(self, files: Iterable[tuple[str, str]]) -> None:
        """`files`: (path, text); paths that are no licence files are passed over."""
        self.folders: dict[str, str] = {}
        folders: dict[str, list[list[str]]] = {}
        for path, text in sorted(files):
            if is_licence_file(path) and (found := licences_in(text)):
                folders.setdefault(path.rpartition("/")[0], []).append(found)
        for folder, groups in folders.items():
            # LICENSE-MIT beside LICENSE-APACHE is a choice; several texts in one file hold together.
            parts = list(dict.fromkeys(_conjunction(found) for found in groups))
            self.folders[folder] = " OR ".join(f"({p})" if " AND " in p and len(parts) > 1 else p for p in parts)

    def of(self, path: str) -> str | None:
        """The expression of the licence files nearest to `path`, up the tree; None where there are none."""
        folder = path.rpartition("/")[0]
        while True:
            if folder in self.folders:
                return self.folders[folder]
            if not folder:
                return None
            folder = folder.rpartition("/")[0]


def _conjunction(ids: Iterable[str]) -> str:
    return " AND ".join(dict.fromkeys(ids))


def _bare(expression: str) -> str:
    """Without brackets around all of it: not `(A) OR (B)`."""
    depth = 0
    for i, character in enumerate(expression):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            whole = character == ")" and i == len(expression) - 1
            return _bare(expression[1:-1].strip()) if whole and i else expression
    return expression


def licence_of(
    spdx: Iterable[str], notice: Iterable[str], *, given: str | None = None, file: str | None = None
) -> Licence:
    """The licence that applies, the nearest evidence first: SPDX tags, words of the header, the input's column, the
    repository's licence file."""
    tags = list(dict.fromkeys(map(_bare, spdx)))
    if len(tags) == 1:
        return Licence(tags[0], "spdx")
    if tags:
        return Licence(" AND ".join(f"({tag})" if re.search(r" (OR|AND) ", tag) else tag for tag in tags), "spdx")
    if words := _conjunction(notice):
        return Licence(words, "notice")
    if given:
        return Licence(given, "given")
    return Licence(file, "file") if file else Licence(None, "none")


# ---- allow-list ----


def known_licences() -> Mapping[str, bool]:
    """Every id that can be recognised → permissive?"""
    gnu = {
        f"{f}-{suffix}"
        for f in ("GPL-1.0", "GPL-2.0", "GPL-3.0", "LGPL-2.0", "LGPL-2.1", "LGPL-3.0", "AGPL-3.0")
        for suffix in ("only", "or-later")
    }
    gnu |= {identity for _, identity in _TEXTS}
    return {**{rule.id: rule.permissive for rule in _rules()}, **dict.fromkeys(sorted(gnu), False)}


def check_allow_list(allow: Iterable[str]) -> None:
    """Raise ConfigError for an entry that is no SPDX id that can be recognised, nor `permissive`."""
    known = [PERMISSIVE, *known_licences()]
    for entry in allow:
        if entry not in known and not entry.startswith("LicenseRef-"):
            raise ConfigError(
                f"transform.licences={entry!r} is no licence that is recognised{nearest(entry, known)}: use `{PERMISSIVE}` or ids of "
                "opencoder/corpus/transform/licences.yaml"
            )


def is_allowed(licence: Licence, allow: Iterable[str], *, unknown: Literal["keep", "drop"] = "keep") -> bool:
    """Whether an allow-list admits a licence: of `A OR B` one side must be on it, of `A AND B` both; an exception
    (`WITH …`) changes nothing. An empty list admits everything. A bare `GPL-2.0` on the list stands for both its forms."""
    listed = set(allow)
    if not listed:
        return True
    if licence.expression is None:
        return unknown == "keep"
    if PERMISSIVE in listed:
        listed |= {identity for identity, permissive in known_licences().items() if permissive}
    listed |= {f"{entry}-{suffix}" for entry in list(listed) for suffix in ("only", "or-later")}
    tokens = re.findall(r"\(|\)|[^\s(),]+", licence.expression.replace(",", " AND "))
    if len(tokens) > MAX_EXPRESSION_TOKENS:
        return False  # no licence is stated like this; the reading is recursive
    allowed, rest = _either(tokens, {entry.lower() for entry in listed}, 0)
    return allowed and rest == len(tokens)  # an expression that cannot be read admits nothing


def _either(tokens: list[str], allow: set[str], i: int) -> tuple[bool, int]:
    allowed, i = _both(tokens, allow, i)
    while i < len(tokens) and tokens[i].upper() == "OR":
        other, i = _both(tokens, allow, i + 1)
        allowed = allowed or other
    return allowed, i


def _both(tokens: list[str], allow: set[str], i: int) -> tuple[bool, int]:
    allowed, i = _one(tokens, allow, i)
    while i < len(tokens) and tokens[i].upper() == "AND":
        other, i = _one(tokens, allow, i + 1)
        allowed = allowed and other
    return allowed, i


def _one(tokens: list[str], allow: set[str], i: int) -> tuple[bool, int]:
    if i >= len(tokens):
        return False, i
    if tokens[i] == "(":
        allowed, i = _either(tokens, allow, i + 1)
        return allowed, i + 1
    name = tokens[i].lower().removesuffix("+")
    allowed = name in allow or tokens[i].lower() in allow
    if i + 1 < len(tokens) and tokens[i + 1].upper() == "WITH":
        i += 2
    return allowed, i + 1
