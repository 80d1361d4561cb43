"""The decontamination row of `opencoder bench-corpus`: checking source files against 1,000 tasks, in C++ and in Python."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial
from typing import Any

from opencoder.errors import Failure
from opencoder.native import text_engine
from opencoder.tools.bench_dedup import best_rates, megabytes_of, source_texts

TASKS = 1000


def decontaminate_rates(megabytes: float, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """(MB/s of each side, facts of the set): the first half of the standard library's files is checked against functions of the
    second. Raises Failure if the two sides differ on any file, or on one that holds every tenth task."""
    from opencoder.corpus.benchmarks import BenchmarkTask
    from opencoder.corpus.decontaminate import Decontaminator
    from opencoder.corpus.ngram_index import PythonIndex

    both = source_texts(2 * megabytes)
    texts, others = both[: len(both) // 2], both[len(both) // 2 :]
    functions = [function for text in others for function in functions_of(text)][:TASKS]
    tasks = [BenchmarkTask("functions", str(number), solution=function) for number, function in enumerate(functions)]
    found, plain = Decontaminator(tasks), Decontaminator(tasks)
    refs, grams = plain._grams()
    plain._index = PythonIndex(refs, grams, ngram=plain.config.ngram, names=plain._name_list)
    if any(found.check(text) != plain.check(text) for text in [*texts, "\n".join(functions[::10])]):
        raise Failure("decontaminate: the C++ index finds other places than the Python one")

    def check(decontaminator: Any) -> None:
        for text in texts:
            decontaminator.check(text)

    sides: dict[str, tuple[float, Callable[[], Any]]] = {"ours, Python": (megabytes_of(texts), partial(check, plain))}
    if text_engine() is not None:
        sides = {"ours, C++": (megabytes_of(texts), partial(check, found)), **sides}
    facts = {"tasks": len(tasks), "ngrams": found.ngrams, "files": len(texts)}
    return best_rates(sides, rounds, "decontaminate"), facts


def functions_of(text: str) -> list[str]:
    """The source of each function of a module; none if it does not parse."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines()
    return [
        "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
