"""What torch.distributed.checkpoint is handed: every tensor under its global shape."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import Placement


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
