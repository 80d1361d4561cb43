"""Cross entropy over a vocabulary split over ranks: two kernels with the collective between them.

T tokens, M width, V/tp this rank's rows of the output matrix. `z_loss` c adds c·lse² of every unmasked token to what is
differentiated (lse: log-sum-exp of its logits), which keeps the logits from drifting; the value stays the cross entropy, which
is what runs are compared by."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Losses(NamedTuple):
    """Cross entropies, equal on all ranks of the group."""

    total: torch.Tensor
    """Their sum, 0-dim. Its gradient has the z-loss in it, its value has not."""
    tokens: torch.Tensor
    """(T,) one by one, 0 where the target is −100. Only `vocab_parallel_cross_entropy` gives them a gradient."""
    z_loss: torch.Tensor
    """Sum of z_loss·lse² over unmasked tokens, 0-dim, without gradient."""


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, vocab_start: int = 0, group: Group = SINGLE, z_loss: float = 0.0
) -> Losses:
    """From this rank's logits (T, V/tp). Differentiable in `logits`, more than once."""
    tokens, z = _CrossEntropy.apply(logits, targets, vocab_start, group, z_loss)
    return Losses(tokens.sum(), tokens, z)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocab_start: int, group: Group, z_loss: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse, target_logit = _combined(*K.ce_stats(logits, targets, vocab_start), group=group)
        ctx.save_for_backward(logits, targets, lse)
        ctx.vocab_start, ctx.z_loss = vocab_start, z_loss
        z = _z_losses(lse, targets, z_loss).sum()
        ctx.mark_non_differentiable(z)
        return (lse - target_logit).masked_fill(targets == IGNORE, 0), z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        logits, targets, lse = ctx.saved_tensors
        return K.ce_grad(logits, targets, lse, grad, ctx.vocab_start, z_loss=ctx.z_loss), None, None, None, None


def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int = 0,
    group: Group = SINGLE,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
) -> Losses:
    """Those of logits = hidden (T, M) · weight (V/tp, M)ᵀ that never exist whole.

    `hidden` must be equal on all ranks of `group` and pass through `copy_to_group` before: its gradient here is this
    rank's partial sum."""
    lse_of_chunks: list[torch.Tensor] = []

    def combine(*statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lse, target_logit = _combined(*statistics, group=group)
        if z_loss:
            lse_of_chunks.append(lse)
        return lse, target_logit

    total, tokens = K.linear_cross_entropy(
        hidden,
        weight,
        targets,
        reduction="sum",
        vocab_start=vocab_start,
        combine=combine if group.size > 1 or z_loss else None,
        chunk_tokens=chunk_tokens,
        z_loss=z_loss,
        return_token_losses=True,
    )
    if not lse_of_chunks:
        return Losses(total, tokens, total.new_zeros(()))
    each = _z_losses(torch.cat(lse_of_chunks), targets, z_loss)
    z = each.sum()
    return Losses(total - z, tokens - each, z)


def _z_losses(lse: torch.Tensor, targets: torch.Tensor, z_loss: float) -> torch.Tensor:
    return (z_loss * lse**2).masked_fill(targets == IGNORE, 0)
