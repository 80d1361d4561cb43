"""One operator of a program made wrong: the negation of a comparison, the opposite of an arithmetic or logical operator."""

from __future__ import annotations

import ast
import random

OPPOSITE: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitXor: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def sites(tree: ast.Module, entry_point: str) -> list[tuple[ast.AST, int]]:
    """Operators of the function and of what is in it: (node, index of the operator in a comparison, else 0)."""
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry_point)
    found: list[tuple[ast.AST, int]] = []
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPPOSITE:
                found.append((node, 0))
            if isinstance(node, ast.Compare):
                found += [(node, i) for i, op in enumerate(node.ops) if type(op) in OPPOSITE]
    return found


def mutate(source: str, entry_point: str, seed: int = 0) -> str | None:
    """The program with one operator replaced; None if it has none."""
    tree = ast.parse(source)
    places = sites(tree, entry_point)
    if not places:
        return None
    node, index = random.Random(f"{seed} {source}").choice(places)
    if isinstance(node, ast.Compare):
        node.ops[index] = OPPOSITE[type(node.ops[index])]()  # type: ignore[call-overload]
    else:
        assert isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp)
        node.op = OPPOSITE[type(node.op)]()  # type: ignore[assignment]
    return ast.unparse(tree)
