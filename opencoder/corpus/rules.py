"""Verdicts: signals against the table of thresholds in rules.yaml. Any hit drops the document."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from .signals import Value

TABLES = ("others", "data", "shell", "sql", "python", "cpp", "c", "csharp", "go", "html", "java", "javascript", "text")
OWN_TABLE = frozenset(TABLES) - {"others", "data", "text"}
_COMPARISONS = {"<": operator.lt, ">": operator.gt}


class Rule(NamedTuple):
    """One line of rules.yaml."""

    name: str
    quantity: str
    unit: str
    drop: dict[str, list[str]]
    """Table → conditions under which a document is dropped."""

    def conditions(self, table: str) -> list[str]:
        """The conditions in force for a table; none if the rule is off there."""
        return self.drop.get(table, [] if table == "text" else self.drop.get("code", []))


class Hit(NamedTuple):
    """A rule that drops a document."""

    rule: str
    """Published name of the signal."""
    value: float
    threshold: str
    """The condition that holds, e.g. "> 0.2"."""


@cache
def load_rules() -> tuple[Rule, ...]:
    """All rules, in the order of the file."""
    entries = yaml.safe_load((Path(__file__).parent / "rules.yaml").read_text(encoding="utf-8"))
    return tuple(Rule(**entry) for entry in entries)


def table_for(doc_type: str, language: str) -> str:
    """The threshold table of a document."""
    if doc_type == "text":
        return "text"
    return language if language in OWN_TABLE else "data" if doc_type == "data" else "others"


def holds(condition: str, value: float) -> bool:
    """Whether `value` meets a condition such as "> 0.2" or "is true"."""
    if condition == "is true":
        return bool(value)
    sign, number = condition.split()
    return bool(_COMPARISONS[sign](value, float(number)))


def judge(signals: Mapping[str, Value], *, doc_type: str, language: str) -> list[Hit]:
    """Every hit, in the order of rules.yaml. A signal without a value never drops a document."""
    table = table_for(doc_type, language)
    prefix = "qsc_doc_" if doc_type == "text" else "qsc_code_"
    hits = []
    for rule in load_rules():
        value = signals.get(prefix + rule.name)
        if value is None:
            continue
        for condition in rule.conditions(table):
            if holds(condition, value):
                hits.append(Hit(prefix + rule.name, float(value), condition))
    return hits
