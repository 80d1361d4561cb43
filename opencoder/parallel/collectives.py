"""The two conjugate collectives of tensor parallelism as autograd Functions (f and g of arXiv:1909.08053, section 3).

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


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Forward: `x`, equal on all ranks, goes into a split region. Backward: the ranks' gradients are summed."""
    return _CopyToGroup.apply(x, group) if group.size > 1 else x


def reduce_from_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Forward: the ranks' partial results are summed. Backward: the gradient, equal on all ranks, passes unchanged."""
    return _ReduceFromGroup.apply(x, group) if group.size > 1 else x
