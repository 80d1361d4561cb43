"""Attention over the documents of a batch, wherever their tokens are.

B batch, S tokens of a sample, H query heads, G key/value heads, D head dim; /tp, /cp: this rank's share."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from opencoder import kernels as K
from opencoder.parallel.context import token_numbers
from opencoder.parallel.mesh import SINGLE, Group
from opencoder.parallel.ring import Piece, ring_attention, ring_pieces
from opencoder.parallel.ulysses import heads_for_tokens, tokens_for_heads

ContextAttention = Literal["ring", "ulysses"]


class Documents(NamedTuple):
    """Document bounds of a batch whose B·S tokens are seen as one packed row: of whole samples, also where cp cuts them."""

    cu_seqlens: torch.Tensor
    """(documents + 1,) int32, from 0 to B·S; no document crosses a sample's end."""
    max_seqlen: int
    """Longest document, in tokens."""


class Rope(NamedTuple):
    """Cosines and sines of the rotary embedding, fp32, (S/cp, D/2) or (B, S/cp, D/2)."""

    cos: torch.Tensor
    sin: torch.Tensor


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    rope: Rope
    documents: Documents | None
    """None: every sample is one document."""
    cp: Group = SINGLE
    ring: tuple[Piece, ...] = ()
    """The steps of ring attention over `cp`; none: attention by exchange."""


def context_of(
    rope: Rope, documents: Documents | None, length: int, cp: Group = SINGLE, kind: ContextAttention = "ring"
) -> Context:
    """For a pass over `length` = S/cp tokens of each sample on each rank of `cp`."""
    if cp.size == 1 or kind == "ulysses":
        return Context(rope, documents, cp)
    cu_seqlens, max_seqlen = documents or (None, None)
    ring = ring_pieces(cp, length=length, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return Context(rope, documents, cp, ring)


def positions_of(
    shape: tuple[int, int], documents: Documents | None, cp: Group = SINGLE, *, device: torch.device | None = None
) -> torch.Tensor:
    """Where each of this rank's (B, S/cp) tokens stands in its document: (S/cp,), with documents (B, S/cp)."""
    b, s = shape
    at = token_numbers(s, cp, device=device)
    if documents is None:
        return at
    at = at + torch.arange(b, device=device)[:, None] * (s * cp.size)
    starts = documents.cu_seqlens.long()
    return at - starts[torch.searchsorted(starts, at, right=True) - 1]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
    """Causal attention: q (B, S/cp, H/tp, D), k and v (B, S/cp, G/tp, D), turned already → (B, S/cp, H/tp, D)."""
    if context.ring:
        return ring_attention(q, k, v, context.cp, context.ring)
    if context.cp.size > 1:
        return tokens_for_heads(_whole(*heads_for_tokens(q, k, v, context.cp), context.documents), context.cp)
    return _whole(q, k, v, context.documents)


def _whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None) -> torch.Tensor:
    """The same of whole samples: q (B, S, H, D), k and v (B, S, G, D) → (B, S, H, D)."""
    if documents is None:
        return K.attention(q, k, v, causal=True)
    out = K.attention(  # (B, S, H, D) -> (B·S, H, D), packed
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens=documents.cu_seqlens,
        max_seqlen=documents.max_seqlen,
    )
    return out.view_as(q)
