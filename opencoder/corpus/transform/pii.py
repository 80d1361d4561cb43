"""Personal data and secrets in code: e-mail addresses, IP addresses, keys, passwords, and names where a header or manifest
states them, each replaced by a placeholder.

`<name>` and `<password>` are the placeholders of the published models (OpenCoder-llm, issue 23); the spelling of the others is
not published and follows them. The order of work: one pass finds anchors (`anchors.py`), small bounded expressions judge
each, overlaps are resolved by KINDS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator

from . import names, network, secrets
from .anchors import AT, IPV6, KEY_PREFIXES, KEY_WORDS, LITERALS, NAME_WORDS, PASSWORD_WORDS, QUAD, anchors
from .spans import KINDS, Kind, PiiSpan

PLACEHOLDERS: dict[Kind, str] = {
    "name": "<name>",
    "password": "<password>",
    "email": "<email>",
    "ip_address": "<ip_address>",
    "key": "<key>",
}

Judge = Callable[[str, int, str], Iterator[PiiSpan]]
"""(text, offset of the anchor, language) → spans."""
_COPYRIGHT_WORDS = ("copyright", "(c)", "© ", "©1", "©2")


def find_pii(text: str, language: str, kinds: Collection[Kind] = KINDS) -> list[PiiSpan]:
    """The personal data of `kinds` in a file of `language`, ascending, without overlaps."""
    wanted = frozenset(kinds)
    found: list[PiiSpan] = []
    for at, number in anchors(text):
        found.extend(_JUDGES[number](text, at, language))
    # Overlaps first: where e-mail addresses stay, the host of user:password@host is still no address.
    return [span for span in _without_overlaps(found) if span.kind in wanted]


def replace(text: str, spans: Collection[PiiSpan]) -> str:
    """`text` with each of its spans (ascending, without overlaps) replaced by its placeholder."""
    parts, position = [], 0
    for start, end, kind in spans:
        parts += [text[position:start], PLACEHOLDERS[kind]]
        position = end
    return "".join([*parts, text[position:]])


def redact(text: str, language: str, kinds: Collection[Kind] = KINDS) -> tuple[str, list[PiiSpan]]:
    """`text` with placeholders, and the spans of the original text that they stand for."""
    spans = find_pii(text, language, kinds)
    return replace(text, spans), spans


def counts(spans: Collection[PiiSpan]) -> dict[str, int]:
    """Spans per kind; kinds without any are left out."""
    return dict(Counter(span.kind for span in spans))


def _email(text: str, at: int, language: str) -> Iterator[PiiSpan]:
    if text.startswith(("@tcp(", "@unix("), at):
        yield from secrets.dsn_password_at(text, at)
        return
    for span in network.email_at(text, at):
        yield span
        yield from names.before_address(text, span.start)


def _plain(judge: Callable[[str, int], Iterator[PiiSpan]]) -> Judge:
    return lambda text, at, language: judge(text, at)


def _with_word(judge: Callable[[str, int, str], Iterator[PiiSpan]], word: str) -> Judge:
    return lambda text, at, language: judge(text, at, word)


def _with_end(judge: Callable[[str, int, int], Iterator[PiiSpan]], word: str) -> Judge:
    return lambda text, at, language: judge(text, at, at + len(word))


_OTHER: dict[str, Judge] = {
    "://": _plain(secrets.url_password_at),
    "authorization": _plain(secrets.authorization_at),
    "-----begin ": _plain(secrets.private_key_at),
    "hooks.slack.com/services/": _plain(secrets.webhook_at),
    ":aa": _plain(secrets.telegram_at),
    "identified by": _plain(secrets.sql_password_at),
    "curl ": _plain(secrets.curl_password_at),
    "(at)": _with_word(network.email_at_word, "(at)"),
    "[at]": _with_word(network.email_at_word, "[at]"),
    " dot ": _plain(network.email_at_dot),
    "author": _with_end(names.author_at, "author"),
}


def _judge_of(word: str) -> Judge:
    """What judges an anchor."""
    if word in KEY_PREFIXES:
        return _with_word(secrets.prefixed_at, word)
    if word in PASSWORD_WORDS:
        return secrets.password_at
    if word in KEY_WORDS:
        return secrets.key_at
    if word in _COPYRIGHT_WORDS:
        return _plain(names.holder_at)
    if word in NAME_WORDS and word not in _OTHER:
        return _with_end(names.maker_at, word)
    return _OTHER[word]


_JUDGES: dict[int, Judge] = {
    AT: _email,
    QUAD: _plain(network.ipv4_at),
    IPV6: _plain(network.ipv6_at),
    **{number: _judge_of(word) for number, (word, _) in enumerate(LITERALS)},
}


def _without_overlaps(found: list[PiiSpan]) -> list[PiiSpan]:
    """Of spans that overlap, the one whose kind comes first in KINDS, then the longer."""
    kept: list[PiiSpan] = []
    for span in sorted(set(found)):
        while kept and span.start < kept[-1].end:
            last = kept[-1]
            if (KINDS.index(last.kind), last.start - last.end) <= (KINDS.index(span.kind), span.start - span.end):
                break
            kept.pop()
        else:
            kept.append(span)
    return kept
