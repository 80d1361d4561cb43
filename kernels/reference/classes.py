"""Nearest rows and the choice of active ones, one step after the other."""

from __future__ import annotations

import torch

FAR = 2**31 - 1
"""Priority of a row that is nobody's neighbour."""
NOBODY = -(2**63)
"""Key of an empty place in a list of nearest rows."""
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def neighbour_priority(
    labels: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scatter of the labels' edges: the minimum of their positions, and their number."""
    starts = offsets[labels].long()
    lengths = offsets[labels + 1].long() - starts
    before = lengths.cumsum(0) - lengths
    edges = torch.repeat_interleave(starts - before, lengths)
    edges += torch.arange(edges.numel(), device=edges.device)
    targets = ids[edges].long()
    priority = torch.full((rows,), FAR, dtype=torch.int32, device=ids.device)
    priority.scatter_reduce_(0, targets, positions[edges].int(), "amin")
    count = torch.zeros(rows, dtype=torch.int32, device=ids.device)
    return priority, count.index_add_(0, targets, torch.ones_like(targets, dtype=torch.int32))


def smallest_keys(priority: torch.Tensor, count: int, hard: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both choices by keys that no two rows share: (priority, row), then (random number, row)."""
    numbers = torch.arange(priority.numel(), device=priority.device)
    wanted = min(hard, int((priority != FAR).sum()))
    first = (priority.long() * 2**31 + numbers).topk(wanted, largest=False, sorted=False).indices
    keys = random_keys(numbers, seed) * 2**31 + numbers
    keys[first] = 2**63 - 1
    rest = keys.topk(count - wanted, largest=False, sorted=False).indices
    rows, order = torch.cat([first, rest]).sort()
    return rows, order < wanted


def random_keys(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """32 random bits for each (seed, int64 number), the same on every device: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (numbers + 1) * _signed(_GOLDEN) + _signed(seed)
    z = (z ^ _shifted(z, 30)) * _signed(_MIX1)
    z = (z ^ _shifted(z, 27)) * _signed(_MIX2)
    return _shifted(z ^ _shifted(z, 31), 32)


# ---- nearest rows ----


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
) -> None:
    """Every pair is scored, whatever the products say."""
    ids = torch.arange(first_id, first_id + rows.shape[0], device=rows.device)
    keys = nearest_keys((queries.double() @ rows.double().t()).float(), ids)
    keys[query_ids[:, None] == ids] = NOBODY
    best.copy_(torch.cat([best, keys], 1).topk(best.shape[1], dim=1).values)


def merge_likely(
    best: torch.Tensor,
    products: torch.Tensor,
    queries: torch.Tensor,
    rows: torch.Tensor,
    query_ids: torch.Tensor,
    first_id: int,
    *,
    slack: float,
    candidates: int,
) -> None:
    """The `candidates` pairs of each query with the greatest products are scored; one more, in case one is the query itself."""
    columns = products.topk(min(candidates + 1, products.shape[1]), dim=1, sorted=False).indices
    step = max(
        1, (1 << 26) // (columns.shape[1] * rows.shape[1])
    )  # of gathered rows in fp64 there are 0.5 GB at one time
    for at in range(0, columns.shape[0], step):
        part = slice(at, at + step)
        found = rows[columns[part]].double()
        scores = torch.einsum("qd,qcd->qc", queries[part].double(), found).float()
        ids = columns[part] + first_id
        keys = nearest_keys(scores, ids)
        keys[query_ids[part, None] == ids] = NOBODY
        best[part] = torch.cat([best[part], keys], 1).topk(best.shape[1], dim=1).values


def nearest_keys(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """fp32 scores and ids in [0, 2³¹) → int64 that fall with the score, then rise with the id: greatest first is best first."""
    bits = (scores + 0.0).view(torch.int32)  # −0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the numbers
    return ordered.long() * 2**32 + (2**31 - 1 - ids)


def nearest_ids(best: torch.Tensor) -> torch.Tensor:
    """Keys → int32 ids."""
    return (2**31 - 1 - (best & 0xFFFFFFFF)).int()


def nearest_scores(best: torch.Tensor) -> torch.Tensor:
    """Keys → fp32 scores, −∞ for an empty place."""
    ordered = (best >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return torch.where(best == NOBODY, -torch.inf, scores)


# ---- 64-bit arithmetic without a sign ----


def _signed(x: int) -> int:
    """A 64-bit number as torch, which has none without a sign, holds it."""
    return (x + 2**63) % 2**64 - 2**63


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros coming in."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
