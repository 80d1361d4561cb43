"""Signals of C#.

| signal | compat (published filter) | default |
|---|---|---|
| cate_var_zero | never true: a list is compared with zero | true if no variable or property is declared |
| frac_lines_func_ratio, score_lines_no_logic | a line such as `return f(x)` or `new T(x)` counts as a function | it does not |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from ..document import Document, Value
from .scanning import engine, share


class CSharpCounts(NamedTuple):
    """Counts over the code of a file; see csrc/text/scan_java.cpp."""

    lines: int
    functions: int
    usings: int
    simple_variables: int
    """Declarations of a primitive type without a value."""
    variables: int
    """Declarations of a primitive type or var, parameters included, and variables and properties of any type."""
    returns: int
    classes: int
    prints: int
    """Lines with Console.WriteLine."""


@lru_cache(maxsize=1)
def _count(code: str, strict: bool) -> CSharpCounts:
    return CSharpCounts(*engine().scan_csharp(code, strict))


def counts(document: Document) -> CSharpCounts:
    """The counts of a document, worked out once."""
    return _count(document.split.code, not document.compat)


def _func_ratio(d: Document) -> Value:
    n = counts(d)
    return share(n.functions, n.lines)


def _no_logic(d: Document) -> Value:
    n = counts(d)
    return share(n.functions + n.usings + n.simple_variables + n.returns + n.classes, n.lines)


def _print(d: Document) -> Value:
    n = counts(d)
    return share(n.prints, n.lines)


SIGNALS: dict[str, Callable[[Document], Value]] = {
    "qsc_codecsharp_frac_lines_func_ratio": _func_ratio,
    "qsc_codecsharp_cate_var_zero": lambda d: not d.compat and counts(d).variables == 0,
    "qsc_codecsharp_score_lines_no_logic": _no_logic,
    "qsc_codecsharp_frac_lines_print": _print,
}
