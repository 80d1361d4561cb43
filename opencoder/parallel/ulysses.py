"""Attention by exchange (arXiv:2309.14509): every rank of cp gives its tokens of most heads for all tokens of a few heads.

Between the two exchanges stand whole samples in their own order, so the usual kernel and document bounds serve. Samples are cut
in zigzag (context.py) as for ring attention: putting the chunks in order costs nothing beside the copy that an exchange needs.

B samples, S tokens of a sample, H query heads, G key/value heads, D head dim."""

from __future__ import annotations

from typing import Any

import torch

from .context import chunks_of
from .group import Group


def key_heads_for(kv_heads: int, size: int) -> int:
    """How many key/value heads are exchanged over `size` ranks: `kv_heads`, or `size` with copies of them, one for each rank.

    Raises ValueError if neither fits."""
    if kv_heads % size and size % kv_heads:
        raise ValueError(
            f"{kv_heads} key/value heads cannot be spread over cp={size}: one must be a multiple of the other"
        )
    return max(kv_heads, size)


def heads_for_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cp: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, S/cp, H, D), k, v (B, S/cp, G, D) → q (B, S, H/cp, D), k, v (B, S, max(G, cp)/cp, D): whole samples.

    One exchange for all three. Rank i gets query heads [i·H/cp, (i+1)·H/cp) and the key/value heads that belong to them.
    Raises ValueError for heads that cannot be spread."""
    if q.shape[2] % cp.size:
        raise ValueError(f"{q.shape[2]} query heads cannot be spread over cp={cp.size}: take a multiple")
    copies = key_heads_for(k.shape[2], cp.size) // k.shape[2]
    if copies > 1:
        k, v = (t.repeat_interleave(copies, 2) for t in (k, v))
    heads = torch.cat([t.unflatten(2, (cp.size, -1)).movedim(2, 0) for t in (q, k, v)], 3)
    found: torch.Tensor = _Exchange.apply(
        heads, cp
    )  # (cp, B, S/cp, heads, D): by rank to get them, now by rank that had them
    # unbind, not indexing: its backward is one stack.
    pairs = (chunks.unbind(1) for chunks in found.unflatten(2, (2, -1)).unbind(0))  # (B, c, heads, D) each
    held = {
        n: chunk for rank, pair in enumerate(pairs) for n, chunk in zip(chunks_of(rank, cp.size), pair, strict=True)
    }
    samples = torch.cat([held[n] for n in range(2 * cp.size)], 1)  # (B, S, heads, D)
    h, g = q.shape[2] // cp.size, k.shape[2] // cp.size
    whole_q, whole_k, whole_v = samples.split([h, g, g], 2)
    return whole_q, whole_k, whole_v


def tokens_for_heads(out: torch.Tensor, cp: Group) -> torch.Tensor:
    """The way back: (B, S, H/cp, D) → (B, S/cp, H, D)."""
    chunks = out.unflatten(1, (2 * cp.size, -1)).unbind(1)  # (B, c, H/cp, D) each
    held = torch.stack([chunks[n] for rank in range(cp.size) for n in chunks_of(rank, cp.size)])
    found: torch.Tensor = _Exchange.apply(
        held, cp
    )  # (2·cp, B, c, H/cp, D): by rank to get them, now by rank whose heads they are
    b, s, h, d = out.shape
    # (cp, 2, B, c, H/cp, D) -> (B, 2, c, cp, H/cp, D)
    return found.unflatten(0, (cp.size, 2)).permute(2, 1, 3, 0, 4, 5).reshape(b, s // cp.size, h * cp.size, d)


class _Exchange(torch.autograd.Function):
    """(cp·n, …): block i of n goes to rank i, block j came from rank j. It is its own inverse and its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cp: Group) -> torch.Tensor:
        ctx.cp = cp
        return cp.all_to_all(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.cp.all_to_all(grad), None
