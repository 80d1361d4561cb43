"""Attention over the documents of a batch, wherever their tokens are.

B batch, S sequence, H query heads, G key/value heads, D head dim; /tp: this rank's share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from opencoder import kernels as K


class Documents(NamedTuple):
    """Document bounds of a batch whose B·S tokens are seen as one packed row."""

    cu_seqlens: torch.Tensor
    """(documents + 1,) int32, from 0 to B·S; no document crosses a sample's end."""
    max_seqlen: int
    """Longest document, in tokens."""


class Rope(NamedTuple):
    """Cosines and sines of the rotary embedding, fp32, (S, D/2) or (B, S, D/2)."""

    cos: torch.Tensor
    sin: torch.Tensor


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    rope: Rope
    documents: Documents | None
    """None: every sample is one document."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
    """Causal attention: q (B, S, H/tp, D), k and v (B, S, G/tp, D), turned already → (B, S, H/tp, D)."""
    documents = context.documents
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
