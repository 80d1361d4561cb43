"""`opencoder bench-engine`: what the task engine itself takes per task, with tasks that do next to nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from opencoder.console import Parser, run
from opencoder.files import write_json


def write_number(inputs: list[Path], outputs: list[Path], *, value: int) -> None:
    """The task."""
    outputs[0].write_text(str(value))


def measure(tasks: int, workers: int) -> dict[str, float]:
    """Milliseconds per task, workers started before: of the run, of the driver's CPU time, and of a run that skips them all."""
    from opencoder.corpus import engine

    def plan(name: str, count: int) -> list[engine.Task]:
        function = "opencoder.tools.bench_engine:write_number"  # not __name__: this file may be the command itself
        return [engine.Task(f"{name}/{i}", function, ("txt",), (), {"value": i}) for i in range(count)]

    with tempfile.TemporaryDirectory() as scratch, engine.LocalExecutor(workers) as executor:
        folder = Path(scratch)
        engine.run(plan("warm", 4 * workers), folder=folder, executor=executor)
        found = {}
        for name in ("done", "skipped"):
            start, cpu = time.perf_counter(), time.process_time()
            engine.run(plan("measured", tasks), folder=folder, executor=executor)
            found[f"{name}_ms"] = (time.perf_counter() - start) / tasks * 1e3
            found[f"{name}_driver_cpu_ms"] = (time.process_time() - cpu) / tasks * 1e3
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = Parser("bench-engine", "Time of the task engine per task, with tasks that write one number.")
    parser.add_argument("--tasks", type=int, default=2000, help="tasks of a run")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes, one row each")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    rows = {workers: measure(args.tasks, workers) for workers in args.workers}
    for workers, row in rows.items():
        print(f"{workers} workers: " + ", ".join(f"{name.replace('_', ' ')} {ms:.2f}" for name, ms in row.items()))
    if args.json:
        write_json(args.json, {"tasks": args.tasks, "rows": {str(workers): row for workers, row in rows.items()}})
    return 0


if __name__ == "__main__":
    run(main)
