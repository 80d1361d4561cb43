"""AdamW (arXiv:1711.05101), SGD of some rows, and the gradient norm, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor] | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coef: Any,
    skip: torch.Tensor | None,
) -> None:
    """p ← p·(1 − lr·wd) − lr/(1 − b1ᵗ) · m / (√(v/(1 − b2ᵗ)) + eps) in the state's type; then the 16-bit copy. Not if `skip`."""
    if skip is not None and skip:
        return
    beta1, beta2 = betas
    for i, param in enumerate(params):
        p, m, v = (param if masters is None else masters[i]), exp_avgs[i], exp_avg_sqs[i]
        g = grads[i].to(m.dtype) if clip_coef is None else grads[i].to(m.dtype) * clip_coef
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        p.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
        if masters is not None:
            param.copy_(p)


def sgd_rows_step(
    weight: torch.Tensor,
    momentum_buffer: torch.Tensor,
    grad: torch.Tensor,
    rows: torch.Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    clip_coef: float,
) -> None:
    """b ← momentum · b + clip · g + wd · w; w ← w − lr · b; of copies of the rows, which are put back."""
    w, b = weight[rows], momentum_buffer[rows]
    b.mul_(momentum).add_(grad, alpha=clip_coef).add_(w, alpha=weight_decay)
    momentum_buffer.index_copy_(0, rows, b)
    weight.index_copy_(0, rows, w.sub_(b, alpha=lr))


def grad_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """In fp64; returned as fp32 unless a tensor is fp64."""
    total = sum((t.double().square().sum() for t in tensors), torch.zeros((), dtype=torch.float64))
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.as_tensor(total, device=tensors[0].device).sqrt().to(wide)
