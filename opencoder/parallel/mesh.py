"""The mesh of ranks, with axes (pp, dp, cp, tp); tp varies fastest, so a tensor-parallel group stays on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .group import SINGLE, DeviceMesh, Group, Records, new_group, torch_mesh, world_group

__all__ = ["AXES", "SINGLE", "Group", "Mesh", "create_mesh", "kv_replicas_of", "pretend_mesh"]

AXES = ("pp", "dp", "cp", "tp")
PARTS = ("kv", "embed", "dp_cp", "world")
"""Groups that are no axis: `kv`, the neighbours within tp that hold the same key/value head; `embed`, the first and the
last pipeline rank, which hold a tied embedding both (size 1 on the ranks between them); `dp_cp`, the ranks that see different
tokens with the same weights, and `world`, all: the rows of a class matrix are split over them."""


@dataclass(frozen=True)
class Mesh:
    """One `Group` per axis, `world` over all of them, and the groups over several axes that are needed."""

    pp: Group = SINGLE
    dp: Group = SINGLE
    cp: Group = SINGLE
    tp: Group = SINGLE
    world: Group = SINGLE
    dp_cp: Group = SINGLE
    """Ranks that see different tokens with the same weights."""
    kv: Group = SINGLE
    embed: Group = SINGLE
    device_mesh: DeviceMesh | None = field(default=None, compare=False)
    """torch's own mesh over the axes longer than 1; None in a single process, where there is nothing to communicate with."""

    @property
    def records(self) -> Records:
        """What was communicated over any group of the mesh."""
        return self.world.records

    def axis(self, name: str) -> Group:
        """The group along one of `AXES`, or one of `PARTS`."""
        if name not in AXES + PARTS:
            raise ValueError(f"no axis {name!r}; axes: {', '.join(AXES + PARTS)}")
        group: Group = getattr(self, name)
        return group

    def group(self, axes: Sequence[str]) -> Group:
        """The ranks that differ from this one along `axes` alone. Axes of size 1 do not count.

        Raises ValueError for a combination that no group was made for."""
        live = {name for name in axes if self.axis(name).size > 1}
        if len(live) < 2:
            return self.axis(next(iter(live))) if live else SINGLE
        if live == {"dp", "cp"}:
            return self.dp_cp
        if live == {name for name in AXES if self.axis(name).size > 1}:
            return self.world
        raise ValueError(f"no group over {', '.join(axes)}: there is one for each axis, for dp with cp, and for all")

    def describe(self) -> str:
        """For example `pp 1 × dp 2 × cp 1 × tp 2`."""
        return " × ".join(f"{name} {self.axis(name).size}" for name in AXES)


def kv_replicas_of(kv_heads: int, tp: int) -> int:
    """How many neighbours in tp hold the same key/value heads: 1 where there are enough heads for all."""
    return max(1, tp // kv_heads)


def create_mesh(
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    kv_replicas: int = 1,
    device_type: str = "cpu",
    timeout_s: float | None = None,
) -> Mesh:
    """The mesh over the initialised default process group, or over this single process if there is none.

    `kv_replicas` neighbours in tp hold the same key/value heads. Called by all ranks. Raises ValueError if the world size is
    not a multiple of tp·pp·cp, or tp not one of kv_replicas."""
    world = world_group(Records())
    dp, rest = divmod(world.size, tp * pp * cp)
    if rest:
        raise ValueError(f"world size {world.size} is not a multiple of tp·pp·cp = {tp * pp * cp}")
    if tp % kv_replicas:
        raise ValueError(f"kv_replicas={kv_replicas} does not divide tp={tp}")
    if world.size == 1:
        return Mesh()
    sizes = (pp, dp, cp, tp)
    layout = torch.arange(world.size).view(sizes)
    lines = {
        name: layout.movedim(i, -1).reshape(-1, size) for i, (name, size) in enumerate(zip(AXES, sizes, strict=True))
    }
    parts = {
        **lines,
        "dp_cp": layout.permute(0, 3, 1, 2).reshape(-1, dp * cp),
        "kv": layout.reshape(-1, kv_replicas),
        "embed": lines["pp"][:, [0, -1]] if pp > 1 else layout.reshape(-1, 1),
    }
    # All ranks make all groups in one order. Where another group has the same members, it serves.
    groups: dict[str, Group] = {}
    for name, ranks in parts.items():
        same = next((other for other in groups if torch.equal(parts[other], ranks)), None)
        whole = ranks.shape[0] == 1 and ranks.shape[1] == world.size
        if whole or same is not None:
            groups[name] = replace(world if whole else groups[same or ""], name=name)
        else:
            groups[name] = new_group(name, ranks.tolist(), world, timeout_s=timeout_s)
    live = [name for name, size in zip(AXES, sizes, strict=True) if size > 1]
    device_mesh = torch_mesh(device_type, [groups[name] for name in live], layout.squeeze(), live)
    return Mesh(**groups, world=world, device_mesh=device_mesh)


def pretend_mesh(*, world_size: int, tp: int = 1, pp: int = 1, cp: int = 1, kv_replicas: int = 1) -> Mesh:
    """The mesh that rank 0 of `world_size` would see, for dry runs on the meta device: nothing can be sent over it."""
    dp = world_size // (tp * pp * cp)
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "world": world_size, "dp_cp": dp * cp, "kv": kv_replicas}
    sizes["embed"] = min(pp, 2)
    return Mesh(**{name: Group(size, name=name) for name, size in sizes.items()}, device_mesh=None)
