"""Acceptance tests 11 to 16 of the large label space: the graph of nearest classes and its columns."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from opencoder import kernels as K
from opencoder.errors import ConfigError, Failure
from opencoder.kernels._library import CPP_MISSING
from opencoder.model.classes.columns import ColumnGraph
from opencoder.model.classes.graph import build_graph
from opencoder.model.classes.partition import Partition
from opencoder.parallel.group import SINGLE, Group, world_group
from opencoder.parallel.records import Records
from tests.harness import RankError, run_cases, run_ranks

WIDTH, NEIGHBOURS = 64, 16


def matrix(classes: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Clusters of twenty: near classes are nearer than Gaussian ones would be."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes // 20 + 1, width, generator=generator)
    return centres.repeat_interleave(20, 0)[:classes] + 0.5 * torch.randn(classes, width, generator=generator)


def brute_force(weight: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Self first, then by falling cosine in fp64, ties by smaller id."""
    unit = torch.nn.functional.normalize(weight.double(), dim=1)
    found = []
    for at in range(0, weight.shape[0], 1000):
        cosines = unit[at : at + 1000] @ unit.t()
        own = torch.arange(cosines.shape[0])
        cosines[own, own + at] = 9
        found.append(cosines.sort(dim=1, descending=True, stable=True).indices[:, :neighbours])
    return torch.cat(found)


def recall(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of the true neighbours that were found."""
    both = torch.cat([found.long(), truth], 1).sort(dim=1).values
    return float((both.diff(dim=1) == 0).double().sum(1).mean() / truth.shape[1])


def cosines(weight: torch.Tensor, lists: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(weight.double(), dim=1)
    return torch.stack([unit[row.long()] @ unit[i] for i, row in enumerate(lists)])


def build(rank: int, size: int, weight: torch.Tensor, dtype: str = "fp32") -> torch.Tensor:
    partition, group = Partition(weight.shape[0], size), world_group(Records())
    own = weight[partition.start(rank) : partition.start(rank + 1)]
    return build_graph(own, partition, group, neighbours=NEIGHBOURS, dtype=dtype)  # type: ignore[arg-type]


def over_ranks(
    weight: torch.Tensor, sizes: tuple[int, ...], dtypes: tuple[str, ...]
) -> dict[tuple[str, int], torch.Tensor]:
    """(type, number of ranks) → the lists of all classes."""
    found = {}
    for size in sizes:
        results = run_cases(build, size, {dtype: (weight, dtype) for dtype in dtypes}, timeout_s=300)
        found.update({(dtype, size): torch.cat(parts) for dtype, parts in results.items()})
    return found


@pytest.mark.parametrize("classes", [1003, pytest.param(20_001, marks=pytest.mark.slow)])
def test_11_and_13_the_ring_finds_the_nearest_for_any_number_of_ranks(classes: int) -> None:
    weight = matrix(classes)
    truth = brute_force(weight, NEIGHBOURS)
    found = over_ranks(weight, (1, 2, 4), ("fp32", "fp16", "bf16"))
    for (dtype, size), lists in found.items():
        share = recall(lists, truth)
        print(f"{classes} classes, {size} ranks, {dtype}: recall {share}")
        assert share >= (0.9999 if dtype == "bf16" else 1.0), (dtype, size)
        assert torch.equal(lists, found["fp32", 1]), (dtype, size)


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 1.0), ("fp16", 1.0), ("bf16", 0.9999)])
@pytest.mark.parametrize("classes", [1003, pytest.param(20_001, marks=pytest.mark.slow)])
def test_11_candidates_cut_by_number_as_on_a_gpu_hold_the_nearest(dtype: str, least: float, classes: int) -> None:
    weight = matrix(classes)
    with K.use(merge_nearest="torch"):
        lists = build(0, 1, weight, dtype)
    assert recall(lists, brute_force(weight, NEIGHBOURS)) >= least


def test_12_self_is_first_also_among_equal_and_empty_rows_and_ties_go_to_the_smaller_id() -> None:
    weight = matrix(403)
    copies = torch.arange(0, 400, 20)  # 5 %, with their originals on other ranks
    weight[copies] = weight[copies.flip(0)]
    weight[[7, 399]] = 0
    found = over_ranks(weight, (1, 4), ("fp32", "bf16"))
    for lists in found.values():
        assert torch.equal(lists[:, 0], torch.arange(403, dtype=torch.int32))
        assert torch.equal(lists, found["fp32", 1])
        for row in lists.tolist():
            assert len(set(row)) == NEIGHBOURS
    # The cosine of a row of zeros is 0 with all: the smallest ids, without its own.
    assert found["fp32", 4][7].tolist() == [7, *(i for i in range(NEIGHBOURS) if i != 7)]
    values = cosines(weight, found["fp32", 4])[:, 1:]
    ids = found["fp32", 4][:, 1:]
    same = (values.diff(dim=1).abs() < 1e-12) & (ids.diff(dim=1) < 0)
    assert not same.any()
    assert (values.diff(dim=1) < 1e-6).all()


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[object, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.held.setdefault(
                    storage._cdata, (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
                )
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}  # type: ignore[attr-defined]
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return result


def peak_of_build(rank: int, size: int, weight: torch.Tensor) -> tuple[int, int]:
    partition = Partition(weight.shape[0], size)
    own = weight[partition.start(rank) : partition.start(rank + 1)].clone()
    with Peak() as peak:
        build_graph(own, partition, world_group(Records()), neighbours=NEIGHBOURS)
    return peak.most, own.shape[0]


@pytest.mark.skipif(CPP_MISSING is not None, reason="the definition scores whole tiles in fp64")
def test_14_a_build_holds_two_copies_of_the_shard_and_a_tile_of_scores() -> None:
    for most, rows in run_ranks(peak_of_build, 2, matrix(8001, 128)):
        shard, lists = (
            rows * 128 * 4,
            rows * NEIGHBOURS * (8 + 4 + 4),
        )  # keys while it runs, ids as they are put together
        tile = 512 * 1024 * 4 + (2 * 512 + 1024) * 128 * 4  # the next queries are made beside the last ones
        assert 2 * shard < most < 2 * shard + 1.2 * (tile + lists)


def columns_of(rank: int, size: int, lists: torch.Tensor) -> tuple[ColumnGraph, torch.Tensor]:
    """And the lists that come back from them."""
    partition, group = Partition(lists.shape[0], size), world_group(Records())
    columns = ColumnGraph.from_rows(lists[partition.start(rank) : partition.start(rank + 1)], partition, group)
    return columns, columns.to_rows(partition, group)


def edges_of(columns: ColumnGraph, start: int) -> set[tuple[int, int, int]]:
    """(class, position, neighbour)."""
    edges = set()
    for y, (begin, end) in enumerate(pairwise(columns.offsets.tolist())):
        positions = columns.positions[begin:end].tolist()
        assert positions == sorted(positions)
        edges.update((y, p, start + i) for p, i in zip(positions, columns.ids[begin:end].tolist(), strict=True))
    return edges


@pytest.mark.parametrize("size", [1, 3])
def test_15_the_columns_of_all_ranks_are_the_lists_edge_for_edge(size: int) -> None:
    lists = brute_force(matrix(200), NEIGHBOURS).int()
    truth = {(y, p, c) for y, row in enumerate(lists.tolist()) for p, c in enumerate(row)}
    partition = Partition(200, size)
    found = run_ranks(columns_of, size, lists)
    parts = [columns for columns, _ in found]
    assert [c.num_rows for c in parts] == [partition.size(r) for r in range(size)]
    assert sum(c.ids.numel() for c in parts) == len(truth)
    assert set().union(*(edges_of(c, partition.start(r)) for r, c in enumerate(parts))) == truth
    assert parts[0].offsets.dtype == parts[0].ids.dtype == torch.int32
    assert parts[0].positions.dtype == torch.int16
    assert torch.equal(torch.cat([back for _, back in found]), lists)


def queries(rank: int, size: int, weight: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    partition = Partition(weight.shape[0], size)
    own = weight[partition.start(rank) : partition.start(rank + 1)]
    return build_graph(
        own,
        partition,
        world_group(Records()),
        neighbours=NEIGHBOURS,
        query_rows=torch.tensor(rows[rank], dtype=torch.int64),
    )


def test_lists_of_some_rows_are_those_of_the_whole_graph() -> None:
    weight, rows = matrix(1003), [[5, 0, 333], [], [333]]
    whole = build(0, 1, weight)
    partition = Partition(1003, 3)
    for rank, found in enumerate(run_ranks(queries, 3, weight, rows)):
        wanted = torch.tensor(rows[rank], dtype=torch.int64) + partition.start(rank)
        assert torch.equal(found, whole[wanted])


def test_as_many_neighbours_as_classes_and_only_itself() -> None:
    weight = matrix(30, 8)
    every = build_graph(weight, Partition(30, 1), SINGLE, neighbours=30)
    assert torch.equal(every.long(), brute_force(weight, 30))
    assert build_graph(weight, Partition(30, 1), SINGLE, neighbours=1).tolist() == [[i] for i in range(30)]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_of_rows_do_not_matter(scale: float) -> None:
    weight = matrix(100)
    scaled = weight * torch.logspace(-3, 3, 100)[:, None] * scale
    build = lambda w: build_graph(w, Partition(100, 1), SINGLE, neighbours=4)  # noqa: E731
    assert torch.equal(build(weight), build(scaled))


def test_weights_may_be_of_16_bits_and_trainable() -> None:
    weight = torch.nn.Parameter(matrix(100).bfloat16())
    found = build_graph(weight, Partition(100, 1), SINGLE, neighbours=4)
    assert torch.equal(found.long(), brute_force(weight.detach().float(), 4))
    assert not found.requires_grad


def test_weights_that_are_not_finite_end_every_rank_alike() -> None:
    weight = matrix(40)
    weight[33, 5] = torch.nan
    weight[35, 5] = torch.inf
    with pytest.raises(
        RankError, match=r"Failure: the graph of classes cannot be built: the weights of class 33 \(rank 1"
    ):
        run_ranks(build, 2, weight)
    with pytest.raises(Failure, match="class 33"):
        build_graph(weight, Partition(40, 1), SINGLE, neighbours=2)


def test_what_no_graph_can_be_built_of_is_told() -> None:
    weight = matrix(40)
    with pytest.raises(ConfigError, match=r"model.head.neighbours=41: a class has between 1 \(itself\) and 40 \(all\)"):
        build_graph(weight, Partition(40, 1), SINGLE, neighbours=41)
    with pytest.raises(ValueError, match=r"weight is \(40, 64\); rank 0 has 20 classes"):
        build_graph(weight, Partition(40, 2), Group(2, 0), neighbours=2)
