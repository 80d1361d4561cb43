"""Bars of each contender's speed, one picture an operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"ours": "#1b6ca8", "ours in place": "#4fa3d8", "ours triton": "#4fa3d8"}
GREYS = ("#8c8c8c", "#b5b5b5", "#6b6b6b", "#d0d0d0", "#545454", "#a0a0a0")


def draw(rows: list[dict[str, Any]], folder: Path, title: str) -> list[Path]:
    """One PNG for each operator and direction; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        for backward in (False, True):
            chosen = [r for r in rows if r["operator"] == operator and r["backward"] == backward]
            if not chosen:
                continue
            names = list(dict.fromkeys(n for r in chosen for n in r["contenders"]))
            figure, axis = plt.subplots(figsize=(max(8.0, 3.0 + 1.5 * len(chosen)), 4.2), layout="constrained")
            width = 0.8 / len(names)
            for i, name in enumerate(names):
                at = [x + (i - (len(names) - 1) / 2) * width for x, r in enumerate(chosen) if name in r["contenders"]]
                heights = [r["contenders"][name]["rate"] / r["unit_scale"] for r in chosen if name in r["contenders"]]
                axis.bar(at, heights, width, label=name, color=COLOURS.get(name, GREYS[i % len(GREYS)]))
            limits = [(x, r["limit_rate"] / r["unit_scale"]) for x, r in enumerate(chosen) if r.get("limit_rate")]
            for n, (x, limit) in enumerate(limits):
                label = f"measured {chosen[x]['limit']}" if n == 0 else "_"  # one entry in the legend
                axis.hlines(limit, x - 0.42, x + 0.42, colors="#c23b22", linestyles="dashed", label=label)
            axis.set_xticks(range(len(chosen)), ["\n".join(r["shape"].rsplit(" ", 1)) for r in chosen], fontsize=8)
            axis.set_ylabel(chosen[0]["unit"])
            axis.set_title(f"{operator}, {'forward and backward' if backward else 'forward'}\n{title}", fontsize=9)
            axis.margins(y=0.15)
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside, where it hides nothing
            axis.spines[["top", "right"]].set_visible(False)
            name = f"{operator} {'fwd-bwd' if backward else 'forward'}".replace(" ", "_").replace("+", "")
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            paths.append(path)
    return paths
