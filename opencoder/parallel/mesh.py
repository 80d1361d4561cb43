"""The mesh of ranks, with axes (pp, dp, cp, tp); tp varies fastest, so a tensor-parallel group stays on one machine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Group:
    """The ranks along one axis as one rank sees them: how many, which one this is, and how to reach the others.

    `process_group` is None at size 1, and also in a dry run, where sizes matter and nothing is sent."""

    size: int = 1
    rank: int = 0
    process_group: dist.ProcessGroup | None = None

    def all_reduce(self, x: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce `x` over the group in place; nothing to do at size 1."""
        if self.size > 1:
            dist.all_reduce(x, op=op, group=self.process_group)
        return x

    def barrier(self) -> None:
        """Wait for every rank of the group."""
        if self.size > 1:
            dist.barrier(group=self.process_group)


SINGLE = Group()


@dataclass(frozen=True)
class Mesh:
    """One `Group` per axis, and `world` over all of them."""

    pp: Group = SINGLE
    dp: Group = SINGLE
    cp: Group = SINGLE
    tp: Group = SINGLE
    world: Group = SINGLE
    device_mesh: DeviceMesh | None = field(default=None, compare=False)
    """None in a single process, where there is nothing to communicate with."""

    def axis(self, name: str) -> Group:
        """The group along one of `AXES`."""
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}[name]

    def describe(self) -> str:
        """For example `pp 1 × dp 2 × cp 1 × tp 2`."""
        return " × ".join(f"{name} {self.axis(name).size}" for name in AXES)


def create_mesh(*, tp: int = 1, pp: int = 1, cp: int = 1, device_type: str = "cpu") -> Mesh:
    """The mesh over the initialised default process group, or over this single process if there is none.

    Raises ValueError if the world size is not a multiple of tp·pp·cp."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    dp, rest = divmod(world_size, tp * pp * cp)
    if rest:
        raise ValueError(f"world size {world_size} is not a multiple of tp·pp·cp = {tp * pp * cp}")
    if world_size == 1:
        return Mesh()
    device_mesh = init_device_mesh(device_type, (pp, dp, cp, tp), mesh_dim_names=AXES)
    groups = {}
    for name in AXES:
        part = device_mesh[name]
        groups[name] = Group(part.size(), part.get_local_rank(), part.get_group() if part.size() > 1 else None)
    world = Group(world_size, dist.get_rank(), dist.group.WORLD)
    return Mesh(**groups, world=world, device_mesh=device_mesh)


def pretend_mesh(*, world_size: int, tp: int = 1, pp: int = 1, cp: int = 1) -> Mesh:
    """The mesh that rank 0 of `world_size` would see, for dry runs on the meta device: nothing can be sent over it."""
    dp = world_size // (tp * pp * cp)
    return Mesh(pp=Group(pp), dp=Group(dp), cp=Group(cp), tp=Group(tp), world=Group(world_size))
