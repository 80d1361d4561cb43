"""The nearest classes of every class: exact search by cosine over rows that are split over ranks.

The blocks of normalised rows go around a ring of the ranks; each rank multiplies its own rows with the block it holds while
the next one is on its way. The products only say where to look: every pair that could be among the nearest is scored again
in double precision, so lists depend neither on the number of ranks nor, on a CPU, on the type of the products. Design and
derivation are ours (no text of the paper's construction could be found)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from opencoder import kernels as K
from opencoder.errors import ConfigError, Failure
from opencoder.parallel.group import Group, Handle

from .partition import Partition

ProductType = Literal["fp32", "fp16", "bf16"]
_TORCH_TYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# K' / K that gave recall 1.0 in fp16 and 0.99997 or more in bf16 (20,000 rows of width 128, one block, the worst case).
_RATIO = {"fp32": 1.0, "fp16": 1.25, "bf16": 1.5}
SCORE_BYTES = 1 << 30
"""Scores that exist at one time on a GPU. On a CPU a tile of them stays in cache."""


@dataclass(frozen=True)
class _Search:
    """How products are made and searched."""

    kept: int
    """Neighbours of each row, without itself."""
    candidates: int
    """K' of each tile, where the implementation cuts by number."""
    operand_type: torch.dtype
    product_type: torch.dtype
    slack: float
    """How far a product may lie from the cosine."""
    query_rows: int
    tile_rows: int


def _search_of(weight: torch.Tensor, neighbours: int, dtype: ProductType, ratio: float | None) -> _Search:
    kept = neighbours - 1
    candidates = math.ceil((_RATIO[dtype] if ratio is None else ratio) * kept)
    wanted, on_cpu = _TORCH_TYPE[dtype], weight.device.type == "cpu"
    # Rounding of two operands and of the product, each by a unit of the type; sums of D products in fp32.
    unit = 0.0 if wanted == torch.float32 else torch.finfo(wanted).eps / 2
    slack = 3 * unit + 3 * unit**2 + weight.shape[1] * 2.0**-23
    # Without matrix units for it, a CPU multiplies 16-bit values slower than fp32 ones: the operands are then rounded to
    # the type and multiplied in fp32. No CPU has such units for fp16 that torch uses.
    has_units = wanted == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    product_type = torch.float32 if on_cpu and not has_units else wanted
    if on_cpu:
        return _Search(kept, candidates, wanted, product_type, slack, query_rows=512, tile_rows=1024)
    tile_rows = 1 << 16
    return _Search(kept, candidates, wanted, product_type, slack, SCORE_BYTES // (4 * tile_rows), tile_rows)


def build_graph(
    weight: torch.Tensor,
    partition: Partition,
    group: Group,
    *,
    neighbours: int,
    dtype: ProductType = "fp32",
    candidate_ratio: float | None = None,
    query_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight (N_r, D), this rank's rows → int32 (N_r, K): global ids of the K = `neighbours` classes of greatest cosine to
    each of its classes, itself first whatever the cosines, then falling, ties by smaller id. Called by all ranks.

    With `query_rows` (local ids, 1-D) the lists of these alone, (len, K): then the queries travel instead of the matrix. A
    row of zeros has cosine 0 with every other. `dtype` is that of the products; `candidate_ratio` is K'/K of a tile of them
    (on a GPU; on a CPU every pair within the rounding error of the K-th place is scored again). Beside the result a build
    needs two fp32 copies of the shard, one tile of scores and 8·N_r·K bytes. Raises ConfigError for K outside [1, N], Failure
    on all ranks for weights that are not finite."""
    if not 1 <= neighbours <= partition.classes:
        raise ConfigError(
            f"model.head.neighbours={neighbours}: a class has between 1 (itself) and {partition.classes} (all) neighbours"
        )
    if weight.shape[0] != partition.size(group.rank) or weight.dim() != 2:
        raise ValueError(
            f"build_graph: weight is {tuple(weight.shape)}; rank {group.rank} has {partition.size(group.rank)} classes"
        )
    weight = weight.detach()
    _check_finite(weight, partition, group)
    search = _search_of(weight, neighbours, dtype, candidate_ratio)
    start = partition.start(group.rank)
    if query_rows is None:
        own = torch.arange(start, start + weight.shape[0], device=weight.device)
        best = _ring(weight, own, partition, group, search)
    else:
        own = query_rows.to(weight.device).long() + start
        best = _visit(weight, own, partition, group, search)
    return torch.cat([own.int()[:, None], K.nearest_ids(best)], 1)


def _normalised(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Into `out`, fp32: rows of length 1, those of zeros as they are. First divided by their largest value, so that no
    square overflows."""
    out.copy_(rows)
    out.div_(torch.linalg.vector_norm(out, math.inf, dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny))
    return out.div_(torch.linalg.vector_norm(out, dim=1, keepdim=True).clamp_min_(0.5))  # at least 1 but for zeros


def _check_finite(weight: torch.Tensor, partition: Partition, group: Group) -> None:
    """All ranks raise alike: one alone would leave the others waiting in the ring."""
    finite = torch.linalg.vector_norm(weight, math.inf, dim=1).isfinite()
    numbers = torch.arange(weight.shape[0], device=weight.device) + partition.start(group.rank)
    first = group.all_reduce(torch.where(finite, partition.classes, numbers).min(), "min").item()
    if first < partition.classes:
        raise Failure(
            f"the graph of classes cannot be built: the weights of class {first} (rank "
            f"{int(partition.owner(torch.tensor(first)))} of its group, the first such) are not finite; go on from an "
            "earlier checkpoint with a smaller learning rate or with gradient clipping"
        )


# ---- the matrix travels ----


def _ring(weight: torch.Tensor, own: torch.Tensor, partition: Partition, group: Group, search: _Search) -> torch.Tensor:
    """The best of each own row over all blocks."""
    best = _nothing_yet(weight.shape[0], search.kept, weight.device)
    for first_id, block in _blocks(weight, partition, group):
        for at in range(0, weight.shape[0], search.query_rows):
            part = slice(at, at + search.query_rows)
            rows = weight[part]
            queries = _normalised(rows, torch.empty_like(rows, dtype=torch.float32))
            _search_block(best[part], queries, own[part], block, first_id, search)
    return best


def _blocks(weight: torch.Tensor, partition: Partition, group: Group) -> Iterator[tuple[int, torch.Tensor]]:
    """(first class, normalised rows) of each rank's shard, own first; the next arrives while one is worked on."""
    rank, size = group.rank, group.size
    buffers = [weight.new_empty(partition.size(0), weight.shape[1], dtype=torch.float32) for _ in range(min(2, size))]
    _normalised(weight, buffers[0][: weight.shape[0]])
    for step in range(size):
        source = (rank - step) % size
        held = buffers[step % 2][: partition.size(source)]
        moving: Handle[list[torch.Tensor]] | None = None
        if step + 1 < size:
            coming = buffers[(step + 1) % 2][: partition.size((source - 1) % size)]
            moving = group.start_exchange([(held, (rank + 1) % size)], [(coming, (rank - 1) % size)])
        yield partition.start(source), held
        if moving is not None:
            moving.wait()


def _search_block(
    best: torch.Tensor,
    queries: torch.Tensor,
    query_ids: torch.Tensor,
    block: torch.Tensor,
    first_id: int,
    search: _Search,
) -> None:
    """Let the rows of `block` into the lists `best` of `queries`, a tile at a time."""
    if not search.kept:
        return
    rounded = queries.to(search.operand_type).to(search.product_type)
    # One buffer for all tiles stays in cache, where a new one for each would be memory fresh from the system.
    buffer = rounded.new_empty(queries.shape[0] * min(search.tile_rows, block.shape[0]))
    for at in range(0, block.shape[0], search.tile_rows):
        tile = block[at : at + search.tile_rows]
        products = buffer[: queries.shape[0] * tile.shape[0]].view(queries.shape[0], tile.shape[0])
        torch.mm(rounded, tile.to(search.operand_type).to(search.product_type).t(), out=products)
        K.merge_nearest(
            best, products, queries, tile, query_ids, first_id + at, slack=search.slack, candidates=search.candidates
        )


def _nothing_yet(rows: int, kept: int, device: torch.device) -> torch.Tensor:
    return torch.full((rows, kept), K.NOBODY, dtype=torch.int64, device=device)


# ---- the queries travel ----


def _visit(
    weight: torch.Tensor, own: torch.Tensor, partition: Partition, group: Group, search: _Search
) -> torch.Tensor:
    """The best of the rows `own` (global ids): every rank searches its shard for those of all, and they come back."""
    count = int(group.all_reduce(torch.tensor(own.numel(), device=weight.device), "max"))
    ids = torch.full((count,), -1, dtype=torch.int64, device=weight.device)  # −1 fills up; it is no class
    ids[: own.numel()] = own
    queries = weight.new_zeros(count, weight.shape[1], dtype=torch.float32)
    _normalised(weight[own - partition.start(group.rank)], queries[: own.numel()])
    ids, queries = group.all_gather(ids), group.all_gather(queries)
    best = _nothing_yet(ids.numel(), search.kept, weight.device)
    for first in range(0, weight.shape[0], search.tile_rows):
        rows = weight[first : first + search.tile_rows]
        tile = _normalised(rows, torch.empty_like(rows, dtype=torch.float32))
        for at in range(0, ids.numel(), search.query_rows):
            part = slice(at, at + search.query_rows)
            first_id = partition.start(group.rank) + first
            _search_block(best[part], queries[part], ids[part], tile, first_id, search)
    found = group.all_to_all(best).view(group.size, count, search.kept)[:, : own.numel()]
    return found.transpose(0, 1).flatten(1).topk(search.kept, dim=1).values
