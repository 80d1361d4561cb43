"""Signals of C and C++: counts over the code text, the same for both languages.

| signal | compat (published filter) | default |
|---|---|---|
| frac_lines_func_ratio, score_lines_no_logic | `return f(x)`, `else f(x)` … count as functions | they do not |
| frac_lines_goto, frac_lines_print | letters anywhere (`fprintf`, `gotoxy`) | whole words |
| frac_lines_preprocessor_directives | `struct`, `using` inside words; `#` anywhere | whole words; first on the line |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from ..document import Document, Value
from .scanning import engine, share

HEADER_EXTENSIONS = frozenset({"h", "hpp", "hxx", "hh", "h++"})
"""Headers may consist of directives."""


class CCounts(NamedTuple):
    """Counts over the code of a file; see csrc/text/scan_c.cpp."""

    lines: int
    """Code lines that are not blank."""
    functions: int
    """Heads of functions, declared or defined."""
    includes: int
    variables: int
    """Declarations of one variable of a simple type without a value, each first on its line."""
    returns: int
    """Returns of nothing or of one simple value."""
    classes: int
    mains: int
    """Definitions of `main`."""
    gotos: int
    """Lines with goto; so the next ones."""
    printfs: int
    couts: int
    """With cout or printf."""
    directives: int
    any_variable: bool
    """Whether something looks like a variable's declaration."""


@lru_cache(maxsize=1)
def _count(code: str, strict: bool) -> CCounts:
    return CCounts(*engine().scan_c(code, strict))


def counts(document: Document) -> CCounts:
    """The counts of a document, worked out once."""
    return _count(document.split.code, not document.compat)


def _func_ratio(d: Document) -> Value:
    n = counts(d)
    return share(n.functions, n.lines)


def _no_logic(d: Document) -> Value:
    n = counts(d)
    return share(n.functions + n.includes + n.variables + n.returns + n.classes, n.lines)


def _directives(d: Document) -> Value:
    n = counts(d)
    return None if d.extension in HEADER_EXTENSIONS else share(n.directives, n.lines)


def _bits_header(d: Document) -> Value:
    return "bits/stdc++.h" in d.split.code.lstrip()[:200].lower()[:200]


def _print_c(d: Document) -> Value:
    n = counts(d)
    return share(n.printfs, n.lines)


def _print_cpp(d: Document) -> Value:
    n = counts(d)
    return share(n.couts, n.lines)


def _goto(d: Document) -> Value:
    n = counts(d)
    return share(n.gotos, n.lines)


_SHARED: dict[str, Callable[[Document], Value]] = {
    "frac_lines_func_ratio": _func_ratio,
    "cate_bitsstdc": _bits_header,
    "nums_lines_main": lambda d: counts(d).mains,
    "frac_lines_goto": _goto,
    "cate_var_zero": lambda d: not counts(d).any_variable,
    "score_lines_no_logic": _no_logic,
    "frac_lines_preprocessor_directives": _directives,
}
C_SIGNALS: dict[str, Callable[[Document], Value]] = {
    **{f"qsc_codec_{name}": function for name, function in _SHARED.items()},
    "qsc_codec_frac_lines_print": _print_c,
}
CPP_SIGNALS: dict[str, Callable[[Document], Value]] = {
    **{f"qsc_codecpp_{name}": function for name, function in _SHARED.items()},
    "qsc_codecpp_frac_lines_print": _print_cpp,
}
