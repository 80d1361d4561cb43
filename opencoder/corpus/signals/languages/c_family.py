"""Signals of C and C++: counts over the code text, the same for both languages.

| signal | compat (published filter) | default |
|---|---|---|
| frac_lines_func_ratio, score_lines_no_logic | `return f(x)`, `else f(x)` … count as functions | they do not |
| frac_lines_goto, frac_lines_print | letters anywhere (`fprintf`, `gotoxy`) | whole words |
| frac_lines_preprocessor_directives | `struct`, `using` inside words; `#` anywhere | whole words; first on the line |
"""

from __future__ import annotations

from typing import NamedTuple

from ..document import Document, Signal, Value
from .scanning import counted_once, engine, share_of_lines

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


counts = counted_once(lambda code, strict: CCounts(*engine().scan_c(code, strict)))
"""Of a document."""


def _directives(d: Document) -> Value:
    return None if d.extension in HEADER_EXTENSIONS else _DIRECTIVES(d)


def _bits_header(d: Document) -> Value:
    return "bits/stdc++.h" in d.split.code.lstrip()[:200].lower()[:200]


_DIRECTIVES = share_of_lines(counts, lambda n: n.directives)
_SHARED: dict[str, Signal] = {
    "frac_lines_func_ratio": share_of_lines(counts, lambda n: n.functions),
    "cate_bitsstdc": _bits_header,
    "nums_lines_main": lambda d: counts(d).mains,
    "frac_lines_goto": share_of_lines(counts, lambda n: n.gotos),
    "cate_var_zero": lambda d: not counts(d).any_variable,
    "score_lines_no_logic": share_of_lines(
        counts, lambda n: n.functions + n.includes + n.variables + n.returns + n.classes
    ),
    "frac_lines_preprocessor_directives": _directives,
}
C_SIGNALS: dict[str, Signal] = {
    **{f"qsc_codec_{name}": function for name, function in _SHARED.items()},
    "qsc_codec_frac_lines_print": share_of_lines(counts, lambda n: n.printfs),
}
CPP_SIGNALS: dict[str, Signal] = {
    **{f"qsc_codecpp_{name}": function for name, function in _SHARED.items()},
    "qsc_codecpp_frac_lines_print": share_of_lines(counts, lambda n: n.couts),
}
