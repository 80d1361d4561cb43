"""Gradient reduction over the data axes, and the global gradient norm. Both read placements only."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

import torch

from opencoder import kernels as K

from .group import Group, Handle
from .mesh import Mesh
from .placement import Placement

BUCKET_BYTES = 32 << 20
"""Small gradients are sent together in flat buckets of about this size: few collectives, little extra memory."""
ALONE_BYTES = 4 << 20
"""From this size a gradient is reduced where it lies: its copy into a bucket would cost more than another collective."""
IN_FLIGHT = 4
"""Collectives of gradients under way at one time: what they hold in buffers stays bounded."""
DATA_AXES = ("dp", "cp")

Gradients = Sequence[tuple[torch.Tensor, Placement]]


def reduction_groups(placement: Placement, mesh: Mesh) -> tuple[Group, ...]:
    """The groups over which a gradient is summed, one after another: every axis of its own, then the data axes as one."""
    live = [axis for axis in placement.grad_sum_axes if mesh.axis(axis).size > 1]
    own = tuple(mesh.axis(axis) for axis in live if axis not in DATA_AXES)
    data = [axis for axis in live if axis in DATA_AXES]
    return (*own, mesh.group(data)) if data else own


def reduce_gradients(gradients: Gradients, mesh: Mesh) -> None:
    """Sum each gradient, in place, over the axes its placement names. Always a sum: the loss is divided by N."""
    by_groups: dict[tuple[Group, ...], list[torch.Tensor]] = defaultdict(list)
    for gradient, placement in gradients:
        groups = reduction_groups(placement, mesh)
        if groups:
            by_groups[groups].append(gradient)
    under_way: deque[tuple[Handle[torch.Tensor], Callable[[], None]]] = deque()
    for groups, tensors in by_groups.items():
        for bucket in _buckets(tensors):
            if len(under_way) == IN_FLIGHT:
                _finish(*under_way.popleft())
            flat = bucket[0] if len(bucket) == 1 and bucket[0].is_contiguous() else _flattened(bucket)
            for group in groups[:-1]:
                group.all_reduce(flat)
            under_way.append((groups[-1].start_all_reduce(flat), _unpacking(flat, bucket)))
    while under_way:
        _finish(*under_way.popleft())


def _finish(handle: Handle[torch.Tensor], unpack: Callable[[], None]) -> None:
    handle.wait()
    unpack()


def _flattened(bucket: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in bucket])


def _unpacking(flat: torch.Tensor, bucket: list[torch.Tensor]) -> Callable[[], None]:
    """What brings the parts of `flat` back to the tensors of `bucket`."""

    def unpack() -> None:
        if flat is bucket[0]:
            return
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    return unpack


def _buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors of one type up to BUCKET_BYTES together, in their order; those of ALONE_BYTES have a bucket to themselves."""
    buckets: list[list[torch.Tensor]] = []
    open_ones: dict[torch.dtype, tuple[list[torch.Tensor], int]] = {}
    for tensor in tensors:
        n = tensor.numel() * tensor.element_size()
        if n >= ALONE_BYTES:
            buckets.append([tensor])
            continue
        bucket, size = open_ones.get(tensor.dtype, ([], BUCKET_BYTES))
        if size + n > BUCKET_BYTES:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        open_ones[tensor.dtype] = (bucket, size + n)
    return buckets


def global_grad_norm(gradients: Gradients, mesh: Mesh) -> torch.Tensor:
    """2-norm of the whole gradient, 0-dim fp64, the same on every rank. Call it after `reduce_gradients`."""
    by_copies: dict[int, list[torch.Tensor]] = defaultdict(list)
    for gradient, placement in gradients:
        by_copies[placement.copies(mesh)].append(gradient)
    return norm_over_world(by_copies, mesh, gradients[0][0].device)


def norm_over_world(by_copies: Mapping[int, Sequence[torch.Tensor]], mesh: Mesh, device: torch.device) -> torch.Tensor:
    """2-norm over all ranks, 0-dim fp64, the same on every rank: number of ranks that hold the same values → this rank's
    tensors. One collective, whatever the axes, so a pipeline's other stages count too."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, tensors in by_copies.items():
        if tensors:
            total += K.grad_norm(tensors).double() ** 2 / copies
    return mesh.world.all_reduce(total).sqrt()
