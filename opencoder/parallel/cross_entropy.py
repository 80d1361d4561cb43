"""Cross entropy over a vocabulary split over ranks: two kernels with the collective between them.

T tokens, M width, V/tp this rank's rows of the output matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opencoder import kernels as K

from .mesh import SINGLE, Group

IGNORE = -100


def _log_sum_exp(
    logits: torch.Tensor, targets: torch.Tensor, vocab_start: int, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, V/tp) → log-sum-exp over the whole vocabulary (T,) and the target's logit (T,), equal on all ranks."""
    highest, sum_exp, target_logit = K.ce_stats(logits, targets, vocab_start)
    if group.size > 1:
        local_highest = highest.clone()
        group.all_reduce(highest, dist.ReduceOp.MAX)
        # The target's logit is zero on all ranks but the one that holds it, so both can travel in one sum.
        packed = torch.stack([sum_exp * (local_highest - highest).exp(), target_logit])
        sum_exp, target_logit = group.all_reduce(packed)
    return highest + sum_exp.log(), target_logit


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, vocab_start: int = 0, group: Group = SINGLE
) -> torch.Tensor:
    """Token losses (T,) from this rank's logits (T, V/tp); 0 where the target is −100. Differentiable in `logits`."""
    return _CrossEntropy.apply(logits, targets, vocab_start, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocab_start: int, group: Group) -> torch.Tensor:
        lse, target_logit = _log_sum_exp(logits, targets, vocab_start, group)
        ctx.save_for_backward(logits, targets, lse)
        ctx.vocab_start = vocab_start
        return (lse - target_logit).masked_fill(targets == IGNORE, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, targets, lse = ctx.saved_tensors
        return K.ce_grad(logits, targets, lse, grad, ctx.vocab_start), None, None, None


def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    group: Group = SINGLE,
    chunk_tokens: int = 512,
) -> torch.Tensor:
    """Sum of token losses, 0-dim, of logits = hidden (T, M) · weight (V/tp, M)ᵀ that never exist whole.

    The gradients of hidden and weight are worked out in the forward pass, chunk by chunk while the logits are at hand
    (three products instead of the four of recomputing), and scaled in the backward pass. `hidden` must be equal on all
    ranks of `group` and pass through `copy_to_group` before: its gradient here is this rank's partial sum."""
    settings = (vocab_start, group, chunk_tokens, torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(hidden, weight, targets, settings)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        settings: tuple[int, Group, int, bool],
    ) -> torch.Tensor:
        vocab_start, group, chunk_tokens, with_grad = settings
        tokens = hidden.shape[0]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_grad else None
        d_weight = torch.zeros_like(weight, dtype=wide) if with_grad else None
        buffer = hidden.new_empty(min(chunk_tokens, tokens), weight.shape[0])
        for start in range(0, tokens, chunk_tokens):
            x, target = hidden[start : start + chunk_tokens], targets[start : start + chunk_tokens]
            logits = torch.mm(x, weight.t(), out=buffer[: x.shape[0]])
            lse, target_logit = _log_sum_exp(logits, target, vocab_start, group)
            loss += (lse - target_logit).masked_fill(target == IGNORE, 0).sum(dtype=wide)
            if d_hidden is not None and d_weight is not None:
                K.ce_grad(logits, target, lse, 1.0, vocab_start, out=logits)
                torch.mm(logits, weight, out=d_hidden[start : start + chunk_tokens])
                if d_weight.dtype == logits.dtype:
                    d_weight.addmm_(logits.t(), x)
                else:  # 16-bit products are summed in fp32
                    d_weight += logits.t() @ x
        ctx.d_hidden, ctx.d_weight, ctx.dtype = d_hidden, d_weight, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        d_hidden, d_weight = ctx.d_hidden.mul_(grad), ctx.d_weight.mul_(grad).to(ctx.dtype)
        ctx.d_hidden = ctx.d_weight = None
        return d_hidden, d_weight, None, None
