"""Which rank has which classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opencoder.errors import ConfigError


@dataclass(frozen=True)
class Partition:
    """`classes` rows over `parts` ranks: contiguous, in rank order, the first `classes % parts` ranks with one row more (as
    insightface and PLSC cut them)."""

    classes: int
    parts: int

    def __post_init__(self) -> None:
        if not 1 <= self.parts <= self.classes:
            raise ConfigError(
                f"model.head.classes={self.classes} cannot be split over {self.parts} ranks: each needs at least one class; "
                "start fewer processes, or choose a smaller model.head.class_group"
            )

    def start(self, rank: int) -> int:
        """First class of the rank; of `parts`: one past the last."""
        return rank * (self.classes // self.parts) + min(rank, self.classes % self.parts)

    def size(self, rank: int) -> int:
        """Classes of the rank."""
        return self.start(rank + 1) - self.start(rank)

    def owner(self, ids: torch.Tensor) -> torch.Tensor:
        """Class ids in [0, classes) → the rank that has each, int64 of the same shape."""
        least, larger = divmod(self.classes, self.parts)
        ids = ids.long()
        before = larger * (least + 1)
        return torch.where(ids < before, ids // (least + 1), larger + (ids - before) // least)
