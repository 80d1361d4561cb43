"""Acceptance tests 17 to 21 of the large label space: which rows a step scores."""

from __future__ import annotations

import math

import pytest
import torch

from opencoder.model.classes.columns import ColumnGraph
from opencoder.model.classes.graph import build_graph
from opencoder.model.classes.partition import Partition
from opencoder.model.classes.selection import Selection, quota_of, select_rows
from opencoder.parallel.group import SINGLE

CLASSES, RANKS = 203, 4
PARTITION = Partition(CLASSES, RANKS)


def labels_of(batch: int, size: int = 24) -> torch.Tensor:
    """Every third batch crowds in the first rank's classes, with more labels there than a quota of 0.1 has room for."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, PARTITION.size(0) if batch % 3 == 0 else CLASSES, (size,), generator=generator)


def own(labels: torch.Tensor, rank: int) -> torch.Tensor:
    """Local ids of the labels that live on the rank."""
    local = labels - PARTITION.start(rank)
    return local[(local >= 0) & (local < PARTITION.size(rank))].unique()


def check(selection: Selection, labels: torch.Tensor, rank: int, rho: float) -> None:
    rows, wanted = selection.rows, own(labels, rank)
    assert rows.dtype == torch.int64
    assert bool((rows.diff() > 0).all())
    assert 0 <= int(rows[0]) <= int(rows[-1]) < PARTITION.size(rank)
    assert rows.numel() == max(math.ceil(rho * PARTITION.size(rank)), wanted.numel())
    assert torch.equal(rows[selection.position(wanted)], wanted)
    assert selection.hard[selection.position(wanted)].all()
    assert selection.labels == wanted.numel()


def test_18_every_label_is_active_in_a_thousand_batches_also_beyond_the_quota() -> None:
    beyond = 0
    for batch in range(1000):
        labels, rank = labels_of(batch), batch % RANKS if batch % 3 else 0
        selection = select_rows(labels, PARTITION, rank, rho=0.1, seed=7, step=batch)
        check(selection, labels, rank, 0.1)
        beyond += selection.labels > selection.quota
    assert beyond > 300


def test_19_quotas_differ_by_one_row_at_most_and_positions_are_the_inverse_of_rows() -> None:
    labels = labels_of(1)
    found = [select_rows(labels, PARTITION, rank, rho=0.3, seed=7, step=0) for rank in range(RANKS)]
    sizes = [s.rows.numel() for s in found]
    assert max(sizes) - min(sizes) <= 1
    for rank, selection in enumerate(found):
        check(selection, labels, rank, 0.3)
        assert torch.equal(selection.position(selection.rows), torch.arange(sizes[rank]))
        absent = torch.tensor(sorted(set(range(PARTITION.size(rank))) - set(selection.rows.tolist())))
        assert (selection.position(absent) == -1).all()


def test_21_the_same_seed_gives_the_same_rows_another_seed_step_or_rank_others() -> None:
    labels = torch.tensor([200])  # lives on the last rank
    base = select_rows(labels, PARTITION, 0, rho=0.2, seed=7, step=3)
    assert torch.equal(base.rows, select_rows(labels, PARTITION, 0, rho=0.2, seed=7, step=3).rows)
    for rank, seed, step in ((0, 8, 3), (0, 7, 4), (1, 7, 3)):
        assert not torch.equal(base.rows, select_rows(labels, PARTITION, rank, rho=0.2, seed=seed, step=step).rows)


def graph(neighbours: int) -> torch.Tensor:
    """The lists of all classes, of random weights."""
    weight = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0))
    return build_graph(weight, Partition(CLASSES, 1), SINGLE, neighbours=neighbours)


def columns_of(lists: torch.Tensor, rank: int) -> ColumnGraph:
    """The columns of one of several ranks, by hand."""
    start, rows = PARTITION.start(rank), PARTITION.size(rank)
    here = (lists >= start) & (lists < start + rows)
    classes, positions = here.nonzero(as_tuple=True)
    offsets = torch.zeros(CLASSES + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(classes, minlength=CLASSES).cumsum(0)
    return ColumnGraph(offsets, (lists[here] - start).int(), positions.to(torch.int16), rows, lists.shape[1])


def priorities(lists: torch.Tensor, labels: torch.Tensor, rank: int) -> dict[int, int]:
    """Local row → its best position in the labels' lists, −1 for labels."""
    best: dict[int, int] = {}
    for label in labels.unique().tolist():
        for position, neighbour in enumerate(lists[label].tolist()):
            best[neighbour] = min(best.get(neighbour, CLASSES), position)
    best.update(dict.fromkeys(labels.tolist(), -1))
    start = PARTITION.start(rank)
    return {i - start: p for i, p in best.items() if start <= i < start + PARTITION.size(rank)}


@pytest.mark.parametrize("uniform_mix", [0.0, 0.2])
def test_17_with_all_classes_as_neighbours_and_rho_one_every_row_is_active(uniform_mix: float) -> None:
    lists, labels = graph(CLASSES), torch.tensor([3, 77, 200])
    for rank in range(RANKS):
        found = select_rows(
            labels, PARTITION, rank, rho=1.0, columns=columns_of(lists, rank), uniform_mix=uniform_mix, seed=0, step=0
        )
        assert torch.equal(found.rows, torch.arange(PARTITION.size(rank)))
        assert found.fill_weight == 0.0  # the random rows stand for themselves alone
        assert found.candidates == 3 * PARTITION.size(rank)


@pytest.mark.parametrize("rho", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("uniform_mix", [0.0, 0.25])
def test_20_the_best_candidates_are_active_and_with_room_enough_all(rho: float, uniform_mix: float) -> None:
    lists = graph(6)
    crowded = roomy = 0
    for batch in range(30):
        labels, rank = labels_of(batch, size=12), batch % RANKS
        columns = columns_of(lists, rank)
        found = select_rows(
            labels, PARTITION, rank, rho=rho, columns=columns, uniform_mix=uniform_mix, seed=1, step=batch
        )
        check(found, labels, rank, rho)
        best = priorities(lists, labels, rank)
        hard = found.rows[found.hard].tolist()
        room = max(len(own(labels, rank)), found.rows.numel() - int(uniform_mix * found.rows.numel()))
        assert hard == sorted(sorted(best, key=lambda row: (best[row], row))[:room])
        edges = [i - PARTITION.start(rank) for i in lists[labels.unique()].flatten().tolist()]
        here = [i for i in edges if 0 <= i < PARTITION.size(rank)]
        assert (found.candidates, found.kept) == (len(here), sum(i in set(hard) for i in here))
        crowded += room < len(best)
        roomy += room > len(best)
    assert {0.05: crowded, 0.3: min(crowded, roomy), 0.9: roomy}[rho] >= 3


def test_21_another_seed_has_the_same_rows_chosen_by_priority() -> None:
    lists, labels = graph(6), labels_of(1)
    options = {"rho": 0.7, "columns": columns_of(lists, 1), "uniform_mix": 0.3, "step": 0}
    a, b = (select_rows(labels, PARTITION, 1, seed=seed, **options) for seed in (1, 2))  # type: ignore[arg-type]
    assert torch.equal(a.rows[a.hard], b.rows[b.hard])
    assert a.hard.any()
    assert not torch.equal(a.rows, b.rows)


def test_29_without_a_graph_only_labels_are_chosen_by_priority() -> None:
    labels = labels_of(2)
    for rank in range(RANKS):
        found = select_rows(labels, PARTITION, rank, rho=0.3, uniform_mix=0.2, seed=0, step=0)
        assert torch.equal(found.rows[found.hard], own(labels, rank))
        assert (found.candidates, found.kept) == (0, 0)


def test_random_rows_are_uniform() -> None:
    """2,000 draws of 5 rows out of 50, beside one label: each row a binomial variable."""
    counts = torch.zeros(PARTITION.size(3))
    for step in range(2000):
        selection = select_rows(torch.tensor([CLASSES - 1]), PARTITION, 3, rho=0.12, seed=0, step=step)
        counts[selection.rows] += 1
    assert counts[-1] == 2000
    share = 5 / (PARTITION.size(3) - 1)
    deviation = (2000 * share * (1 - share)) ** 0.5
    assert ((counts[:-1] - 2000 * share).abs() < 4.5 * deviation).all()


def test_the_weight_of_a_random_row_is_what_it_stands_for() -> None:
    selection = select_rows(torch.tensor([0, 1, 60]), PARTITION, 0, rho=0.2, seed=0, step=0)
    assert (selection.rows.numel(), selection.labels) == (11, 2)
    assert selection.fill_weight == pytest.approx(math.log((51 - 2) / 9))
    assert select_rows(torch.tensor([0]), PARTITION, 0, rho=1.0, seed=0, step=0).fill_weight == 0


def test_ignored_and_repeated_labels_and_batches_without_any() -> None:
    few = select_rows(torch.tensor([[5, -100], [5, 5]]), PARTITION, 0, rho=0.1, seed=0, step=0)
    assert (few.labels, few.rows.numel()) == (1, 6)
    none = select_rows(torch.full((4,), -100), PARTITION, 0, rho=0.1, seed=0, step=0)
    assert (none.labels, none.rows.numel(), int(none.hard.sum())) == (0, 6, 0)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, CLASSES], {}, r"labels lie in \[0, 203\]; allowed: \[0, 203\) and -100"),
        ([-1, 3], {}, r"labels lie in \[-1, 3\]"),
        ([0.5], {}, r"labels are torch.float32; allowed: int64, int32"),
        ([0], {"rho": 0.0}, r"rho=0.0, uniform_mix=0.0; rho must be in \(0, 1\]"),
        ([0], {"uniform_mix": 1.0}, r"uniform_mix in \[0, 1\)"),
    ],
)
def test_what_cannot_be_selected_from_is_told(labels: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_rows(torch.tensor(labels), PARTITION, 0, **{"rho": 0.1, "seed": 0, "step": 0, **options})  # type: ignore[arg-type]


def test_a_quota_is_no_row_larger_for_what_rho_has_lost_in_binary() -> None:
    assert [quota_of(rho, rows) for rho, rows in ((0.1, 30), (0.07, 100), (0.1, 31), (1.0, 7), (1e-12, 7))] == [
        3,
        7,
        4,
        7,
        1,
    ]
