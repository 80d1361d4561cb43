"""Several column-parallel products of one input whose backward pass communicates while it computes.

dX is worked out first and its sum over the ranks started; the weights' gradients, which need nothing of it, are worked out while
it is under way (arXiv:1909.08053 sends dX after everything). Under sequence parallelism only this rank's tokens of the input are
kept: all of them are gathered again while dX is worked out.

A Function that makes dX and dW together cannot be split: zero-bubble schedules would run it, and its collectives, twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .collectives import gathered
from .group import Group, Handle


class _ColumnProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, tokens_split: bool, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.tokens_split = group, tokens_split
        ctx.save_for_backward(x, *weights)
        whole = gathered(x, group) if tokens_split else x
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        group, flat = ctx.group, [gradient.flatten(0, 1) for gradient in gradients]
        need_x, _, _, *need_weights = ctx.needs_input_grad
        gather = group.start_all_gather(x.flatten(0, 1)) if ctx.tokens_split and any(need_weights) else None
        reduction: Handle[torch.Tensor] | None = None
        if need_x:
            # In the order in which autograd would add them: the last product first.
            dx = flat[-1] @ weights[-1]
            for gradient, weight in zip(flat[-2::-1], weights[-2::-1], strict=True):
                dx.addmm_(gradient, weight)
            reduction = group.start_reduce_scatter(dx) if ctx.tokens_split else group.start_all_reduce(dx)
        whole = x.flatten(0, 1) if gather is None else gather.wait()
        dweights = [
            gradient.t() @ whole if needed else None for gradient, needed in zip(flat, need_weights, strict=True)
        ]
        return None if reduction is None else reduction.wait().view(x.shape), None, None, *dweights


def column_products(
    x: torch.Tensor, weights: list[torch.Tensor], group: Group, *, tokens_split: bool
) -> list[torch.Tensor]:
    """x (B, S, M), with split tokens (B, S/tp, M), times each weight (N/tp, M)ᵀ → (B, S, N/tp) each."""
    return list(_ColumnProducts.apply(x, group, tokens_split, *weights))
