"""Signals of Python, on the syntax tree of the standard library's `ast` (3.5–4 MB/s) and on the code text.

| signal (nl: score_lines_no_logic) | compat (published filter) | default |
|---|---|---|
| frac_lines_func_ratio, frac_lines_simplefunc, nl | async functions do not count | they do |
| cate_var_zero | names: plain assignments, for loops, parameters | whatever a statement or parameter list binds |
| frac_lines_pass | lines with the letters "pass" | pass statements |
| frac_lines_import, nl | lines with the letters "import" | import statements |
| frac_lines_simplefunc | a doc string makes a body longer | a doc string does not count |
| frac_lines_print | lines with the letters "print" | lines with the word |
| nl | lines that start with `return`; variables of outer classes | return statements; variables of all classes |

A file that does not parse has `cate_ast` false and no value for the others that need the tree (in default mode also pass and
import). Above `MAX_CHARACTERS` the default mode does not parse: the signals have no value, and the error says so."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..document import Document, Signal, Value, share
from .scanning import counted_once, engine, share_of_lines

MAX_CHARACTERS = 3_000_000
"""A tree takes about a hundred times its text; larger files are dropped for their size anyway."""
RELEASED_RECURSION_LIMIT = 10_000
"""What the published filter sets; it decides how deep a nesting still parses."""


class LineCounts(NamedTuple):
    """Counts over the lines of the code; see csrc/text/scan_go.cpp."""

    lines: int
    passes: int
    imports: int
    prints: int
    returns: int


@dataclass
class TreeCounts:
    """Counts over the statements of a tree."""

    functions: int = 0
    simple_functions: int = 0
    classes: int = 0
    class_variables: int = 0
    """Simple names assigned directly in class bodies."""
    passes: int = 0
    imports: int = 0
    returns: int = 0
    any_variable: bool = False


@contextmanager
def _released_recursion() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, RELEASED_RECURSION_LIMIT))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@lru_cache(maxsize=1)
def parse(text: str, compat: bool = False) -> ast.Module | None:
    """The tree of a text, or None if it is no Python. In default mode a text that is too large or too deeply nested to be
    parsed raises ValueError; compat mode takes every failure for a file that does not parse."""
    if compat:
        with warnings.catch_warnings(), _released_recursion():
            warnings.simplefilter("ignore")  # of invalid escapes in the files
            try:
                return ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a file of {len(text)} characters is not parsed; the limit is {MAX_CHARACTERS}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):  # ValueError: null characters
            return None
        except (RecursionError, MemoryError) as error:
            raise ValueError("nested too deeply to be parsed") from error


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists directly inside a statement."""
    for name in ("body", "orelse", "finalbody"):
        inner = getattr(node, name, None)
        if isinstance(inner, list):
            yield inner
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body


def _is_doc_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _binds(node: ast.stmt, compat: bool) -> bool:
    """Whether a statement gives a variable its value (default), or a plain name (compat)."""
    if isinstance(node, ast.Assign):
        return not compat or any(isinstance(target, ast.Name) for target in node.targets)
    if isinstance(node, ast.For):
        return not compat or isinstance(node.target, ast.Name)
    if isinstance(node, ast.FunctionDef) and compat:
        return bool(node.args.args)
    if compat:
        return False
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        args = node.args
        return bool(args.posonlyargs or args.args or args.kwonlyargs or args.vararg or args.kwarg)
    if isinstance(node, ast.With | ast.AsyncWith):
        return any(item.optional_vars is not None for item in node.items)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.NamedExpr)
    return isinstance(node, ast.AnnAssign | ast.AugAssign | ast.AsyncFor)


def _class_variables(body: list[ast.stmt]) -> int:
    count = 0
    for item in body:
        if isinstance(item, ast.Assign):
            count += sum(isinstance(target, ast.Name) for target in item.targets)
        elif isinstance(item, ast.AnnAssign):
            count += isinstance(item.target, ast.Name)
    return count


def _count_function(node: ast.FunctionDef | ast.AsyncFunctionDef, compat: bool, n: TreeCounts) -> None:
    if compat and isinstance(node, ast.AsyncFunctionDef):
        return
    n.functions += 1
    body = node.body[1:] if not compat and _is_doc_string(node.body[0]) else node.body
    n.simple_functions += len(body) == 1 and isinstance(body[0], ast.Return)


@lru_cache(maxsize=1)
def tree_counts(text: str, compat: bool) -> TreeCounts | None:
    """Counts over the tree of a text; None if it does not parse. Only statements are walked: no expression holds one."""
    tree = parse(text, compat)
    if tree is None:
        return None
    n = TreeCounts()
    pending: list[tuple[list[ast.stmt], bool]] = [(tree.body, False)]
    while pending:
        body, in_class = pending.pop()
        for node in body:
            inside = in_class
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                _count_function(node, compat, n)
            elif isinstance(node, ast.ClassDef):
                n.classes += 1
                if not (compat and in_class):  # the published visitor does not look inside classes for more of them
                    n.class_variables += _class_variables(node.body)
                inside = True
            elif isinstance(node, ast.Pass):
                n.passes += 1
            elif isinstance(node, ast.Import | ast.ImportFrom):
                n.imports += 1
            elif isinstance(node, ast.Return):
                n.returns += 1
            n.any_variable = n.any_variable or _binds(node, compat)
            pending.extend((inner, inside) for inner in _bodies(node))
    return n


line_counts = counted_once(lambda code, strict: LineCounts(*engine().scan_python(code, strict)))
"""Of a document."""


def _tree(d: Document) -> TreeCounts | None:
    return tree_counts(d.text, d.compat)


def _of_tree(count: Callable[[TreeCounts], int]) -> Signal:
    """A signal: a count over the tree, over the number of code lines."""

    def signal(d: Document) -> Value:
        n = _tree(d)
        return None if n is None else share(count(n), line_counts(d).lines)

    return signal


def _by_mode(lines_with: Callable[[LineCounts], int], statements: Signal) -> Signal:
    """A signal: in compat mode the share of lines with some letters, 0 where there is no line; by default that of statements."""

    def signal(d: Document) -> Value:
        if not d.compat:
            return statements(d)
        n = line_counts(d)
        return share(lines_with(n), n.lines) or 0.0

    return signal


def _no_variable(d: Document) -> Value:
    n = _tree(d)
    return None if n is None else not n.any_variable


def _no_logic(d: Document) -> Value:
    n, lines = _tree(d), line_counts(d)
    if n is None:
        return None
    imports, returns = (lines.imports, lines.returns) if d.compat else (n.imports, n.returns)
    return share(n.functions + imports + n.classes + returns + n.class_variables, lines.lines)


SIGNALS: dict[str, Signal] = {
    "qsc_codepython_cate_ast": lambda d: _tree(d) is not None,
    "qsc_codepython_frac_lines_func_ratio": _of_tree(lambda n: n.functions),
    "qsc_codepython_cate_var_zero": _no_variable,
    "qsc_codepython_frac_lines_pass": _by_mode(lambda n: n.passes, _of_tree(lambda n: n.passes)),
    "qsc_codepython_frac_lines_import": _by_mode(lambda n: n.imports, _of_tree(lambda n: n.imports)),
    "qsc_codepython_frac_lines_simplefunc": _of_tree(lambda n: n.simple_functions),
    "qsc_codepython_score_lines_no_logic": _no_logic,
    "qsc_codepython_frac_lines_print": share_of_lines(line_counts, lambda n: n.prints),
}
