"""`opencoder bench-classification`: the class head over all classes, random ones, or the nearest of the labels, beside a plain Partial
FC; building the graph; what a selection costs in accuracy; and one rank of a job of 100 million classes, simulated.

Parts: `steps`, `graph`, `learning`, `simulate`. Ranks are gloo processes of one thread on this machine. The rate of the same matrix
products alone is measured in the same run, so shares of it hold on another machine too."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import ConfigError
from opencoder.files import write_json
from opencoder.tools.class_bench.ranks import be_rank, run_ranks

PARTS = ("steps", "graph", "learning", "simulate")
GB = 1e9
GEMM_GOAL, KNN_GOAL, PEER_GOAL, SELECTION_GOAL_MS = 0.40, 6.0, 1.0, 15.0
"""Of the full step: share of its products' rate; of knn: speed over full and over the peer; of the selection, at 1e6 classes."""
GRAPH_GOAL_S = 30.0
"""1e5 classes of width 64, K = 32, 4 ranks."""
LEARNING_GOAL_POINTS = 0.5
SIMULATED_GOAL, SIMULATED_GOAL_GB = 1.3, 3.0
"""Time of the step over that of its products; peak memory of the process."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts asked for; print tables, write JSON and a plot."""
    parser = Parser(
        "bench-classification", "Full, random and KNN softmax over many classes: speed, memory and accuracy."
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--classes", type=float, default=1e6, help="classes of the steps")
    parser.add_argument("--dim", type=int, default=64, help="width of the steps and the graph")
    parser.add_argument("--batch", type=int, default=256, help="samples of a step over all ranks")
    parser.add_argument("--ranks", type=int, default=4, help="processes of the steps and the graph")
    parser.add_argument("--rho", type=float, default=0.1, help="share of the classes that a step scores")
    parser.add_argument("--neighbours", type=int, default=128, help="length of the steps' neighbour lists")
    parser.add_argument("--uniform-mix", type=float, default=0.2, help="share of the scored classes that stays random")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side; the best counts")
    parser.add_argument("--graph-classes", type=float, default=1e5, help="classes of the graph")
    parser.add_argument("--graph-neighbours", type=int, default=32, help="length of the graph's lists")
    parser.add_argument(
        "--graph-dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the graph's products"
    )
    parser.add_argument("--learning-steps", type=int, default=4000, help="steps of each run of the learning part")
    parser.add_argument("--learning-classes", type=int, default=2000, help="classes of the learning part")
    parser.add_argument(
        "--learning-noise", type=float, default=0.5, help="of samples, beside a class direction of length 1"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method of the learning part")
    parser.add_argument("--simulate-classes", type=float, default=1e8, help="classes of the simulated job")
    parser.add_argument("--simulate-ranks", type=int, default=256, help="ranks of the simulated job")
    parser.add_argument("--simulate-dim", type=int, default=512, help="width of the simulated job")
    parser.add_argument("--simulate-batch", type=int, default=2048, help="samples of a step of the simulated job")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads of the simulated rank; more need as many cores at rest"
    )
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--plot", help="PNG file for a plot of what was measured")
    parser.add_argument("--rank", nargs=2, metavar=("WORK", "FILE"), help="(internal) be one rank")
    args = parser.parse_args(argv)
    if args.rank:
        return be_rank(works()[args.rank[0]], args.rank[1])
    if args.batch % args.ranks or args.simulate_batch % args.simulate_ranks:
        raise ConfigError("--batch must be a multiple of --ranks, and --simulate-batch of --simulate-ranks")
    parts: dict[str, Callable[[Any], dict[str, Any]]] = {
        "steps": bench_steps,
        "graph": bench_graph,
        "learning": bench_learning,
        "simulate": bench_simulated,
    }
    results: dict[str, Any] = {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    for name in PARTS:
        if name in args.only:
            results[name] = parts[name](args)
            print(TABLES[name](results[name]), flush=True)
            if args.json:
                write_json(args.json, results)
    if args.plot:
        from opencoder.tools.class_bench.plot import plot

        plot(results, Path(args.plot))
        print(f"plot: {args.plot}")
    return 0


def works() -> dict[str, Callable[..., dict[str, Any]]]:
    """What the processes of ranks can do."""
    from opencoder.tools.class_bench import simulate, steps

    return {"steps": steps.time_steps, "graph": steps.time_graph, "simulate": simulate.one_rank}


def bench_steps(args: Any) -> dict[str, Any]:
    """Best step of each side over the rounds, each as long as its slowest rank."""
    settings = {
        "classes": int(args.classes), "dim": args.dim, "batch": args.batch, "rho": args.rho, "neighbours": args.neighbours,
        "uniform_mix": args.uniform_mix, "rounds": args.rounds, "sides": ["full", "random", "knn", "peer"],
    }  # fmt: skip
    ranks = run_ranks("steps", settings, args.ranks)
    seconds = {name: _best(ranks, name) for name in ranks[0]["times"]}
    flop = 6.0 * args.batch * settings["classes"] * args.dim
    return {
        "settings": {**settings, "ranks": args.ranks},
        "seconds": seconds,
        "all_seconds": [rank["times"] for rank in ranks],
        "missing_mass": ranks[0]["missing_mass"],
        "scored": {name: sum(rank["scored"][name] for rank in ranks) for name in ranks[0]["scored"]},
        "products_gflops": flop / seconds["products"] / 1e9,
        "full_share_of_products": seconds["products"] / seconds["full"],
        "knn_over_full": seconds["full"] / seconds["knn"],
        "knn_over_peer": seconds["peer"] / seconds["knn"],
    }


def _best(ranks: list[dict[str, Any]], name: str) -> float:
    return min(map(max, zip(*(rank["times"][name] for rank in ranks), strict=True)))


def bench_graph(args: Any) -> dict[str, Any]:
    """A whole graph."""
    settings = {
        "classes": int(args.graph_classes), "dim": args.dim, "neighbours": args.graph_neighbours,
        "dtype": args.graph_dtype, "probe_rows": 128,
    }  # fmt: skip
    ranks = run_ranks("graph", settings, args.ranks)
    flop = 2.0 * settings["classes"] ** 2 * args.dim
    seconds, products = (max(rank[name] for rank in ranks) for name in ("seconds", "products"))
    return {
        "settings": {**settings, "ranks": args.ranks},
        "seconds": seconds,
        "products_seconds": products,
        "gflops": flop / seconds / 1e9,
        "products_gflops": flop / products / 1e9,
        "recall": ranks[0]["recall"],
        "probe_rows": ranks[0]["probe_rows"],
    }


def bench_learning(args: Any) -> dict[str, Any]:
    """Accuracy of each method, in this process."""
    from opencoder.tools.class_bench.learning import METHODS, Task, compare

    return compare(
        Task(classes=args.learning_classes, steps=args.learning_steps, noise=args.learning_noise),
        args.seeds,
        list(METHODS),
    )


def bench_simulated(args: Any) -> dict[str, Any]:
    """One rank of many, in a process of its own."""
    settings = {
        "classes": int(args.simulate_classes), "ranks": args.simulate_ranks, "dim": args.simulate_dim,
        "batch": args.simulate_batch, "rho": args.rho, "neighbours": 100, "rounds": args.rounds, "threads": args.threads,
    }  # fmt: skip
    found = run_ranks("simulate", settings, 1)[0]
    seconds = {name: min(values) for name, values in found["times"].items()}
    return {
        "settings": settings,
        **found,
        "seconds": seconds,
        "step_over_products": seconds["step"] / seconds["products"],
        "products_gflops": 6.0 * settings["batch"] * found["scored"] * settings["dim"] / seconds["products"] / 1e9,
    }


def _goal(met: bool) -> str:
    return "met" if met else "short"


def steps_table(r: dict[str, Any]) -> str:
    """Text of bench_steps."""
    s, sec = r["settings"], r["seconds"]
    lines = [
        f"Steps: {s['classes']:,} classes x {s['dim']}, {s['ranks']} ranks, B = {s['batch']}, rho = {s['rho']}, K = {s['neighbours']} "
        f"(graph known by construction), uniform mix {s['uniform_mix']}; products alone {r['products_gflops']:.0f} GFLOP/s",
        f"{'':<10}{'step s':>10}{'over full':>11}{'scored':>12}{'missing mass':>14}",
    ]
    for name in s["sides"]:
        mass, scored = r["missing_mass"][name], r["scored"][name]
        lines.append(f"{name:<10}{sec[name]:>10.3f}{sec['full'] / sec[name]:>10.2f}x{scored:>12,}{mass:>14.4f}")
    share, selection = r["full_share_of_products"], 1e3 * sec["selection"]
    lower = r["missing_mass"]["knn"] < r["missing_mass"]["peer"]
    lines += [
        f"full: {share:.0%} of its products' rate (goal {GEMM_GOAL:.0%}, {_goal(share >= GEMM_GOAL)})",
        f"knn / full: {r['knn_over_full']:.2f}x (goal {KNN_GOAL:g}x at rho 0.1, {_goal(r['knn_over_full'] >= KNN_GOAL)})",
        f"knn / plain Partial FC: {r['knn_over_peer']:.2f}x (goal {PEER_GOAL:g}x with less missing mass, "
        f"{_goal(lower and r['knn_over_peer'] >= PEER_GOAL)})",
        f"selection: {selection:.1f} ms (goal {SELECTION_GOAL_MS:g} ms at 1e6 classes, {_goal(selection <= SELECTION_GOAL_MS)})",
    ]
    return "\n".join(lines)


def graph_table(r: dict[str, Any]) -> str:
    """Text of bench_graph."""
    s = r["settings"]
    return (
        f"Graph: {s['classes']:,} classes x {s['dim']}, K = {s['neighbours']}, {s['dtype']}, {s['ranks']} ranks: {r['seconds']:.1f} s "
        f"(goal {GRAPH_GOAL_S:g} s at 1e5 x 64, K = 32; {_goal(r['seconds'] <= GRAPH_GOAL_S)}), {r['gflops']:.0f} GFLOP/s; its "
        f"products alone {r['products_seconds']:.1f} s, {r['products_gflops']:.0f} GFLOP/s; recall {r['recall']:.6f} on "
        f"{r['probe_rows']:.0f} rows"
    )


def learning_table(r: dict[str, Any]) -> str:
    """Text of bench_learning."""
    t = r["task"]
    lines = [
        f"Learning: {t['classes']:,} classes, {t['steps']:,} steps of {t['batch']}, rho = {t['rho']}, K = {t['neighbours']}, "
        f"{r['seeds']} seeds",
        f"{'':<26}{'top-1':>8}{'behind full':>13}{'missing mass':>14}{'s a run':>9}",
    ]
    for name, row in r["methods"].items():
        behind = row["behind_full_points"]
        lines.append(
            f"{name:<26}{row['top1']:>8.4f}{behind:>9.2f} pts{row['missing_mass']:>14.4f}{row['seconds']:>9.1f}"
        )
    behind = r["methods"]["knn, mix 0.3, corrected"]["behind_full_points"]
    lines.append(
        f"knn with correction: goal within {LEARNING_GOAL_POINTS} points, {_goal(behind <= LEARNING_GOAL_POINTS)}"
    )
    return "\n".join(lines)


def simulated_table(r: dict[str, Any]) -> str:
    """Text of bench_simulated; every line says so."""
    s, sec = r["settings"], r["seconds"]
    ratio, peak = r["step_over_products"], r["peak_bytes"] / GB
    own = (r["peak_bytes"] - r["before_bytes"]) / GB
    return "\n".join(
        [
            f"Simulated: one rank of {s['ranks']} for {s['classes']:,} classes x {s['dim']}: {r['rows']:,} rows, B = {s['batch']}, "
            f"{r['scored']:,} scored, K = {s['neighbours']}, {s['threads']} threads; no communication",
            f"simulated: step {sec['step']:.2f} s, of which selection {1e3 * sec['selection']:.0f} ms; products alone "
            f"{sec['products']:.2f} s at {r['products_gflops']:.0f} GFLOP/s: {ratio:.2f}x (goal {SIMULATED_GOAL:g}x, "
            f"{_goal(ratio <= SIMULATED_GOAL)})",
            f"simulated: peak memory of the process {peak:.2f} GB (goal {SIMULATED_GOAL_GB:g} GB, {_goal(peak <= SIMULATED_GOAL_GB)}), "
            f"{own:.2f} GB without the interpreter and torch; calculator {r['formula_bytes'] / GB:.2f} GB "
            f"({own / (r['formula_bytes'] / GB) - 1:+.1%})",
        ]
    )


TABLES = {"steps": steps_table, "graph": graph_table, "learning": learning_table, "simulate": simulated_table}


if __name__ == "__main__":
    run(main)
