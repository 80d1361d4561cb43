"""Rotary embedding (arXiv:2104.09864, half-split pairs) and SwiGLU (arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the pairs (i, i + R/2) of the first R dims of each head; the rest passes unchanged."""
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B or 1, S, 1, R/2)
    turned = _turn(q, cos, sin), _turn(k, cos, sin)
    if not inplace:
        return turned
    return q.copy_(turned[0]), k.copy_(turned[1])


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    a, b = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat([turned, x[..., 2 * half :]], -1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up in the type of the inputs."""
    return F.silu(gate) * up
