"""The conjugate collectives of tensor parallelism (f and g of arXiv:1909.08053, section 3) and of sequence parallelism (g and ḡ
of arXiv:2205.05198, section 4.2) as autograd Functions.

Under sequence parallelism the hidden state between the split layers is split over the tokens: rank i has the i-th part of the B·S
tokens in their order, whichever sample they belong to, as a tensor (B, S/tp, M) whose first two dimensions tell the shape of the
batch and nothing else. So a gather needs no copy, and packed documents stay one row. The functions' results follow.

They hold a collective and nothing else: the matrix products beside them stay aten's, so that pipeline schedules may
split their backward."""

from __future__ import annotations

from typing import Any

import torch

from .group import Group


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return scattered(grad, ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gathered(grad, ctx.group), None


def gathered(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(B, S/tp, M) of each rank → (B, S, M), without gradients."""
    return group.all_gather(x.flatten(0, 1)).view(x.shape[0], -1, x.shape[2])


def scattered(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(B, S, M) → this rank's tokens (B, S/tp, M) of the sum over the ranks, without gradients."""
    return group.reduce_scatter(x.flatten(0, 1)).view(x.shape[0], -1, x.shape[2])


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Forward: `x`, equal on all ranks, goes into a split region. Backward: the ranks' gradients are summed."""
    return _CopyToGroup.apply(x, group) if group.size > 1 else x


def reduce_from_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Forward: the ranks' partial results are summed. Backward: the gradient, equal on all ranks, passes unchanged."""
    return _ReduceFromGroup.apply(x, group) if group.size > 1 else x


def gather_tokens(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(B, S/tp, M) → (B, S, M). Backward: the ranks' gradients are summed, and each rank has its tokens of the sum."""
    return _GatherTokens.apply(x, group) if group.size > 1 else x


def scatter_tokens(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(B, S, M) → (B, S/tp, M): the ranks' partial results are summed, and each rank has its tokens of the sum. Backward: the
    gradients of all tokens are gathered."""
    return _ScatterTokens.apply(x, group) if group.size > 1 else x


def enter_split(x: torch.Tensor, group: Group, *, tokens_split: bool) -> torch.Tensor:
    """The hidden state goes into layers whose weights are split: all tokens on every rank."""
    return gather_tokens(x, group) if tokens_split else copy_to_group(x, group)


def leave_split(x: torch.Tensor, group: Group, *, tokens_split: bool) -> torch.Tensor:
    """Partial results of such layers become the hidden state: summed, for all tokens or for this rank's."""
    return scatter_tokens(x, group) if tokens_split else reduce_from_group(x, group)
