"""What the sandbox costs: HumanEval's own solutions scored several times over, beside the time of the programs themselves, and the
time to start a program in a warm sandbox."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Sequence

from opencoder.console import Parser, run
from opencoder.files import write_json


def children_cpu_s() -> float:
    """CPU seconds of all ended child processes and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = Parser(
        "bench-evaluate", "Time of the sandbox beside that of the programs in it, on HumanEval's own solutions."
    )
    parser.add_argument("--samples", type=int, default=10, help="times that each of the 164 solutions is scored")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="programs at once")
    parser.add_argument("--starts", type=int, default=100, help="starts of a program to measure, one at a time")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)

    from opencoder.eval import benchmarks
    from opencoder.eval.sandbox.limits import Limits
    from opencoder.eval.sandbox.pool import Sandbox
    from opencoder.eval.score import score_all

    tasks = benchmarks.load("humaneval")
    programs = [(task, task.program(task.solution, "completion")) for task in tasks] * args.samples
    begin, used = time.monotonic(), children_cpu_s()
    with Sandbox() as sandbox:
        ready_s = time.monotonic() - begin
        starts = []
        for _ in range(args.starts):
            begin = time.monotonic()
            sandbox.execute([["/bin/true"]], files={}, limits=Limits())
            starts.append(1000 * (time.monotonic() - begin))
        begin, before = time.monotonic(), os.times()
        outcomes = list(score_all(programs, sandbox, workers=args.workers))
        wall_s, after = time.monotonic() - begin, os.times()
    # After closing, so that the zygotes' own time and that of all their children is counted.
    caller_s = after.user + after.system - before.user - before.system
    own_s = sum(outcome.cpu_s for outcome in outcomes)
    result = {
        "programs": len(programs), "passed": sum(o.status == "passed" for o in outcomes), "workers": args.workers,
        "wall_s": wall_s, "programs_cpu_s": own_s, "ms_per_program": 1000 * wall_s / len(programs),
        "all_cpu_s": caller_s + children_cpu_s() - used, "ready_s": ready_s,
        "start_ms_median": statistics.median(starts), "start_ms_best": min(starts), "load": os.getloadavg()[0],
    }  # fmt: skip
    print(
        f"warm start and end of a program   median {result['start_ms_median']:.1f} ms, best {result['start_ms_best']:.1f} ms"
    )
    print(
        f"{len(programs)} programs, {args.workers} at once   {wall_s:.1f} s ({result['ms_per_program']:.1f} ms each), ",
        end="",
    )
    print(f"{result['passed']} passed; load of the machine {result['load']:.1f}")
    print(
        f"CPU time   {result['all_cpu_s']:.1f} s in all, the programs' own {own_s:.1f} s; sandbox ready in {ready_s:.2f} s"
    )
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    run(main)
