"""Gradient reduction over the data axes, and the global gradient norm. Both read placements only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from opencoder import kernels as K

from .mesh import AXES, Mesh
from .placement import Placement

BUCKET_BYTES = 32 << 20
"""Gradients are sent in flat buckets of about this size: few collectives, little extra memory."""


def reduce_gradients(gradients: Sequence[tuple[torch.Tensor, Placement]], mesh: Mesh) -> None:
    """Sum each gradient, in place, over the axes its placement names. Always a sum: the loss is divided by N."""
    by_axes: dict[tuple[str, ...], list[torch.Tensor]] = defaultdict(list)
    for gradient, placement in gradients:
        axes = tuple(a for a in placement.grad_sum_axes if mesh.axis(a).size > 1)
        if axes:
            by_axes[axes].append(gradient)
    for axes, tensors in by_axes.items():
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            for axis in axes:
                mesh.axis(axis).all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Consecutive tensors of one type, up to BUCKET_BYTES together (a larger tensor has a bucket to itself)."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        n = tensor.numel() * tensor.element_size()
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + n > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += n
    return buckets


def global_grad_norm(gradients: Sequence[tuple[torch.Tensor, Placement]], mesh: Mesh) -> torch.Tensor:
    """2-norm of the whole gradient, 0-dim fp64, the same on every rank.

    Call it after `reduce_gradients`. Shards are summed over their axis; what is replicated is counted once."""
    device = gradients[0][0].device
    by_axis: dict[str | None, list[torch.Tensor]] = defaultdict(list)
    for gradient, placement in gradients:
        by_axis[placement.axis].append(gradient)
    squares = {
        axis: K.grad_norm(by_axis[axis]).double() ** 2
        if axis in by_axis
        else torch.zeros((), dtype=torch.float64, device=device)
        for axis in (None, *AXES)
    }
    total = squares[None]
    for axis in AXES:
        total = total + mesh.axis(axis).all_reduce(squares[axis])
    return total.sqrt()
