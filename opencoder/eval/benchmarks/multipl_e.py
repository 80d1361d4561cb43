"""MultiPL-E: HumanEval and MBPP in other languages. Program and test are one source (docs/evaluation.md says what that means)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opencoder.errors import DataError, UserError

from ..languages import MULTIPL_E, TUPLES, missing
from ..task import OwnTests, Task, need
from . import files


def load(path: str | Path | None) -> list[Task]:
    """The tasks of one language's file. Raises UserError if the language cannot run on this machine."""
    tasks = [_task(where, row) for where, row in files.rows(str(path))]
    for language in {task.language for task in tasks}:
        if reason := missing(language):
            raise UserError(f"{path}: {reason}; install what is missing, or evaluate another language")
    if any("org.javatuples" in task.prompt for task in tasks) and not Path(TUPLES).is_file():
        raise UserError(
            f"{path} imports org.javatuples, and {TUPLES} is not there: install libjavatuples-java, or put it there"
        )
    return tasks


def _task(where: str, row: dict[str, Any]) -> Task:
    name = need(row, "language", str, where)
    if name not in MULTIPL_E:
        raise DataError(f"{where}: language {name!r} is not supported: allowed are {', '.join(MULTIPL_E)}")
    language = MULTIPL_E[name]
    stops = need(row, "stop_tokens", list, where)
    return Task(
        need(row, "name", str, where), need(row, "prompt", str, where), OwnTests(language, need(row, "tests", str, where)),
        language=language, stops=tuple(stops), solution=row.get("canonical_solution") or "",
    )  # fmt: skip
