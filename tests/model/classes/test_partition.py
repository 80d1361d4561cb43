"""Acceptance test 1 of the large label space: every class has one owner."""

from __future__ import annotations

import pytest
import torch

from opencoder.errors import ConfigError
from opencoder.model.classes.partition import Partition


@pytest.mark.parametrize(("classes", "parts"), [(n, p) for n in (7, 1000, 1003) for p in (1, 2, 3, 4, 7, 8) if p <= n])
def test_01_each_class_has_one_owner_and_sizes_differ_by_one_at_most(classes: int, parts: int) -> None:
    partition = Partition(classes, parts)
    starts = [partition.start(rank) for rank in range(parts + 1)]
    assert (starts[0], starts[-1]) == (0, classes)
    sizes = [partition.size(rank) for rank in range(parts)]
    assert sum(sizes) == classes
    assert max(sizes) - min(sizes) <= 1
    owners = [rank for rank in range(parts) for _ in range(sizes[rank])]
    assert partition.owner(torch.arange(classes)).tolist() == owners


def test_more_ranks_than_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"classes=7 cannot be split over 8 ranks: each needs at least one class"):
        Partition(7, 8)
