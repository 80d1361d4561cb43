"""Signals of Java.

| signal | compat (published filter) | default |
|---|---|---|
| frac_lines_func_ratio, score_lines_no_logic | lines such as `return f(x)` count as functions | they do not |
| frac_words_no_modifier | share with a modifier; classes count as without | share without an access modifier |
| frac_words_legal_func_name, …_var_name | looks at the second character of the match | looks at the name |
"""

from __future__ import annotations

from typing import NamedTuple

from ..document import Document, Signal, Value, share
from .scanning import counted_once, engine, share_of_lines


class JavaCounts(NamedTuple):
    """Counts over the code of a file; see csrc/text/scan_java.cpp."""

    lines: int
    functions: int
    imports: int
    simple_variables: int
    """Fields and locals without a value."""
    variables: int
    returns: int
    """Returns of nothing, one word or one string."""
    classes: int
    prints: int
    """Lines with System.out.print."""
    accessible: int
    """Functions with an access word in their match."""
    function_letters: int
    """Functions whose match has an ASCII letter as its second character."""
    variable_letters: int
    """Variables whose match has a small ASCII letter as its second character."""
    class_names: int
    """Classes with a name in upper camel case."""
    function_names: int
    """Functions whose name is letters and digits, a letter first."""
    variable_names: int
    """Variables whose name is letters and digits, a small letter first."""
    accessible_classes: int


counts = counted_once(lambda code, strict: JavaCounts(*engine().scan_java(code, strict)))
"""Of a document."""


def _no_modifier(d: Document) -> Value:
    n = counts(d)
    total = n.functions + n.classes
    return share(n.accessible if d.compat else total - n.accessible - n.accessible_classes, total)


def _variable_names(d: Document) -> Value:
    n = counts(d)
    return share(n.variable_letters if d.compat else n.variable_names, n.variables)


def _function_names(d: Document) -> Value:
    n = counts(d)
    return share(n.function_letters if d.compat else n.function_names, n.functions)


def _class_names(d: Document) -> Value:
    n = counts(d)
    return share(n.class_names, n.classes)


SIGNALS: dict[str, Signal] = {
    "qsc_codejava_cate_var_zero": lambda d: counts(d).variables == 0,
    "qsc_codejava_frac_lines_func_ratio": share_of_lines(counts, lambda n: n.functions),
    "qsc_codejava_score_lines_no_logic": share_of_lines(
        counts, lambda n: n.functions + n.imports + n.simple_variables + n.returns + n.classes
    ),
    "qsc_codejava_frac_words_no_modifier": _no_modifier,
    "qsc_codejava_frac_words_legal_var_name": _variable_names,
    "qsc_codejava_frac_words_legal_func_name": _function_names,
    "qsc_codejava_frac_words_legal_class_name": _class_names,
    "qsc_codejava_frac_lines_print": share_of_lines(counts, lambda n: n.prints),
}
