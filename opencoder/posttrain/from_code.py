"""Conversations out of real Python code: functions with docstrings, asked for in words.

Two sets for two stages of tuning. `practical`: from the docstring, write the function. `broad`: say what a function does, complete
its second half, find its name. No model takes part: answers are what people wrote. Order and content depend on the files alone."""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencoder.errors import UserError

BROAD, PRACTICAL = "broad", "practical"
HELD_OUT_OF = 10
"""One file in so many is held out, for both sets alike: by a hash of its path."""
_TEST_PART = re.compile(r"(?:^|[/_.])(?:tests?|testing|conftest|mock)(?:[/_.]|$)", re.IGNORECASE)
_DOCTEST = re.compile(r"^\s*>>> ", re.MULTILINE)
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", ".git", "node_modules"})


@dataclass(frozen=True)
class Limits:
    """Which functions are taken."""

    least_lines: int = 3
    """Lines of the function without its docstring."""
    most_lines: int = 30
    least_words: int = 4
    """Words of the docstring."""
    most_characters: int = 1200
    """Of the docstring and of the code, each."""


@dataclass(frozen=True)
class Function:
    """A function with a docstring."""

    name: str
    file: str
    line: int
    signature: str
    """Lines up to the docstring, dedented."""
    docstring: str
    """Cleaned of its indentation."""
    code: str
    """The whole function, dedented."""
    bare: str
    """The same without its docstring."""


def python_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """(path relative to the input, file) of every Python file that is no test, sorted. Raises UserError if there is none."""
    found: list[tuple[str, Path]] = []
    for root in paths:
        if not root.exists():
            raise UserError(f"--input {root} does not exist")
        inside = sorted(root.rglob("*.py")) if root.is_dir() else [root]
        base = root if root.is_dir() else root.parent
        names = [(file.relative_to(base).as_posix(), file) for file in inside if file.is_file()]
        found += [
            (name, file)
            for name, file in names
            if not _TEST_PART.search(name) and _SKIPPED_FOLDERS.isdisjoint(Path(name).parts)
        ]
    if not found:
        raise UserError(f"no Python file in {', '.join(map(str, paths))} but tests")
    return found


def is_held_out(file: str) -> bool:
    """Whether the functions of a file are kept for evaluation."""
    return int(hashlib.sha256(file.encode()).hexdigest(), 16) % HELD_OUT_OF == 0


def functions(name: str, file: Path, limits: Limits, counts: Counter[str]) -> Iterator[Function]:
    """Those of one file that pass the filters; `counts` says why the others do not."""
    try:
        with tokenize.open(file) as opened:  # as the file's own coding line says
            text = opened.read()
        tree = ast.parse(text)
    except (SyntaxError, ValueError, UnicodeDecodeError, RecursionError):
        counts["files_not_parseable"] += 1
        return
    lines = text.splitlines(keepends=True)
    for node in _definitions(tree):
        counts["functions"] += 1
        found = _function(name, node, lines, limits)
        if isinstance(found, str):
            counts[found] += 1
        else:
            yield found


def _definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of the module and of its classes, test cases left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef) and not _is_test_class(node):
            yield from (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))


def _is_test_class(node: ast.ClassDef) -> bool:
    return node.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in node.bases)


def _function(
    file: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], limits: Limits
) -> Function | str:
    """The function, or why it is left out."""
    docstring = ast.get_docstring(node)
    if docstring is None:
        return "without_docstring"
    if node.name.startswith("test") or (node.name.startswith("__") and node.name != "__init__"):
        return "tests_and_special_methods"
    if _DOCTEST.search(docstring):
        return "with_doctest"
    if len(docstring.split()) < limits.least_words:
        return "docstring_too_short"
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    end = node.end_lineno
    quoted = node.body[0]
    if len(node.body) < 2 or end is None or quoted.end_lineno is None:
        return "without_body"
    if quoted.lineno == node.lineno or node.body[1].lineno == quoted.end_lineno:
        return "on_one_line"
    code = textwrap.dedent("".join(lines[first:end])).rstrip() + "\n"
    bare = textwrap.dedent("".join(lines[first : quoted.lineno - 1] + lines[quoted.end_lineno : end])).rstrip() + "\n"
    if not limits.least_lines <= bare.count("\n") <= limits.most_lines:
        return "too_few_or_many_lines"
    if max(len(code), len(docstring)) > limits.most_characters:
        return "too_long"
    if not _parses(code) or not _parses(bare):
        return "not_parseable_alone"
    signature = textwrap.dedent("".join(lines[first : quoted.lineno - 1])).rstrip() + "\n"
    return Function(node.name, file, node.lineno, signature, docstring, code, bare)


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


# ---- questions and answers ----


def practical(function: Function) -> Iterator[dict[str, Any]]:
    """Docstring to function."""
    question = (
        f"Write the Python function `{function.name}`.\n\n{function.docstring}\n\n"
        f"It begins with:\n\n{fenced(function.signature)}"
    )
    yield _row(function, "write", question, fenced(function.bare))


def broad(function: Function) -> Iterator[dict[str, Any]]:
    """What it does, its second half, its name."""
    summary = re.split(r"\n\s*\n", function.docstring)[0]
    yield _row(function, "explain", f"What does this Python function do?\n\n{fenced(function.bare)}", summary)
    lines = function.bare.splitlines(keepends=True)
    half = (len(lines) + 1) // 2
    begun = "".join(lines[:half])
    yield _row(
        function, "complete", f"Complete this Python function.\n\n{fenced(begun)}", fenced("".join(lines[half:]))
    )
    nameless = re.sub(rf"\b{re.escape(function.name)}\b", "f", function.bare)
    yield _row(
        function, "name", f"Find a better name for this Python function.\n\n{fenced(nameless)}", f"`{function.name}`"
    )


def fenced(code: str) -> str:
    """As code in Markdown."""
    return f"```python\n{code.rstrip(chr(10))}\n```"


def _row(function: Function, kind: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"{function.file}:{function.line}:{kind}",
        "source": function.file,
        "language": "Python",
        "kind": kind,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def make_sets(paths: list[Path], limits: Limits) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """({`broad`, `practical`, `broad.held-out`, `practical.held-out`: rows}, counts). The same function twice is taken once."""
    sets: dict[str, list[dict[str, Any]]] = {
        f"{kind}{part}": [] for kind in (BROAD, PRACTICAL) for part in ("", ".held-out")
    }
    counts: Counter[str] = Counter(files=0, functions=0, taken=0)
    seen: set[str] = set()
    for name, file in python_files(paths):
        counts["files"] += 1
        part = ".held-out" if is_held_out(name) else ""
        for function in functions(name, file, limits, counts):
            if function.bare in seen:
                counts["copies"] += 1
                continue
            seen.add(function.bare)
            counts["taken"] += 1
            sets[PRACTICAL + part] += practical(function)
            sets[BROAD + part] += broad(function)
    return sets, dict(sorted(counts.items()))
