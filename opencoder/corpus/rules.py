"""Verdicts: signals against the tables of thresholds in rules.yaml. Any hit drops the document.

`python -m opencoder.corpus.rules > docs/rules.md` writes the rules as a page."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from .signals import Value

TEXT_TABLES = ("text_zh", "text_en")
CODE_TABLES = ("others", "data", "shell", "sql", "python", "cpp", "c", "csharp", "go", "html", "java", "javascript")
TABLES = (*TEXT_TABLES, *CODE_TABLES)
OWN_TABLE = frozenset(CODE_TABLES) - {"others", "data"}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, ">": operator.gt, "=": operator.eq}
_FLAGS = {"is true": 1.0, "is false": 0.0}


class Rule(NamedTuple):
    """One entry of rules.yaml, whose head says what the fields mean."""

    name: str
    groups: list[str]
    quantity: str
    unit: str
    doc: str
    drop: dict[str, list[str]]
    """Table → conditions under which a document is dropped."""
    probability: float = 1.0

    def conditions(self, table: str) -> list[str]:
        """The conditions in force for a table; none if the rule is off there."""
        return self.drop.get(table, self.drop.get("text" if table in TEXT_TABLES else "code", []))

    def published(self, group: str) -> str:
        """The name of the signal in a group."""
        return f"qsc_{group}_{self.name}" if group in ("doc", "code") else f"qsc_code{group}_{self.name}"


class Hit(NamedTuple):
    """A rule that drops a document."""

    rule: str
    """Published name of the signal."""
    value: float
    threshold: str
    """The condition that holds, e.g. "> 0.2"."""


class Condition(NamedTuple):
    """One condition of a table, ready to be compared."""

    signal: str
    """Published name."""
    compare: Callable[[float, float], bool]
    number: float
    text: str
    """As in rules.yaml."""
    probability: float

    def holds(self, value: float, identity: str | None) -> bool:
        """Whether a document with this SHA-256 and value of the signal is dropped; without an identity nothing is drawn and
        the condition alone decides."""
        if not self.compare(value, self.number):
            return False
        return self.probability == 1.0 or identity is None or drawn(identity, self.signal, self.probability)


@cache
def load_rules() -> tuple[Rule, ...]:
    """All rules, in the order of the file."""
    entries = yaml.safe_load((Path(__file__).parent / "rules.yaml").read_text(encoding="utf-8"))
    return tuple(Rule(**{"drop": {}, **entry}) for entry in entries)


def groups_of(table: str) -> tuple[str, ...]:
    """The groups of signals that a table judges."""
    if table in TEXT_TABLES:
        return ("doc",)
    return ("code", table) if table in OWN_TABLE else ("code",)


def table_for(doc_type: str, language: str, natural_language: str = "en") -> str:
    """The threshold table of a document. Prose that is not Chinese has the English one."""
    if doc_type == "text":
        return "text_zh" if natural_language == "zh" else "text_en"
    return language if language in OWN_TABLE else "data" if doc_type == "data" else "others"


def parse(condition: str) -> tuple[Callable[[float, float], bool], float]:
    """Comparison and number of a condition such as "> 0.2", "= 1" or "is true". Raises ValueError for any other form."""
    if condition in _FLAGS:
        return operator.eq, _FLAGS[condition]
    sign, _, number = condition.partition(" ")
    if sign not in _COMPARISONS:
        raise ValueError(f"condition {condition!r}: allowed are {', '.join(_FLAGS)}, or a number after <, > or =")
    return _COMPARISONS[sign], float(number)


def holds(condition: str, value: float) -> bool:
    """Whether `value` meets a condition."""
    compare, number = parse(condition)
    return compare(float(value), number)


@cache
def conditions(table: str) -> tuple[Condition, ...]:
    """The conditions of a table, in the order of rules.yaml."""
    return tuple(
        Condition(rule.published(group), *parse(condition), condition, rule.probability)
        for rule in load_rules()
        for group in groups_of(table)
        if group in rule.groups
        for condition in rule.conditions(table)
    )


def drawn(identity: str, signal: str, probability: float) -> bool:
    """The draw of a rule that drops only a share of its documents: the same for the same file and rule, everywhere.

    The published filter draws anew at each run."""
    digest = hashlib.sha256(f"{identity} {signal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < probability * 2**64


def judge(
    signals: Mapping[str, Value],
    *,
    doc_type: str,
    language: str,
    natural_language: str = "en",
    identity: str | None = None,
) -> list[Hit]:
    """Every hit, in the order of rules.yaml. A signal without a value never drops a document.

    `identity` is the SHA-256 (hex) of the file's bytes; it decides the draws of the rules with a probability, which hit
    always if it is None."""
    hits = []
    for condition in conditions(table_for(doc_type, language, natural_language)):
        value = signals.get(condition.signal)
        if value is not None and condition.holds(value, identity):
            hits.append(Hit(condition.signal, float(value), condition.text))
    return hits


if __name__ == "__main__":
    from .rules_page import page

    print(page(), end="")
