"""The verdict on one document: its signals, judged by the rules of its table."""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

from . import rules, signals
from .signals import Document, Signal, Value
from .signals.general import CHEAP

log = logging.getLogger("opencoder")


class Verdict(NamedTuple):
    """What signals and rules say of a document."""

    values: dict[str, Value]
    """Signals by published name; None where one has no value."""
    errors: dict[str, str]
    """Of the signals that failed, by published name."""
    hits: list[rules.Hit]
    """Rules that drop the document, in the order of rules.yaml."""
    natural_language: str

    @property
    def keep(self) -> bool:
        """Whether no rule drops the document."""
        return not self.hits


def evaluate(
    text: str,
    *,
    path: str,
    size_bytes: int,
    language: str,
    doc_type: str,
    identity: str | None,
    natural_language: str | None = None,
    compat: bool = False,
) -> Verdict:
    """Signals and hits of a decoded text of doc type code, data or text (KeyError for others, which have no signals).

    `path` gives file name and extension; `identity` is the SHA-256 (hex) of the file's bytes, for the rules that draw;
    `natural_language` is an ISO 639-1 code, None to find out; `compat` reproduces the published filter."""
    document = signals.make_document(
        text,
        size_bytes=size_bytes,
        doc_type=doc_type,
        language=language,
        path=path,
        natural_language=natural_language,
        compat=compat,
    )
    computed = signals.compute_document(document)
    hits = rules.judge(
        computed.values,
        doc_type=doc_type,
        language=language,
        natural_language=document.natural_language,
        identity=identity,
    )
    return Verdict(computed.values, computed.errors, hits, document.natural_language)


def first_hit(document: Document, identity: str | None) -> rules.Hit | None:
    """A rule that drops the document, or None if it is kept: the verdict of `evaluate` in less time, since the rules come
    cheap ones first, those of the language last, and the first hit ends it. A signal that fails does not drop."""
    table = rules.table_for(document.doc_type, document.language, document.natural_language)
    functions = _functions(document.doc_type, document.language)
    for condition in _by_cost(table):
        function = functions.get(condition.signal)
        if function is None:
            continue
        try:
            value = function(document)
        except Exception:  # as in compute_document: a signal that fails has no value; evaluate() tells the error
            log.debug("%s of %s failed", condition.signal, document.file_name, exc_info=True)
            continue
        if isinstance(value, float):
            value = round(value, signals.DECIMALS)
        if value is not None and condition.holds(value, identity):
            return rules.Hit(condition.signal, float(value), condition.text)
    return None


@cache
def _functions(doc_type: str, language: str) -> dict[str, Signal]:
    return {name: function for group in signals.groups(doc_type, language) for name, function in group.items()}


@cache
def _by_cost(table: str) -> tuple[rules.Condition, ...]:
    def cost(condition: rules.Condition) -> int:
        prefix, _, name = condition.signal.removeprefix("qsc_").partition("_")
        return (name not in CHEAP) + (prefix not in ("doc", "code"))

    return tuple(sorted(rules.conditions(table), key=cost))
