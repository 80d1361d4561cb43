"""What one Python file gives: its functions with names masked and locals renamed, and the places where it calls something.

A function's text is that of its syntax tree (`ast.unparse`), so comments and layout are gone; its docstring is taken out; its own
name, wherever it stands, is FUNC; parameters and variables are v0, v1, … in order of appearance. Two functions with one text are
one class. Functions inside functions belong to the outer one."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

FUNCTION, CALLEE = "FUNC", "CALLEE"
"""What stands for a masked name."""
LOCAL = re.compile(r"\bv(\d+)\b")
KEPT = frozenset({"self", "cls"})
BEFORE, AFTER = 320, 160
"""Bytes of source read at each side of a call."""

Def = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A class of the first task."""

    name: str
    line: int
    text: str
    locals: int
    """v0 … v(locals − 1) occur in the text."""

    @property
    def key(self) -> bytes:
        """The same for functions that differ in names and layout alone."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).digest()


@dataclass(frozen=True)
class Site:
    """A call: the callee's last name ends at byte `end` of the file."""

    name: str
    end: int


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        self.generic_visit(node)
        node.arg = self.names.get(node.arg, node.arg)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        node.name = self.names.get(node.name, node.name) if node.name else None
        return node


def _locals(function: Def) -> dict[str, str]:
    """Each local name → its new one. Names declared global or nonlocal anywhere inside keep theirs."""
    found: dict[str, None] = {}
    outside: set[str] = set(KEPT)
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            found.setdefault(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.setdefault(node.name)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            outside.update(node.names)
    return {name: f"v{i}" for i, name in enumerate(n for n in found if n not in outside)}


def normalised(function: Def) -> Function:
    """Mask, rename and print one function. The tree is changed."""
    name, line = function.name, function.lineno
    names = _locals(function)
    if function.body and isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant):
        function.body = function.body[1:] or [ast.Pass()]
    _Rename(names).visit(function)
    text = re.sub(rf"\b{re.escape(name)}\b", FUNCTION, ast.unparse(function))
    return Function(name, line, text, len(names))


def _outer(body: list[ast.stmt]) -> Iterator[Def]:
    """Functions and methods that are not inside a function, at any depth of classes and branches."""
    for node in body:
        if isinstance(node, Def):
            yield node
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _outer(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _outer(handler.body)


def sites_of(tree: ast.Module, source: bytes, *, per_name: int = 4) -> list[Site]:
    """The first `per_name` calls of each name, in order of their places."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: dict[str, int] = {}
    sites = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        line, column = node.func.end_lineno, node.func.end_col_offset
        assert line is not None
        assert column is not None
        end = starts[line - 1] + column
        # Lines that only Python counts (form feeds) or names that are written in another Unicode form do not match: left out.
        if seen.get(name, 0) < per_name and source[end - len(name.encode()) : end] == name.encode():
            seen[name] = seen.get(name, 0) + 1
            sites.append(Site(name, end))
    return sorted(sites, key=lambda s: s.end)


def site_text(source: bytes, site: Site) -> tuple[str, str]:
    """(before, after) the call's name, which is masked in both."""
    start = site.end - len(site.name.encode())
    before = source[max(0, start - BEFORE) : start].decode(errors="ignore")
    after = source[site.end : site.end + AFTER].decode(errors="ignore")
    mask = re.compile(rf"\b{re.escape(site.name)}\b")
    return mask.sub(CALLEE, before), mask.sub(CALLEE, after)


def read_file(source: bytes, *, functions: bool = True, least: int = 120) -> tuple[list[Function], list[Site]]:
    """Functions of at least `least` characters and three lines, unless not wanted, and calls; nothing of a file that is no
    UTF-8 Python."""
    try:
        source.decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the files' own escapes
            tree = ast.parse(source)
        sites = sites_of(tree, source)  # before the functions are changed
        found = [normalised(f) for f in _outer(tree.body)] if functions else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [], []
    return [f for f in found if len(f.text) >= least and f.text.count("\n") >= 2], sites
