"""`opencoder bench-train`: a training step beside transformers' LlamaForCausalLM, eager and compiled, same shape, batch and
optimizer; and beside the floor: nothing but the step's matrix products, attention and AdamW, into buffers that are reused.
With `--layouts`, two processes of one thread each, tensor and data parallel, beside one process with two threads.

Each side is a process of its own, or two, that takes a step when asked, so they alternate and no one's memory counts for
another. Reported: best step of each, tokens/s, ratios, peak resident memory, and model FLOP/s as a share of the GEMM rate
measured in the same process. All have the same allocator settings, which are printed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, ProgressBar, run
from opencoder.files import write_json
from opencoder.tools.bench_train_sides import BATCH, LAYOUTS, LENGTH, SHAPE, serve

SIDES = ("ours", "transformers", "compiled", "floor")
GOALS = {"transformers": 1.5, "compiled": 1.3, "floor": 0.85}
"""Speed of ours over each."""
MEMORY_GOAL = 0.4
"""Peak of ours over that of eager transformers, at most."""
LAYOUT_GOALS = {"tp2": 0.85, "dp2": 0.9}
"""Speed of a layout over one process; the variants of each share its goal."""
STATE_GOAL = 0.05
"""Of the sharded optimizer's memory, relative difference from its formula."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run both sides and print the table."""
    parser = Parser("bench-train", "Training speed and peak memory beside transformers, fp32 on CPU.")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side; the best counts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--without", nargs="*", default=[], choices=SIDES[1:], help="sides to leave out")
    parser.add_argument("--layouts", action="store_true", help="tensor and data parallel instead, beside one process")
    parser.add_argument("--side", choices=(*SIDES, *LAYOUTS), help="(internal) be one side")
    args = parser.parse_args(argv)
    if args.side:
        return serve(args.side, args.threads)
    names = ("ours", *LAYOUTS) if args.layouts else SIDES
    sides = {name: Side(name, args.threads) for name in names if name not in args.without}
    times: dict[str, list[float]] = {name: [] for name in sides}
    with ProgressBar("bench", total=(args.steps + 1) * len(sides), unit="steps") as bar:
        for round_ in range(args.steps + 1):  # the first round warms up, and compiles
            for name, side in sides.items():
                seconds = side.step()
                if round_:
                    times[name].append(seconds)
                bar.advance(postfix=name)
    facts = {
        name: {**side.finish(), "step_s": min(times[name]), "all_step_s": times[name]} for name, side in sides.items()
    }
    for fact in facts.values():
        fact["tokens_per_s"] = BATCH * LENGTH / fact["step_s"]
        fact["gemm_share"] = fact["flops_per_token"] * fact["tokens_per_s"] / (fact["gemm_tflops"] * 1e12)
    ours = facts["ours"]
    others = {name: fact for name, fact in facts.items() if name != "ours"}
    result = {
        "shape": {**SHAPE, "batch": BATCH, "length": LENGTH, "threads": args.threads},
        "malloc": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_TUNABLES"))},
        **facts,
        "speed_ratios": {name: ours["tokens_per_s"] / fact["tokens_per_s"] for name, fact in others.items()},
        "memory_ratios": {name: ours["peak_gib"] / fact["peak_gib"] for name, fact in others.items()},
    }
    print(table(result))
    if args.json:
        write_json(args.json, result)
    return 0


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"malloc: {result['malloc'] or 'default'}"]
    lines.append(f"{'':<14}{'best step s':>12}{'tokens/s':>10}{'peak GiB':>10}{'of GEMM rate':>14}  loss of step 1")
    for name in (n for n in (*SIDES, *LAYOUTS) if n in result):
        f = result[name]
        loss = "-" if f["first_loss"] is None else f"{f['first_loss']:.4f}"
        lines.append(
            f"{name:<14}{f['step_s']:>12.2f}{f['tokens_per_s']:>10.0f}{f['peak_gib']:>10.2f}{f['gemm_share']:>14.1%}  {loss}"
        )
    for name, ratio in result["speed_ratios"].items():
        if name in LAYOUTS:
            lines.append(_layout_line(name, 1 / ratio, result[name]))
            continue
        met = "met" if ratio >= GOALS[name] else "short"
        lines.append(f"ours / {name}: {ratio:.2f}x tokens/s (goal {GOALS[name]:.2f}x, {met})")
    if "transformers" in result["memory_ratios"]:
        ratio = result["memory_ratios"]["transformers"]
        met = "met" if ratio <= MEMORY_GOAL else "short"
        lines.append(f"ours / transformers: {ratio:.2f}x peak memory (goal at most {MEMORY_GOAL:.2f}x, {met})")
    return "\n".join(lines)


def _layout_line(name: str, ratio: float, facts: dict[str, Any]) -> str:
    goal = LAYOUT_GOALS[name.split("-")[0]]
    met = "met" if ratio >= goal else "short"
    off = facts["state_bytes"] / facts["state_formula"] - 1
    state = "met" if abs(off) <= STATE_GOAL else "short"
    return (
        f"{name} / one process: {ratio:.2f}x tokens/s (goal {goal:.2f}x, {met}); {facts['exposed']:.1%} of the step waits for "
        f"communication, {facts['bytes'] / 1e6:,.0f} MB handed over a step and rank; weights, gradients and optimizer "
        f"{facts['state_bytes'] / 1e6:,.1f} MB a rank, {off:+.2%} of the formula (goal {STATE_GOAL:.0%}, {state})"
    )


class Side:
    """The process of one side, or those of a layout, driven over their standard inputs."""

    def __init__(self, name: str, threads: int) -> None:
        world = 2 if name in LAYOUTS else 1
        threads = max(1, threads // world)
        argv = [sys.executable, str(Path(__file__).resolve()), "--side", name, "--threads", str(threads)]
        # One BLAS thread pool setting and allocator for all; transformers must not look for a hub.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.processes = [
            subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**env, "RANK": str(rank)}
            )
            for rank in range(world)
        ]

    def _ask(self, what: str) -> list[Any]:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(what + "\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"a side of the benchmark ended with status {process.wait()}")
            answers.append(json.loads(answer))
        return answers

    def step(self) -> float:
        """Seconds of one training step, of the slowest rank."""
        return float(max(self._ask("step")))

    def finish(self) -> dict[str, Any]:
        """Facts of the side, memory and GEMM rate those of all ranks; its processes end."""
        ranks = self._ask("finish")
        for process in self.processes:
            process.wait()
        facts: dict[str, Any] = ranks[0]
        facts |= {name: sum(rank[name] for rank in ranks) for name in ("peak_gib", "gemm_tflops")}
        return facts


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    run(main)
