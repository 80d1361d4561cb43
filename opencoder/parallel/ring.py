"""Ring attention (arXiv:2310.01889) over samples cut in zigzag (context.py): queries stay, keys and values go round.

What a rank computes in step s, with the keys of rank j = r − s: in step 0, causal attention among its own tokens, whose early
chunk is before the late one. With j < r, all its queries see the early chunk of j and none the late one. With j > r, its late
queries see both chunks of j and its early ones none. Each is half of a square, so no rank waits for another.

Documents need no mask: those bounds of the batch that fall between the tokens at hand are counted off (`_bounds_among`), and
the same kernel as ever gets them, for queries and keys apart. A document without a token there is one of length 0.

B samples, s = S/cp tokens of each here, c = s/2 of a chunk, H query heads, G key/value heads, D head dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from opencoder import kernels as K

from .context import chunks_of
from .group import Group, Handle

EARLY, LATE, BOTH = (0,), (1,), (0, 1)
"""Of a rank's two chunks."""


class Piece(NamedTuple):
    """What one step of the ring computes."""

    queries: slice
    """Of the s tokens of a sample here."""
    keys: slice
    """Of those that came round."""
    causal: bool
    documents: tuple[torch.Tensor, torch.Tensor, int] | None
    """Bounds among these queries and among these keys, int32 (documents + 1,), and a length that none exceeds."""


def ring_pieces(
    cp: Group, *, length: int, cu_seqlens: torch.Tensor | None, max_seqlen: int | None
) -> tuple[Piece, ...]:
    """The steps for samples of which `length` tokens each are here. `cu_seqlens` bounds the documents of the whole samples,
    seen as one row; None: each is one document. The same for all layers of a pass."""
    c = length // 2
    pieces = []
    for step in range(cp.size):
        other = (cp.rank - step) % cp.size
        queries, keys = (BOTH, BOTH) if step == 0 else (BOTH, EARLY) if other < cp.rank else (LATE, BOTH)
        documents = None
        if cu_seqlens is not None and max_seqlen is not None:
            bounds, bounds_k = (
                _bounds_among(
                    cu_seqlens, [chunks_of(rank, cp.size)[i] for i in halves], chunk=c, per_sample=2 * cp.size
                )
                for rank, halves in ((cp.rank, queries), (other, keys))
            )
            documents = (bounds, bounds_k, min(max_seqlen, length))
        rows, columns = (slice(halves[0] * c, (halves[-1] + 1) * c) for halves in (queries, keys))
        pieces.append(Piece(rows, columns, step == 0, documents))
    return tuple(pieces)


def _bounds_among(cu_seqlens: torch.Tensor, chunks: Sequence[int], *, chunk: int, per_sample: int) -> torch.Tensor:
    """How many tokens of `chunks` of all samples stand before each bound: the bounds among these tokens alone."""
    size = chunk * per_sample
    sample, at = cu_seqlens // size, cu_seqlens % size
    inside = torch.stack([(at - i * chunk).clamp(0, chunk) for i in chunks]).sum(0)
    return (sample * (len(chunks) * chunk) + inside).to(torch.int32)


def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cp: Group, pieces: tuple[Piece, ...]
) -> torch.Tensor:
    """Causal attention of this rank's queries (B, s, H, D) to the keys and values (B, s, G, D) of all → (B, s, H, D)."""
    out: torch.Tensor = _RingAttention.apply(q, k, v, cp, pieces)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cp: Group, pieces: tuple[Piece, ...]
    ) -> torch.Tensor:
        kv = torch.stack((k, v))
        total, lse = q.new_empty(0), q.new_empty(0)
        for step, piece in enumerate(pieces):
            coming = _pass_on(kv, cp) if step + 1 < cp.size else None
            part, part_lse = _attention(q[:, piece.queries], kv[:, :, piece.keys], piece)
            if step == 0:  # every query sees itself, so from here on no lse is −inf
                total, lse = part.to(part_lse.dtype), part_lse
            else:
                _merge(total[:, piece.queries], lse[:, :, piece.queries], part, part_lse)
            if coming is not None:
                kv = coming.wait()[0]
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cp, ctx.pieces = cp, pieces
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        kv = torch.stack((k, v))
        dq = torch.zeros_like(q, dtype=lse.dtype)
        # The sum of dk and dv follows its keys, one hop behind, and is at home after the last of cp hops.
        dkv, homing = torch.zeros_like(kv, dtype=lse.dtype), None
        for step, piece in enumerate(ctx.pieces):
            coming = _pass_on(kv, ctx.cp) if step + 1 < ctx.cp.size else None
            rows = piece.queries
            dq_part, dk, dv = _attention_backward(
                dout[:, rows], q[:, rows], kv[:, :, piece.keys], out[:, rows], lse[:, :, rows], piece
            )
            dq[:, rows] += dq_part
            if homing is not None:
                dkv = homing.wait()[0]
            dkv[0, :, piece.keys] += dk
            dkv[1, :, piece.keys] += dv
            homing = _pass_on(dkv, ctx.cp)
            if coming is not None:
                kv = coming.wait()[0]
        assert homing is not None
        dk, dv = homing.wait()[0].to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None


def _pass_on(x: torch.Tensor, cp: Group) -> Handle[list[torch.Tensor]]:
    """Start to send `x` to the next rank and to receive the like from the one before."""
    return cp.start_exchange([(x, (cp.rank + 1) % cp.size)], [(torch.empty_like(x), (cp.rank - 1) % cp.size)])


def _merge(total: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Take further keys into `total` (B, n, H, D) and `lse` (B, H, n), in place: softmax over the union of both key sets."""
    together = torch.logaddexp(lse, part_lse)
    ours, theirs = ((x - together).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))  # (B, n, H, 1)
    total.mul_(ours).add_(part * theirs)
    lse.copy_(together)


def _attention(q: torch.Tensor, kv: torch.Tensor, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, n, H, D), kv (2, B, m, G, D) → out (B, n, H, D) and lse (B, H, n)."""
    k, v = kv
    if piece.documents is None:
        out, lse = K.attention(q, k, v, causal=piece.causal, return_lse=True)
        return out, lse
    rows = [t.flatten(0, 1) for t in (q, k, v)]  # (B, n, H, D) -> (B·n, H, D), packed
    out, lse = K.attention(*rows, causal=piece.causal, return_lse=True, **_options(piece))
    return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def _attention_backward(
    dout: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, piece: Piece
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the piece, of the shapes of q, k and v; `out` and `lse` are those over all keys."""
    k, v = kv
    if piece.documents is None:
        return K.attention_backward(dout, q, k, v, out, lse.contiguous(), causal=piece.causal)
    dout, packed_q, packed_k, packed_v, out = (t.flatten(0, 1) for t in (dout, q, k, v, out))
    row_lse = lse.transpose(0, 1).flatten(1, 2)  # (B, H, n) -> (H, B·n)
    grads = K.attention_backward(
        dout, packed_q, packed_k, packed_v, out, row_lse, causal=piece.causal, **_options(piece)
    )
    dq, dk, dv = (grad.view(like.shape) for grad, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _options(piece: Piece) -> dict[str, Any]:
    assert piece.documents is not None
    cu_seqlens, cu_seqlens_k, longest = piece.documents
    return {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "max_seqlen": longest}
