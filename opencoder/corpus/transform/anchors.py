"""Where in a text an expression for personal data is worth trying: literals (any case), the `@` of e-mail addresses, dotted
quads, and heads of global IPv6 addresses. The search runs in C++ (csrc/text/anchors.cpp); the version here gives the same
places, slowly."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from opencoder.native import text_engine

from .data import key_prefixes

AT, QUAD, IPV6 = -1, -2, -3

KEY_PREFIXES = key_prefixes()

PASSWORD_WORDS = ("pass", "pwd")
KEY_WORDS = (
    "secret", "token", "api_key", "apikey", "api-key",
    "access_key", "accesskey", "access-key", "auth_key", "authkey", "app_key", "appkey",
    "private_key", "privatekey", "encryption_key", "encryptionkey", "signing_key", "subscription_key", "subscriptionkey",
    "subscription-key", "accountkey", "account_key", "master_key", "masterkey",
)  # fmt: skip
NAME_WORDS = (
    "author",
    "copyright",
    "(c)",
    "© ",
    "©1",
    "©2",
    "written by",
    "created by",
    "maintainer",
    "contributor",
    "signed-off-by",
)
OTHER = (
    "://",
    "authorization",
    "-----begin ",
    "hooks.slack.com/services/",
    ":aa",
    "identified by",
    "curl ",
    "(at)",
    "[at]",
    " dot ",
)

LITERALS: list[tuple[str, bool]] = [
    *((prefix, True) for prefix in KEY_PREFIXES),
    *((word, False) for word in (*PASSWORD_WORDS, *KEY_WORDS, *NAME_WORDS, *OTHER)),
]
"""(literal, must stand at the start of a word); an anchor's id is its place in this list."""


@cache
def _scanner() -> Any:
    engine = text_engine()
    return None if engine is None else engine.AnchorScanner(LITERALS)


def anchors(text: str) -> list[tuple[int, int]]:
    """(offset, id) of every anchor, ascending; id is a place in LITERALS, or AT, QUAD, IPV6."""
    scanner = _scanner()
    if scanner is None:
        return anchors_in_python(text)
    found: list[tuple[int, int]] = scanner.scan(text)
    return found


@cache
def _special() -> list[tuple[re.Pattern[str], int]]:
    return [
        (re.compile(r"(?<=[A-Za-z0-9_.%+\\-])@(?=[A-Za-z0-9])"), AT),
        (re.compile(r"(?<![A-Za-z0-9_.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}"), QUAD),
        (re.compile(r"(?<![A-Za-z0-9_.:])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]"), IPV6),
    ]


def anchors_in_python(text: str) -> list[tuple[int, int]]:
    """`anchors` without the C++ engine."""
    found = [(match.start(), number) for pattern, number in _special() for match in pattern.finditer(text)]
    lowered = text.translate(_LOWER)  # str.lower may change the length
    for number, (literal, word_start) in enumerate(LITERALS):
        at = lowered.find(literal)
        while at >= 0:
            before = lowered[at - 1 : at]
            if not (word_start and before.isascii() and (before.isalnum() or before == "_")):
                found.append((at, number))
            at = lowered.find(literal, at + 1)
    return sorted(found, key=lambda hit: (hit[0], hit[1] >= 0, hit[1]))


_LOWER = {c: c + 32 for c in range(ord("A"), ord("Z") + 1)}
