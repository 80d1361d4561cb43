"""`opencoder plan-classification`: memory, arithmetic and traffic of a class head on a number of ranks, computed, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import ConfigError
from opencoder.files import write_json
from opencoder.model.classes.memory import GB, RECIPES, build_bytes, head_memory, neighbours_for, weight_bytes

STEP_OVERHEAD, GRAPH_OVERHEAD = 1.18, 1.8
"""What a step and a build take over their matrix products alone: measured by bench-classification on CPU cores (the simulated rank,
mean of three runs; the graph of 10^5 classes). docs/classification.md has the runs."""
PARTS = ("weight_and_state", "features", "scored_rows", "logits", "graph", "graph_build", "selection", "total")


def plan(
    classes: int,
    ranks: int,
    dim: int,
    *,
    recipe: str,
    batch: int,
    rho: float,
    neighbours: int | None,
    tflops: float,
    overheads: tuple[float, float] = (STEP_OVERHEAD, GRAPH_OVERHEAD),
    background: bool = True,
) -> dict[str, Any]:
    """What one of `ranks` ranks holds, multiplies and receives in a step of `batch` samples in all; the graph's build too.

    `tflops`: the rate of a rank's matrix products; `overheads`: of a step and of a build over them. Everything is arithmetic from
    these inputs (sheet 1.6, 2.3, 2.9)."""
    memory = head_memory(classes, ranks, dim, recipe=recipe, batch=batch, rho=rho, neighbours=neighbours)
    held = build_bytes(classes, ranks, dim, neighbours, background=background) if neighbours else 0.0
    scored = -(-classes * rho // ranks)
    flop = 6.0 * batch * scored * dim
    build = 2.0 * classes**2 * dim / ranks
    others = (ranks - 1) / ranks
    return {
        "classes": classes,
        "ranks": ranks,
        "batch": batch,
        "rho": rho,
        "neighbours": neighbours,
        "bytes": {**asdict(memory), "graph": memory.graph, "graph_build": held, "total": memory.total + held},
        "step_flop": flop,
        "step_s": overheads[0] * flop / (tflops * 1e12),
        "step_received_bytes": {
            "features, 16 bit": others * batch * dim * 2,
            "their gradient, 16 bit": others * batch * dim * 2,
            "labels": others * batch * 8,
            "max, sum, target": 2 * others * batch * 3 * 4,
        },
        "graph_flop": build if neighbours else 0.0,
        "graph_s": overheads[1] * build / (tflops * 1e12) if neighbours else 0.0,
        "graph_received_bytes": others * classes * dim * 4 if neighbours else 0.0,
    }


def recipes_table(classes: int, ranks: Sequence[int], dim: int, rho: float) -> str:
    """Class matrix with optimizer state for every recipe, GB a rank: the sheet's table 8.2."""
    lines = [
        f"Class matrix, gradient and optimizer state, GB a rank, D = {dim}, rho = {rho} (computed)",
        "",
        "| classes / ranks | " + " | ".join(RECIPES) + " |",
        "|---|" + "---|" * len(RECIPES),
    ]
    for n in ranks:
        values = (weight_bytes(classes, n, dim, recipe, rho=rho) / GB for recipe in RECIPES)
        lines.append(f"| {classes:.0e} / {n} | " + " | ".join(f"{v:.3g}" for v in values) + " |")
    return "\n".join(lines)


def plans_table(
    plans: Sequence[dict[str, Any]], recipe: str, memory_gb: float, tflops: float, overheads: tuple[float, float]
) -> str:
    """One row for each number of ranks."""
    lines = [
        f"One rank with recipe `{recipe}`, GB (computed); times: products at {tflops:g} TFLOP/s a rank, times {overheads[0]:g} for a "
        f"step and {overheads[1]:g} for a graph (computed)",
        "",
        "| ranks | batch | K | "
        + " | ".join(part.replace("_", " ") for part in PARTS)
        + f" | of {memory_gb:g} GB | head ms | MB received | graph min |",
        "|---|---|---|" + "---|" * (len(PARTS) + 4),
    ]
    for row in plans:
        gb = {part: row["bytes"][part] / GB for part in PARTS}
        share = gb["total"] / memory_gb
        verdict = f"{share:.0%}" + ("" if share <= 0.9 else " too tight" if share <= 1 else " does not fit")
        received = sum(row["step_received_bytes"].values()) / 1e6
        lines.append(
            f"| {row['ranks']} | {row['batch']} | {row['neighbours'] or '-'} | "
            + " | ".join(f"{gb[part]:.3g}" for part in PARTS)
            + f" | {verdict} | {row['step_s'] * 1e3:.1f} | {received:.1f} | {row['graph_s'] / 60:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = Parser("plan-classification", "Memory, arithmetic and traffic of a class head: computed, nothing is run.")
    parser.add_argument("--classes", type=float, default=1e8, help="classes N")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 256], help="ranks of the class group")
    parser.add_argument("--dim", type=int, default=512, help="width D of a row")
    parser.add_argument("--rank-batch", type=int, default=64, help="samples of a rank and step")
    parser.add_argument("--rho", type=float, default=0.1, help="share of the classes that a step scores")
    parser.add_argument(
        "--neighbours", type=int, help="length K of the neighbour lists (default: by the rule, at most 100)"
    )
    parser.add_argument("--selection", choices=("full", "random", "knn"), default="knn", help="which rows are scored")
    parser.add_argument(
        "--wait-for-graph", action="store_true", help="training waits for the graph: no copy of the rows"
    )
    parser.add_argument("--recipe", choices=list(RECIPES), default="ours, sgd fp32", help="what is stored per number")
    parser.add_argument("--memory-gb", type=float, default=80.0, help="memory of a rank")
    parser.add_argument(
        "--tflops", type=float, default=400.0, help="rate of a rank's matrix products, as you measured it"
    )
    parser.add_argument(
        "--overheads",
        type=float,
        nargs=2,
        default=[STEP_OVERHEAD, GRAPH_OVERHEAD],
        metavar=("STEP", "GRAPH"),
        help="time over that of the products alone, as bench-classification measures it (default: on CPU cores)",
    )
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)
    overheads = (args.overheads[0], args.overheads[1])
    if min(args.rank_batch, args.memory_gb, args.tflops) <= 0 or min(overheads) < 1:
        raise ConfigError("--rank-batch, --memory-gb and --tflops are positive numbers, --overheads at least 1")
    classes, rho = int(args.classes), 1.0 if args.selection == "full" else args.rho
    plans = []
    for ranks in args.ranks:
        batch = args.rank_batch * ranks
        k = None
        if args.selection == "knn":
            k = args.neighbours or min(100, neighbours_for(classes, rho, batch))
        how: dict[str, Any] = {"recipe": args.recipe, "tflops": args.tflops, "overheads": overheads}
        how["background"] = not args.wait_for_graph
        plans.append(plan(classes, ranks, args.dim, batch=batch, rho=rho, neighbours=k, **how))
    print(recipes_table(classes, args.ranks, args.dim, rho))
    print()
    print(plans_table(plans, args.recipe, args.memory_gb, args.tflops, overheads))
    if args.json:
        write_json(args.json, {"plans": plans, "recipe": args.recipe, "kind": "computed"})
    return 0


if __name__ == "__main__":
    run(main)
