"""Scaled dot-product attention, forward and backward, written out.

B batch, Sq/Sk query and key positions, H query heads, G key/value heads, D head dim. Causal is aligned bottom-right:
the last query sees the last key. A row that sees no key gives 0 and log-sum-exp −inf, and passes no gradient."""

from __future__ import annotations

import torch

Window = tuple[int | None, int | None]


def mask_of(sq: int, sk: int, *, causal: bool, window: Window, device: torch.device) -> torch.Tensor | None:
    """(Sq, Sk) of the pairs that may meet, None if all may. Window (left, right) is inclusive, None is unbounded."""
    left, right = window
    if not causal and left is None and right is None:
        return None
    distance = torch.arange(sk, device=device)[None] - (torch.arange(sq, device=device)[:, None] + sk - sq)
    mask = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if causal:
        mask &= distance <= 0
    if left is not None:
        mask &= distance >= -left
    if right is not None:
        mask &= distance <= right
    return mask


def _scores(
    q: torch.Tensor, k: torch.Tensor, *, causal: bool, window: Window, softcap: float | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, H, Sq, Sk) capped and masked scores in fp32 or wider, and the raw scores' tanh where capped."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * scale
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores = softcap * tanh
    mask = mask_of(q.shape[1], k.shape[1], causal=causal, window=window, device=q.device)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)), tanh


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()


def attention_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    window: Window,
    softcap: float | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B,Sq,H,D), k, v (B,Sk,G,D) → out (B,Sq,H,D), lse (B,H,Sq)."""
    scores, _ = _scores(q, k, causal=causal, window=window, softcap=softcap, scale=scale)
    # logsumexp of a row of −inf has a NaN gradient; such rows are cut out before.
    empty = (scores == -torch.inf).all(-1)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0), -1).masked_fill(empty, -torch.inf)
    p = _probabilities(scores, lse)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", p, v.to(p.dtype)).to(q.dtype), lse


def attention_backward_dense(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    window: Window,
    softcap: float | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients from the saved log-sum-exp (B,H,Sq), without the forward's probabilities (arXiv:2205.14135, section 3).

    `lse` may come from a larger set of keys than `k`: then these are that set's gradients for the keys given here."""
    scores, tanh = _scores(q, k, causal=causal, window=window, softcap=softcap, scale=scale)
    p = _probabilities(scores, lse)
    wide, groups = p.dtype, q.shape[2] // k.shape[2]
    g = dout.to(wide)
    repeated_k, repeated_v = (t.to(wide).repeat_interleave(groups, 2) for t in (k, v))
    dv = torch.einsum("bhqk,bqhd->bkhd", p, g)
    dp = torch.einsum("bqhd,bkhd->bhqk", g, repeated_v)
    delta = (g * out.to(wide)).sum(-1).transpose(1, 2)  # (B, H, Sq)
    ds = p * (dp - delta[..., None]) * scale
    if tanh is not None:
        ds = ds * (1 - tanh**2)
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, repeated_k)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, q.to(wide))
    b, sk, heads, d = dk.shape
    dk, dv = (t.view(b, sk, heads // groups, groups, d).sum(3) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
