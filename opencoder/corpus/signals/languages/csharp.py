"""Signals of C#.

| signal | compat (published filter) | default |
|---|---|---|
| cate_var_zero | never true: a list is compared with zero | true if no variable or property is declared |
| frac_lines_func_ratio, score_lines_no_logic | a line such as `return f(x)` or `new T(x)` counts as a function | it does not |
"""

from __future__ import annotations

from typing import NamedTuple

from ..document import Signal
from .scanning import counted_once, engine, share_of_lines


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


counts = counted_once(lambda code, strict: CSharpCounts(*engine().scan_csharp(code, strict)))
"""Of a document."""

SIGNALS: dict[str, Signal] = {
    "qsc_codecsharp_frac_lines_func_ratio": share_of_lines(counts, lambda n: n.functions),
    "qsc_codecsharp_cate_var_zero": lambda d: not d.compat and counts(d).variables == 0,
    "qsc_codecsharp_score_lines_no_logic": share_of_lines(
        counts, lambda n: n.functions + n.usings + n.simple_variables + n.returns + n.classes
    ),
    "qsc_codecsharp_frac_lines_print": share_of_lines(counts, lambda n: n.prints),
}
