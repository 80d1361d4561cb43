"""Plans of tasks for the tests of the task engine, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opencoder.corpus.engine import Input, Task

HERE = "tests.corpus.engine_tasks"
ROOT = Path(__file__).parents[2]


def task(
    name: str, function: str, *inputs: Input | str, outputs: tuple[str, ...] = ("txt",), **parameters: Any
) -> Task:
    """A task of the functions in engine_tasks.py; a plain string is an input of its content."""
    files = tuple(i if isinstance(i, Input) else Input(i) for i in inputs)
    return Task(name, f"{HERE}:{function}", outputs, files, parameters)


def sums(values: list[int]) -> list[Task]:
    """One task per number, one that adds them, one with two outputs that reads the sum."""
    numbers = [task(f"number/{i:03d}", "number", value=v) for i, v in enumerate(values)]
    added = task("total", "total", *(n.output_paths()[0] for n in numbers))
    return [task("shout", "shout", "total.txt", outputs=("txt", "length.txt")), added, *numbers]


def content(folder: Path) -> dict[str, str]:
    """Every output, and every manifest without what was measured."""
    found = {}
    for path in sorted(folder.rglob("*.txt")):
        found[str(path.relative_to(folder))] = path.read_text()
    for path in sorted(folder.rglob("*.task.json")):
        plain = json.loads(path.read_text())
        del plain["measured"]
        found[str(path.relative_to(folder))] = json.dumps(plain)
    return found
