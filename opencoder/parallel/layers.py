"""Layers split over the tensor-parallel ranks (arXiv:1909.08053, section 3).

B batch, S sequence, M input width, N output width, V vocabulary; /tp: this rank's share. None has a bias. `tokens_split`:
the hidden state outside the layer is split over the tokens, (B, S/tp, …) as in collectives.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .collectives import enter_split, leave_split
from .group import SINGLE, Group
from .overlap import column_products
from .placement import place, sharded


def _share(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise ValueError(f"{what}={total} cannot be split over {parts} ranks: it must be a multiple")
    return total // parts


class ColumnParallelLinear(nn.Module):
    """(B, S, M) → (B, S, N/tp). Holds rows [rank·N/tp, (rank+1)·N/tp) of the weight (N, M).

    With `shards` fewer than tp, tp/shards neighbours hold the same rows: (B, S, M) → (B, S, N/shards)."""

    def __init__(
        self, d_in: int, d_out: int, *, tp: Group = SINGLE, tokens_split: bool = False, shards: int | None = None
    ) -> None:
        super().__init__()
        self.tp, self.tokens_split = tp, tokens_split
        rows = _share(d_out, shards or tp.size, "output width")
        self.weight = place(nn.Parameter(torch.empty(rows, d_in)), sharded((d_out, d_in), 0, shards=shards))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return columns(x, self)[0]


def columns(x: torch.Tensor, *layers: ColumnParallelLinear, overlap: bool = False) -> list[torch.Tensor]:
    """What each layer makes of `x`, which is gathered or copied once for all, so that its gradient is one sum over the ranks.
    `overlap`: that sum is under way while the weights' gradients are worked out (not for schedules that split the backward)."""
    tp, tokens_split = layers[0].tp, layers[0].tokens_split
    weights: list[torch.Tensor] = [layer.weight for layer in layers]
    if overlap and tp.size > 1:
        return column_products(x, weights, tp, tokens_split=tokens_split)
    x = enter_split(x, tp, tokens_split=tokens_split)
    return [F.linear(x, weight) for weight in weights]


class RowParallelLinear(nn.Module):
    """(…, M/tp) → (…, N), summed over the ranks. Holds columns [rank·M/tp, (rank+1)·M/tp) of the weight (N, M)."""

    def __init__(self, d_in: int, d_out: int, *, tp: Group = SINGLE, tokens_split: bool = False) -> None:
        super().__init__()
        self.tp, self.tokens_split = tp, tokens_split
        local = torch.empty(d_out, _share(d_in, tp.size, "input width"))
        self.weight = place(nn.Parameter(local), sharded((d_out, d_in), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return leave_split(F.linear(x, self.weight), self.tp, tokens_split=self.tokens_split)


class VocabParallelEmbedding(nn.Module):
    """(B, S) ids → (B, S, M). Holds rows [rank·V/tp, (rank+1)·V/tp) of the table; other ranks' ids give zero here."""

    def __init__(self, vocab_size: int, width: int, *, tp: Group = SINGLE, tokens_split: bool = False) -> None:
        super().__init__()
        self.tp, self.tokens_split = tp, tokens_split
        rows = _share(vocab_size, tp.size, "vocabulary")
        self.start = tp.rank * rows
        self.weight = place(nn.Parameter(torch.empty(rows, width)), sharded((vocab_size, width), 0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        rows = rows.masked_fill(elsewhere[..., None], 0)
        return leave_split(rows, self.tp, tokens_split=self.tokens_split)
