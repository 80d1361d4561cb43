"""The public functions `rotary` and `swiglu`."""

from __future__ import annotations

import torch

from . import _checks
from ._dispatch import choose, register
from .reference import elementwise as _reference

register("rotary", "reference")(_reference.rotary)
register("swiglu", "reference")(_reference.swiglu)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of q (B,S,H,D) and k (B,S,G,D), half-split pairs, arithmetic in fp32 or wider.

    cos, sin: fp32 (S, R/2) or (B, S, R/2) with R ≤ D; dims from R on pass unchanged. Source: arXiv:2104.09864."""
    _checks.floating("rotary", q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rotary: q and k must be (B,S,H,D) and (B,S,G,D), got {tuple(q.shape)} and {tuple(k.shape)}")
    b, s, _, d = q.shape
    allowed = [(s, cos.shape[-1]), (b, s, cos.shape[-1]), (1, s, cos.shape[-1])]
    if cos.shape != sin.shape or tuple(cos.shape) not in allowed or 2 * cos.shape[-1] > d:
        raise ValueError(
            f"rotary: cos and sin must be ({s}, R/2) or ({b}, {s}, R/2) with R ≤ {d}, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    turned: tuple[torch.Tensor, torch.Tensor] = choose("rotary", impl, q.device.type, q, k, cos, sin).run(
        q, k, cos, sin
    )
    return turned


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """silu(gate) · up, both (…, F). Source: arXiv:2002.05202."""
    _checks.floating("swiglu", gate=gate, up=up)
    _checks.same_dtype("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    out: torch.Tensor = choose("swiglu", impl, gate.device.type, gate, up).run(gate, up)
    return out
