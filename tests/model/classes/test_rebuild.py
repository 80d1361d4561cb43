"""Acceptance tests 16 and 29 of the large label space: when the graph is made anew, and what ends a build that cannot be."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from opencoder.errors import Failure
from opencoder.model.classes import rebuild
from opencoder.model.classes.columns import ColumnGraph
from opencoder.model.classes.partition import Partition
from opencoder.model.classes.rebuild import BuildOptions, GraphKeeper, Schedule, background_group
from opencoder.model.classes.selection import select_rows
from opencoder.parallel.group import SINGLE, Group, new_group, world_group
from opencoder.parallel.records import CommunicationError, Records
from tests.harness import run_ranks

from .test_graph import brute_force, matrix, recall

CLASSES, NEIGHBOURS = 403, 8
OPTIONS = BuildOptions(NEIGHBOURS)


def keeper_of(size: int, group: Group, schedule: Schedule, background: Group | None = None) -> GraphKeeper:
    return GraphKeeper(Partition(CLASSES, size), group, OPTIONS, schedule, background=background, seed=5)


def shard(weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    partition = Partition(weight.shape[0], size)
    return weight[partition.start(rank) : partition.start(rank + 1)].clone()


def moved(weight: torch.Tensor, by: float = 0.3) -> torch.Tensor:
    return weight + by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))


# ---- schedule and probe ----


def probed(rank: int, size: int, weight: torch.Tensor) -> dict[str, Any]:
    keeper = keeper_of(size, world_group(Records()), Schedule(first_step=2, every=30, probe_recall=0.5))
    own, later = shard(weight, rank, size), shard(moved(weight), rank, size)
    found: dict[str, Any] = {"swaps": [step for step in range(5) if keeper.before_step(step, own)]}
    found["first"], found["recall of itself"] = keeper.lists(), keeper.probe(own)
    found["recall"] = keeper.probe(later)
    found["rows"] = keeper._probe_rows + keeper.partition.start(rank)
    found["later swaps"] = [step for step in range(5, 40) if keeper.before_step(step, later)]
    found["second"], found["metrics"] = keeper.lists(), keeper.metrics(39)
    return found


def test_16_a_rebuild_follows_the_weights_and_the_probe_is_the_recall_on_its_rows() -> None:
    weight = matrix(CLASSES)
    ranks = run_ranks(probed, 2, weight)
    first, second = (torch.cat([found[name] for found in ranks]) for name in ("first", "second"))
    before, after = brute_force(weight, NEIGHBOURS), brute_force(moved(weight), NEIGHBOURS)
    assert torch.equal(first.long(), before)
    assert torch.equal(second.long(), after)
    assert not torch.equal(first, second)
    rows = torch.cat([found["rows"] for found in ranks])
    assert rows.unique().numel() == rows.numel() == 2 * 201
    exact = recall(before[rows, 1:], after[rows, 1:])
    for found in ranks:
        assert found["swaps"] == [2]
        assert found["recall of itself"] == 1.0
        assert found["recall"] == pytest.approx(exact, abs=1e-12)
        assert 0.5 < exact < 0.9  # so the threshold does not fire, and the next build is the one that is due
        assert found["later swaps"] == [32]
        assert found["metrics"] == {"graph_age": 7.0, "probe_recall": 1.0}


def test_a_low_probe_recall_brings_the_next_build_forward() -> None:
    keeper = keeper_of(1, SINGLE, Schedule(first_step=0, every=100, probe_recall=0.95))
    weight = matrix(CLASSES)
    assert keeper.before_step(0, weight)
    assert not any(keeper.before_step(step, weight) for step in range(1, 15))
    assert keeper.metrics(14) == {"graph_age": 14.0, "probe_recall": 1.0}
    assert [step for step in range(15, 40) if keeper.before_step(step, moved(weight))] == [20]
    assert keeper.built_at == 20


def test_a_graph_that_is_too_old_ends_the_run() -> None:
    keeper = keeper_of(1, SINGLE, Schedule(first_step=0, every=10, max_age=6))
    assert keeper.before_step(0, matrix(CLASSES))
    keeper.before_step(6, matrix(CLASSES))
    with pytest.raises(Failure, match=r"graph of classes is 7 steps behind at step 7 \(it is of step 0\); .*max_age=6"):
        keeper.before_step(7, matrix(CLASSES))


def stored(rank: int, size: int, weight: torch.Tensor, lists: torch.Tensor | None) -> torch.Tensor | None:
    keeper = keeper_of(size, world_group(Records()), Schedule(first_step=0, every=10))
    if lists is None:
        assert keeper.lists() is None
        keeper.before_step(0, shard(weight, rank, size))
    else:
        keeper.load(shard(lists, rank, size), 7)
        assert keeper.metrics(9) == {"graph_age": 2.0}
        assert keeper.probe(shard(weight, rank, size)) == 1.0
        assert not keeper.before_step(16, shard(weight, rank, size))
        assert keeper.before_step(17, shard(weight, rank, size))
    return keeper.lists()


def test_a_stored_graph_goes_on_over_another_number_of_ranks() -> None:
    weight = matrix(CLASSES)
    lists = torch.cat(run_ranks(stored, 3, weight, None))
    assert torch.equal(torch.cat(run_ranks(stored, 2, weight, lists)), lists)


# ---- in the background ----


def swapped(rank: int, size: int, weight: torch.Tensor, copies: int) -> tuple[int, bool, bool, torch.Tensor]:
    """`copies` of the classes over as many groups of two ranks. Of all ranks, the last is done long after the others, which
    are slow between steps."""
    world, last = world_group(Records()), rank == size - 1
    pairs = [[2 * copy, 2 * copy + 1] for copy in range(copies)]
    group = world if copies == 1 else new_group("classes", pairs, world, timeout_s=20)
    beside = background_group(group, world, timeout_s=20)
    partition, schedule = Partition(CLASSES, 2), Schedule(first_step=3, every=1000)
    keeper = GraphKeeper(partition, group, OPTIONS, schedule, background=beside, everyone=world)

    class Slow:
        @staticmethod
        def from_rows(*args: Any) -> ColumnGraph:
            columns = ColumnGraph.from_rows(*args)
            time.sleep(0.3 * last)
            return columns

    rebuild.ColumnGraph = Slow  # type: ignore[misc, assignment]
    own, labels, rank = shard(weight, group.rank, 2), torch.arange(0, CLASSES, 9), group.rank
    options: dict[str, Any] = {"rho": 0.4, "seed": 1}
    as_random = differs = False
    for step in range(1000):
        if step == 5:
            own += 100 * torch.arange(own.numel()).view(own.shape)  # the build is of a copy
        swap = keeper.before_step(step, own)
        found = select_rows(labels, partition, rank, columns=keeper.columns, step=step, **options)
        random = select_rows(labels, partition, rank, step=step, **options)
        if swap:
            differs = not torch.equal(found.rows, random.rows)
            break
        as_random = torch.equal(found.rows, random.rows)
        time.sleep(0.02 if last else 0.04)
    lists = keeper.lists()
    assert lists is not None
    return step, as_random, differs, lists


@pytest.mark.parametrize("copies", [1, 2])
def test_29_the_graph_changes_at_one_step_on_all_ranks_and_before_it_selection_is_random(copies: int) -> None:
    weight = matrix(CLASSES)
    found = run_ranks(swapped, 2 * copies, weight, copies)
    steps = {step for step, *_ in found}
    assert len(steps) == 1
    assert 5 < steps.pop() < 999
    assert all(as_random and differs for _, as_random, differs, _ in found)
    lists = torch.cat([lists for *_, lists in found]).long()
    assert torch.equal(lists, brute_force(weight, NEIGHBOURS).repeat(copies, 1))


def closed(rank: int, size: int, weight: torch.Tensor) -> tuple[int, bool]:
    world = world_group(Records())
    keeper = keeper_of(size, world, Schedule(first_step=0, every=10), background_group(world, world, timeout_s=20))
    keeper.before_step(0, shard(weight, rank, size))
    keeper.close()
    return sum(thread.name == "class graph" for thread in threading.enumerate()), keeper.columns is None


def test_a_run_that_ends_waits_for_a_build_and_gives_it_up() -> None:
    assert run_ranks(closed, 2, matrix(CLASSES)) == [(0, True)] * 2


def broken(rank: int, size: int, weight: torch.Tensor) -> tuple[str, str, bool, float]:
    """The thread of rank 1 breaks, while that of rank 0 waits for it."""
    world = world_group(Records())
    keeper = keeper_of(size, world, Schedule(first_step=0, every=10), background_group(world, world, timeout_s=30))
    if rank == 1:

        def build(*args: Any, **kwargs: Any) -> torch.Tensor:
            raise MemoryError("injected")

        rebuild.build_graph = build
    begun = time.monotonic()
    try:
        for step in range(1000):
            keeper.before_step(step, shard(weight, rank, size))
            time.sleep(0.02)
    except (MemoryError, Failure) as error:
        return type(error).__name__, str(error), getattr(error, "told_elsewhere", False), time.monotonic() - begun
    return "none", "", False, 0.0


def test_what_a_builds_thread_raises_ends_all_ranks() -> None:
    waiting, broke = run_ranks(broken, 2, matrix(CLASSES))
    assert broke[:3] == ("MemoryError", "injected", False)
    assert waiting[0] == "Failure"
    assert "begun at step 0 was not built: another rank of world tells why" in waiting[1]
    assert waiting[2]
    assert max(waiting[3], broke[3]) < 15


def lost(rank: int, size: int, weight: torch.Tensor, background: bool) -> tuple[str, float] | None:
    """Rank 1 begins no build: it might as well be gone."""
    world = world_group(Records())
    group = new_group("classes", [[0, 1]], world, timeout_s=2)
    beside = background_group(group, world, timeout_s=2) if background else None
    if rank == 1:
        time.sleep(5)
        return None
    keeper = keeper_of(size, group, Schedule(first_step=0, every=10), beside)
    begun = time.monotonic()
    try:
        for step in range(100):
            keeper.before_step(step, shard(weight, rank, size))
            time.sleep(0.1)
    except CommunicationError as error:
        return str(error), time.monotonic() - begun
    return "no error", 0.0


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_is_lost_in_a_build_is_an_error_not_a_hang(background: bool) -> None:
    found = run_ranks(lost, 2, matrix(CLASSES), background)[0]
    assert "broke off" in found[0]
    assert found[1] < 10


def test_a_background_group_of_other_ranks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"background is rank 0 of 2, group is rank 0 of 1; make it with background_group"
    ):
        keeper_of(1, SINGLE, Schedule(first_step=0, every=10), Group(2, 0))
