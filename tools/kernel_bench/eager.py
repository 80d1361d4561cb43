"""The operators as an eager model writes them (transformers' Llama): the baseline and, in fp64, the truth."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

EPS = 1e-5


def rms_norm(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None = None) -> Any:
    """Statistics in fp32 or wider, then the weight in its own type."""
    t = x if r is None else x + r
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    y = w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return y if r is None else (y, t)


def functional_rms_norm(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None = None) -> Any:
    """torch's own function, after the addition."""
    t = x if r is None else x + r
    y = F.rms_norm(t, w.shape, w, EPS)
    return y if r is None else (y, t)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Two operations."""
    return F.silu(gate) * up


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotary(
    q: torch.Tensor, k: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B,S,H,D), k (B,S,G,D); cos, sin (S,1,D), doubled."""
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def cross_entropy(logits: torch.Tensor, *, targets: torch.Tensor) -> torch.Tensor:
    """Mean, in fp32 or wider."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def linear_cross_entropy(x: torch.Tensor, w: torch.Tensor, *, targets: torch.Tensor) -> torch.Tensor:
    """With whole logits."""
    return cross_entropy(x @ w.t(), targets=targets)


def linear_cross_entropy_in_parts(x: torch.Tensor, w: torch.Tensor, *, targets: torch.Tensor) -> torch.Tensor:
    """The same, 512 tokens at a time and made again in backward: for the fp64 truth, whose whole logits would need 13 GB."""

    def part(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ w.t(), targets, reduction="sum")

    parts = (
        checkpoint(part, a, w, t, use_reentrant=False) for a, t in zip(x.split(512), targets.split(512), strict=True)
    )
    return sum(parts, x.new_zeros(())) / len(targets)


def document_mask(bounds: torch.Tensor) -> torch.Tensor:
    """(T, T): causal, within documents."""
    at = torch.arange(int(bounds[-1]), device=bounds.device)
    document = torch.searchsorted(bounds.long(), at, right=True)
    return (document[:, None] == document[None]) & (at[:, None] >= at[None])


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
    """q (T,H,D), k, v (T,G,D) through SDPA with a dense mask."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None) -> torch.Tensor:
    """q (B,S,H,D), k, v (B,S,G,D) through SDPA: causal, with a mask where there is a window."""
    mask = None
    if window is not None:
        at = torch.arange(q.shape[1], device=q.device)
        mask = (at[:, None] >= at[None]) & (at[:, None] - at[None] <= window)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1], "is_causal": mask is None, "attn_mask": mask}
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
