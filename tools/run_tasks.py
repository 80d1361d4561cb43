"""`opencoder run-tasks`: one element of a job array does its share of the tasks a driver has listed."""

from __future__ import annotations

from collections.abc import Sequence

from opencoder.console import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the share and print what was done; a failed task gives exit status 1."""
    parser = Parser("run-tasks", "Do share I of N of the tasks in FOLDER/tasks.jsonl (docs/engine.md).")
    parser.add_argument("folder", help="folder of the run, shared with the driver")
    parser.add_argument("--index", type=int, required=True, help="this share, from 0: $SLURM_ARRAY_TASK_ID, say")
    parser.add_argument("--count", type=int, required=True, help="number of shares")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument(
        "--memory-mb", type=int, help="MiB a worker may use; default: worked out from what is available"
    )
    parser.add_argument("--retries", type=int, default=2, help="further attempts for a task whose process was killed")
    parser.add_argument("--max-failures", type=int, default=10, help="failed tasks after which nothing new is started")
    args = parser.parse_args(argv)

    from opencoder.corpus.engine import run_share

    limit = None if args.memory_mb is None else args.memory_mb << 20
    report = run_share(
        args.folder,
        args.index,
        args.count,
        workers=args.workers,
        memory_per_worker=limit,
        retries=args.retries,
        max_failures=args.max_failures,
    )
    print(f"share {args.index}/{args.count}: {report.done} tasks done, {report.skipped} done before")
    return 0


if __name__ == "__main__":
    run(main)
