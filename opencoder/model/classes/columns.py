"""The graph of nearest classes as a rank needs it in a step: for every class of all ranks, which of *my* rows are in its list.

With it a step's candidates are found without communication. Made from the lists, which lie with their owners, by one exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opencoder import kernels as K
from opencoder.errors import DataError
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
        owner = partition.owner(lists)
        # By owner, and for each as they were: by class, then by position.
        order = owner.flatten().to(torch.int32).sort(stable=True).indices
        starts = torch.tensor([partition.start(rank) for rank in range(group.size)], device=lists.device)
        local = (lists - starts[owner]).flatten()[order].int()
        place = torch.int16 if neighbours <= 2**15 - 1 else torch.int32
        position = (order % neighbours).to(place)
        lengths = torch.zeros(rows, group.size, dtype=torch.int32, device=lists.device)
        lengths.scatter_add_(1, owner, torch.ones_like(owner, dtype=torch.int32))
        # Blocks arrive in the order of the ranks, so of the classes: offsets need no more than a sum.
        edges = lengths.sum(0).tolist()
        received = group.all_to_all_uneven(lengths.t().flatten(), [rows] * group.size)
        offsets = torch.zeros(partition.classes + 1, dtype=torch.int64, device=lists.device)
        torch.cumsum(received, 0, out=offsets[1:])
        if offsets[-1] < 2**31:
            offsets = offsets.int()
        ids = group.all_to_all_uneven(local, edges)
        # As bytes: NCCL has no 16-bit integers.
        found = group.all_to_all_uneven(position.view(torch.uint8).view(-1, place.itemsize), edges)
        return cls(offsets, ids, found.flatten().view(place), rows, neighbours)

    def priority(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct classes (U,) int64 → for each row of this rank its best position in their lists, K.FAR without any, and in
        how many lists it is; both int32 (N_r,)."""
        labels = labels.to(self.offsets.device)
        return K.neighbour_priority(labels, self.offsets, self.ids, self.positions, self.num_rows)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores; for the same number of ranks, as local ids are those of one split."""
        return {"offsets": self.offsets, "ids": self.ids, "positions": self.positions}

    @classmethod
    def from_state(
        cls, state: dict[str, torch.Tensor], partition: Partition, rank: int, neighbours: int
    ) -> ColumnGraph:
        """From `state_tensors` of the same rank. Raises DataError where they belong to another split or matrix."""
        offsets, ids, positions = (state[name] for name in ("offsets", "ids", "positions"))
        rows = partition.size(rank)
        most = int(ids.max()) if ids.numel() else -1
        fits = offsets.numel() == partition.classes + 1 and int(offsets[-1]) == ids.numel() == positions.numel()
        if not fits or most >= rows:
            raise DataError(
                f"the stored graph of classes ({offsets.numel() - 1} classes, local rows up to {most}) is not that of rank "
                f"{rank} with {rows} of {partition.classes} classes; leave it out and let the first rebuild make a new one"
            )
        return cls(offsets, ids, positions, rows, neighbours)
