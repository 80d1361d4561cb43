"""Class ids in another order: a bijection that spreads neighbours."""

from __future__ import annotations

import pytest
import torch

from opencoder.model.classes.partition import Partition
from opencoder.model.classes.permutation import Permutation


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 16, 17, 100, 1003, 65_536])
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_every_row_has_one_label_and_back(classes: int, seed: int) -> None:
    permutation, labels = Permutation(classes, seed), torch.arange(classes)
    rows = permutation.rows_of(labels)
    assert torch.equal(rows.sort().values, labels)
    assert torch.equal(permutation.labels_of(rows), labels)


def test_another_seed_is_another_order_and_neighbours_are_spread_over_ranks() -> None:
    labels = torch.arange(20_000)
    rows = Permutation(20_000, 3).rows_of(labels)
    assert (rows == Permutation(20_000, 4).rows_of(labels)).sum() < 20
    # A run of 400 neighbours on 4 ranks: 100 each, give or take five standard deviations of 8.7.
    for at in range(0, 20_000, 400):
        share = torch.bincount(Partition(20_000, 4).owner(rows[at : at + 400]), minlength=4)
        assert (share - 100).abs().max() < 44
    # As from one another as random ones: a third of the range on average.
    assert abs(float(rows.diff().abs().double().mean()) / 20_000 - 1 / 3) < 0.02


def test_a_hundred_million_classes_need_no_table() -> None:
    permutation = Permutation(100_000_000, 7)
    labels = torch.randint(0, 100_000_000, (3, 1000), generator=torch.Generator().manual_seed(0))
    rows = permutation.rows_of(labels)
    assert rows.shape == labels.shape
    assert 0 <= int(rows.min()) <= int(rows.max()) < 100_000_000
    assert torch.equal(permutation.labels_of(rows), labels)


def test_what_is_no_class_stays() -> None:
    permutation = Permutation(10, 0)
    labels = torch.tensor([-100, 3, 10, -1, 2**40])
    stay = labels != 3
    for found in (permutation.rows_of(labels), permutation.labels_of(labels)):
        assert torch.equal(found[stay], labels[stay])
        assert 0 <= int(found[1]) < 10
    with pytest.raises(ValueError, match=r"numbers are torch.int32; allowed: int64"):
        permutation.labels_of(torch.tensor([1], dtype=torch.int32))
