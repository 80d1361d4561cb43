"""Signals of Go.

| signal | compat (published filter) | default |
|---|---|---|
| cate_testfile | never true: the file name comes without its extension | true if the name ends in `_test.go` |
| cate_var_zero | never true: a list is compared with zero | true if there is no `var`, `const` or `:=` |
| score_lines_no_logic | of an import block only the opening line counts | each of its lines counts |
"""

from __future__ import annotations

from typing import NamedTuple

from ..document import Document, Signal, Value, share
from .scanning import counted_once, engine, share_of_lines


class GoCounts(NamedTuple):
    """Counts over the code of a file; see csrc/text/scan_go.cpp."""

    lines: int
    functions: int
    imports: int
    """Import lines, and the opening lines of import blocks."""
    block_imports: int
    """Lines inside import blocks."""
    variables: int
    simple_variables: int
    """`var name type` and nothing else on the line."""
    returns: int
    types: int
    """Struct and interface types."""
    prints: int
    """Lines with fmt.Print."""


counts = counted_once(lambda code, strict: GoCounts(*engine().scan_go(code)))
"""Of a document."""


def _no_logic(d: Document) -> Value:
    n = counts(d)
    imports = n.imports if d.compat else n.imports + n.block_imports
    return share(n.functions + imports + n.simple_variables + n.returns + n.types, n.lines)


SIGNALS: dict[str, Signal] = {
    "qsc_codego_cate_testfile": lambda d: d.file_name.lower().endswith("_test.go"),
    "qsc_codego_frac_lines_func_ratio": share_of_lines(counts, lambda n: n.functions),
    "qsc_codego_cate_var_zero": lambda d: not d.compat and counts(d).variables == 0,
    "qsc_codego_score_lines_no_logic": _no_logic,
    "qsc_codego_frac_lines_print": share_of_lines(counts, lambda n: n.prints),
}
