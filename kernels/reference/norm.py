"""RMSNorm (arXiv:1910.07467): y = t / sqrt(mean(t²) + eps) · weight with t = x + residual, in fp32 or wider."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x (…, M) → y (…, M); with residual → (y, x + residual). The unrounded sum feeds the norm."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    y = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps) * weight.to(wide)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total.to(x.dtype))
