"""`opencoder bench-kernels`: every operator beside eager torch, torch.compile and the other packages that can be imported.

Each contender's outputs and gradients are held against fp64 first: one that is wrong is named and not timed. Then they
take turns; a row gives milliseconds, GB/s or TFLOP/s, the share of the copy or GEMM rate measured in the same run, and
how many times faster ours is. On a CPU all run in one process with the same allocator settings, which are printed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from opencoder.console import Parser, ProgressBar, run
from opencoder.errors import Failure, UserError
from opencoder.files import write_json

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""glibc keeps freed memory: otherwise large outputs are mapped anew each time and page faults are what is measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = Parser("bench-kernels", "The kernels beside eager torch, torch.compile and other packages.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--only", default="", help="only cases whose name contains this, e.g. 'swiglu' or 'add+rms_norm 2048'"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender on a CPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's allocator settings as they are")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--plots", help="folder for pictures")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CONTENDER"), help="(internal) print peak bytes")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        raise UserError(f"--rounds {args.rounds} --threads {args.threads}: both must be positive")
    if not args.default_malloc and platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # The allocator reads them when a process starts.
        again = [sys.executable, "-m", "opencoder.tools.bench_kernels", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, again, {**os.environ, **ALLOCATOR})

    import torch

    device = torch.device(
        "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device: use --device cpu")
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print_peak(device, *args.memory_of)
    return bench(args, device)


def bench(args: Any, device: Any) -> int:
    """All rows; then the goals."""
    from opencoder.tools.kernel_bench import plots
    from opencoder.tools.kernel_bench.cases import all_cases

    cases = [case for case in all_cases(device) if args.only in case.name]
    if not cases:
        raise UserError(f"--only {args.only}: no case's name contains it")
    facts = environment(device, args)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    limits = Limits(device)
    rows: list[dict[str, Any]] = []
    with ProgressBar("bench", total=len(cases), unit="cases") as bar:
        for case in cases:
            row = measure(case, device, args, limits)
            rows.append(row)
            print(text_of(row), flush=True)
            bar.advance(postfix=case.name)
    held = [goal for row in rows for goal in row["goals"]]
    short = [goal for goal in held if not goal["met"]]
    print(f"\n{len(held) - len(short)} of {len(held)} goals met" + "".join(f"\n  short: {g['text']}" for g in short))
    if args.json:
        write_json(args.json, {"environment": facts, "limits": limits.measured, "rows": rows})
    if args.plots:
        title = f"{facts['device']}, torch {facts['torch']}, {facts['date']}"
        print(f"{len(plots.draw(rows, Path(args.plots), title))} pictures in {args.plots}")
    wrong = [f"{row['name']}: {name}" for row in rows for name in row["wrong"] if name.startswith("ours")]
    if wrong:
        raise Failure(f"ours is wrong in {len(wrong)} cases, the first: {wrong[0]}")
    return 0


def environment(device: Any, args: Any) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    from opencoder import kernels as K

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {args.threads} threads"
    malloc = ", ".join(f"{k}={os.environ[k]}" for k in ALLOCATOR if k in os.environ) or "default"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": name, "torch": torch.__version__, "triton": triton_version, "python": platform.python_version(),
        "date": date.today().isoformat(), "command": " ".join(["opencoder bench-kernels", *sys.argv[1:]]),
        "malloc": malloc, "kernels": K.chosen(device.type),
    }  # fmt: skip


class Limits:
    """The machine's own rates, measured once in this run for each size and type."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.measured: dict[str, float] = {}

    def copy(self, size_bytes: int) -> float:
        """Bytes per second of a copy of tensors about that large."""
        from opencoder.tools.kernel_bench.measure import copy_rate

        megabytes = 512 if self.device.type == "cuda" else max(1, min(128, round(size_bytes / 1e6)))
        key = f"copy of {megabytes} MB, GB/s"
        if key not in self.measured:
            self.measured[key] = copy_rate(self.device, megabytes) / 1e9
        return self.measured[key] * 1e9

    def gemm(self, dtype: Any) -> float:
        """FLOP per second of a product."""
        from opencoder.tools.kernel_bench.measure import gemm_rate

        key = f"GEMM {str(dtype).removeprefix('torch.')}, TFLOP/s"
        if key not in self.measured:
            self.measured[key] = gemm_rate(self.device, dtype) / 1e12
        return self.measured[key] * 1e12


def measure(case: Any, device: Any, args: Any, limits: Limits) -> dict[str, Any]:
    """One row: errors, times, rates, ratios, goals."""
    import torch

    from opencoder.tools.kernel_bench.goals import goals_of
    from opencoder.tools.kernel_bench.measure import interleaved, release
    from opencoder.tools.kernel_bench.prepared import Prepared

    torch.compiler.reset()  # each shape its own graphs: after eight of one function torch.compile gives up and runs eagerly
    prepared = Prepared(case, device, without=("compile",) if args.no_compile else ())
    wrong = prepared.wrong()
    release()  # the fp64 truth
    times = interleaved({n: r for n, r in prepared.runs.items() if n not in wrong}, args.rounds, device)
    del prepared
    release()  # before the peaks, for which other processes need memory, and the next case
    work, unit, scale = (case.flops, "TFLOP/s", 1e12) if case.flops else (case.traffic, "GB/s", 1e9)
    limit = limits.gemm(case.dtype) if case.flops else limits.copy(case.size_bytes)
    contenders = {
        name: {
            "best_ms": t.best * 1e3, "q20_ms": t.q20 * 1e3, "q50_ms": t.q50 * 1e3, "q80_ms": t.q80 * 1e3,
            "rate": work / t.best, "share_of_limit": work / t.best / limit,
        }
        for name, t in times.items()
    }  # fmt: skip
    if case.memory:
        for name, facts in contenders.items():
            facts["peak_bytes"] = peak_of(case, name, device, args)
    row: dict[str, Any] = {
        "name": case.name, "operator": case.operator, "shape": case.shape, "backward": case.backward,
        "dtype": str(case.dtype).removeprefix("torch."), "unit": unit, "unit_scale": scale, "work": work,
        "limit": "GEMM" if case.flops else "copy", "limit_rate": limit, "contenders": contenders, "wrong": wrong,
    }  # fmt: skip
    row["goals"] = [judged for goal in goals_of(case, device.type) if (judged := judge(goal, row)) is not None]
    return row


def judge(goal: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """Whether a goal is met; None if its contender did not run."""
    found, ours = row["contenders"], row["contenders"].get(goal.row)
    if ours is None or (goal.contender not in found and goal.contender != row["limit"]):
        return None
    if goal.contender == row["limit"]:
        ratio = ours["share_of_limit"]
    else:
        kind = "peak_bytes" if goal.peak else "best_ms"
        ratio = found[goal.contender][kind] / ours[kind]
    what = "'s peak" if goal.peak else ""
    text = f"{row['name']}: {goal.row} {ratio:.2f}x {goal.contender}{what}, goal {goal.at_least:.2f}x"
    return {
        "contender": goal.contender,
        "ratio": ratio,
        "at_least": goal.at_least,
        "met": ratio >= goal.at_least,
        "text": text,
    }


def peak_of(case: Any, contender: str, device: Any, args: Any) -> int:
    """Peak bytes beyond what is there before: on a CPU in a process of its own, with the allocator's own settings, so that
    what other contenders left behind does not hide it."""
    if device.type == "cuda":
        from opencoder.tools.kernel_bench.measure import peak_extra
        from opencoder.tools.kernel_bench.prepared import Prepared

        return peak_extra(Prepared(case, device, only=contender).runs[contender], device)
    argv = [sys.executable, "-m", "opencoder.tools.bench_kernels", "--device", "cpu", "--threads", str(args.threads)]
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    done = subprocess.run(
        [*argv, "--default-malloc", "--memory-of", case.name, contender],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Failure(f"the peak of {case.name}, {contender}, was not measured: {done.stderr[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def print_peak(device: Any, name: str, contender: str) -> int:
    """In a process of its own: measure one contender's peak."""
    from opencoder.tools.kernel_bench.cases import all_cases
    from opencoder.tools.kernel_bench.measure import peak_extra
    from opencoder.tools.kernel_bench.prepared import Prepared

    (case,) = [c for c in all_cases(device) if c.name == name]
    print(json.dumps(peak_extra(Prepared(case, device, only=contender).runs[contender], device)))
    return 0


def text_of(row: dict[str, Any]) -> str:
    """A row as text: a line for each contender, fastest first."""
    limit = row["limit_rate"] / row["unit_scale"]
    lines = [f"\n{row['name']}   (measured {row['limit']}: {limit:.3g} {row['unit']})"]
    found = row["contenders"]
    ours = found.get("ours", {}).get("best_ms")
    for name, f in sorted(found.items(), key=lambda item: item[1]["best_ms"]):
        line = (
            f"  {name:<22}{f['best_ms']:>10.3f} ms  (20/50/80 %: {f['q20_ms']:.3f} {f['q50_ms']:.3f} {f['q80_ms']:.3f})"
        )
        line += f"{f['rate'] / row['unit_scale']:>9.3g} {row['unit']}{f['share_of_limit']:>7.0%} of {row['limit']}"
        if ours is not None and name != "ours":
            line += f"   ours is {f['best_ms'] / ours:.2f}x"
        if "peak_bytes" in f:
            line += f"   peak +{f['peak_bytes'] / 1e6:.0f} MB"
        lines.append(line)
    lines += [f"  {name:<22} not timed: {why}" for name, why in row["wrong"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
