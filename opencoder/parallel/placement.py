"""Where a parameter lives. Optimizer, clipping, checkpoint, converter and gradient reduction read this alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from .mesh import Mesh


@dataclass(frozen=True)
class Placement:
    """`shard_dim` of the global tensor is split evenly over `axis` (both None: not split). The same values stand on all
    ranks of `replicated_over`. Its gradient is a partial sum over `grad_sum_axes` and must be summed there."""

    global_shape: tuple[int, ...]
    shard_dim: int | None = None
    axis: str | None = None
    replicated_over: tuple[str, ...] = ("dp", "cp", "tp")
    grad_sum_axes: tuple[str, ...] = ("dp", "cp")

    def slice_of(self, mesh: Mesh) -> tuple[slice, ...]:
        """This rank's part of the global tensor, as slices."""
        slices = [slice(0, n) for n in self.global_shape]
        if self.shard_dim is not None and self.axis is not None:
            group = mesh.axis(self.axis)
            n = self.global_shape[self.shard_dim] // group.size
            slices[self.shard_dim] = slice(group.rank * n, (group.rank + 1) * n)
        return tuple(slices)


def sharded(global_shape: tuple[int, ...], shard_dim: int, axis: str = "tp") -> Placement:
    """Split over `axis`, equal over the data axes."""
    return Placement(global_shape, shard_dim, axis, replicated_over=("dp", "cp"))


def replicated(global_shape: tuple[int, ...]) -> Placement:
    """The same on every rank of a pipeline stage."""
    return Placement(global_shape)


def place(parameter: torch.nn.Parameter, placement: Placement) -> torch.nn.Parameter:
    """Attach `placement` and return the parameter."""
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: torch.Tensor) -> Placement:
    """The placement of a parameter; a parameter without one is a defect of the layer that made it."""
    placement = getattr(parameter, "placement", None)
    if placement is None:
        raise TypeError(f"parameter of shape {tuple(parameter.shape)} has no placement: its layer must call place()")
    return placement


def as_global(local: torch.Tensor, placement: Placement, mesh: Mesh) -> torch.Tensor:
    """`local` as a tensor whose `size()` is the global shape and that shares its storage: what checkpoints are made of.

    A DTensor over the mesh, or `local` itself in a single process."""
    if mesh.device_mesh is None:
        assert tuple(local.shape) == placement.global_shape, (local.shape, placement)
        return local
    per_axis = [
        Shard(placement.shard_dim) if name == placement.axis and placement.shard_dim is not None else Replicate()
        for name in mesh.device_mesh.mesh_dim_names or ()
    ]
    shape = torch.Size(placement.global_shape)
    return DTensor.from_local(
        local,
        mesh.device_mesh,
        per_axis,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
