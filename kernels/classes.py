"""The public functions for softmax over very many classes: nearest rows of a matrix, and the choice of active ones."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks
from ._dispatch import choose, register
from ._library import CPP_MISSING, cpp_supports, define
from .reference import classes as _reference

FAR = _reference.FAR
"""Priority of a row that is nobody's neighbour."""
NOBODY = _reference.NOBODY
"""Key of an empty place in a list of nearest rows."""
nearest_ids, nearest_scores = _reference.nearest_ids, _reference.nearest_scores
nearest_keys, random_keys = _reference.nearest_keys, _reference.random_keys


@torch.no_grad()
def merge_nearest(
    best: torch.Tensor,
    products: torch.Tensor,
    queries: torch.Tensor,
    rows: torch.Tensor,
    query_ids: torch.Tensor,
    first_id: int,
    *,
    slack: float,
    candidates: int,
    impl: str = "auto",
) -> None:
    """Let `rows` (C, D), with ids from `first_id` on, into the lists of nearest rows of `queries` (Q, D), both fp32; in place.

    best: int64 (Q, K), keys of score and id, falling, NOBODY where there are fewer (`nearest_ids`, `nearest_scores`
    read them). The score of a pair is its dot product in fp64, rounded to fp32; ties go to the smaller id; a query never
    meets the row that has its own id (`query_ids`, int64 (Q,)). products: (Q, C), the dot products wrong by up to `slack`,
    which says where to look: `cpp` scores every pair that could matter, `torch` the `candidates` with the greatest products."""
    _checks.floating("merge_nearest", products=products, queries=queries, rows=rows)
    _checks.one_device("merge_nearest", best=best, products=products, query_ids=query_ids)
    shapes = (products.shape, rows.shape[1:], query_ids.shape, best.shape[:1])
    q, c, d = queries.shape[0], rows.shape[0], queries.shape[1]
    if shapes != ((q, c), (d,), (q,), (q,)) or best.dim() != 2:
        raise ValueError(
            f"merge_nearest: queries (Q, D), rows (C, D), products (Q, C), best (Q, K), query_ids (Q,) do not fit: got "
            f"{[tuple(t.shape) for t in (queries, rows, products, best, query_ids)]}"
        )
    if queries.dtype != torch.float32 or rows.dtype != torch.float32:
        raise ValueError(f"merge_nearest: queries are {queries.dtype}, rows {rows.dtype}; allowed: fp32")
    if best.dtype != torch.int64 or query_ids.dtype != torch.int64 or not best.is_contiguous():
        raise ValueError("merge_nearest: best must be contiguous int64, query_ids int64")
    if not 0 <= first_id <= 2**31 - c:
        raise ValueError(f"merge_nearest: ids from {first_id} to {first_id + c}; allowed: below 2³¹")
    _checks.at_least("merge_nearest", 0, slack=slack, candidates=candidates)
    if best.shape[1] == 0:
        return
    arguments = (best, products, queries, rows, query_ids, first_id)
    options = {"slack": slack, "candidates": candidates}
    choose("merge_nearest", impl, best.device, *arguments, **options).run(*arguments, **options)


def neighbour_priority(
    labels: torch.Tensor,
    offsets: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    rows: int,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists in CSR form → for each of `rows` rows, its best place in the lists of `labels` and in how many it is.

    labels: int64 (U,), each once. List y is ids[offsets[y]:offsets[y + 1]] (int32, rows) with positions (int16 or int32);
    offsets int32 or int64. Both results are int32 (rows,); the first is FAR where the second is 0."""
    for name, tensor, allowed in (
        ("labels", labels, (torch.int64,)),
        ("offsets", offsets, (torch.int32, torch.int64)),
        ("ids", ids, (torch.int32,)),
        ("positions", positions, (torch.int16, torch.int32)),
    ):
        if tensor.dim() != 1 or tensor.dtype not in allowed:
            raise ValueError(
                f"neighbour_priority: {name} must be 1-D {' or '.join(map(str, allowed))}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    if ids.shape != positions.shape:
        raise ValueError(f"neighbour_priority: {ids.numel()} ids but {positions.numel()} positions")
    arguments = (labels, offsets, ids, positions, rows)
    found: tuple[torch.Tensor, torch.Tensor] = choose("neighbour_priority", impl, labels.device, *arguments).run(
        *arguments
    )
    return found


def smallest_keys(
    priority: torch.Tensor, count: int, hard: int, *, seed: int, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` of the rows of priority (N,) int32, ascending (int64), and which of them were chosen by priority (bool).

    Priorities are from −1 on, below 2²⁶, or FAR. By priority: the `hard` smallest (fewer where the others are FAR), ties to
    the smaller row. The rest is drawn uniformly from the rows that are left, by `seed` (64 bits), the same with every
    implementation and on every device."""
    if priority.dim() != 1 or priority.dtype != torch.int32:
        raise ValueError(
            f"smallest_keys: priority must be 1-D int32, got {priority.dtype} of shape {tuple(priority.shape)}"
        )
    if not 0 <= hard <= count <= priority.numel():
        raise ValueError(f"smallest_keys: 0 ≤ hard={hard} ≤ count={count} ≤ {priority.numel()} rows must hold")
    found: tuple[torch.Tensor, torch.Tensor] = choose(
        "smallest_keys", impl, priority.device, priority, count, hard
    ).run(priority, count, hard, seed)
    return found


def _signed(seed: int) -> int:
    """64 bits, as operators take them."""
    return (seed + 2**63) % 2**64 - 2**63


def _merge(best: torch.Tensor, *arguments: Any, slack: float, candidates: int) -> None:
    torch.ops.opencoder.merge_nearest_(best, *arguments, slack)


def _smallest(priority: torch.Tensor, count: int, hard: int, seed: int) -> Any:
    return torch.ops.opencoder.smallest_keys(priority, count, hard, _signed(seed))


def _priority(*arguments: Any) -> Any:
    return torch.ops.opencoder.neighbour_priority(*arguments)


for _operator, _cpp, _torch, _definition in (
    ("merge_nearest", _merge, _reference.merge_likely, _reference.merge_nearest),
    ("neighbour_priority", _priority, _reference.neighbour_priority, _reference.neighbour_priority),
    ("smallest_keys", _smallest, _reference.smallest_keys, _reference.smallest_keys),
):
    register(_operator, "reference")(_definition)
    register(_operator, "cpp", cpp_supports, missing=lambda: CPP_MISSING)(_cpp)
    register(_operator, "torch")(_torch)


# ---- the operators: none has a gradient, and on a GPU torch's own operators do the same ----


def _merge_anywhere(
    best: torch.Tensor,
    products: torch.Tensor,
    queries: torch.Tensor,
    rows: torch.Tensor,
    query_ids: torch.Tensor,
    first_id: int,
    slack: float,
) -> None:
    _reference.merge_nearest(best, products, queries, rows, query_ids, first_id, slack=slack, candidates=0)


def _chosen_like(priority: torch.Tensor, count: int, hard: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return priority.new_empty(count, dtype=torch.int64), priority.new_empty(count, dtype=torch.bool)


define(
    "merge_nearest_(Tensor(a!) best, Tensor products, Tensor queries, Tensor rows, Tensor query_ids, int first_id, "
    "float slack) -> ()",
    fake=lambda *arguments: None,
    python=_merge_anywhere,
)
define(
    "neighbour_priority(Tensor labels, Tensor offsets, Tensor ids, Tensor positions, int rows) -> (Tensor, Tensor)",
    fake=lambda labels, offsets, ids, positions, rows: (ids.new_empty(rows), ids.new_empty(rows)),
    python=_reference.neighbour_priority,
)
define(
    "smallest_keys(Tensor priority, int count, int hard, int seed) -> (Tensor, Tensor)",
    fake=_chosen_like,
    python=_reference.smallest_keys,
)
