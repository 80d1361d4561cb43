"""The page of an evaluation: one self-contained HTML file. What models wrote is escaped; it may well be HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from opencoder.files import write_text

from .task import Task

SHOWN = 20_000
"""Characters of a program on the page; verdicts.jsonl has all."""


def write_page(
    path: str | Path, summary: dict[str, Any], tasks: Sequence[Task], rows: Sequence[dict[str, Any]]
) -> None:
    """Write `report.html`: scores, how programs failed, and every program with its verdict."""
    environment = Environment(loader=PackageLoader("opencoder.eval", "."), autoescape=True, undefined=StrictUndefined)
    by_task: dict[str, list[dict[str, Any]]] = {task.id: [] for task in tasks}
    for row in rows:
        by_task[row["task"]].append(
            {**row, "program": _printable(row["program"][:SHOWN]), "detail": _printable(row["detail"])}
        )
    groups = [
        {"id": task, "rows": some, "passed": sum(row["status"] == "passed" for row in some)}
        for task, some in by_task.items()
    ]
    kinds = sorted(summary["kinds"].items(), key=lambda item: (-item[1], item[0]))
    write_text(path, environment.get_template("report.html.j2").render(summary=summary, groups=groups, kinds=kinds))


def _printable(text: str) -> str:
    """Without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
