"""Memory of a class head, worked out from its sizes: no run, no tensor (sheet 1.5, 2.4, 8.2).

N classes, P ranks, D width, B gathered samples, ρ share of scored rows, K neighbours. All figures are bytes of the rank with
the most classes; GB is 1e9 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from opencoder.errors import ConfigError

from .partition import Partition

GB = 1e9
OFFSET_LIMIT = 2**31
"""From this many edges on, offsets of the column graph need 8 bytes."""


@dataclass(frozen=True)
class Recipe:
    """What is stored for each number of the class matrix, in bytes."""

    per_weight: float
    """For every row, whether scored or not."""
    per_scored: float = 0.0
    """More, for the rows that a step scores: their gradient."""

    def bytes_per_weight(self, rho: float) -> float:
        """k of the sheet's (N/P)·D·k."""
        return self.per_weight + self.per_scored * rho


RECIPES: dict[str, Recipe] = {
    "fp16 W": Recipe(2),
    "fp32 W": Recipe(4),
    "fp16 + fp16 momentum": Recipe(4),  # what PLSC's published sizes imply
    "momentum-SGD": Recipe(12),  # fp32 weight, momentum and a dense gradient: insightface v2
    "sparse-grad SGD": Recipe(10, 2),  # fp16 weight, fp32 master and momentum, gradient of scored rows in fp16
    "Adam": Recipe(16),  # fp16 weight and gradient, fp32 master, m, v
    "Adam, fp32 gradient": Recipe(18),
    "ours, sgd fp32": Recipe(8, 4),  # fp32 weight and momentum; gradient of scored rows in fp32
    "ours, adamw fp32": Recipe(12, 4),
}
"""The first seven are the columns of the sheet's table 8.2, in its order."""


@dataclass(frozen=True)
class HeadMemory:
    """Bytes on one rank, by what they are for."""

    weight_and_state: float
    features: float
    """Gathered features, and as much for their gradient."""
    scored_rows: float
    """A contiguous copy of the rows that a step scores."""
    logits: float
    """fp32; the gradient of the logits is written over them."""
    graph_ids: float
    graph_positions: float
    graph_offsets: float
    selection: float
    """Two int32 for each row of the rank: its best position in the labels' lists, and in how many of them it is."""

    @property
    def graph(self) -> float:
        """The neighbours of all classes that live on this rank, by column."""
        return self.graph_ids + self.graph_positions + self.graph_offsets

    @property
    def total(self) -> float:
        """All of it."""
        return self.weight_and_state + self.features + self.scored_rows + self.logits + self.graph + self.selection


def weight_bytes(classes: int, ranks: int, dim: int, recipe: str, *, rho: float = 1.0) -> float:
    """Class matrix, its gradient and the optimizer's state on one rank: (N/P)·D·k bytes. Source: sheet 1.5, 8.2.

    Raises ConfigError for a recipe that is none."""
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} is unknown: choose from {', '.join(RECIPES)}")
    return Partition(classes, ranks).size(0) * dim * RECIPES[recipe].bytes_per_weight(rho)


def graph_bytes(classes: int, ranks: int, neighbours: int) -> tuple[float, float, float]:
    """(ids, positions, offsets) of the column graph on one rank, N·K/P edges of it (sheet 2.4, whose 2-byte ids for few rows we do
    without)."""
    edges = classes * neighbours / ranks
    offset_bytes = 4 if edges < OFFSET_LIMIT else 8
    return edges * 4.0, edges * 2.0, (classes + 1.0) * offset_bytes


def build_bytes(
    classes: int, ranks: int, dim: int, neighbours: int, *, background: bool = True, tile_bytes: float = 2**30
) -> float:
    """What building the graph holds beside the rest on one rank: two fp32 blocks of rows on their way around the ring (one on a
    single rank), in the background a copy of the rows too, the best pairs found (8 bytes each), the lists (4) and a tile of scores.
    Of our implementation (graph.py, rebuild.py), not of the sheet."""
    rows = Partition(classes, ranks).size(0)
    blocks = min(2, ranks) + (1 if background else 0)
    return rows * (blocks * dim * 4.0 + neighbours * 12.0) + tile_bytes


def head_memory(
    classes: int,
    ranks: int,
    dim: int,
    *,
    recipe: str = "ours, sgd fp32",
    batch: int = 1024,
    rho: float = 0.1,
    neighbours: int | None = 100,
    compute_bytes: int = 2,
    logit_rows: int | None = None,
) -> HeadMemory:
    """Memory of the head on one rank. `batch`: samples of a step over all ranks (B); `compute_bytes`: of a feature and of a
    copied row; `neighbours=None`: no graph (full or random); `logit_rows`: samples whose logits exist at a time, None: all.

    Raises ConfigError for sizes that cannot be."""
    if not 0 < rho <= 1:
        raise ConfigError(f"rho={rho} is not a share of the classes: choose 0 < rho ≤ 1 (1: all)")
    if min(dim, batch, compute_bytes) < 1 or (neighbours is not None and not 1 <= neighbours <= classes):
        raise ConfigError(
            f"dim={dim}, batch={batch}, neighbours={neighbours}: all are at least 1, neighbours at most the {classes} classes"
        )
    rows = Partition(classes, ranks).size(0)
    scored = -(-rows * rho // 1)
    graph = graph_bytes(classes, ranks, neighbours) if neighbours else (0.0, 0.0, 0.0)
    return HeadMemory(
        weight_and_state=weight_bytes(classes, ranks, dim, recipe, rho=rho),
        features=2.0 * batch * dim * compute_bytes,
        scored_rows=scored * dim * compute_bytes if rho < 1 else 0.0,
        logits=min(batch, logit_rows or batch) * scored * 4,
        graph_ids=graph[0],
        graph_positions=graph[1],
        graph_offsets=graph[2],
        selection=rows * 8.0 if rho < 1 else 0.0,
    )


def neighbours_for(classes: int, rho: float, labels: int, *, uniform_mix: float = 0.2) -> int:
    """K so that a batch of `labels` distinct labels about fills the quota: 1.25 times the M/|U| rows each may keep, after the
    uniform share (sheet 2.5 gives 1 to 1.5; ours, not the paper's)."""
    return max(1, min(classes, round(1.25 * (1 - uniform_mix) * rho * classes / labels)))


def rho_for(classes: int, neighbours: int, labels: int, *, uniform_mix: float = 0.2) -> float:
    """ρ at which K neighbours of each of `labels` distinct labels, and the uniform share, fill the quota (sheet 2.5)."""
    return min(1.0, neighbours * labels / classes / (1 - uniform_mix))
