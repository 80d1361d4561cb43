"""Which of its rows a rank scores in a step, chosen from the labels of the whole batch alone, so before any feature is
known. Our design (no text of the paper's selection could be found); random is Partial FC's (arXiv:2203.15565)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from opencoder import kernels as K
from opencoder.kernels.classes import FAR

from .partition import Partition

if TYPE_CHECKING:
    from .columns import ColumnGraph


@dataclass(frozen=True)
class Selection:
    """The active rows of one rank."""

    rows: torch.Tensor
    """(m,) int64, local ids, ascending, each once; the labels of this rank are among them."""
    hard: torch.Tensor
    """(m,) bool: chosen for its priority (labels, then their neighbours); the others are random."""
    fill_weight: float
    """log((N_r − hard) / random): what a random row's logit is raised by where it is to stand for all that were not chosen
    by priority; 0 without random rows."""
    quota: int
    """ceil(rho·N_r). m is this, or the number of labels if that is larger."""
    labels: int
    """Distinct labels of the batch that live here."""
    candidates: int
    """Edges from labels of the whole batch to rows of this rank; 0 without a graph."""
    kept: int
    """Those of them whose row was chosen by priority. kept / candidates is the coverage."""
    num_rows: int = field(repr=False)
    """N_r."""

    def position(self, local_ids: torch.Tensor) -> torch.Tensor:
        """Local row ids (any shape) → their places in `rows`, −1 for a row that is not active."""
        at = torch.searchsorted(self.rows, local_ids).clamp_(max=self.rows.numel() - 1)
        return torch.where(self.rows[at] == local_ids, at, -1)


def quota_of(rho: float, rows: int) -> int:
    """ceil(rho·rows), at least 1, without a row more for what rho has lost in binary."""
    return min(rows, max(1, math.ceil(rho * rows - 1e-9 * rows)))


def select_rows(
    labels: torch.Tensor,
    partition: Partition,
    rank: int,
    *,
    rho: float,
    columns: ColumnGraph | None = None,
    uniform_mix: float = 0.0,
    seed: int,
    step: int,
) -> Selection:
    """Choose the active rows of `rank` from `labels`, the class ids of the whole batch (any shape and order, repeats allowed;
    −100 is ignored).

    A candidate's priority is its best position in the lists of neighbours of the labels, ties to the smaller id; labels come
    before all. At most 1 − uniform_mix of the rows are chosen so, unless there are more labels; the rest is drawn uniformly
    from the others, a function of (seed, step, rank) that is the same on every device. Without `columns`: labels and random rows.
    Raises ValueError for labels that are no class, rho outside (0, 1] and uniform_mix outside [0, 1)."""
    if not 0 < rho <= 1 or not 0 <= uniform_mix < 1:
        raise ValueError(
            f"selection: rho={rho}, uniform_mix={uniform_mix}; rho must be in (0, 1], uniform_mix in [0, 1)"
        )
    num_rows, start = partition.size(rank), partition.start(rank)
    distinct = _distinct(labels, partition)
    if columns is not None:
        distinct = distinct.to(columns.ids.device)
    own = distinct[(distinct >= start) & (distinct < start + num_rows)] - start
    quota = quota_of(rho, num_rows)
    count = max(quota, own.numel())
    if columns is None:
        priority = torch.full((num_rows,), FAR, dtype=torch.int32, device=distinct.device)
        edges, hard_limit = None, own.numel()
    else:
        priority, edges = columns.priority(distinct)
        hard_limit = max(own.numel(), count - math.floor(uniform_mix * count + 1e-9))
    priority[own] = -1
    rows, hard = K.smallest_keys(priority, count, hard_limit, seed=key_of(seed, step, rank))
    chosen, candidates, kept = _counts(rows, hard, edges)
    fill = count - chosen
    fill_weight = math.log((num_rows - chosen) / fill) if fill else 0.0
    return Selection(rows, hard, fill_weight, quota, own.numel(), candidates, kept, num_rows)


def _counts(rows: torch.Tensor, hard: torch.Tensor, edges: torch.Tensor | None) -> tuple[int, int, int]:
    """Rows chosen by priority, edges, and edges to such rows; in one look, as a GPU is waited for."""
    counts = [hard.sum()]
    if edges is not None:
        counts += [edges.sum(), (edges[rows] * hard).sum()]
    found = torch.stack(counts).tolist()
    return (*found,) if edges is not None else (found[0], 0, 0)


def _distinct(labels: torch.Tensor, partition: Partition) -> torch.Tensor:
    """Ascending int64, without −100."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"selection: labels are {labels.dtype}; allowed: int64, int32")
    distinct = labels.long().unique()
    distinct = distinct[distinct != -100]
    if distinct.numel():
        least, most = distinct[[0, -1]].tolist()
        if least < 0 or most >= partition.classes:
            raise ValueError(
                f"selection: labels lie in [{least}, {most}]; allowed: [0, {partition.classes}) and -100 for ignored"
            )
    return distinct


def key_of(*numbers: int) -> int:
    """64 bits that depend on every one of the numbers and on their order."""
    key = 0
    for number in numbers:
        key = (key ^ number) * 0x9E3779B97F4A7C15 % 2**64
        key = (key ^ key >> 29) * 0xBF58476D1CE4E5B9 % 2**64
        key ^= key >> 32
    return key
