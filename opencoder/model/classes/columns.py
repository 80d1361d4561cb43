"""The graph of nearest classes as a rank needs it in a step: for every class of all ranks, which of *my* rows are in its list.

With it a step's candidates are found without communication. Made from the lists, which lie with their owners, by one exchange."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from opencoder import kernels as K
from opencoder.parallel.group import Group

from .partition import Partition


@dataclass(frozen=True)
class ColumnGraph:
    """Lists in CSR form: those of class y are at offsets[y]:offsets[y + 1] of the other two, by rising position."""

    offsets: torch.Tensor
    """(N + 1,) int32, int64 from 2³¹ edges on."""
    ids: torch.Tensor
    """(edges,) int32, local rows of this rank."""
    positions: torch.Tensor
    """(edges,) int16 (int32 for more than 32,767 neighbours): place in the list of y, 0 for y itself."""
    num_rows: int
    """Rows N_r of this rank."""
    neighbours: int
    """Length K of a list over all ranks."""

    @classmethod
    def from_rows(cls, lists: torch.Tensor, partition: Partition, group: Group) -> ColumnGraph:
        """lists: integers (N_r, K), the global ids near each class of this rank. Called by all ranks of the group."""
        rows, neighbours = lists.shape
        if rows != partition.size(group.rank):
            raise ValueError(f"ColumnGraph: {rows} lists; rank {group.rank} has {partition.size(group.rank)} classes")
        starts = [partition.start(rank) for rank in range(group.size)]
        bounds = torch.tensor(starts[1:], dtype=lists.dtype, device=lists.device)
        owner = torch.bucketize(lists, bounds, out_int32=True, right=True)
        # By owner, and for each as they were: by class, then by position.
        order = _stable_order(owner.flatten(), group.size)
        place = torch.int16 if neighbours <= 2**15 - 1 else torch.int32
        position = (order % neighbours).to(place)
        local = lists.flatten()[order].int()
        del order  # 8 bytes for each edge
        owner += torch.arange(0, rows * group.size, group.size, dtype=torch.int32, device=lists.device)[:, None]
        lengths = torch.bincount(owner.flatten(), minlength=rows * group.size).view(rows, -1).int()
        edges = lengths.sum(0).tolist()
        for part, start in zip(local.split(edges), starts, strict=True):
            part -= start
        # Blocks arrive in the order of the ranks, so of the classes: offsets need no more than a sum.
        received = group.all_to_all_uneven(lengths.t().flatten(), [rows] * group.size)
        offsets = torch.zeros(partition.classes + 1, dtype=torch.int64, device=lists.device)
        torch.cumsum(received, 0, out=offsets[1:])
        if offsets[-1] < 2**31:
            offsets = offsets.int()
        ids = group.all_to_all_uneven(local, edges)
        found = group.all_to_all_uneven(_bytes(position), edges)
        return cls(offsets, ids, found.flatten().view(place), rows, neighbours)

    def priority(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct classes (U,) int64 → for each row of this rank its best position in their lists, K.FAR without any, and in
        how many lists it is; both int32 (N_r,)."""
        return K.neighbour_priority(labels, self.offsets, self.ids, self.positions, self.num_rows)

    def to_rows(self, partition: Partition, group: Group) -> torch.Tensor:
        """The lists `from_rows` was given, int32 (N_r, K): what a checkpoint stores, as they belong to no split. Called by all
        ranks of the group."""
        bounds = [partition.start(rank) for rank in range(group.size + 1)]
        edges = self.offsets[bounds].diff().tolist()
        sizes = [partition.size(rank) for rank in range(group.size)]
        lengths = group.all_to_all_uneven(self.offsets.diff(), sizes).view(group.size, -1)
        ids = group.all_to_all_uneven(self.ids + bounds[group.rank], edges)
        positions = group.all_to_all_uneven(_bytes(self.positions), edges).flatten().view(self.positions.dtype)
        own = torch.arange(lengths.shape[1], device=ids.device).repeat(group.size)
        classes = own.repeat_interleave(lengths.flatten())
        lists = ids.new_empty(lengths.shape[1], self.neighbours)
        lists[classes, positions.long()] = ids
        return lists


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """(n,) → (n, bytes of a value): NCCL has no 16-bit integers."""
    return x.view(torch.uint8).view(-1, x.element_size())


def _stable_order(keys: torch.Tensor, below: int) -> torch.Tensor:
    """Indices that sort 1-D integer keys in [0, below), equal ones as they were."""
    if keys.device.type == "cpu" and below <= 2**16:
        # A radix sort, ten times as fast as torch's.
        narrow = keys.numpy().astype(np.uint8 if below <= 2**8 else np.uint16)
        return torch.from_numpy(np.argsort(narrow, kind="stable"))
    return keys.sort(stable=True).indices
