"""One picture of what bench-classification measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel for each part that was measured, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, tuple[Callable[[Any, dict[str, Any]], None], ...]] = {
        "steps": (_step_times, _mass),
        "graph": (_graph,),
        "learning": (_accuracy,),
        "simulate": (_simulated,),
    }
    drawn = [(draw, results[name]) for name, some in panels.items() if name in results for draw in some]
    if not drawn:
        raise ValueError("nothing was measured: there is nothing to plot")
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 4), squeeze=False, layout="constrained")
    for ax, (draw, result) in zip(axes[0], drawn, strict=True):
        draw(ax, result)
        ax.margins(y=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(ax: Any, values: dict[str, float], title: str, unit: str) -> None:
    made = ax.bar(list(values), list(values.values()), color=[f"C{i}" for i in range(len(values))])
    ax.bar_label(made, fmt="%.0f" if unit == "ms" else "%.3g")
    ax.set(title=title, ylabel=unit)
    if max(map(len, values)) > 8:
        ax.set_xticks(range(len(values)), list(values), rotation=25, ha="right")


def _step_times(ax: Any, r: dict[str, Any]) -> None:
    s = r["settings"]
    _bars(
        ax, {n: 1e3 * r["seconds"][n] for n in s["sides"]}, f"step, {s['classes']:,} classes, {s['ranks']} ranks", "ms"
    )
    ax.axhline(1e3 * r["seconds"]["products"], color="grey", linestyle=":", label="products of a full step alone")
    ax.legend(loc="upper right")


def _mass(ax: Any, r: dict[str, Any]) -> None:
    sides = [name for name in r["settings"]["sides"] if name != "full"]
    _bars(
        ax, {n: r["missing_mass"][n] for n in sides}, f"missing mass at rho = {r['settings']['rho']}", "of the softmax"
    )


def _graph(ax: Any, r: dict[str, Any]) -> None:
    s = r["settings"]
    values = {"graph": r["seconds"], "products alone": r["products_seconds"]}
    _bars(ax, values, f"graph, {s['classes']:,} classes, K = {s['neighbours']}\nrecall {r['recall']:.6f}", "s")


def _accuracy(ax: Any, r: dict[str, Any]) -> None:
    _bars(ax, {n: 100 * m["top1"] for n, m in r["methods"].items()}, f"top-1, {r['task']['classes']:,} classes", "%")
    lowest = min(m["top1"] for m in r["methods"].values())
    ax.set_ylim(max(0, 100 * lowest - 5), 101)


def _simulated(ax: Any, r: dict[str, Any]) -> None:
    s = r["settings"]
    _bars(ax, r["seconds"], f"simulated: a rank of {s['ranks']},\n{s['classes']:,} classes", "s")
