"""MBPP (the full set with three worked examples, and the sanitised one) and MBPP+ (the form with a `test` program).

Full set: tasks 11–510 are the test split, 2–4 the examples; prompt of Austin et al. 2021 (arXiv 2108.07732). The other two ask in a
docstring with the first test, as EvalPlus does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencoder.errors import DataError

from ..task import PYTHON_STOPS, Judge, Task, need
from . import files

FULL_TEST = range(11, 511)
SHOTS = range(2, 5)
ASK = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
)
STOPS = (*PYTHON_STOPS, "\nassert ", '\n"""', "\n# Test", "\n#Test")


def load_full(path: str | Path | None) -> list[Task]:
    """`mbpp.jsonl` with its 974 rows: the 500 tasks of the test split, each behind three examples. A file without rows of the test
    split gives all its tasks; one without the examples' rows is an error."""
    rows = list(files.rows(str(path)))
    numbered = {int(need(row, "task_id", int, where)): (where, row) for where, row in rows}
    missing = [number for number in SHOTS if number not in numbered]
    if missing:
        raise DataError(f"{path} lacks tasks {missing}, the worked examples of its prompt: give the full mbpp.jsonl")
    shots = "".join(_shot(*numbered[number]) for number in SHOTS)
    chosen = [number for number in numbered if number in FULL_TEST] or [n for n in numbered if n not in SHOTS]
    return [_full_task(*numbered[number], shots) for number in chosen]


def _shot(where: str, row: dict[str, Any]) -> str:
    return f"{_ask(where, row)}[BEGIN]\n{_code(where, row)}\n[DONE]\n"


def _ask(where: str, row: dict[str, Any]) -> str:
    return ASK.format(text=need(row, "text", str, where), tests="\n".join(tests_of(row, where)))


def _code(where: str, row: dict[str, Any]) -> str:
    return str(need(row, "code", str, where)).replace("\r\n", "\n").strip()


def _full_task(where: str, row: dict[str, Any], shots: str) -> Task:
    tests = tests_of(row, where)
    code = _code(where, row)
    name = entry_point(code, tests)
    job = {"mode": "script", "setup": row.get("test_setup_code") or "", "test": "\n".join(tests), "entry_point": name}
    return Task(
        f"Mbpp/{row['task_id']}", f"{shots}{_ask(where, row)}[BEGIN]\n", Judge(job), name, code,
        instruction=f"{_ask(where, row)}Answer with one Python code block.\n", stops=("[DONE]", "\n```"), prompt_is_code=False,
    )  # fmt: skip


def load_sanitized(path: str | Path | None) -> list[Task]:
    """`sanitized-mbpp.json` (427 tasks)."""
    return [_docstring_task(where, row, None) for where, row in files.rows(str(path))]


def load_plus(path: str | Path | None) -> list[Task]:
    """MBPP+ with a `test` program in each row (the form on the Hugging Face hub)."""
    tasks = []
    for where, row in files.rows(str(path)):
        if "test" not in row and "base_input" in row:
            raise DataError(
                f"{where} has inputs as JSON, which lost their tuples and sets: give the form with `test` (evalplus/mbppplus)"
            )
        tasks.append(_docstring_task(where, row, need(row, "test", str, where)))
    return tasks


def _docstring_task(where: str, row: dict[str, Any], test: str | None) -> Task:
    tests = tests_of(row, where)
    code = _code(where, row)
    imports = "\n".join(row.get("test_imports") or [])
    prompt = f'"""\n{need(row, "prompt", str, where).strip()}\n{tests[0]}\n"""\n'
    name = entry_point(code, tests)
    test = "\n".join(tests) if test is None else test
    job = {"mode": "script", "setup": imports, "test": test, "entry_point": name}
    number = str(row.get("task_id", "")).removeprefix("Mbpp/")
    if not number:
        raise DataError(f"{where} has no field `task_id`")
    return Task(f"Mbpp/{number}", prompt, Judge(job), name, code, stops=STOPS)


def tests_of(row: dict[str, Any], where: str) -> Sequence[str]:
    """The asserts. Raises DataError if there are none."""
    tests = need(row, "test_list", list, where)
    if not tests or not all(isinstance(test, str) for test in tests):
        raise DataError(f"{where}: `test_list` must hold at least one statement, all of them text")
    return tests


def entry_point(code: str, tests: Sequence[str]) -> str:
    """The last function of the solution that the tests mention; empty if there is none."""
    mentioned = set(re.findall(r"\w+", "\n".join(tests)))
    names = re.findall(r"^(?:def|class)[ \t]+(\w+)", code, re.MULTILINE)
    return next((name for name in reversed(names) if name in mentioned), "")
