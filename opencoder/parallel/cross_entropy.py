"""Cross entropy over a vocabulary split over ranks: two kernels with the collective between them.

T tokens, M width, V/tp this rank's rows of the output matrix."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from opencoder import kernels as K

from .group import SINGLE, Group

IGNORE = -100


def _combined(
    highest: torch.Tensor, sum_exp: torch.Tensor, target_logit: torch.Tensor, *, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics of this rank's logits → log-sum-exp over the whole vocabulary (T,) and the target's logit (T,), equal on
    all ranks."""
    if group.size > 1:
        local_highest = highest.clone()
        group.all_reduce(highest, "max")
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
        lse, target_logit = _combined(*K.ce_stats(logits, targets, vocab_start), group=group)
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
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Sum of token losses, 0-dim, of logits = hidden (T, M) · weight (V/tp, M)ᵀ that never exist whole.

    `hidden` must be equal on all ranks of `group` and pass through `copy_to_group` before: its gradient here is this
    rank's partial sum."""
    combine = None if group.size == 1 else partial(_combined, group=group)
    return K.linear_cross_entropy(
        hidden,
        weight,
        targets,
        reduction="sum",
        vocab_start=vocab_start,
        combine=combine,
        chunk_tokens=chunk_tokens,
    )
