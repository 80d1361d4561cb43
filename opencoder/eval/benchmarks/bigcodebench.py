"""BigCodeBench: functions that use many libraries, tested by unittest in the program's own process (see docs/evaluation.md)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ..task import PYTHON_BASE_STOPS, Task, UnitTests, need
from . import files


def load(path: str | Path | None) -> list[Task]:
    """Full or hard, whichever the file holds. Completion mode is the benchmark's "complete", chat mode its "instruct"."""
    return [_task(where, row) for where, row in files.rows(str(path))]


def _task(where: str, row: dict[str, Any]) -> Task:
    libraries = row.get("libs") or []
    if isinstance(libraries, str):  # the released files hold the list as text
        libraries = ast.literal_eval(libraries)
    return Task(
        need(row, "task_id", str, where),
        need(row, "complete_prompt", str, where),
        UnitTests(need(row, "test", str, where)),
        need(row, "entry_point", str, where),
        row.get("canonical_solution") or "",
        need(row, "instruct_prompt", str, where),
        stops=PYTHON_BASE_STOPS,
        facts={"libraries": ", ".join(libraries)},
    )
