"""The comment share of Python files as the published filter takes it: doc strings from the syntax tree, comments from the
tokenizer. Only compat mode needs it; the default mode counts the comments of every language in one way."""

from __future__ import annotations

import ast
import io
import tokenize

from .languages.python import parse

_KINDS = {ast.ClassDef: "Class", ast.FunctionDef: "Function/Method", ast.Module: "Module"}


def python_comment_characters(text: str) -> int:
    """Characters of the doc strings of modules, classes and functions that are not async, one per line, then a newline and
    all comments without their number signs and line ends, stripped. A part whose parser fails is empty."""
    return len(f"{_doc_strings(text)}\n{_comments(text)}".strip())


def _doc_strings(text: str) -> str:
    tree = parse(text, compat=True)
    if tree is None:
        return ""
    found = [
        (_KINDS[type(node)], getattr(node, "name", ""), ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module)
    ]
    return "\n".join(doc for _, _, doc in sorted(found, key=lambda entry: entry[:2]) if doc)


def _comments(text: str) -> str:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, tokenize.TokenError):  # IndentationError is a SyntaxError
        return ""
    return "".join(token.string for token in tokens if token.type == tokenize.COMMENT).replace("#", "")
